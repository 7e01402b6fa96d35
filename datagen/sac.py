"""Soft actor-critic for a stack of agents: what stable-baselines3's SAC computes, for K agents at once.

Haarnoja et al. 2018 (arXiv 1812.05905): twin action values with targets, a tanh-Gaussian policy and a learnt
temperature. Every function below gives a gradient written out beside the loss it is the gradient of. They read and
return (K, ...) tensors, and nothing passes from one agent to another: a NaN stays where it arose.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..trainer.networks import TanhGaussianPolicy
from .settings import LOG_STD_BOUNDS, SacSettings
from .stacked import Adam, StackedMlp, Workspace

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SQUASH_EPSILON = 1e-6  # stable-baselines3's, inside the logarithm of the tanh correction


class Actions(NamedTuple):
    """Sampled actions and what the policy's gradient needs of them; `log_probs` is (K, B), the others (K, A, B)."""

    actions: Tensor  # a = tanh(u), u = mean + std noise
    log_probs: Tensor  # log pi(a|s)
    slopes: Tensor  # da/du = 1 - a^2
    spreads: Tensor  # std noise = du/d(log std)
    unclamped: Tensor  # 1 where log std was inside its bounds, else 0: where its gradient passes


class RowLayout:
    """Columns of a replay row: observation | action | next observation | reward | terminated."""

    def __init__(self, obs_dim: int, act_dim: int):
        pair = obs_dim + act_dim
        self.observation, self.action = slice(0, obs_dim), slice(obs_dim, pair)
        self.next_observation = slice(pair, pair + obs_dim)
        self.reward, self.terminated, self.width = pair + obs_dim, pair + obs_dim + 1, pair + obs_dim + 2


def sample_actions(outputs: Tensor, noise: Tensor) -> Actions:
    """Sample by reparameterisation from the policy's outputs (K, 2A, B), means above log stds, and noise (K, A, B).

    log pi(a|s) = sum over A of -noise^2/2 - log std - log(2 pi)/2 - log(1 - a^2 + 1e-6), log std clamped to [-20, 2].
    """
    mean, raw = outputs.chunk(2, dim=1)
    log_std = raw.clamp(*LOG_STD_BOUNDS)
    spreads = log_std.exp() * noise
    actions = torch.tanh(mean + spreads)
    slopes = 1.0 - actions * actions
    log_probs = -(0.5 * noise * noise + log_std + (slopes + _SQUASH_EPSILON).log()).sum(1)
    log_probs -= noise.shape[1] * _HALF_LOG_2PI
    return Actions(actions, log_probs, slopes, spreads, (raw == log_std).to(raw.dtype))


def bellman_targets(
    rewards: Tensor, terminated: Tensor, next_values: Tensor, next_log_probs: Tensor, temperature: Tensor,
    discount: float,
) -> Tensor:  # fmt: skip
    """Return y = r + discount (1 - terminated) (min_i Q_i'(s', a') - temperature log pi(a'|s')), (K, B).

    `next_values` is (K, 2, B), `temperature` (K, 1), the others (K, B). A time limit is no termination: it is
    bootstrapped through.
    """
    next_value = next_values.amin(1) - temperature * next_log_probs
    return rewards + discount * (1.0 - terminated) * next_value


def critic_gradient(values: Tensor, targets: Tensor) -> Tensor:
    """Gradient (K, 2, B) of 1/2 sum_i mean_B (Q_i - y)^2 with respect to the values Q (K, 2, B)."""
    return (values - targets.unsqueeze(1)) / values.shape[2]


def temperature_gradient(log_probs: Tensor, target_entropy: float) -> Tensor:
    """Gradient (K, 1) of -log temperature * mean_B(log pi(a|s) + target entropy) with respect to log temperature."""
    return -(log_probs.mean(1, keepdim=True) + target_entropy)


def smaller_value_gradient(values: Tensor) -> Tensor:
    """Gradient (K, 2, B) of -mean_B min_i Q_i with respect to the values Q (K, 2, B)."""
    first = values[:, 0] <= values[:, 1]
    return torch.stack([first, ~first], 1).to(values.dtype) / -values.shape[2]


def policy_gradient(sampled: Actions, action_gradient: Tensor, temperature: Tensor) -> Tensor:
    """Gradient (K, 2A, B) of mean_B(temperature log pi(a|s) - min_i Q_i(s, a)) with respect to the policy's outputs.

    `action_gradient` (K, A, B) is that of -mean_B min_i Q_i with respect to the actions, `temperature` (K, 1).
    With d log pi/du = 2 a (1 - a^2)/(1 - a^2 + 1e-6) and u = mean + std noise; the noise term has no gradient.
    """
    weight = (temperature / sampled.log_probs.shape[1]).unsqueeze(2)
    entropy = 2.0 * weight * sampled.actions * sampled.slopes / (sampled.slopes + _SQUASH_EPSILON)
    mean = entropy + action_gradient * sampled.slopes
    log_std = (mean * sampled.spreads - weight) * sampled.unclamped
    return torch.cat([mean, log_std], dim=1)


class Scratch:
    """What an update of K agents writes and nobody reads after it; stacks updated in turn share one."""

    def __init__(self, obs_dim: int, act_dim: int, agents: int, settings: SacSettings, like: Tensor, low: bool = False):
        hidden, rows = settings.hidden_sizes, settings.batch_size
        self.actor = Workspace(agents, 2 * rows, hidden, like, trained_rows=rows, low=low)
        self.critic = Workspace(2 * agents, rows, hidden, like, low=low)
        self.states = like.new_empty(agents, 2 * rows, obs_dim)
        self.pairs = like.new_empty(agents, 2, rows, obs_dim + act_dim)

    def first(self, agents: int) -> "Scratch":
        """Return the part of the first `agents` agents, in the same memory."""
        part = copy.copy(self)
        part.actor, part.critic = self.actor.first(agents), self.critic.first(2 * agents)
        part.states, part.pairs = self.states[:agents], self.pairs[:agents]
        return part


class SacStack:
    """K agents: parameters, optimisers, and the update of all of them by one batch each."""

    def __init__(
        self, obs_dim: int, act_dim: int, agents: int, settings: SacSettings, like: Tensor | None = None,
        low: bool = False, scratch: Scratch | None = None,
    ):  # fmt: skip
        like = torch.empty(0) if like is None else like
        self.agents, self.settings = agents, settings
        self.columns = RowLayout(obs_dim, act_dim)
        self._obs_dim, self._act_dim = obs_dim, act_dim
        hidden = settings.hidden_sizes
        self.actor = StackedMlp(agents, obs_dim, hidden, 2 * act_dim, like, low=low)
        self.critic = StackedMlp(2 * agents, obs_dim + act_dim, hidden, 1, like, low=low)
        self.target = StackedMlp(2 * agents, obs_dim + act_dim, hidden, 1, like, low=low)
        self.log_temperature = like.new_zeros(agents, 1)
        self._temperature_gradient = torch.zeros_like(self.log_temperature)
        self._actor_adam = Adam(
            [self.actor.parameters, self.log_temperature],
            [self.actor.gradients, self._temperature_gradient],
            settings.learning_rate,
        )
        self._critic_adam = Adam([self.critic.parameters], [self.critic.gradients], settings.learning_rate)
        self._scratch = scratch.first(agents) if scratch else Scratch(obs_dim, act_dim, agents, settings, like, low)

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Draw every agent's networks from its own generator; targets start equal to the critics."""
        for k, generator in enumerate(generators):
            self.actor.initialise(k, generator)
            self.critic.initialise(2 * k, generator)
            self.critic.initialise(2 * k + 1, generator)
        self.target.parameters.copy_(self.critic.parameters)
        self.refresh()

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample one action each: (K, obs_dim) and standard normal noise (K, A) to (K, A) in (-1, 1)."""
        outputs = self.actor.forward(observations.unsqueeze(1).to(self.log_temperature.dtype))
        mean, log_std = outputs.squeeze(2).chunk(2, dim=1)
        return torch.tanh(mean + log_std.clamp(*LOG_STD_BOUNDS).exp() * noise)

    @torch.no_grad()
    def update(self, batch: Tensor, noise: Tensor) -> None:
        """Take one gradient step: temperature, critics, actor, then the Polyak step of the targets.

        `batch` (K, B, columns) holds replay rows, `noise` (K, A, 2B) standard normal numbers, for a ~ pi(s) and then
        for a' ~ pi(s'). The temperature in the losses is the one before its own step.
        """
        batch, noise = batch.to(self.log_temperature.dtype), noise.to(self.log_temperature.dtype)
        current, following = self._sample(batch, noise)
        temperature = self.log_temperature.exp()
        self._step_critics(batch, following, temperature)
        self._step_actor_and_temperature(current, temperature)
        self.target.parameters.lerp_(self.critic.parameters, self.settings.tau)  # target += tau (critic - target)
        self.target.refresh()

    def _sample(self, batch: Tensor, noise: Tensor) -> tuple[Actions, Actions]:
        """Sample actions at the batch's observations and at its next ones, in one pass through the actor."""
        size = batch.shape[1]
        self._scratch.states[:, :size] = batch[..., self.columns.observation]
        self._scratch.states[:, size:] = batch[..., self.columns.next_observation]
        sampled = sample_actions(self.actor.forward(self._scratch.states, self._scratch.actor), noise)
        now, after = slice(0, size), slice(size, 2 * size)
        return Actions(*(part[..., now] for part in sampled)), Actions(*(part[..., after] for part in sampled))

    def _step_critics(self, batch: Tensor, following: Actions, temperature: Tensor) -> None:
        next_states = batch[..., self.columns.next_observation]
        targets = bellman_targets(
            batch[..., self.columns.reward],
            batch[..., self.columns.terminated],
            self._values(self.target, next_states, following.actions.transpose(1, 2)),
            following.log_probs,
            temperature,
            self.settings.discount,
        )
        states, actions = batch[..., self.columns.observation], batch[..., self.columns.action]
        gradient = critic_gradient(self._values(self.critic, states, actions), targets)
        self.critic.backward(self._scratch.pairs.flatten(0, 1), _per_critic(gradient), self._scratch.critic)
        self._critic_adam.step()
        self.critic.refresh()

    def _step_actor_and_temperature(self, current: Actions, temperature: Tensor) -> None:
        size = current.log_probs.shape[1]
        states = self._scratch.states[:, :size]
        gradient = smaller_value_gradient(self._values(self.critic, states, current.actions.transpose(1, 2)))
        by_critic = self.critic.input_gradient(_per_critic(gradient), self._scratch.critic, self._obs_dim)
        action_gradient = by_critic.unflatten(0, (-1, 2)).sum(1)  # (K, A, B)
        self.actor.backward(
            self._scratch.states, policy_gradient(current, action_gradient, temperature), self._scratch.actor
        )
        self._temperature_gradient.copy_(temperature_gradient(current.log_probs, -float(self._act_dim)))
        self._actor_adam.step()
        self.actor.refresh()

    def _values(self, critics: StackedMlp, states: Tensor, actions: Tensor) -> Tensor:
        """Both action values (K, 2, B) at observations (K, B, obs_dim) and actions (K, B, act_dim)."""
        pairs = self._scratch.pairs
        pairs[..., : self._obs_dim] = states.unsqueeze(1)
        pairs[..., self._obs_dim :] = actions.unsqueeze(1)
        return critics.forward(pairs.flatten(0, 1), self._scratch.critic).unflatten(0, (-1, 2)).squeeze(2)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state by name, agents first, as views."""
        actor, critic = self._actor_adam, self._critic_adam
        state = {
            "log_temperature": self.log_temperature,
            "adam.mean.log_temperature": actor.means[1],
            "adam.square.log_temperature": actor.squares[1],
        }
        for owner, network, flat in (
            ("actor", self.actor, self.actor.parameters),
            ("adam.mean.actor", self.actor, actor.means[0]),
            ("adam.square.actor", self.actor, actor.squares[0]),
            ("critic", self.critic, self.critic.parameters),
            ("adam.mean.critic", self.critic, critic.means[0]),
            ("adam.square.critic", self.critic, critic.squares[0]),
            ("target", self.target, self.target.parameters),
        ):
            for name, part in network.named(flat).items():
                state[f"{owner}.{name}"] = part.view(self.agents, -1, *part.shape[1:])
        return state

    @property
    def updates(self) -> int:
        """Steps the optimisers have taken."""
        return int(self._critic_adam.steps[0])

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take over a state that `tensors` gave after `updates` updates."""
        state = self.tensors()
        assert sorted(state) == sorted(tensors), sorted(set(state) ^ set(tensors))
        for name, tensor in state.items():
            assert tensors[name].shape == tensor.shape, name
            tensor.copy_(tensors[name])
        for optimiser in (self._actor_adam, self._critic_adam):
            for steps in optimiser.steps:
                steps.fill_(updates)
        self.refresh()

    def refresh(self) -> None:
        """Take over parameters that were written to directly."""
        for network in (self.actor, self.critic, self.target):
            network.refresh()

    def policy(self, agent: int) -> TanhGaussianPolicy:
        """Return a copy of one actor, on the CPU, as the project's own network."""
        act_dim, hidden = self._act_dim, self.settings.hidden_sizes
        policy = TanhGaussianPolicy(self._obs_dim, hidden, act_dim, *LOG_STD_BOUNDS)
        weights, biases = self.actor.network(agent)
        source: dict[str, Tensor] = {}
        for layer in range(len(hidden)):
            source |= {f"body.{2 * layer}.weight": weights[layer].T, f"body.{2 * layer}.bias": biases[layer]}
        for name, rows in (("mean", slice(0, act_dim)), ("log_std", slice(act_dim, 2 * act_dim))):
            source |= {f"{name}.weight": weights[-1][rows], f"{name}.bias": biases[-1][rows]}
        policy.load_state_dict({name: tensor.cpu() for name, tensor in source.items()})
        return policy.eval()


def _per_critic(gradient: Tensor) -> Tensor:
    """Lay (K, 2, B) out as the outputs (2K, 1, B) of the stacked critics."""
    return gradient.flatten(0, 1).unsqueeze(1)
