"""Stage two composed: a collection and settings in, a run folder and its meta-test out. Below `cli.py`, above all else.

The trainer knows no environment; its periodic meta-test is made here and handed in.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import QUALITIES, Collection, Quality, find_collections, open_collection
from .envs import get_family
from .errors import FocalError, UsageError
from .evaluation import CONDITIONS, Interval, MetaTestResult, meta_test, quick_test, seed_interval, select_test_tasks
from .files import write_json
from .provenance import provenance
from .settings import override, parse_assignments
from .trainer.agent import Agent
from .trainer.journal import read_rows
from .trainer.loop import train
from .trainer.replay import TrainingData
from .trainer.runs import Run, RunSource, load_agent, load_untrained_agent, read_run, seed_folder
from .trainer.settings import TrainSettings, train_settings
from .workers import available_cores, run_jobs

QUICK_EPISODES, QUICK_SEED = 2, 1_000_003  # of the meta-tests during training; another seed than `focal-cli test`'s


@dataclass(frozen=True)
class TrainRequest:
    """What `focal-cli train` asks for."""

    collection: Path
    quality: str
    scale: str | None
    seeds: tuple[int, ...]
    assignments: tuple[str, ...]
    runs: Path
    name: str | None = None
    resume: bool = False
    workers: int = 0  # 0: as many as there are cores


@dataclass(frozen=True)
class SeedJob:
    """One seed of a run, for a worker process."""

    run_dir: Path
    collection: Path
    quality: str
    settings: TrainSettings
    seed: int
    source: RunSource
    resume: bool


class TrainProgress:
    """Called as seeds train; the command line draws bars from it. This one shows nothing."""

    def begin(self, run_dir: Path, seeds: tuple[int, ...], steps: int) -> None:
        """Announce the run."""

    def update(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take a report of one seed."""


@dataclass(frozen=True)
class RunTest:
    """Meta-test results of all seeds of a run."""

    run_dir: Path
    settings: TrainSettings
    context_size: int
    episodes: int
    test_seed: int
    results: dict[int, MetaTestResult]

    def over_seeds(self, measure: str, condition: str) -> Interval | None:
        """Interval over seeds of `measure` ("mean", "score" or "share_of_optimum"), None where it does not exist."""
        values = [getattr(result, measure)(condition) for result in self.results.values()]
        return None if any(value is None for value in values) else seed_interval(values)

    @property
    def first(self) -> MetaTestResult:
        """Any seed's result, for what all share."""
        return next(iter(self.results.values()))

    def to_json(self) -> dict[str, Any]:
        """Return summaries over seeds and every raw return as JSON values."""
        summary = {
            condition: {
                measure: dataclasses.asdict(interval) if interval else None
                for measure in ("mean", "score", "share_of_optimum")
                for interval in [self.over_seeds(measure, condition)]
            }
            for condition in CONDITIONS
            if condition in self.first.conditions
        }
        return {
            "run": str(self.run_dir),
            "context_size": self.context_size,
            "episodes": self.episodes,
            "test_seed": self.test_seed,
            "protocol": "offline",
            "summary": summary,
            "seeds": {str(seed): result.to_json() for seed, result in self.results.items()},
            "provenance": provenance(),
        }


def choose_collection(stores: Path, env: str | None, collection: Path | None) -> Path:
    """Return the collection a command means. Raises `UsageError` listing the exact choices when it is not clear."""
    if collection is not None:
        return collection
    if env is not None:
        return stores / get_family(env).name
    found = find_collections(stores)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"no collection in {stores}; make one first: make data ENV=point")
    choices = " | ".join(f"--collection {path}" for path in found)
    raise UsageError(f"{stores} holds {len(found)} collections; add one of: {choices}")


def newest_run(runs: Path) -> Path:
    """Return the run whose settings were written last. Raises `FocalError` when there is none."""
    found = sorted(runs.glob("*/settings.json"), key=lambda path: path.stat().st_mtime) if runs.is_dir() else []
    if not found:
        raise FocalError(f"no run in {runs}; train one first: focal-cli train --data mixed")
    return found[-1].parent


def train_run(request: TrainRequest, progress: TrainProgress | None = None) -> Path:
    """Train all seeds of a run side by side and return its folder.

    Raises `FocalError` for missing data, a folder of another run, or the first seed that failed; what the others
    did is kept, and --resume continues.
    """
    progress = progress or TrainProgress()
    collection = open_collection(request.collection)
    base = train_settings(collection.family, request.scale or collection.scale)
    settings = override(base, parse_assignments(request.assignments))
    settings.check()
    training_data(collection, request.quality)  # fails here, before any process starts
    run_dir = _run_folder(request, collection, settings)
    source = RunSource(collection.name, str(request.collection.resolve()), request.quality, request.seeds, provenance())
    jobs = {
        seed: SeedJob(run_dir, request.collection, request.quality, settings, seed, source, request.resume)
        for seed in request.seeds
    }
    progress.begin(run_dir, request.seeds, settings.total_steps)
    failures = run_jobs(train_seed, jobs, request.workers or available_cores(), progress.update)
    if failures:
        seed, error = min(failures.items())
        raise (
            error
            if isinstance(error, FocalError)
            else FocalError(
                f"seed {seed} failed: {type(error).__name__}: {error}; finished steps are kept, continue with --resume"
            )
        ) from error
    return run_dir


def train_seed(job: SeedJob, report: Any) -> None:
    """Train one seed in this process."""
    collection = open_collection(job.collection)
    data = training_data(collection, job.quality)
    tests = select_test_tasks(collection, job.quality)
    last = [0.0]

    def evaluate(agent: Agent, step: int) -> dict[str, float]:
        return quick_test(agent, tests, job.settings.context_size, QUICK_EPISODES, QUICK_SEED)

    def show(step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if metrics or step == total or now - last[0] > 0.5:  # a queue is slower than a gradient step
            last[0] = now
            report(job.seed, step, dict(metrics))

    train(job.run_dir, data, job.settings, job.seed, evaluate, job.resume, show, job.source)


def training_data(collection: Collection, quality: str) -> TrainingData:
    """Load the training tasks' transitions of one quality, held-out episodes excluded."""
    loaded = collection.load_training(quality)
    family = get_family(collection.family)
    return TrainingData(
        family=collection.family,
        task_indices=tuple(entry.index for entry, _ in loaded),
        tasks=[transitions for _, transitions in loaded],
        obs_dim=family.obs_dim,
        act_dim=family.act_dim,
        absolute_x=loaded[0][0].record.absolute_x,
        content_hash=collection.content_hash,
    )


def _run_folder(request: TrainRequest, collection: Collection, settings: TrainSettings) -> Path:
    if request.name is not None:
        return request.runs / request.name
    if request.resume:
        return newest_run(request.runs)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return request.runs / f"{collection.family}-{request.quality}-{settings.algo}-{stamp}"


def test_run(run_dir: Path, quality: str | None, context_size: int | None, episodes: int, test_seed: int) -> RunTest:
    """Meta-test every trained seed of a run on its collection's test tasks; results are saved in RUN/test.json.

    Raises `FocalError` when the run or its collection is missing or does not fit.
    """
    run = read_run(run_dir)
    collection = _collection_of(run)
    tasks = select_test_tasks(collection, quality or run.source.quality)
    size = context_size or run.settings.context_size
    results = {}
    for seed in run.source.seeds:
        if not seed_folder(run_dir, seed).is_dir():
            continue
        agent = load_agent(run_dir, seed)
        results[seed] = meta_test(agent, load_untrained_agent(run_dir, seed), tasks, size, episodes, test_seed)
    if not results:
        raise FocalError(f"{run_dir} holds no trained seed; train it: focal-cli train --resume --name {run_dir.name}")
    tested = RunTest(run_dir, run.settings, size, episodes, test_seed, results)
    write_json(run_dir / "test.json", tested.to_json())
    return tested


def _collection_of(run: Run) -> Collection:
    path = Path(run.source.collection_path)
    collection = open_collection(path)
    if collection.content_hash != run.content_hash:
        raise FocalError(
            f"{path} is not the data this run was trained on (content hash {collection.content_hash[:12]}, "
            f"expected {run.content_hash[:12]}); put that collection back, or train again"
        )
    return collection


def save_figures(run_dir: Path, tested: RunTest) -> list[Path]:
    """Draw return curve, embeddings by task and episodes by quality into RUN/figures; return the files."""
    from .evaluation import figures

    run = read_run(run_dir)
    folder, result = run_dir / "figures", tested.first
    what = "sparse return" if get_family(run.family).sparse else "return"
    where = "held-out context" if result.heldout_only else "unseen tasks"
    curves: dict[str, dict[int, dict[int, float]]] = {"right context": {}, "wrong context": {}}
    for seed in tested.results:
        rows: Any = read_rows(seed_folder(run_dir, seed) / "evaluation.jsonl")
        for name, key in (("right context", "test/return"), ("wrong context", "test/wrong_context_return")):
            curves[name][seed] = {row["step"]: row[key] for row in rows}
    paths = [folder / "return_curve.png", folder / "embeddings.png", folder / "data_by_quality.png"]
    if all(curve for seeds in curves.values() for curve in seeds.values()):
        figures.return_curve(paths[0], curves, f"{what} on {where}", f"{run.family}, {run.source.quality} data")
    count, episodes, latent = result.embeddings.shape
    figures.embeddings_by_task(
        paths[1], result.embeddings.reshape(count * episodes, latent), np.repeat(np.arange(count), episodes),
        [f"task {index}" for index in result.task_indices], f"{run.family}: embeddings, {where}",
    )  # fmt: skip
    _draw_data(paths[2], _collection_of(run), result)
    return [path for path in paths if path.exists()]


def _draw_data(path: Path, collection: Collection, result: MetaTestResult) -> None:
    from .evaluation import figures

    levels = [quality for quality in QUALITIES if quality != "mixed"]
    if collection.family != "sparse-point-robot":
        returns: dict[str, Any] = {level: [] for level in levels}
        for entry in collection.tasks:
            episodes = collection.load(entry.index)
            for level in levels:
                returns[level] += episodes.returns[episodes.qualities == Quality[level.upper()]].tolist()
        figures.returns_by_quality(path, returns, f"{collection.family}: episodes by quality")
        return
    chosen = result.task_indices[:: max(1, len(result.task_indices) // 4)][:5]
    panels: dict[str, list[dict[str, Any]]] = {level: [] for level in levels}
    for index in chosen:
        episodes = collection.load(index)
        starts = np.concatenate([[0], np.cumsum(episodes.lengths + 1)])
        goal = collection.tasks[index].record.params["goal"]
        for level in levels:
            for e in np.flatnonzero(episodes.qualities == Quality[level.upper()])[:8]:
                positions = episodes.observations[starts[e] : starts[e + 1]]
                panels[level].append({"positions": positions, "goal": goal})
    figures.trajectories_by_quality(path, panels, f"{collection.family}: episodes by quality, goal region circled")


def load_test(run_dir: Path) -> dict[str, Any]:
    """Read back what `test_run` saved."""
    path = run_dir / "test.json"
    if not path.exists():
        raise FocalError(f"{run_dir} was not tested yet; focal-cli test {run_dir}")
    return json.loads(path.read_text(encoding="utf-8"))
