"""The context encoder q(z | c) of the paper's section 4.1: deterministic and permutation-invariant."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .networks import MLP


class DeterministicEncoder(nn.Module):
    """z = mean over the context's transitions of tanh(MLP(transition)), so z lies in (-1, 1)^L.

    tanh before the mean as in the released code (reference-facts 3.1); the mean makes the order of transitions and the
    number of them immaterial to the meaning of z.
    """

    def __init__(
        self, context_dim: int, hidden: Sequence[int], latent_dim: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.network = MLP(context_dim, hidden, latent_dim, generator)

    def forward(self, context: Tensor) -> Tensor:
        """Map context (..., N, context_dim) to task embeddings (..., L)."""
        return torch.tanh(self.network(context)).mean(dim=-2)


def build_context(
    observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor | None = None
) -> Tensor:
    """Join transitions into context rows [observation, action, reward(, next observation)].

    `observations` (..., obs_dim) after the run's `ObservationTransform`, `actions` (..., act_dim), `rewards` (...,)
    unscaled, `next_observations` like `observations` or None. Returns (..., context_dim).
    """
    parts = [observations, actions, rewards.unsqueeze(-1)]
    return torch.cat(parts if next_observations is None else [*parts, next_observations], dim=-1)


def context_width(observation_dim: int, action_dim: int, next_observation: bool) -> int:
    """Return the width of the rows that `build_context` makes."""
    return observation_dim + action_dim + 1 + (observation_dim if next_observation else 0)
