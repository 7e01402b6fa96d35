"""One run tested along an axis: context sizes, or the quality of the context. Between experiment.py and cli.py."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .datasets import Collection
from .datasets.collection import has_context
from .envs import make_batch
from .errors import FocalError, UsageError
from .evaluation import Interval, OfflineTransitions, TestTasks, seed_interval, share_interval
from .evaluation.embeddings import halves, nearest_centroid_accuracy
from .evaluation.figures import context_size_curve
from .evaluation.metatest import TaskReturns, episode_seeds, play_agent, reference_returns, task_centroids, task_returns
from .evaluation.run_figures import return_name
from .experiment import RunTest, collection_of, test_run, testable
from .files import write_json
from .provenance import provenance
from .trainer.agent import Agent
from .trainer.runs import Run, load_agent, only_seeds, read_run

SWEEP_FORMAT = "focal-sweep/2"  # 1: accuracy with centroids of the same transitions
_LONGEST = 100  # characters of sizes in a file name, of which a file system takes 255


@dataclass(frozen=True)
class SweepPoint:
    """What one trained network does with contexts of one size."""

    returns: TaskReturns  # (K, E)
    accuracy: float  # share of contexts nearest to their own task's centroid


@dataclass(frozen=True)
class Sweep:
    """A run tested offline with contexts of several sizes, all on the same episode seeds."""

    run_dir: Path
    run: Run
    tasks: TestTasks
    episodes: int
    test_seed: int
    points: dict[int, dict[int, SweepPoint]]  # by seed, then by context size
    largest_judged: int  # accuracy of larger contexts is that of contexts of this size: half of a task's data
    left_out: tuple[int, ...] = ()  # sizes asked for that a task's data cannot fill

    @property
    def name(self) -> str:
        """What its file is called: everything that was chosen."""
        sizes = "-".join(map(str, self.sizes))
        if len(sizes) > _LONGEST:
            digest = hashlib.sha256(sizes.encode()).hexdigest()[:8]
            sizes = f"{self.sizes[0]}-to-{self.sizes[-1]}-{len(self.sizes)}sizes-{digest}"
        name = f"sweep-{self.tasks.quality}-contexts{sizes}-episodes{self.episodes}-seed{self.test_seed}"
        return name + only_seeds(self.points, self.run)

    @property
    def sizes(self) -> list[int]:
        """Context sizes, ascending."""
        return sorted(next(iter(self.points.values())))

    def over_seeds(self, measure: str, size: int) -> Interval:
        """Interval over seeds of "return" (the reported one) or "accuracy" at one size."""
        points = [by_size[size] for by_size in self.points.values()]
        if measure == "accuracy":
            return share_interval([point.accuracy for point in points])
        return seed_interval([float(point.returns.reported.mean()) for point in points])

    @property
    def expert_return(self) -> float:
        """Mean deterministic return of the tasks' behaviour experts, in the reported reward; NaN: not known."""
        return float(reference_returns(self.tasks)[1].mean())

    def draw(self) -> list[Path]:
        """Draw return and task accuracy against the context size into RUN/figures; return the files."""
        name = f"context_size_{self.tasks.quality}{only_seeds(self.points, self.run)}"
        path = self.run_dir / "figures" / f"{name}.png"
        return context_size_curve(path, {self.run.family: self}, {self.run.family: return_name(self.run.family)})

    def to_json(self) -> dict[str, Any]:
        """Return summaries over seeds and every raw return as JSON values."""
        return {
            "format": SWEEP_FORMAT,
            "run": str(self.run_dir),
            "gradient_steps": self.run.settings.total_steps,
            "collection": {"name": self.tasks.collection.name, "content_hash": self.tasks.collection.content_hash},
            "protocol": "offline",
            "quality": self.tasks.quality,
            "episodes": self.episodes,
            "test_seed": self.test_seed,
            "tasks": [entry.index for entry in self.tasks.entries],
            "sizes": self.sizes,
            "accuracy_of_at_most": self.largest_judged,
            "seeds_of_run": list(self.run.source.seeds),
            "summary": {
                measure: {str(size): dataclasses.asdict(self.over_seeds(measure, size)) for size in self.sizes}
                for measure in ("return", "accuracy")
            },
            "seeds": {
                str(seed): {
                    str(size): {"accuracy": point.accuracy, **point.returns.to_json()}
                    for size, point in by_size.items()
                }
                for seed, by_size in self.points.items()
            },
            "provenance": provenance(),
        }


def sweep_run(
    run_dir: Path, stores: Path, quality: str | None, sizes: tuple[int, ...], episodes: int, test_seed: int,
    seeds: tuple[int, ...] | None = None,
) -> Sweep:  # fmt: skip
    """Meta-test all seeds of a run, or some, with contexts of `sizes`, less those that a task's data cannot fill.

    Every raw return is saved in RUN/tests. Raises `FocalError` as `test_run` does, and where no size is left.
    """
    run, tasks = testable(run_dir, stores, quality, seeds)
    held, asked = min(len(context.rows) for context in tasks.contexts), sorted(set(sizes))
    kept = [size for size in asked if size <= held]
    if not kept:
        raise FocalError(
            f"a test task has {held} {tasks.quality} transitions, found sizes from {min(sizes)}; take less"
        )
    points = {
        seed: sweep_agent(load_agent(run_dir, seed), tasks, kept, episodes, test_seed)
        for seed in seeds or run.source.seeds
    }
    half = min(len(halves(context)[1].rows) for context in tasks.contexts)
    swept = Sweep(run_dir, run, tasks, episodes, test_seed, points, half, tuple(asked[len(kept) :]))
    write_json(run_dir / "tests" / f"{swept.name}.json", swept.to_json())
    return swept


def sweep_agent(agent: Agent, tasks: TestTasks, sizes: list[int], episodes: int, seed: int) -> dict[int, SweepPoint]:
    """Test one agent with contexts of each size; the centroids are those of contexts of the training size."""
    count = len(tasks.entries)
    envs = make_batch(tasks.family, [entry.record.params for entry in tasks.entries for _ in range(episodes)])
    seeds, centroids = episode_seeds(seed, count * episodes), task_centroids(agent, tasks, seed)
    points = {}
    for size in sizes:
        source = OfflineTransitions(size)
        contexts = source.gather(agent, tasks, envs, seed)
        returns = task_returns(play_agent(envs, agent, contexts.embeddings, seeds), count, episodes)
        embeddings = source.told_apart(agent, tasks, contexts, seed).reshape(count, episodes, -1)
        points[size] = SweepPoint(returns, nearest_centroid_accuracy(embeddings, centroids))
    envs.close()
    return points


def parse_sizes(text: str) -> tuple[int, ...]:
    """Turn `1,2,5` into sizes. Raises `UsageError`."""
    return _parse_numbers(text, 1, "--sizes", "context sizes such as --sizes 1,10,100")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Turn `0,2` into seeds. Raises `UsageError`."""
    return tuple(sorted(_parse_numbers(text, 0, "--only-seeds", "seeds of the run such as --only-seeds 0,2")))


def _parse_numbers(text: str, least: int, option: str, expected: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UsageError(f"{option} got '{text}', expected {expected}")
    return tuple(dict.fromkeys(int(word) for word in words))


def qualities_of(collection: Collection, qualities: tuple[str, ...]) -> list[str]:
    """Return those of `qualities` that some test task has a context of."""
    return [quality for quality in qualities if shared_test_tasks(collection, (quality,))]


def shared_test_tasks(collection: Collection, qualities: tuple[str, ...]) -> list[int]:
    """Return the test tasks that have a context of every one of `qualities`."""
    return [entry.index for entry in collection.test_tasks() if all(has_context(entry, one) for one in qualities)]


def matrix_row(
    run_dir: Path, stores: Path, qualities: tuple[str, ...], context_size: int | None, episodes: int, test_seed: int,
    seeds: tuple[int, ...] | None = None,
) -> dict[str, RunTest]:  # fmt: skip
    """Meta-test a run with contexts of every quality that its test tasks have: one row of the paper's Table 6.

    All on the tasks that have every one of them: means of different tasks would tell tasks apart, not qualities. Where
    no task has all, the quality that the fewest tasks have is left out, and so on; empty where no task has any.
    """
    collection = collection_of(read_run(run_dir), stores)
    found = tuple(qualities_of(collection, qualities))
    if not found:
        return {}
    while not shared_test_tasks(collection, found):
        found = tuple(
            one for one in found if one != min(found, key=lambda one: len(shared_test_tasks(collection, (one,))))
        )
    return {
        quality: test_run(run_dir, stores, quality, context_size, episodes, test_seed, seeds=seeds, shared=found)
        for quality in found
    }
