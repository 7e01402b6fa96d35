"""What meta-testing needs of a trained method: task embeddings from contexts, actions from observations. No state."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import FocalError
from .encoder import DeterministicEncoder, ProbabilisticEncoder, context_width
from .networks import TanhGaussianPolicy
from .settings import TrainSettings
from .transform import ObservationTransform

Array = TypeVar("Array", np.ndarray, Tensor)


class Agent:
    """An encoder and a policy with the observation transform they were trained under.

    Nothing is remembered between calls: the same arguments give the same result in any order of calls. NumPy arrays in,
    NumPy arrays out; tensors in, tensors out.
    """

    def __init__(
        self,
        settings: TrainSettings,
        transform: ObservationTransform,
        encoder: DeterministicEncoder | ProbabilisticEncoder,
        policy: TanhGaussianPolicy,
    ) -> None:
        self.settings = settings
        self.transform = transform
        self.encoder = encoder
        self.policy = policy

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.policy.parameters()).device

    @torch.no_grad()
    def embed(self, context: Array) -> Array:
        """Map contexts (K, N, context_dim) to task embeddings (K, L).

        Contexts come from `TaskReplay.sample_context` or `context_at`, built with this agent's `transform` and
        `settings`, so that training and meta-testing cannot differ. Raises `FocalError` for rows of another width.
        """
        width = self.encoder.network.body[0].in_features
        if context.shape[-1] != width:
            parts = "observation, action, reward" + ", next observation" * self.settings.next_observation_in_context
            raise FocalError(
                f"context rows have {context.shape[-1]} columns, this run's encoder takes {width} ({parts}); use data "
                "of the family it was trained on"
            )
        return _like(self.encoder(self._tensor(context)), context)

    @torch.no_grad()
    def act(
        self,
        observations: Array,
        embeddings: Array,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
        at_reset: bool = False,
    ) -> Array:
        """Map RAW observations (K, M, obs_dim) and embeddings (K, L) to actions (K, M, act_dim) in [-1, 1].

        `deterministic` gives the mode; else actions are sampled with `generator`, which is then required (on the
        agent's device), because nothing here draws from global random state. `at_reset` says that these are the first
        observations of episodes, which matters to `released.raw_reset` (D7) only.
        """
        raw = at_reset and self.settings.released.raw_reset
        seen = (self.transform.select if raw else self.transform)(self._tensor(observations))
        states = augment(seen, self._tensor(embeddings))
        if deterministic:
            return _like(self.policy.mode(states), observations)
        if generator is None:
            raise ValueError("act(deterministic=False) needs a torch.Generator")
        return _like(self.policy.sample(states, generator)[0], observations)

    def _tensor(self, array: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def new_agent(
    settings: TrainSettings,
    transform: ObservationTransform,
    act_dim: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Agent:
    """Make an untrained agent; the CPU `generator` decides its weights on every device."""
    width = context_width(transform.dim, act_dim, settings.next_observation_in_context)
    sizes = width, settings.encoder_hidden, settings.latent_dim
    encoder: DeterministicEncoder | ProbabilisticEncoder
    if settings.encoder.kind == "deterministic":
        encoder = DeterministicEncoder(*sizes, generator)
    else:
        encoder = ProbabilisticEncoder(*sizes, settings.encoder.prior_std, generator)
    policy = TanhGaussianPolicy(
        transform.dim + settings.latent_dim,
        settings.control_hidden,
        act_dim,
        settings.log_std_min,
        settings.log_std_max,
        generator,
    )
    return Agent(settings, transform, encoder.to(device), policy.to(device))


def augment(observations: Tensor, embeddings: Tensor) -> Tensor:
    """Join transformed observations (K, M, dim) and embeddings (K, L) into augmented states (K, M, dim + L)."""
    repeated = embeddings.unsqueeze(1).expand(-1, observations.shape[1], -1)
    return torch.cat([observations, repeated], dim=-1)


def _like(result: Tensor, model: Array) -> Array:
    return result.cpu().numpy() if isinstance(model, np.ndarray) else result  # type: ignore[return-value]
