"""Offline meta-testing (FOCAL, algorithm 2): embed logged transitions of a test task, act, never explore.

Every number is reported beside controls that must be worse (or better, for the expert), so that a silent bug cannot
look like success.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..datasets import Collection, TaskEntry, Transitions
from ..envs import BatchedEnvs, Rollouts, TaskFamily, get_family, make_batch, rollout
from ..errors import FocalError
from ..trainer.agent import Agent
from ..trainer.diagnostics import embedding_metrics
from ..trainer.networks import TanhGaussianPolicy
from ..trainer.policies import load_policy
from ..trainer.replay import TaskReplay
from .statistics import normalised

RIGHT, WRONG, UNTRAINED, ZERO, EXPERT = "right context", "wrong context", "untrained", "zero action", "expert"
CONDITIONS = (RIGHT, WRONG, UNTRAINED, ZERO, EXPERT)
EPISODE_STREAM, CONTEXT_STREAM = 5, 6  # children of the test seed


@dataclass(frozen=True)
class TestTasks:
    """The test tasks of a collection that have data of the quality asked for, in the family's order."""

    family: TaskFamily
    entries: tuple[TaskEntry, ...]
    contexts: tuple[Transitions, ...]  # the data each task's context is drawn from
    skipped: tuple[int, ...]  # test tasks without that quality
    quality: str
    collection: Collection

    @property
    def heldout_only(self) -> bool:
        """True where test tasks were trained on too, so that results are "held-out context", not "unseen tasks"."""
        return any(entry.split == "both" for entry in self.entries)


@dataclass(frozen=True)
class TaskReturns:
    """Undiscounted returns (K, E) of one condition; `sparse` where the family has a sparse reward."""

    dense: np.ndarray
    sparse: np.ndarray | None

    @property
    def reported(self) -> np.ndarray:
        """The returns this family reports (K, E): sparse where there are any (FOCAL section 5.1)."""
        return self.dense if self.sparse is None else self.sparse


@dataclass(frozen=True)
class MetaTestResult:
    """Returns of every episode of every condition of one trained network."""

    family: str
    quality: str
    task_indices: tuple[int, ...]
    skipped: tuple[int, ...]
    heldout_only: bool
    conditions: dict[str, TaskReturns]
    untrained_reference: np.ndarray  # (K,) deterministic untrained behaviour policy, reported reward; NaN: not known
    expert_reference: np.ndarray  # (K,) deterministic behaviour expert, reported reward; NaN: not known
    optimum: np.ndarray | None  # (K,) where a closed-form optimum exists
    counted: np.ndarray  # (K,) bool: references are known and the task's behaviour expert passed its absolute test
    embeddings: np.ndarray = field(repr=False)  # (K, E, L) of the right contexts

    def mean(self, condition: str) -> float:
        """Mean reported return over tasks and episodes."""
        return float(self.conditions[condition].reported.mean())

    def task_scores(self, condition: str) -> np.ndarray:
        """Normalised return (K,): (return - untrained) / (expert - untrained); NaN where the expert failed its test."""
        per_task = self.conditions[condition].reported.mean(axis=1)
        scores = normalised(per_task, self.untrained_reference, self.expert_reference)
        return np.where(self.counted, scores, np.nan)

    def score(self, condition: str) -> float | None:
        """Mean of `task_scores` over the tasks whose expert deserves the name; None where there is none."""
        return float(np.nanmean(self.task_scores(condition))) if self.counted.any() else None

    def share_of_optimum(self, condition: str) -> float | None:
        """Mean reported return as a share of the mean optimum."""
        return None if self.optimum is None else self.mean(condition) / float(self.optimum.mean())

    def to_json(self) -> dict[str, Any]:
        """Return every raw return and the summaries as JSON values."""
        return {
            "family": self.family,
            "quality": self.quality,
            "tasks": list(self.task_indices),
            "skipped_tasks": list(self.skipped),
            "heldout_context_only": self.heldout_only,
            "optimum": None if self.optimum is None else self.optimum.tolist(),
            "untrained_reference": _or_none(self.untrained_reference),
            "expert_reference": _or_none(self.expert_reference),
            "expert_passed": self.counted.tolist(),
            "conditions": {
                name: {
                    "mean": self.mean(name),
                    "score": self.score(name),
                    "task_scores": _or_none(self.task_scores(name)),
                    "share_of_optimum": self.share_of_optimum(name),
                    "returns": returns.dense.tolist(),
                    "sparse_returns": None if returns.sparse is None else returns.sparse.tolist(),
                }
                for name, returns in self.conditions.items()
            },
        }


def select_test_tasks(collection: Collection, quality: str) -> TestTasks:
    """Choose the test tasks that have `quality`. Context on a task also trained on comes from held-out episodes only.

    Raises `FocalError` when none has it.
    """
    family = get_family(collection.family)
    tests = collection.test_tasks()
    ordered = family.ordered([entry.index for entry in tests], [entry.record.params for entry in tests])
    entries = [next(entry for entry in tests if entry.index == index) for index in ordered]
    found = collection.load_context(quality, entries)
    have = [(entry, data) for entry, data in zip(entries, found, strict=True) if data is not None]
    if not have:
        raise FocalError(
            f"no test task of {collection.source} has {quality} data; "
            f"see what there is: focal-cli data show {collection.source}"
        )
    kept = tuple(entry for entry, _ in have)
    skipped = tuple(entry.index for entry, data in zip(entries, found, strict=True) if data is None)
    return TestTasks(family, kept, tuple(data for _, data in have), skipped, quality, collection)


def meta_test(
    agent: Agent, untrained: Agent, tasks: TestTasks, context_size: int, episodes: int, seed: int
) -> MetaTestResult:
    """Test `agent` on `tasks` beside all controls; `untrained` is the same method before training.

    Every episode has a context of its own: `context_size` transitions drawn from the task's data. All conditions
    play the same episode seeds. The wrong context is that of the task half-way round the ordered list.
    """
    count = len(tasks.entries)
    envs = make_batch(tasks.family, [entry.record.params for entry in tasks.entries for _ in range(episodes)])
    seeds = _episode_seeds(seed, count * episodes)
    own = np.repeat(np.arange(count), episodes)
    wrong = (own + count // 2) % count
    embeddings = embed_contexts(agent, tasks.contexts, own, context_size, seed)
    play = {
        RIGHT: lambda: play_agent(envs, agent, embeddings, seeds),
        WRONG: lambda: play_agent(envs, agent, embed_contexts(agent, tasks.contexts, wrong, context_size, seed), seeds),
        UNTRAINED: lambda: play_agent(
            envs, untrained, embed_contexts(untrained, tasks.contexts, own, context_size, seed), seeds
        ),
        ZERO: lambda: rollout(envs, lambda obs: np.zeros((len(obs), tasks.family.act_dim), np.float32), seeds),
        EXPERT: lambda: play_experts(envs, tasks, episodes, seeds),
    }
    if count < 2:
        del play[WRONG]  # there is no other task
    if not all(tasks.collection.source.exists(f"{_expert_policy(entry)}.json") for entry in tasks.entries):
        del play[EXPERT]  # imported data come without behaviour policies
    conditions = {name: _returns(run(), count, episodes) for name, run in play.items()}
    envs.close()
    untrained_reference, expert_reference = _references(tasks)
    reached = np.array([entry.record.references.reached_expert for entry in tasks.entries])
    return MetaTestResult(
        family=tasks.family.name,
        quality=tasks.quality,
        task_indices=tuple(entry.index for entry in tasks.entries),
        skipped=tasks.skipped,
        heldout_only=tasks.heldout_only,
        conditions=conditions,
        untrained_reference=untrained_reference,
        expert_reference=expert_reference,
        optimum=_optimum(tasks),
        counted=reached & np.isfinite(untrained_reference) & np.isfinite(expert_reference),
        embeddings=embeddings.reshape(count, episodes, -1),
    )


def quick_test(agent: Agent, tasks: TestTasks, context_size: int, episodes: int, seed: int) -> dict[str, float]:
    """Test with right and wrong context only, and measure the spread of the embeddings; what training logs."""
    count = len(tasks.entries)
    parameters = [entry.record.params for entry in tasks.entries for _ in range(episodes)]
    envs = make_batch(tasks.family, parameters, threads=1)  # the other cores train the other seeds
    seeds = _episode_seeds(seed, count * episodes)
    own = np.repeat(np.arange(count), episodes)
    sources = {"return": own}
    if count > 1:
        sources["wrong_context_return"] = (own + count // 2) % count
    metrics: dict[str, float] = {}
    for name, source in sources.items():
        embeddings = embed_contexts(agent, tasks.contexts, source, context_size, seed)
        if name == "return":
            spread = embedding_metrics(torch.from_numpy(embeddings[::episodes]))  # one context per task
            metrics |= {f"test/{measure}": value for measure, value in spread.items()}
        returns = _returns(play_agent(envs, agent, embeddings, seeds), count, episodes)
        metrics[f"test/{name}"] = float(returns.reported.mean())
    envs.close()
    return metrics


def embed_contexts(
    agent: Agent, contexts: Sequence[Transitions], source: np.ndarray, size: int, seed: int
) -> np.ndarray:
    """Embed one fresh context per entry of `source` (M,), positions in `contexts`. Returns (M, L)."""
    replay = TaskReplay(contexts, agent.transform, agent.settings, agent.device)
    words = np.random.SeedSequence(seed, spawn_key=(CONTEXT_STREAM,)).generate_state(2)
    generator = torch.Generator(agent.device).manual_seed(int(words[0]))
    context = replay.sample_context(torch.as_tensor(source, device=agent.device), size, generator)
    return agent.embed(context).cpu().numpy()


def play_agent(envs: BatchedEnvs, agent: Agent, embeddings: np.ndarray, seeds: Sequence[int]) -> Rollouts:
    """Roll the deterministic policy out, one embedding (M, L) per episode."""
    calls = itertools.count()

    def act(observations: np.ndarray) -> np.ndarray:
        return agent.act(observations[:, None], embeddings, at_reset=next(calls) == 0)[:, 0]

    return rollout(envs, act, seeds)


def play_experts(envs: BatchedEnvs, tasks: TestTasks, episodes: int, seeds: Sequence[int]) -> Rollouts:
    """Roll each task's best behaviour policy out deterministically: what stage two could at best imitate."""
    experts = []
    for entry in tasks.entries:
        experts.append(_read_policy(tasks.collection, _expert_policy(entry)))

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(observations).unflatten(0, (len(experts), episodes))
        return torch.cat([expert.mode(rows) for expert, rows in zip(experts, inputs, strict=True)]).numpy()

    return rollout(envs, act, seeds)


def _read_policy(collection: Collection, stem: str) -> TanhGaussianPolicy:
    """Read a behaviour policy from the collection, wherever that is."""
    where = f"{collection.source}/{stem}"
    return load_policy(lambda suffix, limit: collection.read_file(stem + suffix, limit), where)[0]


def _expert_policy(entry: TaskEntry) -> str:
    """Where the best behaviour policy of a task is in its collection, without suffix."""
    return f"policies/task_{entry.index:04d}/step_{entry.record.references.expert_sac_step:09d}"


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _episode_seeds(seed: int, count: int) -> list[int]:
    words = np.random.SeedSequence(seed, spawn_key=(EPISODE_STREAM,)).generate_state(count)
    return [int(word) for word in words]


def _returns(rollouts: Rollouts, count: int, episodes: int) -> TaskReturns:
    sparse = rollouts.sparse_returns
    return TaskReturns(
        rollouts.returns.reshape(count, episodes), None if sparse is None else sparse.reshape(count, episodes)
    )


def _references(tasks: TestTasks) -> tuple[np.ndarray, np.ndarray]:
    """Deterministic reference returns (K,) of untrained and best behaviour policy, in the reported reward.

    NaN for an imported task that has none.
    """
    references = [entry.record.references for entry in tasks.entries]
    if tasks.family.sparse:
        pairs = [(r.random_sparse_deterministic, r.expert_sparse_deterministic) for r in references]
    else:
        pairs = [(r.random_deterministic, r.expert_deterministic) for r in references]
    means = np.array([[np.mean(returns) if len(returns) else np.nan for returns in pair] for pair in pairs])
    return means[:, 0], means[:, 1]


def _optimum(tasks: TestTasks) -> np.ndarray | None:
    if tasks.family.optimum is None:
        return None
    return np.array([tasks.family.optimum(entry.record.params) for entry in tasks.entries])
