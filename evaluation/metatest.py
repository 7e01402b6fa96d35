"""Offline meta-testing (FOCAL, algorithm 2): embed logged transitions of a test task, act, never explore.

Every number is reported beside controls that must be worse (or better, for the expert), so that a silent bug cannot
look like success.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ..datasets import Collection, TaskEntry, Transitions
from ..datasets.collection import has_context
from ..envs import BatchedEnvs, Rollouts, TaskFamily, get_family, make_batch, rollout
from ..errors import FocalError, UsageError
from ..trainer.agent import Agent
from ..trainer.diagnostics import embedding_metrics
from ..trainer.networks import TanhGaussianPolicy
from ..trainer.policies import load_policy
from ..trainer.replay import refuse_larger_context
from .embeddings import embed_contexts, halves, nearest_centroid_accuracy, spread
from .statistics import normalised, scored_tasks

RIGHT, WRONG, UNTRAINED, ZERO, EXPERT = "right context", "wrong context", "untrained", "zero action", "expert"
CONDITIONS = (RIGHT, WRONG, UNTRAINED, ZERO, EXPERT)
EPISODE_STREAM, CENTROID_STREAM, TOLD_APART_STREAM = 5, 7, 11  # children of the test seed
CENTROID_CONTEXTS = 20  # contexts of the training size whose mean embedding stands for a task


@dataclass(frozen=True)
class TestTasks:
    """The test tasks of a collection that have data of the quality asked for, in the family's order."""

    family: TaskFamily
    entries: tuple[TaskEntry, ...]
    contexts: tuple[Transitions, ...]  # the data each task's context is drawn from
    skipped: tuple[int, ...]  # test tasks without that quality, or without another that all must have
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

    def mean_of_last(self, count: int) -> "TaskReturns":
        """Return the means (K, E) over the last `count` of returns (K, E, R)."""
        sparse = None if self.sparse is None else self.sparse[..., -count:].mean(axis=-1)
        return TaskReturns(self.dense[..., -count:].mean(axis=-1), sparse)

    def to_json(self) -> dict[str, Any]:
        """Return every return as JSON values."""
        return {
            "returns": self.dense.tolist(),
            "sparse_returns": None if self.sparse is None else self.sparse.tolist(),
        }


@dataclass(frozen=True)
class Contexts:
    """What the agent is told of the task of each of M episodes, K tasks times E, task by task."""

    embeddings: np.ndarray  # (M, L) from contexts of the episode's own task
    wrong: np.ndarray  # (M, L) from contexts of the task half-way round the ordered list
    returns: TaskReturns | None = None  # (K, E, R) of the R episodes rolled out for each context, if any were


@dataclass(frozen=True)
class ContextSource:
    """Where contexts come from: `OfflineTransitions` here, the other protocols in protocols.py."""

    size: int  # of a context, in `unit`
    protocol: ClassVar[str]  # offline, shift, online or mbml
    unit: ClassVar[str] = "transitions"  # or episodes

    def check(self, tasks: "TestTasks") -> None:
        """Raise `FocalError` where the tasks' data cannot fill a context."""

    def gather(self, agent: Agent, tasks: "TestTasks", envs: BatchedEnvs, seed: int) -> Contexts:
        """Return contexts for every episode of `envs`, K tasks times E, as `agent` embeds them."""
        raise NotImplementedError

    def told_apart(self, agent: Agent, tasks: "TestTasks", contexts: Contexts, seed: int) -> np.ndarray:
        """Return embeddings (M, L) whose contexts share no transition with those of `task_centroids`: here the gathered
        ones, which are not from the log."""
        return contexts.embeddings

    def result(self, contexts: Contexts) -> "TaskReturns | None":
        """Return the returns (K, E) where gathering the contexts gave the result; None: an episode is played after."""
        return None


class OfflineTransitions(ContextSource):
    """Logged transitions of the test task, drawn independently, with replacement (FOCAL algorithm 2)."""

    protocol = "offline"

    def check(self, tasks: TestTasks) -> None:
        """See `ContextSource`."""
        refuse_larger_context(self.size, min(len(context.rows) for context in tasks.contexts), "a test task")

    def gather(self, agent: Agent, tasks: "TestTasks", envs: BatchedEnvs, seed: int) -> Contexts:
        """See `ContextSource`."""
        own = task_of_episode(tasks, envs)
        other = half_way_round(own, len(tasks.entries))
        right, wrong = (embed_contexts(agent, tasks.contexts, source, self.size, seed) for source in (own, other))
        return Contexts(right, wrong)

    def told_apart(self, agent: Agent, tasks: TestTasks, contexts: Contexts, seed: int) -> np.ndarray:
        """See `ContextSource`: as many contexts, of the half that the centroids are not of, or of all of that."""
        data = [halves(one)[1] for one in tasks.contexts]
        own = np.repeat(np.arange(len(data)), len(contexts.embeddings) // len(data))
        size = min(self.size, *(len(one.rows) for one in data))
        return embed_contexts(agent, data, own, size, seed, TOLD_APART_STREAM)


@dataclass(frozen=True)
class MetaTestResult:
    """Returns of every episode of every condition of one trained network."""

    family: str
    protocol: str
    context_size: int
    context_unit: str
    quality: str
    task_indices: tuple[int, ...]
    skipped: tuple[int, ...]
    heldout_only: bool
    conditions: dict[str, TaskReturns]
    untrained_reference: np.ndarray  # (K,) deterministic untrained behaviour policy, reported reward; NaN: not known
    expert_reference: np.ndarray  # (K,) deterministic behaviour expert, reported reward; NaN: not known
    optimum: np.ndarray | None  # (K,) where a closed-form optimum exists
    counted: np.ndarray  # (K,) bool: the task has a normalised score (statistics.scored_tasks)
    embeddings: np.ndarray = field(repr=False)  # (K, E, L) of the right contexts
    centroids: np.ndarray = field(repr=False)  # (K, L) mean embedding of each task's logged contexts
    told_apart: np.ndarray = field(repr=False)  # (K, E, L) of contexts that share no transition with the centroids'
    context_returns: TaskReturns | None = None  # (K, E, R) of episodes that were rolled out for a context

    @property
    def task_accuracy(self) -> float:
        """Share of contexts whose embedding is nearest to the centroid of their own task; they share no transition."""
        return nearest_centroid_accuracy(self.told_apart, self.centroids)

    @property
    def spread(self) -> dict[str, float]:
        """ESR, RMS and effective dimensions of the tasks' mean embeddings; see embeddings.py."""
        return spread(self.embeddings)

    def mean(self, condition: str) -> float:
        """Mean reported return over tasks and episodes."""
        return float(self.conditions[condition].reported.mean())

    def dense_mean(self, condition: str) -> float | None:
        """Mean dense return over tasks and episodes, where the family reports the sparse one; else None."""
        returns = self.conditions[condition]
        return None if returns.sparse is None else float(returns.dense.mean())

    def task_scores(self, condition: str) -> np.ndarray:
        """Normalised return (K,): (return - untrained) / (expert - untrained); NaN for a task that is not `counted`."""
        per_task = self.conditions[condition].reported.mean(axis=1)
        scores = normalised(per_task, self.untrained_reference, self.expert_reference)
        return np.where(self.counted, scores, np.nan)

    def score(self, condition: str) -> float | None:
        """Mean of `task_scores` over the tasks that are `counted`; None where there is none."""
        return float(np.nanmean(self.task_scores(condition))) if self.counted.any() else None

    def share_of_optimum(self, condition: str) -> float | None:
        """Mean reported return as a share of the mean optimum."""
        return None if self.optimum is None else self.mean(condition) / float(self.optimum.mean())

    def to_json(self) -> dict[str, Any]:
        """Return every raw return and the summaries as JSON values."""
        return {
            "family": self.family,
            "protocol": self.protocol,
            "context_size": self.context_size,
            "context_unit": self.context_unit,
            "quality": self.quality,
            "task_accuracy": self.task_accuracy,
            **self.spread,
            "tasks": list(self.task_indices),
            "skipped_tasks": list(self.skipped),
            "heldout_context_only": self.heldout_only,
            "optimum": None if self.optimum is None else self.optimum.tolist(),
            "untrained_reference": _or_none(self.untrained_reference),
            "expert_reference": _or_none(self.expert_reference),
            "scored": self.counted.tolist(),
            "embeddings": self.embeddings.tolist(),
            "centroids": self.centroids.tolist(),
            "told_apart": self.told_apart.tolist(),
            "context_returns": None if self.context_returns is None else self.context_returns.to_json(),
            "conditions": {
                name: {
                    "mean": self.mean(name),
                    "dense_mean": self.dense_mean(name),
                    "score": self.score(name),
                    "task_scores": _or_none(self.task_scores(name)),
                    "share_of_optimum": self.share_of_optimum(name),
                    **returns.to_json(),
                }
                for name, returns in self.conditions.items()
            },
        }


def select_test_tasks(collection: Collection, quality: str, and_also: Sequence[str] = ()) -> TestTasks:
    """Choose the test tasks that have `quality`. Context on a task also trained on comes from held-out episodes only.

    With `and_also` only tasks that have these qualities too, so that the results of several are of the same tasks.
    Raises `FocalError` when none has it, or for a task that is none of the family's.
    """
    family = get_family(collection.family)
    tests = collection.test_tasks()
    for entry in tests:
        try:
            family.checked(entry.record.params, f"task {entry.index} of {collection.source}")
        except UsageError as error:
            raise FocalError(f"{error}; it is no collection of this family, import or generate it again") from error
    ordered = family.ordered([entry.index for entry in tests], [entry.record.params for entry in tests])
    entries = [next(entry for entry in tests if entry.index == index) for index in ordered]
    found = collection.load_context(quality, entries)
    have = [
        (entry, data)
        for entry, data in zip(entries, found, strict=True)
        if data is not None and all(has_context(entry, other) for other in and_also)
    ]
    if not have:
        wanted = ", ".join(dict.fromkeys([quality, *and_also]))
        raise FocalError(
            f"no test task of {collection.source} has {wanted} data; "
            f"see what there is: focal-cli data show {collection.source}"
        )
    kept = tuple(entry for entry, _ in have)
    skipped = tuple(index for index in ordered if index not in {entry.index for entry in kept})
    return TestTasks(family, kept, tuple(data for _, data in have), skipped, quality, collection)


def meta_test(
    agent: Agent, untrained: Agent, tasks: TestTasks, source: ContextSource, episodes: int, seed: int
) -> MetaTestResult:
    """Test `agent` on `tasks` beside all controls; `untrained` is the same method before training.

    Every episode has a context of its own, from `source`. All conditions play the same episode seeds, but for a result
    that is of the episodes that gathered the context (protocol mbml), which have seeds of their own. The wrong context
    is that of the task half-way round the ordered list; there is none where there is no other task, or for such a
    result.
    """
    count = len(tasks.entries)
    envs = make_batch(tasks.family, [entry.record.params for entry in tasks.entries for _ in range(episodes)])
    seeds = episode_seeds(seed, count * episodes)
    contexts, before = (source.gather(one, tasks, envs, seed) for one in (agent, untrained))

    def played(rollouts: Rollouts) -> TaskReturns:
        return task_returns(rollouts, count, episodes)

    conditions = {
        RIGHT: source.result(contexts) or played(play_agent(envs, agent, contexts.embeddings, seeds)),
        UNTRAINED: source.result(before) or played(play_agent(envs, untrained, before.embeddings, seeds)),
        ZERO: played(rollout(envs, lambda obs: np.zeros((len(obs), tasks.family.act_dim), np.float32), seeds)),
    }
    if count > 1 and source.result(contexts) is None:
        conditions[WRONG] = played(play_agent(envs, agent, contexts.wrong, seeds))
    # imported data come without behaviour policies
    if all(tasks.collection.source.exists(f"{_expert_policy(entry)}.json") for entry in tasks.entries):
        conditions[EXPERT] = played(play_experts(envs, tasks, episodes, seeds))
    envs.close()
    untrained_reference, expert_reference = reference_returns(tasks)
    reached = np.array([entry.record.references.reached_expert for entry in tasks.entries])
    return MetaTestResult(
        family=tasks.family.name,
        protocol=source.protocol,
        context_size=source.size,
        context_unit=source.unit,
        quality=tasks.quality,
        task_indices=tuple(entry.index for entry in tasks.entries),
        skipped=tasks.skipped,
        heldout_only=tasks.heldout_only,
        conditions=conditions,
        untrained_reference=untrained_reference,
        expert_reference=expert_reference,
        optimum=_optimum(tasks),
        counted=scored_tasks(reached, untrained_reference, expert_reference),
        embeddings=contexts.embeddings.reshape(count, episodes, -1),
        centroids=task_centroids(agent, tasks, seed),
        told_apart=source.told_apart(agent, tasks, contexts, seed).reshape(count, episodes, -1),
        context_returns=contexts.returns,
    )


def quick_test(agent: Agent, tasks: TestTasks, context_size: int, episodes: int, seed: int) -> dict[str, Any]:
    """Test with right and wrong context only, and measure the spread of the embeddings; what training logs.

    Beside the means stands every return, reported reward, as lists (K, E): "test/return" and "test/returns".
    """
    count = len(tasks.entries)
    parameters = [entry.record.params for entry in tasks.entries for _ in range(episodes)]
    envs = make_batch(tasks.family, parameters, threads=1)  # the other cores train the other seeds
    seeds = episode_seeds(seed, count * episodes)
    own = np.repeat(np.arange(count), episodes)
    sources = {"return": own}
    if count > 1:
        sources["wrong_context_return"] = half_way_round(own, count)
    indices = [entry.index for entry in tasks.entries]
    metrics: dict[str, Any] = {"test/tasks": indices, "test/context_size": context_size}
    for name, source in sources.items():
        embeddings = embed_contexts(agent, tasks.contexts, source, context_size, seed)
        if name == "return":
            measured = embedding_metrics(torch.from_numpy(embeddings[::episodes]))  # one context per task
            metrics |= {f"test/{measure}": value for measure, value in measured.items()}
        returns = task_returns(play_agent(envs, agent, embeddings, seeds), count, episodes)
        metrics[f"test/{name}"] = float(returns.reported.mean())
        metrics[f"test/{name}s"] = returns.reported.tolist()
    envs.close()
    return metrics


def play_agent(
    envs: BatchedEnvs, agent: Agent, embeddings: np.ndarray, seeds: Sequence[int],
    generator: torch.Generator | None = None,
) -> Rollouts:  # fmt: skip
    """Roll the policy out, one embedding (M, L) per episode: deterministic, or with `generator` stochastic."""
    calls = itertools.count()
    noise: dict[str, Any] = {} if generator is None else {"deterministic": False, "generator": generator}

    def act(observations: np.ndarray) -> np.ndarray:
        return agent.act(observations[:, None], embeddings, at_reset=next(calls) == 0, **noise)[:, 0]

    return rollout(envs, act, seeds)


def play_experts(envs: BatchedEnvs, tasks: TestTasks, episodes: int, seeds: Sequence[int]) -> Rollouts:
    """Roll each task's best behaviour policy out deterministically: what stage two could at best imitate."""
    experts = []
    for entry in tasks.entries:
        experts.append(read_policy(tasks.collection, _expert_policy(entry)))

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(observations).unflatten(0, (len(experts), episodes))
        return torch.cat([expert.mode(rows) for expert, rows in zip(experts, inputs, strict=True)]).numpy()

    return rollout(envs, act, seeds)


def read_policy(collection: Collection, stem: str) -> TanhGaussianPolicy:
    """Read a behaviour policy from the collection, wherever that is."""
    where = f"{collection.source}/{stem}"
    return load_policy(lambda suffix, limit: collection.read_file(stem + suffix, limit), where)[0]


def task_centroids(agent: Agent, tasks: TestTasks, seed: int) -> np.ndarray:
    """Return the mean embedding of contexts of half of each task's data, (K, L); the other half is for those judged.

    They have the training's size, or that of the data; see `halves`.
    """
    own = np.repeat(np.arange(len(tasks.entries)), CENTROID_CONTEXTS)
    data = [halves(context)[0] for context in tasks.contexts]
    size = min(agent.settings.context_size, *(len(one.rows) for one in data))
    embeddings = embed_contexts(agent, data, own, size, seed, CENTROID_STREAM)
    return embeddings.reshape(len(tasks.entries), CENTROID_CONTEXTS, -1).mean(axis=1)


def task_of_episode(tasks: TestTasks, envs: BatchedEnvs) -> np.ndarray:
    """Return the position in `tasks` of each of the M episodes of `envs`, (M,)."""
    return np.repeat(np.arange(len(tasks.entries)), len(envs.tasks) // len(tasks.entries))


def half_way_round(own: np.ndarray, count: int) -> np.ndarray:
    """Return for positions `own` in an ordered list of `count` tasks those of the tasks least like them."""
    return (own + count // 2) % count


def _expert_policy(entry: TaskEntry) -> str:
    """Where the best behaviour policy of a task is in its collection, without suffix."""
    return f"policies/task_{entry.index:04d}/step_{entry.record.references.expert_sac_step:09d}"


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def episode_seeds(seed: int, count: int, *stream: int) -> list[int]:
    """Return the reset seeds of `count` episodes."""
    words = np.random.SeedSequence(seed, spawn_key=(EPISODE_STREAM, *stream)).generate_state(count)
    return [int(word) for word in words]


def task_returns(rollouts: Rollouts, count: int, episodes: int) -> TaskReturns:
    """Return the returns of `count` tasks times `episodes`, task by task, as (K, E)."""
    sparse = rollouts.sparse_returns
    return TaskReturns(
        rollouts.returns.reshape(count, episodes), None if sparse is None else sparse.reshape(count, episodes)
    )


def reference_returns(tasks: TestTasks) -> tuple[np.ndarray, np.ndarray]:
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
