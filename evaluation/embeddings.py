"""Embedding contexts, and how well that tells the tasks apart: the paper's ESR and RMS, nearest-centroid accuracy.

ESR, the effective separation rate (paper section 5.2.1): the share of pairs of different tasks whose SQUARED distance
exceeds 2L/3, its expectation for two independent points uniform in (-1, 1)^L. RMS: the mean over the L dimensions of
the standard deviation across tasks, times sqrt(2K / (K - 1)), so that uniform points give sqrt(2/3). Both are of the
tasks' mean embeddings; trainer/diagnostics.py computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..datasets import Collection, Transitions
from ..envs import get_family
from ..trainer.agent import Agent
from ..trainer.diagnostics import embedding_metrics
from ..trainer.replay import TaskReplay
from .statistics import Interval, seed_interval, share_interval

CONTEXT_STREAM = 6  # a child of the test seed


@dataclass(frozen=True)
class TaskPoints:
    """Embeddings of several contexts of some tasks, the tasks in the family's order."""

    embeddings: np.ndarray  # (K, D, L)
    tasks: tuple[int, ...]  # indices in the collection
    unseen: tuple[bool, ...]  # whether training never saw the task

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings as (K D, L), and each one's position in `tasks`."""
        count, draws, latent = self.embeddings.shape
        return self.embeddings.reshape(count * draws, latent), np.repeat(np.arange(count), draws)

    @property
    def names(self) -> list[str]:
        """The tasks as a legend calls them."""
        return [f"task {index}" for index in self.tasks]

    def of(self, unseen: bool) -> np.ndarray:
        """The embeddings of the unseen tasks, or of the trained ones, (K', D, L)."""
        return self.embeddings[np.array(self.unseen) == unseen]


def embed_tasks(
    agent: Agent, collection: Collection, quality: str, draws: int, seed: int, most: int | None = None
) -> TaskPoints:
    """Embed `draws` contexts of the training size of every task that has `quality` data, or of `most` evenly chosen.

    Contexts come from data that training never saw: test tasks, and held-out episodes of training tasks.
    """
    family = get_family(collection.family)
    ordered = family.ordered([entry.index for entry in collection.tasks], [e.record.params for e in collection.tasks])
    entries = [collection.task(index) for index in ordered]
    have = [
        (entry, data)
        for entry, data in zip(entries, collection.load_context(quality, entries), strict=True)
        if data is not None
    ]
    if most is not None and len(have) > most:
        have = [have[i] for i in np.linspace(0, len(have) - 1, most).round().astype(int)]
    contexts = [data for _, data in have]
    size = min(agent.settings.context_size, *(len(data.rows) for data in contexts))
    embeddings = embed_contexts(agent, contexts, np.repeat(np.arange(len(have)), draws), size, seed)
    return TaskPoints(
        embeddings.reshape(len(have), draws, -1),
        tuple(entry.index for entry, _ in have),
        tuple(entry.split == "test" for entry, _ in have),
    )


def embed_contexts(
    agent: Agent,
    contexts: Sequence[Transitions],
    source: np.ndarray,
    size: int,
    seed: int,
    stream: int = CONTEXT_STREAM,
) -> np.ndarray:
    """Embed one fresh context per entry of `source` (M,), positions in `contexts`. Returns (M, L)."""
    replay = TaskReplay(contexts, agent.transform, agent.settings, agent.device)
    words = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2)
    generator = torch.Generator(agent.device).manual_seed(int(words[0]))
    context = replay.sample_context(torch.as_tensor(source, device=agent.device), size, generator)
    return agent.embed(context).cpu().numpy()


def halves(data: Transitions) -> tuple[Transitions, Transitions]:
    """Part a task's transitions by every second episode (a single one: in its middle), so that samples share none.

    Contexts and centroids of the same few thousand transitions are alike in what these have in common by chance: on
    Sparse-Point-Robot, whose neighbours are hard to tell apart, that raised the accuracy from 0.69 to 0.92 at contexts
    of 1,000.
    """
    ends = ~data.next_action_valid
    episode = np.cumsum(ends) - ends
    second = episode % 2 == 1 if episode.any() else np.arange(len(episode)) >= len(episode) // 2
    if not second.any() or second.all():  # a single transition
        return data, data
    return _those(data, ~second), _those(data, second)


def _those(data: Transitions, mask: np.ndarray) -> Transitions:
    """The transitions where `mask` (T,) is True; `rows` still point into all observations."""
    return Transitions(
        observations=data.observations,
        rows=data.rows[mask],
        actions=data.actions[mask],
        rewards=data.rewards[mask],
        infos={name: values[mask] for name, values in data.infos.items()},
        terminated=data.terminated[mask],
        next_action_valid=data.next_action_valid[mask],
    )


def spread(embeddings: np.ndarray) -> dict[str, float]:
    """Return `esr`, `rms` and `dimensions` of the tasks' mean embeddings, for `embeddings` (K, E, L).

    Empty for a single task.
    """
    means = torch.from_numpy(np.asarray(embeddings, np.float64).mean(axis=1))
    return {name.removeprefix("embedding/"): value for name, value in embedding_metrics(means).items()}


def spread_interval(name: str, per_seed: Sequence[float]) -> Interval:
    """Return the interval over seeds of one of `spread`'s numbers, whatever its name goes on with; ESR is a share."""
    return (share_interval if name.lower().startswith("esr") else seed_interval)(per_seed)


def nearest_centroid_accuracy(embeddings: np.ndarray, centroids: np.ndarray) -> float:
    """Return the share of `embeddings` (K, E, L) whose nearest of the `centroids` (K, L) is their own task's.

    Chance is 1 / K. A centroid that several tasks share counts for none of them: what cannot be told apart is wrong.
    """
    distances = np.linalg.norm(embeddings[:, :, None, :] - centroids[None, None], axis=-1)  # (K, E, K)
    own = np.arange(len(centroids))
    others = np.where(np.eye(len(centroids), dtype=bool)[:, None, :], np.inf, distances).min(axis=-1)  # (K, E)
    return float((distances[own, :, own] < others).mean())
