"""Training data in memory: all tasks flattened into a few tensors, batches gathered without a loop over tasks.

Two tasks, episodes of 2 and 1 (task 0) and of 1 (task 1) transitions; observation rows are kept once:

    observations  | 0:s0  0:s1  0:s2 | 0:s0'  0:s1' | 1:s0  1:s1 |      next observation = next row
    row of step      0     1            3              5
    actions       | 0:a0  0:a1       | 0:a0'        | 1:a0       |      next action = next row where the mask says so
    valid            1     0            0              0
    first, count    0, 3                               3, 1             steps of a task
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..datasets import Transitions
from ..errors import FocalError
from .encoder import build_context
from .settings import FocalSettings, TrainSettings
from .transform import ObservationTransform, fit_transform


@dataclass(frozen=True)
class TrainingData:
    """The training tasks of one collection, as the trainer takes them. `content_hash` is the collection's."""

    family: str
    task_indices: tuple[int, ...]  # indices in the collection, in the order of `tasks`
    tasks: list[Transitions]
    obs_dim: int
    act_dim: int
    absolute_x: int | None  # observation column that holds the absolute x, if the family has one
    content_hash: str

    def __post_init__(self) -> None:
        if not self.tasks or len(self.tasks) != len(self.task_indices):
            raise FocalError(f"{self.family}: {len(self.tasks)} tasks for {len(self.task_indices)} indices; "
                             "expected at least one of each; focal-cli data show PATH lists the tasks")  # fmt: skip
        for index, task in zip(self.task_indices, self.tasks, strict=True):
            widths = task.observations.shape[1], task.actions.shape[1]
            if widths != (self.obs_dim, self.act_dim):
                raise FocalError(f"task {index} has observation and action widths {widths}, expected "
                                 f"{(self.obs_dim, self.act_dim)}; focal-cli data verify PATH")  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """B transitions of each of K tasks. Observations are transformed; rewards are the dense ones, unscaled."""

    observations: Tensor  # (K, B, dim)
    actions: Tensor  # (K, B, act_dim)
    rewards: Tensor  # (K, B)
    next_observations: Tensor  # (K, B, dim)
    terminated: Tensor  # (K, B) bool: the next state ends the episode, its value is 0
    next_actions: Tensor  # (K, B, act_dim) logged action at the next state; meaningless where the mask is False
    next_action_valid: Tensor  # (K, B) bool: False where the episode ends


@dataclass(frozen=True)
class MetaBatch:
    """What one gradient step consumes."""

    tasks: Tensor  # (K,) positions of the tasks, all different unless drawn with replacement
    contexts: Tensor  # (draws, K, N, context_dim); control sees the first draw
    transitions: Batch | None  # None in encoder-only steps
    discriminator: tuple[Batch, ...] = ()  # fresh batches of the same tasks for further discriminator steps
    trains_encoder: bool = True  # whether the encoder is to learn from it


class TaskReplay:
    """Uniform samples, with replacement, from the transitions of several tasks.

    `tasks` in any number, `transform` the run's (never refitted on test data), `settings` for what a context row
    holds. Meta-testing builds one over its test tasks and draws contexts from it exactly as training does. Raises
    `FocalError` for a task without transitions, or observations of another width than the transform's.
    """

    def __init__(
        self,
        tasks: Sequence[Transitions],
        transform: ObservationTransform,
        settings: TrainSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        counts = np.array([len(task.rows) for task in tasks])
        if not len(counts) or counts.min() == 0:
            empty = int(counts.argmin()) if len(counts) else 0
            raise FocalError(f"task number {empty} holds no transition; focal-cli data show PATH lists what there is")
        self._smallest = int(counts.min())
        row_offsets = np.cumsum([0, *(len(task.observations) for task in tasks)])[:-1]
        rows = np.concatenate([task.rows + offset for task, offset in zip(tasks, row_offsets, strict=True)])
        self.next_observation_in_context = settings.next_observation_in_context
        self.device = torch.device(device)
        self.counts = self._move(counts)  # (K,)
        self.first = self._move(np.cumsum([0, *counts])[:-1])  # (K,)
        self.rows = self._move(rows)  # (T,)
        raw = torch.from_numpy(np.concatenate([task.observations for task in tasks]))
        self.observations = transform(raw).to(self.device)  # (T + E, dim)
        self.actions = self._move(np.concatenate([task.actions for task in tasks]))  # (T, act_dim)
        self.rewards = self._move(np.concatenate([task.rewards for task in tasks]))  # (T,)
        terminated = np.concatenate([task.terminated for task in tasks])
        next_action_valid = np.concatenate([task.next_action_valid for task in tasks])
        if settings.limits_terminate:  # D6
            terminated = terminated | ~next_action_valid
        self.terminated = self._move(terminated)  # (T,) bool
        self.next_action_valid = self._move(next_action_valid)  # (T,) bool
        self.context_rewards = self.rewards
        if settings.context_reward == "sparse":
            self.context_rewards = self._move(np.concatenate(_sparse_rewards(tasks)))

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.counts)

    def sample_tasks(self, size: int, generator: torch.Generator, replacement: bool = False) -> Tensor:
        """Draw min(`size`, all) different tasks, (K,), or `size` with replacement."""
        if replacement:
            return torch.randint(len(self), (size,), generator=generator, device=self.device)
        return torch.randperm(len(self), generator=generator, device=self.device)[:size]

    def sample_batch(self, tasks: Tensor, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` transitions of each of `tasks` (K,)."""
        return self.batch_at(self._sample_steps(tasks, size, generator))

    def sample_context(self, tasks: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Draw a context of `size` transitions for each of `tasks` (K,): (K, size, context_dim).

        Raises `FocalError` when a task of the store holds fewer: the rest would be repetitions.
        """
        refuse_larger_context(size, self._smallest)
        return self.context_at(self._sample_steps(tasks, size, generator))

    def batch_at(self, steps: Tensor) -> Batch:
        """Gather the transitions at `steps` (K, B), counted over all tasks (`first` holds each task's first)."""
        rows, valid = _gather(self.rows, steps), _gather(self.next_action_valid, steps)
        return Batch(
            observations=_gather(self.observations, rows),
            actions=_gather(self.actions, steps),
            rewards=_gather(self.rewards, steps),
            next_observations=_gather(self.observations, rows + 1),
            terminated=_gather(self.terminated, steps),
            next_actions=_gather(self.actions, steps + valid),  # the last step of all has no next row; masked
            next_action_valid=valid,
        )

    def context_at(self, steps: Tensor) -> Tensor:
        """Gather the context rows at `steps` (K, N), counted over all tasks: (K, N, context_dim)."""
        rows = _gather(self.rows, steps)
        following = _gather(self.observations, rows + 1) if self.next_observation_in_context else None
        rewards = _gather(self.context_rewards, steps)
        return build_context(_gather(self.observations, rows), _gather(self.actions, steps), rewards, following)

    def state_actions_at(self, steps: Tensor) -> Tensor:
        """Gather observations and actions at `steps` (K, B), counted over all tasks: (K, B, dim + act_dim)."""
        observations = _gather(self.observations, _gather(self.rows, steps))
        return torch.cat([observations, _gather(self.actions, steps)], dim=-1)

    def next_observations_at(self, steps: Tensor) -> Tensor:
        """Gather the next observations at `steps` (K, B), counted over all tasks: (K, B, dim)."""
        return _gather(self.observations, _gather(self.rows, steps) + 1)

    def steps_at(self, tasks: Tensor, uniform: Tensor) -> Tensor:
        """Turn numbers from [0, 1), (..., K, B), into transitions of `tasks` (K,), counted over all tasks."""
        counts = self.counts[tasks].unsqueeze(-1)
        return self.first[tasks].unsqueeze(-1) + torch.minimum((uniform * counts).long(), counts - 1)

    def _sample_steps(self, tasks: Tensor, size: int, generator: torch.Generator) -> Tensor:
        # float64: float32 has too few values to reach every one of a few million transitions
        uniform = torch.rand((len(tasks), size), generator=generator, device=self.device, dtype=torch.float64)
        return self.steps_at(tasks, uniform)

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _gather(source: Tensor, positions: Tensor) -> Tensor:
    """Return source[positions], which takes up to 6 times as long on a CPU, the longer the more there are."""
    return source.index_select(0, positions.flatten()).unflatten(0, positions.shape)


def sample_meta_batch(
    replay: TaskReplay, settings: FocalSettings, generator: torch.Generator, encoder: bool, control: bool
) -> MetaBatch:
    """Draw what one step of FOCAL needs that trains the `encoder`, the `control` networks, or both.

    Two contexts per task where the encoder trains, so that every task has a positive pair; with `context_draws=1`, as
    in the released code, only a task drawn twice has one.
    """
    tasks = replay.sample_tasks(settings.meta_batch, generator, settings.task_replacement)
    draws = settings.context_draws if encoder else 1
    contexts = replay.sample_context(tasks.repeat(draws), settings.context_size, generator)
    contexts = contexts.unflatten(0, (draws, len(tasks)))
    if not control:
        return MetaBatch(tasks, contexts, None, trains_encoder=encoder)
    transitions = replay.sample_batch(tasks, settings.batch_size, generator)
    regularised = settings.regularisation.kind != "none"
    further = settings.regularisation.discriminator_steps - 1 if regularised else 0
    fresh = tuple(replay.sample_batch(tasks, settings.batch_size, generator) for _ in range(further))
    return MetaBatch(tasks, contexts, transitions, fresh, encoder)


def sample_joint_batch(
    replay: TaskReplay, settings: TrainSettings, generator: torch.Generator, discriminator_batches: int = 0
) -> MetaBatch:
    """Draw what one step needs that trains everything at once: of each task one context and one batch."""
    tasks = replay.sample_tasks(settings.meta_batch, generator)
    contexts = replay.sample_context(tasks, settings.context_size, generator).unsqueeze(0)
    batch, *fresh = (
        replay.sample_batch(tasks, settings.batch_size, generator) for _ in range(1 + discriminator_batches)
    )
    return MetaBatch(tasks, contexts, batch, tuple(fresh))


def training_transform(data: TrainingData, settings: TrainSettings) -> ObservationTransform:
    """Fit the run's observation transform on its training tasks."""
    observations = [task.observations for task in data.tasks]
    return fit_transform(observations, settings.observation_scale, settings.hide_x, data.absolute_x)


def refuse_larger_context(size: int, held: int, whose: str = "the smallest task") -> None:
    """Raise `FocalError` for contexts of `size` transitions where `whose` data are only `held`."""
    if size > held:
        raise FocalError(
            f"contexts of {size} transitions were asked for, but {whose} holds only {held}; take at most "
            f"that (focal-cli train --set context_size={held}, focal-cli test --context-size {held}), or other data"
        )


def _sparse_rewards(tasks: Sequence[Transitions]) -> list[np.ndarray]:
    for number, task in enumerate(tasks):
        if "sparse_reward" not in task.infos:
            found = ", ".join(sorted(task.infos)) or "none"
            raise FocalError(f"context_reward=sparse, but task number {number} holds no 'sparse_reward' (its infos: "
                             f"{found}); --set context_reward=dense")  # fmt: skip
    return [task.infos["sparse_reward"] for task in tasks]
