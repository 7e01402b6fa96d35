"""Batch-constrained Q-learning (BCQ, arXiv 1812.02900): actions are chosen among those that a generative model of the
data proposes, a little perturbed. Its networks and losses, for Contextual BCQ and for both stages of MBML.

States are (K, M, S): observations joined to a task embedding, or observations alone where each task has networks of
its own (stacked.py). Losses are per task, (K,). C is the number of candidate actions, V = 2 act_dim the length of the
generative model's noise.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .agent import Agent, Encoder
from .networks import MLP, StateActionNet, TwinCritic
from .replay import Batch
from .settings import TrainSettings
from .transform import ObservationTransform

Build = Callable[[int, Sequence[int], int], nn.Module]  # (inputs, hidden widths, outputs) -> network on the last axis
Values = Callable[[Tensor, Tensor], Tensor]  # (states, actions) -> action values

LARGEST_NOISE = 0.5  # decoded noise is clipped to this, which keeps candidates near the data
LOG_STD_BOUNDS = (-4.0, 15.0)  # of the action encoder


class ActionEncoder(nn.Module):
    """The recognition half of the conditional VAE: q(noise | state, action), a Gaussian."""

    def __init__(self, build: Build, state_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = build(state_dim + action_dim, hidden, 2 * noise_width(action_dim))

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation, each (K, M, V)."""
        mean, log_std = self.body(torch.cat([states, actions], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_BOUNDS)


class ActionDecoder(nn.Module):
    """The generative half of the conditional VAE: an action from a state and noise."""

    def __init__(self, build: Build, state_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = build(state_dim + noise_width(action_dim), hidden, action_dim)
        self.noise_width = noise_width(action_dim)

    def forward(self, states: Tensor, noise: Tensor) -> Tensor:
        """Map (..., S) and (..., V) to actions (..., act_dim) in (-1, 1)."""
        return torch.tanh(self.body(torch.cat([states, noise], dim=-1)))


class Perturbation(nn.Module):
    """The actor: moves an action by at most `limit` in each dimension, and keeps it in [-1, 1]."""

    def __init__(self, build: Build, state_dim: int, action_dim: int, hidden: Sequence[int], limit: float) -> None:
        super().__init__()
        self.body = build(state_dim + action_dim, hidden, action_dim)
        self.limit = limit

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Map (..., S) and (..., act_dim) to perturbed actions (..., act_dim)."""
        change = self.limit * torch.tanh(self.body(torch.cat([states, actions], dim=-1)))
        return (actions + change).clamp(-1.0, 1.0)


class BcqAgent(Agent):
    """An agent that acts by the candidate of the largest (first) action value: Contextual BCQ's and MBML's.

    Without a generator every state's candidates are decoded from the same noise, drawn once and for all.
    """

    def __init__(
        self,
        settings: TrainSettings,
        transform: ObservationTransform,
        encoder: Encoder,
        decoder: ActionDecoder,
        perturbation: Perturbation,
        critic: TwinCritic | StateActionNet,
        candidates: int,
    ) -> None:
        super().__init__(settings, transform, encoder)
        self.decoder, self.perturbation, self.critic = decoder, perturbation, critic
        fixed = torch.Generator().manual_seed(0)
        self.noise = decoding_noise((1, 1, candidates, decoder.noise_width), fixed).to(self.device)  # (1, 1, C, V)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Encoder, decoder, perturbation and critic."""
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "perturbation": self.perturbation,
            "critic": self.critic,
        }

    def choose(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the best candidate (K, M, act_dim) for each of `states` (K, M, S)."""
        noise = self.noise
        if generator is not None:
            noise = decoding_noise((*states.shape[:2], *self.noise.shape[2:]), generator)
        candidates = candidate_actions(self.decoder, self.perturbation, states, noise)
        return best_candidate(self.value, states, candidates)

    @property
    def value(self) -> StateActionNet:
        """The action value that chooses."""
        return self.critic.first if isinstance(self.critic, TwinCritic) else self.critic


def noise_width(action_dim: int) -> int:
    """Return V, the length of the generative model's noise."""
    return 2 * action_dim


def plain(generator: torch.Generator) -> Build:
    """Return a builder of MLPs whose initial weights come from `generator`."""
    return lambda inputs, hidden, outputs: MLP(inputs, hidden, outputs, generator)


def decoding_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw noise of `shape` (..., V) to decode candidates from, N(0, 1) clipped to +-0.5, on the generator's device."""
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return noise.clamp_(-LARGEST_NOISE, LARGEST_NOISE)


def vae_loss(
    encoder: ActionEncoder, decoder: ActionDecoder, states: Tensor, actions: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the conditional VAE per task (K,), for `states` (K, M, S), logged `actions` and standard normal `noise`
    (K or 1, M, V).

        (1 / act_dim) |a - decode(s, mean + std noise)|^2 + (1 / V) KL(N(mean, std^2) || N(0, 1)) / 2

    averaged over M: BCQ's, whose KL is averaged over the noise's dimensions, not summed. Returns the loss and its two
    parts without gradient: squared error (K,), KL per dimension (K,).
    """
    mean, log_std = encoder(states, actions)
    decoded = decoder(states, mean + log_std.exp() * noise)
    error = (decoded - actions).square().mean(dim=(1, 2))
    kl = 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std).mean(dim=(1, 2))
    return error + 0.5 * kl, error.detach(), kl.detach()


def candidate_actions(decoder: ActionDecoder, perturbation: Perturbation, states: Tensor, noise: Tensor) -> Tensor:
    """Return C candidates for each of `states` (K, M, S), (K, M, C, act_dim): decoded from `noise`, then perturbed.

    `noise` (K or 1, M or 1, C, V) as from `decoding_noise`.
    """
    repeated = _repeat(states, noise.shape[2])
    return perturbation(repeated, decoder(repeated, noise.expand(*repeated.shape[:-1], -1)))


def min_max_value(values: Tensor, min_weight: float) -> Tensor:
    """Return min_weight * min + (1 - min_weight) * max over the twins of `values` (2, ...), (...,).

    BCQ's soft form of clipped double Q-learning; min_weight 0.75 penalises what the twins disagree on.
    """
    return min_weight * values.amin(dim=0) + (1.0 - min_weight) * values.amax(dim=0)


@torch.no_grad()
def bcq_targets(
    decoder: ActionDecoder,
    target_perturbation: Perturbation,
    target_critic: Values,
    batch: Batch,
    next_states: Tensor,
    noise: Tensor,
    discount: float,
    min_weight: float,
) -> Tensor:
    """Return the regression targets of the action values, (K, M), for `next_states` (K, M, S).

        y = r + discount (1 - terminated) max over C candidates a' of min_max(Q'(s', a'))

    `noise` (K or 1, M, C, V) decodes the candidates. A time limit is no termination: its state's value is bootstrapped.
    """
    actions = candidate_actions(decoder, target_perturbation, next_states, noise)
    values = min_max_value(target_critic(_repeat(next_states, noise.shape[2]), actions), min_weight)  # (K, M, C)
    return batch.rewards + discount * values.amax(dim=-1) * ~batch.terminated


def twin_error(values: Tensor, targets: Tensor) -> Tensor:
    """Squared error of both action values `values` (2, K, M) per task (K,): mean over M, summed over the twins."""
    return (values - targets).square().mean(dim=-1).sum(dim=0)


def perturbation_loss(value: Values, perturbation: Perturbation, states: Tensor, decoded: Tensor) -> Tensor:
    """Minus the mean of the first action value at the perturbed `decoded` actions, per task (K,).

    `states` (K, M, S) and `decoded` (K, M, act_dim) without gradient: only the perturbation is to learn.
    """
    return -value(states, perturbation(states, decoded)).mean(dim=-1)


def best_candidate(value: Values, states: Tensor, candidates: Tensor) -> Tensor:
    """Return for each of `states` (K, M, S) the one of (K, M, C, act_dim) with the largest value, (K, M, act_dim)."""
    values = value(_repeat(states, candidates.shape[2]), candidates)  # (K, M, C)
    best = values.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, candidates.shape[-1])
    return candidates.gather(2, best).squeeze(2)


def _repeat(states: Tensor, count: int) -> Tensor:
    """(K, M, S) -> (K, M, count, S)."""
    return states.unsqueeze(2).expand(-1, -1, count, -1)
