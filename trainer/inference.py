"""A trained run as an object to use: what `focal.load_policy(run)` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets import Transitions
from ..errors import FocalError
from .agent import Agent
from .encoder import build_context
from .runs import Run, load_agent, read_run


@dataclass(frozen=True)
class TrainedPolicy:
    """One trained network of a run: infers a task from transitions, and acts in it. Remembers nothing between calls."""

    agent: Agent
    run: Run  # settings, family, dimensions, provenance
    seed: int

    def embed(self, transitions: Transitions | Mapping[str, Any]) -> np.ndarray:
        """Infer the embedding (L,) of the task that N transitions come from; their order is immaterial.

        `transitions` are one task's of a collection, or arrays by name, raw as the environment gives them:
        "observations" (N, obs_dim), "actions" (N, act_dim), "rewards" (N,) (the sparse reward where the run's
        `context_reward` is sparse), and "next_observations" (N, obs_dim) where its `next_observation_in_context` is
        on. Raises `FocalError` for arrays that are missing or do not fit.
        """
        settings = self.agent.settings
        names = ["observations", "actions", "rewards", *["next_observations"] * settings.next_observation_in_context]
        arrays = _by_name(transitions, settings.context_reward) if isinstance(transitions, Transitions) else transitions
        if missing := [name for name in names if name not in arrays]:
            raise FocalError(f"the context lacks '{missing[0]}', this run's encoder takes {', '.join(names)}; see "
                             "help(focal.load_policy)")  # fmt: skip
        tensors = {name: torch.as_tensor(np.asarray(arrays[name]), dtype=torch.float32) for name in names}
        self._check(tensors)
        transform, following = self.agent.transform, tensors.get("next_observations")
        context = build_context(
            transform(tensors["observations"]), tensors["actions"], tensors["rewards"],
            None if following is None else transform(following),
        )  # fmt: skip
        return self.agent.embed(context.unsqueeze(0))[0].cpu().numpy()

    def act(
        self,
        observation: np.ndarray,
        embedding: np.ndarray,
        generator: torch.Generator | None = None,
        at_reset: bool = False,
    ) -> np.ndarray:
        """Return the action (act_dim,) in [-1, 1] for a raw `observation` (obs_dim,), or (M, act_dim) for (M, obs_dim).

        `embedding` (L,) is what `embed` returned. The policy's mode; with a `generator`, on the agent's device, a
        sample. `at_reset` says that an episode begins here, which matters to runs with `released.raw_reset` (D7) only.
        Raises `FocalError` for an observation of another width or an embedding of another shape.
        """
        observation, embedding = np.asarray(observation), np.asarray(embedding)
        latent = (self.agent.settings.latent_dim,)
        if embedding.shape != latent:
            raise FocalError(f"the embedding has shape {embedding.shape}, this run's are {latent}; it is what `embed` "
                             "returns")  # fmt: skip
        rows = observation.reshape(1, -1, observation.shape[-1])
        actions = self.agent.act(rows, embedding[None], generator is None, generator, at_reset)
        return actions[0].reshape(*observation.shape[:-1], -1)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        count, widths = len(tensors["rewards"]), {"actions": self.run.act_dim}
        for name, tensor in tensors.items():
            expected = (count,) if name == "rewards" else (count, widths.get(name, self.run.obs_dim))
            if tuple(tensor.shape) != expected or not count:
                raise FocalError(f"'{name}' of the context has shape {tuple(tensor.shape)}, expected {expected} with "
                                 "at least one transition")  # fmt: skip


def load_policy(run: Path | str, seed: int | None = None, device: torch.device | str = "cpu") -> TrainedPolicy:
    """Load one trained network of the run folder `run`: the one of `seed`, by default the run's first.

    Raises `FocalError` naming what is missing or damaged, and the next command.
    """
    described = read_run(Path(run))
    chosen = described.source.seeds[0] if seed is None else seed
    return TrainedPolicy(load_agent(Path(run), chosen, device), described, chosen)


def _by_name(transitions: Transitions, context_reward: str) -> Mapping[str, np.ndarray]:
    rewards: np.ndarray | None = transitions.rewards
    if context_reward == "sparse":
        rewards = transitions.infos.get("sparse_reward")
    found = {
        "observations": transitions.observations[transitions.rows],
        "actions": transitions.actions,
        "rewards": rewards,
        "next_observations": transitions.observations[transitions.rows + 1],
    }
    return {name: array for name, array in found.items() if array is not None}
