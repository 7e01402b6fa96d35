"""What meta-testing needs of a trained method: task embeddings from contexts, actions from observations. No state."""

from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import FocalError
from .encoder import DeterministicEncoder, ProbabilisticEncoder, context_width
from .networks import TanhGaussianPolicy
from .settings import ControlSettings, TrainSettings
from .transform import ObservationTransform

Array = TypeVar("Array", np.ndarray, Tensor)
Encoder = DeterministicEncoder | ProbabilisticEncoder


class Agent(ABC):
    """An encoder and what acts on its embeddings, with the observation transform they were trained under.

    Nothing is remembered between calls: the same arguments give the same result in any order of calls. NumPy arrays in,
    NumPy arrays out; tensors in, tensors out.
    """

    def __init__(self, settings: TrainSettings, transform: ObservationTransform, encoder: Encoder) -> None:
        self.settings = settings
        self.transform = transform
        self.encoder = encoder

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Every network it needs, by the name that checkpoints give it."""

    @abstractmethod
    def choose(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Map augmented states (K, M, dim + L) to actions (K, M, act_dim): at random with a generator, else not."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.encoder.parameters()).device

    @torch.no_grad()
    def embed(self, context: Array, generator: torch.Generator | None = None) -> Array:
        """Map contexts (K, N, context_dim) to task embeddings (K, L); with a generator, to samples of the posterior.

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
        rows = self._tensor(context)
        return _like(self.encoder(rows) if generator is None else self.encoder.infer(rows, generator)[0], context)

    @torch.no_grad()
    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the embeddings (count, L) of tasks of which nothing is known; a deterministic encoder has only 0."""
        return self.encoder.prior(count, generator)

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
        if not deterministic and generator is None:
            raise ValueError("act(deterministic=False) needs a torch.Generator")
        raw = at_reset and self.settings.raw_reset
        seen = (self.transform.select if raw else self.transform)(self._tensor(observations))
        states = augment(seen, self._tensor(embeddings))
        return _like(self.choose(states, None if deterministic else generator), observations)

    def _tensor(self, array: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


class PolicyAgent(Agent):
    """An agent that acts by a tanh-Gaussian policy: FOCAL's and Batch PEARL's."""

    def __init__(
        self, settings: TrainSettings, transform: ObservationTransform, encoder: Encoder, policy: TanhGaussianPolicy
    ) -> None:
        super().__init__(settings, transform, encoder)
        self.policy = policy

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Encoder and policy."""
        return {"encoder": self.encoder, "policy": self.policy}

    def choose(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the policy's mode, or a sample of it."""
        return self.policy.mode(states) if generator is None else self.policy.sample(states, generator)[0]


def new_policy_agent(
    settings: ControlSettings,
    transform: ObservationTransform,
    act_dim: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> PolicyAgent:
    """Make an untrained agent; the CPU `generator` decides its weights on every device."""
    encoder = new_encoder(settings, transform, act_dim, generator)
    policy = TanhGaussianPolicy(
        transform.dim + settings.latent_dim,
        settings.control_hidden,
        act_dim,
        settings.log_std_min,
        settings.log_std_max,
        generator,
    )
    return PolicyAgent(settings, transform, encoder.to(device), policy.to(device))


def new_encoder(
    settings: TrainSettings, transform: ObservationTransform, act_dim: int, generator: torch.Generator
) -> Encoder:
    """Make the untrained encoder that `settings.encoder` describes, on the CPU."""
    width = context_width(transform.dim, act_dim, settings.next_observation_in_context)
    sizes, rule = (width, settings.encoder_hidden, settings.latent_dim), settings.encoder
    if rule.kind == "deterministic":
        return DeterministicEncoder(*sizes, generator)
    return ProbabilisticEncoder(*sizes, rule.prior_std, generator, rule.bounded)


def augment(observations: Tensor, embeddings: Tensor) -> Tensor:
    """Join transformed observations (K, M, dim) and embeddings (K, L) into augmented states (K, M, dim + L)."""
    repeated = embeddings.unsqueeze(1).expand(-1, observations.shape[1], -1)
    return torch.cat([observations, repeated], dim=-1)


def _like(result: Tensor, model: Array) -> Array:
    return result.cpu().numpy() if isinstance(model, np.ndarray) else result  # type: ignore[return-value]
