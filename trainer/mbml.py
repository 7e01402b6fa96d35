"""MBML (Multi-task Batch RL with Metric Learning, arXiv 1909.11373): the second stage, and the settings of both.

The first stage (mbml_teachers.py) has learnt BCQ and reward (and transition) ensembles for every training task alone.
Here one student learns from all of them. Transitions of other tasks, relabelled by a task's ensembles where their
members agree, must look to the encoder like the task's own (triplet loss); then BCQ's three networks, conditioned on
the task embedding, are distilled from the teachers.

K tasks, B transitions per task, N context transitions, L latent size, M tasks of the first stage, P pool.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..settings import Scale
from .agent import augment, new_encoder
from .bcq import ActionDecoder, BcqAgent, Perturbation, decoding_noise, plain
from .encoder import ProbabilisticEncoder, build_context, gaussian_kl, product_of_gaussians, sample_gaussian
from .mbml_teachers import Predictions, Teachers, TeacherSettings
from .networks import StateActionNet
from .optimisers import Metrics, adam, descend, matrix_precision
from .replay import Batch, TaskReplay
from .settings import EncoderSettings, TrainSettings, require, require_widths
from .transform import ObservationTransform

Posterior = tuple[Tensor, Tensor]  # mean and variance of Gaussians, each (..., L)


@dataclass(frozen=True)
class RelabelSettings:
    """Which transitions of other tasks count as a task's own once relabelled."""

    reward_std: float = 0.1  # largest standard deviation of the members' rewards
    next_observation_std: float = 0.2  # largest one of their next observations, mean over dimensions

    def __post_init__(self) -> None:
        require(self, "relabel.", above_zero=("reward_std", "next_observation_std"))


@dataclass(frozen=True)
class StudentSettings:
    """The distilled networks."""

    critic_hidden: tuple[int, ...] = (1024,) * 9  # hidden widths of the action value
    decoder_hidden: tuple[int, ...] = (1024,) * 7  # hidden widths of the generative model's decoder
    perturbation_hidden: tuple[int, ...] = (1024,) * 8  # hidden widths of the perturbation

    def __post_init__(self) -> None:
        require_widths(self, "student.")


@dataclass(frozen=True)
class MbmlSettings(TrainSettings):
    """Everything that decides a run of MBML. Defaults are the released code's (reference-facts 5.3)."""

    algo: Literal["mbml"] = "mbml"
    context_size: int = 64
    batch_size: int = 128
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(kind="probabilistic", bounded=False))
    transitions_vary: bool = False  # relabel next observations too, with transition ensembles
    triplet_margin: float = 2.0  # by which another task's posterior must be farther than the task's own
    relabel: RelabelSettings = field(default_factory=RelabelSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    teachers: TeacherSettings = field(default_factory=TeacherSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "", above_zero=("triplet_margin",))

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together."""
        if self.encoder.kind != "probabilistic":
            raise UsageError("MBML compares posteriors, which encoder.kind=deterministic has not got; "
                             "--set encoder.kind=probabilistic")  # fmt: skip
        if self.transitions_vary and not self.next_observation_in_context:
            raise UsageError("transitions_vary=true has no effect without next observations in the context; "
                             "--set next_observation_in_context=true")  # fmt: skip

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing beside the others, each with the `--set` words that let it act."""
        if self.transitions_vary:
            return super().idle()
        ensemble = [f"teachers.transitions.{one.name}" for one in fields(self.teachers.transitions)]
        seen = "" if self.next_observation_in_context else "next_observation_in_context=true "
        return super().idle() | dict.fromkeys(
            ("relabel.next_observation_std", *ensemble), f"{seen}transitions_vary=true"
        )


def _widths(group: str, width: int, layers: int, *names: str) -> dict[str, Any]:
    return {f"{group}.{name}": (width,) * layers for name in names}


_STUDENT = "critic_hidden", "decoder_hidden", "perturbation_hidden"
_TEACHER = "bcq.critic_hidden", "bcq.vae_hidden", "bcq.perturbation_hidden", "transitions.hidden"

# Differences of a scale, and of families, from what settings.py has for the family, whose KL weight is Batch PEARL's.
_KL: dict[str, Any] = {"encoder.kl_weight": 0.1}
# 0.1 is described for values of MuJoCo families after 100,000 steps. The point robots' are below 10, those of laptop's
# few steps 4 in size on half-cheetah-vel, 38 on walker-2d-params: what embeddings save of their mean squared error is
# worth less than 0.1 of the KL, a sum over tasks, so posteriors ended at the prior (docs/results.md). Assumed of the
# other families.
_SMALL_VALUES: dict[str, Any] = {"encoder.kl_weight": 1e-3}
SCALES: dict[Scale, dict[str, Any]] = {
    "paper": {**_KL, "context_size": 64, "steps": 100_000},
    "laptop": {
        **_SMALL_VALUES, "encoder_hidden": (256,) * 3, **_widths("student", 256, 3, *_STUDENT),
        **_widths("teachers", 256, 3, *_TEACHER), "context_size": 64, "meta_batch": 8,
        "teachers.steps": 2000, "teachers.batch_size": 64, "teachers.learning_rate": 1e-3,
        "teachers.rewards.steps": 4000, "teachers.rewards.learning_rate": 1e-3, "teachers.transitions.members": 5,
        "teachers.transitions.steps": 1500, "teachers.transitions.learning_rate": 1e-3,
    },
    "smoke": {
        **_KL, **_widths("student", 32, 2, *_STUDENT), **_widths("teachers", 32, 2, *_TEACHER), "context_size": 16,
        "teachers.bcq.candidates": 4, "teachers.pool": 64, "teachers.steps": 60, "teachers.batch_size": 32,
        "teachers.rewards.hidden": (32,), "teachers.rewards.members": 4, "teachers.rewards.steps": 60,
        "teachers.transitions.members": 4, "teachers.transitions.steps": 60,
    },
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "sparse-point-robot": _SMALL_VALUES,
    "point-robot-wind": {**_SMALL_VALUES, "transitions_vary": True},
    "half-cheetah-vel": {"relabel.reward_std": 0.05},
    "walker-2d-params": {"transitions_vary": True},
}


@dataclass(frozen=True)
class MbmlBatch:
    """What one gradient step consumes."""

    tasks: Tensor  # (K,) positions of the tasks
    own: Tensor  # (K, N, context_dim) each task's own transitions
    foreign: Tensor  # (K, N, context_dim) transitions of each task for the others to relabel, as logged
    relabelled: Tensor  # (K, K, N, context_dim) [i, j]: those of task j as task i's ensembles see them
    accepted: Tensor  # (K, K, N) bool: task i's ensembles are sure of them; False where i = j
    transitions: Batch


class Mbml:
    """The student's networks, their optimisers, and one gradient step.

    Departures from the released code (reference-facts 5.3): a step takes `meta_batch` tasks, not all; transitions of
    other tasks come from a pool of P per task, which the ensembles, whose weights are fixed, predict once and not anew
    in every step; pairs of tasks without an accepted transition are left out of the triplet loss, not counted with the
    constant margin (D19); acting decodes every state from the same candidates' noise; the KL weighs less where action
    values are small: the point robots', and all at laptop scale. As with Contextual BCQ, context and transitions are
    independent draws, not disjoint ones; context rows hold the next observation only in families whose FOCAL runs have
    it; latent size and discount are the family's. The ensembles learn and predict scaled observations.
    """

    def __init__(
        self,
        settings: MbmlSettings,
        transform: ObservationTransform,
        act_dim: int,
        generator: torch.Generator,
        teachers: Teachers,
        predictions: Predictions,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks. The CPU `generator` decides their weights, the same on every device.

        `teachers` and `predictions` are the first stage's, on `device`; they are not changed.
        """
        settings.check()
        self.settings, self.teachers, self.predictions = settings, teachers, predictions
        self.agent = new_mbml_agent(settings, transform, act_dim, generator, device)
        self.optimisers = {
            "encoder": adam(self.agent.encoder.parameters(), settings.encoder_learning_rate),
            "critic": adam(self.agent.critic.parameters(), settings.critic_learning_rate),
            "decoder": adam(self.agent.decoder.parameters(), settings.actor_learning_rate),
            "perturbation": adam(self.agent.perturbation.parameters(), settings.actor_learning_rate),
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name; with `scalars` and `optimisers` this is the whole state of training."""
        return dict(self.agent.networks)

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Nothing is learnt outside the networks."""
        return {}

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Take the gradient step after `step`."""
        return self.update(self.sample(replay, generator), generator)

    def sample(self, replay: TaskReplay, generator: torch.Generator) -> MbmlBatch:
        """Draw what one gradient step consumes."""
        settings, found = self.settings, self.predictions
        tasks = replay.sample_tasks(settings.meta_batch, generator)
        own = replay.sample_context(tasks, settings.context_size, generator)
        chosen = torch.randint(
            found.steps.shape[1], (len(tasks), settings.context_size), generator=generator, device=replay.device
        )
        steps = found.steps[tasks].gather(1, chosen)  # (K, N)
        i, j, n = tasks[:, None, None], tasks[None, :, None], chosen[None]
        original = replay.batch_at(steps)
        following = original.next_observations.expand(len(tasks), -1, -1, -1)
        next_std = None
        if found.next_observation is not None and found.next_observation_std is not None:
            following, next_std = found.next_observation[i, j, n], found.next_observation_std[i, j, n]
        rewards = found.reward[i, j, n]
        relabelled = build_context(
            original.observations.expand_as(following),
            original.actions.expand(len(tasks), -1, -1, -1),
            rewards,
            following if settings.next_observation_in_context else None,
        )
        accepted = accept_relabelled(found.reward_std[i, j, n], next_std, settings.relabel) & (i != j)
        transitions = replay.sample_batch(tasks, settings.batch_size, generator)
        return MbmlBatch(tasks, own, replay.context_at(steps), relabelled, accepted, transitions)

    def update(self, batch: MbmlBatch, generator: torch.Generator) -> Metrics:
        """Take one gradient step with each optimiser. Returns metrics, tensors ().

        The encoder's gradient is that of

            triplet loss + kl_weight sum over tasks of KL(q(z | c) || prior) + loss of the action value

        where c, of a task's own and of accepted relabelled transitions, gives z, one sample per task. The decoder's and
        the perturbation's losses do not reach it.
        """
        encoder, settings = self.agent.encoder, self.settings
        assert isinstance(encoder, ProbabilisticEncoder)
        with matrix_precision(settings.precision, self.agent.device):
            own, relabelled = encoder.factors(batch.own), encoder.factors(batch.relabelled)
            posteriors = pair_posteriors(own, relabelled, encoder.factors(batch.foreign), batch.accepted)
            triplet, pairs = triplet_loss(*posteriors, batch.accepted.any(dim=-1), settings.triplet_margin)

            mean, variance = context_posterior(own, relabelled, batch.accepted, generator)
            embeddings = sample_gaussian(mean, variance, generator)  # (K, L)
            kl = gaussian_kl(mean, variance, settings.encoder.prior_std)  # (K,)
            seen = embeddings.detach().requires_grad_()
            metrics, of_value = self._distil(batch.transitions, batch.tasks, seen, generator)

            loss = triplet + settings.encoder.kl_weight * kl.sum() + (embeddings * of_value).sum()
            norm, _ = descend(self.optimisers["encoder"], loss)
        return metrics | {
            "encoder/triplet": triplet.detach(),
            "encoder/pairs": pairs,
            "encoder/accepted": batch.accepted.float().mean(),
            "encoder/kl": kl.detach().mean(),
            "encoder/gradient_norm": norm,
        }

    def _distil(self, batch: Batch, tasks: Tensor, seen: Tensor, generator: torch.Generator) -> tuple[Metrics, Tensor]:
        """Step the student's three networks; returns metrics and the value loss's gradient in `seen` (K, L)."""
        agent = self.agent
        noise = decoding_noise((*batch.rewards.shape, agent.decoder.noise_width), generator)
        targets = self.teachers.distillation_targets(tasks, batch.observations, batch.actions, noise)
        states, fixed = augment(batch.observations, seen), augment(batch.observations, seen.detach())
        values = agent.critic(states, batch.actions)
        value_loss = (values - targets.values).square().mean()
        norm, gradient = descend(self.optimisers["critic"], value_loss, seen)
        assert gradient is not None
        decoder_loss = (agent.decoder(fixed, noise) - targets.decoded).square().mean()
        descend(self.optimisers["decoder"], decoder_loss)
        perturbation_loss = (agent.perturbation(fixed, targets.decoded) - targets.perturbed).square().mean()
        descend(self.optimisers["perturbation"], perturbation_loss)
        metrics = {
            "critic/loss": value_loss.detach(),
            "critic/value": values.detach().mean(),
            "critic/value_largest": values.detach().abs().amax(),
            "critic/target": targets.values.mean(),
            "critic/gradient_norm": norm,
            "decoder/loss": decoder_loss.detach(),
            "perturbation/loss": perturbation_loss.detach(),
        }
        return metrics, gradient


def accept_relabelled(reward_std: Tensor, next_observation_std: Tensor | None, rule: RelabelSettings) -> Tensor:
    """Tell which relabelled transitions count as the task's own, bool, for the members' standard deviations (...,)."""
    accepted = reward_std < rule.reward_std
    return accepted if next_observation_std is None else accepted & (next_observation_std < rule.next_observation_std)


def pair_posteriors(
    own: Posterior, relabelled: Posterior, foreign: Posterior, accepted: Tensor
) -> tuple[Posterior, Posterior, Posterior]:
    """Return anchor, positive and negative posteriors (K, K, L) of every ordered pair [i, j] of tasks.

    From the Gaussians of single transitions: anchor of task j's accepted transitions relabelled by i (`relabelled`
    (K, K, N, L), `accepted` (K, K, N)), positive of as many of i's own (`own` (K, N, L), independent draws, so the
    first are as good as any), negative of the same transitions as the anchor but as logged (`foreign` (K, N, L)).
    Where nothing is accepted all three are wide Gaussians without a meaning.
    """
    count, size = accepted.sum(dim=-1, keepdim=True), accepted.shape[-1]
    as_many = torch.arange(size, device=accepted.device) < count  # (K, K, N)
    own_mean, own_variance = (part.unsqueeze(1).expand_as(relabelled[0]) for part in own)
    foreign_mean, foreign_variance = (part.unsqueeze(0).expand_as(relabelled[0]) for part in foreign)
    return (
        product_of_gaussians(*relabelled, accepted),
        product_of_gaussians(own_mean, own_variance, as_many),
        product_of_gaussians(foreign_mean, foreign_variance, accepted),
    )


def triplet_loss(
    anchor: Posterior, positive: Posterior, negative: Posterior, valid: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Triplet loss on posteriors (..., L), averaged over the `valid` (...,) ones; 0 where there is none.

        max(0, KL(anchor || positive) - KL(anchor || negative) + margin)

    Returns it and the share of valid ones, both ().
    """
    near, far = kl_between(anchor, positive), kl_between(anchor, negative)
    losses = torch.where(valid, (near - far + margin).clamp_min(0.0), 0.0)
    return losses.sum() / valid.sum().clamp_min(1), valid.float().mean()


def kl_between(first: Posterior, second: Posterior) -> Tensor:
    """Return KL(first || second) of diagonal Gaussians, summed over L: (..., L) -> (...,)."""
    (mean, variance), (other_mean, other_variance) = first, second
    ratio = variance / other_variance
    return 0.5 * (ratio + (mean - other_mean).square() / other_variance - 1.0 - ratio.log()).sum(dim=-1)


def context_posterior(own: Posterior, relabelled: Posterior, accepted: Tensor, generator: torch.Generator) -> Posterior:
    """Return the posterior (K, L) of a task's own N transitions and of N accepted foreign ones (fewer where there are
    not as many), drawn without replacement.

    `own` (K, N, L), `relabelled` (K, K, N, L) and `accepted` (K, K, N) as in `pair_posteriors`.
    """
    size = accepted.shape[-1]
    chosen, valid = choose_accepted(accepted.flatten(1), size, generator)
    index = chosen.unsqueeze(-1).expand(-1, -1, own[0].shape[-1])
    means, variances = (
        torch.cat([mine, theirs.flatten(1, 2).gather(1, index)], dim=1)
        for mine, theirs in zip(own, relabelled, strict=True)
    )
    return product_of_gaussians(means, variances, torch.cat([torch.ones_like(valid), valid], dim=1))


def choose_accepted(accepted: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw up to `size` of the accepted entries of each row (K, C), without replacement.

    Returns positions (K, min(size, C)) and which of them are accepted; the others fill rows that have too few.
    """
    keys = torch.rand(accepted.shape, generator=generator, device=accepted.device)
    chosen = keys.masked_fill(~accepted, -1.0).topk(min(size, accepted.shape[1]), dim=1).indices
    return chosen, accepted.gather(1, chosen)


def new_mbml_agent(
    settings: MbmlSettings,
    transform: ObservationTransform,
    act_dim: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> BcqAgent:
    """Make an untrained student; the CPU `generator` decides its weights on every device."""
    rule, limit, build = settings.student, settings.teachers.bcq.perturbation_limit, plain(generator)
    state_dim = transform.dim + settings.latent_dim
    return BcqAgent(
        settings,
        transform,
        new_encoder(settings, transform, act_dim, generator).to(device),
        ActionDecoder(build, state_dim, act_dim, rule.decoder_hidden).to(device),
        Perturbation(build, state_dim, act_dim, rule.perturbation_hidden, limit).to(device),
        StateActionNet(state_dim, act_dim, rule.critic_hidden, generator).to(device),
        settings.teachers.bcq.candidates,
    )
