"""MBML's first stage (arXiv 1909.11373): for every training task alone, BCQ, an ensemble that predicts its rewards, and
one that predicts its next observations where transitions vary.

All tasks learn side by side, their networks stacked (stacked.py), from the same random numbers: what a task learns does
not depend on which others are there. K tasks, B transitions per task, E members of an ensemble, P transitions per task
in the pool that the second stage relabels.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .bcq import (
    ActionDecoder,
    ActionEncoder,
    Perturbation,
    bcq_targets,
    decoding_noise,
    perturbation_loss,
    twin_error,
    vae_loss,
)
from .optimisers import Metrics, adam, descend, polyak_update, take_step
from .replay import Batch, TaskReplay
from .settings import BcqSettings, require, require_widths
from .stacked import StackedMLP, StackedTwinCritic, of_tasks, stacked

_ROWS_AT_ONCE = 4096  # that ensembles learn from or predict, so that it needs little memory


@dataclass(frozen=True)
class EnsembleSettings:
    """Networks that predict the same thing; where they disagree, they do not know."""

    members: int = 20  # networks per task
    hidden: tuple[int, ...] = (128,)  # hidden widths
    steps: int = 4000  # gradient steps
    batch_size: int = 128  # transitions per network and step
    learning_rate: float = 3e-4  # of their Adam

    def __post_init__(self) -> None:
        require(self, "teachers.ensemble ", above_zero=("members", "steps", "batch_size", "learning_rate"))
        require_widths(self, "teachers.ensemble ")


@dataclass(frozen=True)
class TeacherSettings:
    """MBML's first stage. Defaults are the released code's (reference-facts 5.3)."""

    seed: int = 0  # of everything it draws; all seeds of a run share one first stage
    steps: int = 100_000  # gradient steps of BCQ
    batch_size: int = 100  # transitions per task and step of BCQ
    learning_rate: float = 3e-4  # of BCQ's Adams but the perturbation's
    pool: int = 1024  # transitions per task that the ensembles of all other tasks predict, for the second stage
    bcq: BcqSettings = field(
        default_factory=lambda: BcqSettings(
            critic_hidden=(400, 300), vae_hidden=(750, 750), perturbation_hidden=(400, 300)
        )
    )
    rewards: EnsembleSettings = field(default_factory=EnsembleSettings)
    transitions: EnsembleSettings = field(default_factory=lambda: EnsembleSettings(hidden=(256,) * 6, steps=20_000))

    def __post_init__(self) -> None:
        require(self, "teachers.", above_zero=("steps", "batch_size", "learning_rate", "pool"), not_negative=("seed",))


@dataclass(frozen=True)
class Examples:
    """What an ensemble is to learn, member by member."""

    inputs: Tensor  # (E K, B, S + act_dim) observations and actions
    targets: Tensor  # (E K, B, outputs)


@dataclass(frozen=True)
class TeacherBatch:
    """What one step of the first stage consumes; None for what has finished learning."""

    bcq: Batch | None  # (K, B, ...)
    rewards: Examples | None  # targets: the context's rewards (E K, B, 1)
    transitions: Examples | None  # targets: the next observations (E K, B, dim)


class PredictionEnsemble(nn.Module):
    """E networks per task from a state and an action to `outputs` numbers."""

    def __init__(
        self,
        members: int,
        tasks: int,
        state_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        outputs: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.members, self.tasks = members, tasks
        self.body = StackedMLP(members, tasks, state_dim + action_dim, hidden, outputs, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (E K, B, S + act_dim), member by member, to (E K, B, outputs)."""
        return self.body(inputs)

    def errors(self, examples: Examples) -> tuple[Tensor, list[Tensor]]:
        """Return every network's mean squared error, (E K,), and the gradient of their sum in each parameter.

        On a CPU some networks at a time, so that what they keep for the backward pass stays in its cache.
        """
        networks, rows, _ = examples.inputs.shape
        some = max(1, _ROWS_AT_ONCE // rows) if examples.inputs.device.type == "cpu" else networks
        named = dict(self.named_parameters())
        errors, gradients = [], []
        for inputs, targets, *parameters in zip(
            *(tensor.split(some) for tensor in (examples.inputs, examples.targets, *named.values())), strict=True
        ):
            weights = [parameter.detach().requires_grad_() for parameter in parameters]
            predicted = functional_call(self, dict(zip(named, weights, strict=True)), inputs)
            error = (predicted - targets).square().mean(dim=(1, 2))
            gradients.append(torch.autograd.grad(error.sum(), weights))
            errors.append(error.detach())
        return torch.cat(errors), [torch.cat(parts) for parts in zip(*gradients, strict=True)]

    @torch.no_grad()
    def predict(self, task: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict for `states` (M, S) and `actions` (M, act_dim) with the members of one task.

        Returns their mean and their (population) standard deviation, each (M, outputs).
        """
        inputs = torch.cat([states, actions], dim=-1).expand(self.members, -1, -1)
        members = torch.arange(self.members, device=states.device) * self.tasks + task
        spread, mean = torch.std_mean(of_tasks(self.body, members, inputs), dim=0, correction=0)
        return mean, spread


@dataclass(frozen=True)
class Predictions:
    """What the ensembles of every task say of transitions of every task: [i, j] is task i's word on task j's.

    The next observation is None where transitions do not vary between tasks: then it is right as logged.
    """

    steps: Tensor  # (K, P) int64: positions of the pool in the replay
    reward: Tensor  # (K, K, P) mean over the members
    reward_std: Tensor  # (K, K, P) standard deviation over the members
    next_observation: Tensor | None  # (K, K, P, dim) as the networks see observations
    next_observation_std: Tensor | None  # (K, K, P) mean over the dimensions, in the raw observations' units


@dataclass(frozen=True)
class DistillationTargets:
    """What the teachers of K tasks say at B states each."""

    values: Tensor  # (K, B) first action value of the logged action
    decoded: Tensor  # (K, B, act_dim) action that their generative model makes of the noise
    perturbed: Tensor  # (K, B, act_dim) that action after their perturbation


class Teachers:
    """The networks of all tasks, their optimisers, and one gradient step.

    Departures from the released code (reference-facts 5.3): BCQ's last state is kept, not that with the best return in
    the environment, which an offline method has not got; time limits bootstrap.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        discount: float,
        tau: float,
        transitions_vary: bool,
        tasks: int,
        state_dim: int,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks. The CPU `generator` decides their weights, the same on every device."""
        self.settings, self.discount, self.tau, self.tasks = settings, discount, tau, tasks
        self.device = torch.device(device)
        rule, build = settings.bcq, stacked(tasks, generator)
        self.action_encoder = ActionEncoder(build, state_dim, act_dim, rule.vae_hidden).to(device)
        self.decoder = ActionDecoder(build, state_dim, act_dim, rule.vae_hidden).to(device)
        self.perturbation = Perturbation(build, state_dim, act_dim, rule.perturbation_hidden, rule.perturbation_limit)
        self.perturbation.to(device)
        self.critic = StackedTwinCritic(tasks, state_dim, act_dim, rule.critic_hidden, generator).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        sizes = tasks, state_dim, act_dim
        members, hidden = settings.rewards.members, settings.rewards.hidden
        self.rewards = PredictionEnsemble(members, *sizes, hidden, 1, generator).to(device)
        self.transitions: PredictionEnsemble | None = None
        if transitions_vary:
            members, hidden = settings.transitions.members, settings.transitions.hidden
            self.transitions = PredictionEnsemble(members, *sizes, hidden, state_dim, generator).to(device)
        self.optimisers = self._new_optimisers()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name; with `optimisers` this is the whole state of training."""
        named = {
            "action_encoder": self.action_encoder,
            "decoder": self.decoder,
            "perturbation": self.perturbation,
            "target_perturbation": self.target_perturbation,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "rewards": self.rewards,
            "transitions": self.transitions,
        }
        return {name: network for name, network in named.items() if network is not None}

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Nothing is learnt outside the networks."""
        return {}

    @property
    def total_steps(self) -> int:
        """Gradient steps until the last of them has finished."""
        ensembles = [self.settings.rewards.steps] + [self.settings.transitions.steps] * (self.transitions is not None)
        return max(self.settings.steps, *ensembles)

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Take the gradient step after `step`."""
        return self.update(self.sample(replay, step, generator), generator)

    def sample(self, replay: TaskReplay, step: int, generator: torch.Generator) -> TeacherBatch:
        """Draw what the gradient step after `step` consumes: the same random numbers for every task."""
        settings, bcq, rewards, transitions = self.settings, None, None, None
        if step < settings.steps:
            bcq = replay.batch_at(self._steps(replay, 1, settings.batch_size, generator))
        if step < settings.rewards.steps:
            steps = self._steps(replay, settings.rewards.members, settings.rewards.batch_size, generator)
            rewards = Examples(replay.state_actions_at(steps), replay.context_rewards[steps].unsqueeze(-1))
        if self.transitions is not None and step < settings.transitions.steps:
            rule = settings.transitions
            steps = self._steps(replay, rule.members, rule.batch_size, generator)
            transitions = Examples(replay.state_actions_at(steps), replay.next_observations_at(steps))
        return TeacherBatch(bcq, rewards, transitions)

    def update(self, batch: TeacherBatch, generator: torch.Generator) -> Metrics:
        """Take one gradient step with each optimiser that `batch` has data for. Returns metrics, tensors ().

        Losses are sums over tasks (and members) of each one's own loss, so that every network learns as if alone.
        """
        metrics = Metrics()
        if batch.bcq is not None:
            metrics |= self._update_bcq(batch.bcq, generator)
        ensembles = ("rewards", self.rewards, batch.rewards), ("transitions", self.transitions, batch.transitions)
        for name, ensemble, examples in ensembles:
            if ensemble is not None and examples is not None:
                errors, gradients = ensemble.errors(examples)
                take_step(self.optimisers[name], gradients)
                metrics[f"{name}/loss"] = errors.mean()
        return metrics

    @torch.no_grad()
    def distillation_targets(
        self, tasks: Tensor, states: Tensor, actions: Tensor, noise: Tensor
    ) -> DistillationTargets:
        """Return what a student of the teachers `tasks` (K,) is to imitate, at `states` (K, B, S), logged `actions`
        (K, B, act_dim) and `noise` (K, B, V) as from `decoding_noise`."""
        decoded = of_tasks(self.decoder, tasks, states, noise)
        perturbed = of_tasks(self.perturbation, tasks, states, decoded)
        return DistillationTargets(of_tasks(self.critic.first, tasks, states, actions), decoded, perturbed)

    def _update_bcq(self, batch: Batch, generator: torch.Generator) -> Metrics:
        rule, states, (tasks, size) = self.settings.bcq, batch.observations, batch.rewards.shape
        width = self.decoder.noise_width
        noise = torch.randn((1, size, width), generator=generator, device=generator.device)
        loss, error, kl = vae_loss(self.action_encoder, self.decoder, states, batch.actions, noise)
        descend(self.optimisers["vae"], loss.sum())

        noise = decoding_noise((1, size, rule.candidates, width), generator)
        nets = self.decoder, self.target_perturbation, self.target_critic
        targets = bcq_targets(*nets, batch, batch.next_observations, noise, self.discount, rule.min_weight)
        values = self.critic(states, batch.actions)
        critic_loss = twin_error(values, targets)
        descend(self.optimisers["critic"], critic_loss.sum())

        with torch.no_grad():
            decoded = self.decoder(states, decoding_noise((1, size, width), generator).expand(tasks, -1, -1))
        value_loss = perturbation_loss(self.critic.first, self.perturbation, states, decoded)
        norm, _ = descend(self.optimisers["perturbation"], value_loss.sum())
        polyak_update(self.target_critic, self.critic, self.tau)
        polyak_update(self.target_perturbation, self.perturbation, self.tau)
        return {
            "vae/error": error.mean(),
            "vae/kl": kl.mean(),
            "critic/loss": critic_loss.detach().mean(),
            "critic/value": values.detach().mean(),
            "critic/value_largest": values.detach().abs().amax(),
            "perturbation/value": -value_loss.detach().mean(),
            "perturbation/gradient_norm": norm,
        }

    def _steps(self, replay: TaskReplay, copies: int, size: int, generator: torch.Generator) -> Tensor:
        """Positions (copies K, size) in the replay, copy by copy: each copy's draw is the same for all tasks."""
        uniform = torch.rand((copies, 1, size), generator=generator, device=replay.device, dtype=torch.float64)
        tasks = torch.arange(len(replay), device=replay.device)
        return replay.steps_at(tasks, uniform.expand(-1, len(replay), -1)).flatten(0, 1)

    def _new_optimisers(self) -> dict[str, torch.optim.Adam]:
        rate = self.settings.learning_rate
        generative = nn.ModuleList([self.action_encoder, self.decoder])
        optimisers = {
            "vae": adam(generative.parameters(), rate),
            "critic": adam(self.critic.parameters(), rate),
            "perturbation": adam(self.perturbation.parameters(), self.settings.bcq.perturbation_learning_rate),
            "rewards": adam(self.rewards.parameters(), self.settings.rewards.learning_rate),
        }
        if self.transitions is not None:
            optimisers["transitions"] = adam(self.transitions.parameters(), self.settings.transitions.learning_rate)
        return optimisers

    def predict_pool(self, replay: TaskReplay, observation_scale: Tensor, generator: torch.Generator) -> Predictions:
        """Draw `pool` transitions of every task and let every task's ensembles predict all of them.

        `observation_scale` (dim,) turns the networks' observations into raw ones.
        """
        count = len(replay)
        steps = self._steps(replay, 1, self.settings.pool, generator)
        pool = replay.batch_at(steps)
        states, actions = pool.observations.flatten(0, 1), pool.actions.flatten(0, 1)
        rewards = [_in_parts(self.rewards, task, states, actions) for task in range(count)]
        mean, spread = (
            torch.stack(parts).squeeze(-1).unflatten(1, steps.shape) for parts in zip(*rewards, strict=True)
        )
        if self.transitions is None:
            return Predictions(steps, mean, spread, None, None)
        following = [_in_parts(self.transitions, task, states, actions) for task in range(count)]
        next_mean, next_std = (torch.stack(parts).unflatten(1, steps.shape) for parts in zip(*following, strict=True))
        return Predictions(steps, mean, spread, next_mean, (next_std * observation_scale).mean(dim=-1))


def _in_parts(ensemble: PredictionEnsemble, task: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        ensemble.predict(task, some, their)
        for some, their in zip(states.split(_ROWS_AT_ONCE), actions.split(_ROWS_AT_ONCE), strict=True)
    ]
    means, spreads = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(spreads)
