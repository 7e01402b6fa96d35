"""Stage two composed: a collection and settings in, a run folder and its meta-test out. Below `cli.py`, above all else.

The trainer knows no environment; its periodic meta-test is made here and handed in.
"""

import dataclasses
import datetime
import functools
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cluster import PATIENCE, Cluster, has_gpu, run_on_cluster, wait_until
from .commands import train_commands
from .datasets import Collection, find_collections, is_committed, open_collection
from .datasets.opening import STAGING
from .datasets.sources import Folder
from .envs import get_family
from .errors import DiskFullError, DivergedError, FocalError, StoppedError, UsageError, unless_default
from .evaluation import (
    CONDITIONS,
    ContextSource,
    Interval,
    MetaTestResult,
    TestTasks,
    context_source,
    interquartile_mean,
    meta_test,
    over_seeds,
    quick_test,
    seed_interval,
    select_test_tasks,
    share_interval,
)
from .evaluation.embeddings import spread_interval
from .files import write_json
from .provenance import provenance
from .settings import override, parse_assignments
from .trainer.agent import Agent
from .trainer.checkpoint import list_checkpoints
from .trainer.files import read_json
from .trainer.loop import train
from .trainer.mbml import MbmlSettings
from .trainer.mbml_first_stage import first_stage, first_stage_is_there, teachers_folder
from .trainer.methods import train_settings
from .trainer.replay import TaskReplay, TrainingData, refuse_larger_context
from .trainer.runs import (
    Run,
    RunSource,
    describe_run,
    load_agent,
    load_untrained_agent,
    only_seeds,
    read_run,
    refuse_other_run,
    seed_folder,
)
from .trainer.settings import TrainSettings
from .trainer.training import DIVERGED, SMALLER_STEPS
from .workers import available_cores, run_jobs

TEST_FORMAT = "focal-test/2"  # 1: accuracy with centroids of the same transitions
MEASURES = ("mean", "dense_mean", "score", "share_of_optimum")  # of a condition, methods of `MetaTestResult`
QUICK_EPISODES, QUICK_SEED = 2, 1_000_003  # of the meta-tests during training; another seed than `focal-cli test`'s


@dataclass(frozen=True)
class TrainRequest:
    """What `focal-cli train` asks for."""

    collection: Path | str  # its folder or its URL
    quality: str
    scale: str | None
    seeds: tuple[int, ...]  # none: those of the run that is continued, else seed 0
    assignments: tuple[str, ...]
    runs: Path
    algo: str | None = None  # none: that of the run that is continued, else FOCAL
    name: str | None = None
    resume: bool = False
    workers: int = 0  # 0: as many as there are cores
    cache: Path | None = None  # folder for memory-mapped copies of the chosen episodes
    device: str = "auto"  # auto (cuda where there is one), cpu or cuda
    ray: str | None = None  # address of a Ray cluster to train on; needs `resume`, with which a dead node's seeds go on
    test_context_size: int = 0  # of the meta-tests during training; 0: as large as those trained with


@dataclass(frozen=True)
class SeedJob:
    """One seed of a run, or with `seed` None what its seeds share (MBML's first stage), for a worker process."""

    run_dir: Path
    collection: Path | str
    quality: str
    settings: TrainSettings
    seed: int | None
    source: RunSource
    resume: bool
    cache: Path | None
    device: str
    threads: int = 1
    patience: float = 0.0  # seconds to wait for another process that trains this seed

    def run_from_data(self) -> tuple[TrainingData, Run]:
        """Load the training data, and describe the run on it."""
        data = training_data(open_collection(self.collection), self.quality, self.cache)
        return data, describe_run(data, self.settings, self.source)


@dataclass(frozen=True)
class PlannedRun:
    """A run whose settings and data were checked, and what is still to do for it."""

    run_dir: Path
    settings: TrainSettings
    source: RunSource
    first_stage: SeedJob | None  # to be done before any seed
    first_stage_folder: Path | None  # where that is, or will be, kept
    seeds: tuple[SeedJob, ...]  # without those that are trained to the end
    command: str  # that begins it, or goes on, whatever there is of it


class TrainProgress:
    """Called as runs train; the command line draws bars from it. This one shows nothing.

    A folder is a run's, or that of MBML's first stage, which counts as one seed.
    """

    def begin(self, folder: Path, seeds: tuple[int, ...], steps: int) -> None:
        """Announce what will train in `folder`."""

    def update(self, folder: Path, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take a report of one seed."""


@dataclass(frozen=True)
class RunTest:
    """Meta-test results of all seeds of a run."""

    run_dir: Path
    run: Run
    collection: Collection
    source: ContextSource
    episodes: int
    test_seed: int
    results: dict[int, MetaTestResult]
    shared: tuple[str, ...] = ()  # qualities that every task has; others were left out

    def over_seeds(self, measure: str, condition: str) -> Interval | None:
        """Interval over seeds of `measure`, one of `MEASURES`; None where it does not exist."""
        values = [getattr(result, measure)(condition) for result in self.results.values()]
        return None if any(value is None for value in values) else seed_interval(values)

    def interquartile(self, condition: str) -> Interval | None:
        """Interval over seeds of the interquartile mean of the tasks' normalised scores, None where there are none."""
        if not self.first.counted.any():
            return None
        scores = np.stack([result.task_scores(condition) for result in self.results.values()])
        return over_seeds(scores, interquartile_mean)

    @property
    def span(self) -> float | None:
        """Mean of expert - untrained over the tasks with references: what differences, of all tasks, are judged by."""
        if not self.first.counted.any():
            return None
        return float(np.nanmean(self.first.expert_reference - self.first.untrained_reference))

    @property
    def accuracy(self) -> Interval:
        """Interval over seeds of the nearest-centroid task accuracy."""
        return share_interval([result.task_accuracy for result in self.results.values()])

    @property
    def spread(self) -> dict[str, Interval]:
        """Intervals over seeds of ESR, RMS and effective dimensions; empty for a single task."""
        found = [result.spread for result in self.results.values()]
        return {name: spread_interval(name, [one[name] for one in found]) for name in found[0]}

    @property
    def name(self) -> str:
        """What the test's file is called: everything that was chosen."""
        source = self.source
        words = [] if source.protocol == "offline" else [source.protocol]
        unit = "" if source.unit == "transitions" else "episodes"
        words += [
            self.first.quality,
            f"context{source.size}{unit}",
            f"episodes{self.episodes}",
            f"seed{self.test_seed}",
        ]
        if self.shared:
            words.append(f"tasks-with-{'+'.join(self.shared)}")
        return "-".join(words) + only_seeds(self.results, self.run)

    @property
    def first(self) -> MetaTestResult:
        """Any seed's result, for what all share."""
        return next(iter(self.results.values()))

    def to_json(self) -> dict[str, Any]:
        """Return summaries over seeds and every raw return as JSON values."""
        summary = {
            condition: {
                measure: dataclasses.asdict(interval) if interval else None
                for measure, interval in [
                    *((name, self.over_seeds(name, condition)) for name in MEASURES),
                    ("interquartile_score", self.interquartile(condition)),
                ]
            }
            for condition in CONDITIONS
            if condition in self.first.conditions
        }
        return {
            "format": TEST_FORMAT,
            "run": str(self.run_dir),
            "protocol": self.source.protocol,
            "context_size": self.source.size,
            "context_unit": self.source.unit,
            "episodes": self.episodes,
            "test_seed": self.test_seed,
            "tasks_with": list(self.shared),
            "seeds_of_run": list(self.run.source.seeds),
            "task_accuracy": dataclasses.asdict(self.accuracy),
            "spread": {name: dataclasses.asdict(interval) for name, interval in self.spread.items()},
            "gradient_steps": self.run.settings.total_steps,
            "collection": {"name": self.collection.name, "content_hash": self.collection.content_hash},
            "summary": summary,
            "seeds": {str(seed): result.to_json() for seed, result in self.results.items()},
            "provenance": provenance(),
        }


def choose_collection(stores: Path, env: str | None, collection: Path | str | None) -> Path | str:
    """Return the collection a command means. Raises `UsageError` listing the exact choices when it is not clear."""
    if collection is not None and env is not None:
        raise UsageError(f"--env {env} and --collection {collection} each name a collection; leave one of them out")
    if collection is not None:
        return collection
    if env is not None:
        return stores / get_family(env).name
    found = find_collections(stores)
    if len(found) == 1:
        return found[0]
    if not found:
        for entry in sorted(stores.iterdir()) if stores.is_dir() else ():
            if (entry / STAGING).is_dir():
                open_collection(entry)  # says how to finish it
        where = unless_default("--stores", stores, "stores")
        raise UsageError(f"no collection in {stores}; make one first: focal-cli data generate --env point{where}")
    choices = " | ".join(f"--collection {path}" for path in found)
    raise UsageError(f"{stores} holds {len(found)} collections; add one of: {choices}")


def newest_run(runs: Path) -> Path:
    """Return the run whose settings were written last. Raises `FocalError` when there is none."""
    found = sorted(runs.glob("*/settings.json"), key=lambda path: path.stat().st_mtime) if runs.is_dir() else []
    if not found:
        where = unless_default("--runs", runs, "runs")
        raise FocalError(f"no run in {runs}; train one first: focal-cli train --data mixed{where}")
    return found[-1].parent


def train_run(request: TrainRequest, progress: TrainProgress | None = None) -> Path:
    """Train all seeds of a run side by side and return its folder.

    Raises `UsageError` for a device that is not there, `FocalError` for missing data, a folder of another run, or the
    first seed that failed; what the others did is kept, and --resume continues.
    """
    planned = plan_run(request)
    train_planned([planned], request.workers, progress, request.ray)
    return planned.run_dir


def plan_run(request: TrainRequest) -> PlannedRun:
    """Check a request and find out what is still to do for it. Raises as `train_run`; nothing is written."""
    if request.ray:
        assert request.resume, "a seed whose node dies is started again"
        request = _with_whole_paths(request)
    collection = open_collection(request.collection)
    run_dir = _run_folder(request, collection)
    settings, seeds = _settings_and_seeds(request, collection, run_dir)
    device = request.device if request.ray else choose_device(request.device)  # the nodes' devices are theirs to check
    cache = request.cache
    if cache is None and not isinstance(collection.source, Folder):
        cache = run_dir.parent / ".cache"  # far away: fetched once for all seeds and runs
    where = request.collection.resolve() if isinstance(request.collection, Path) else request.collection
    size = _test_context_size(request, run_dir)
    source = RunSource(collection.name, str(where), request.quality, seeds, provenance(), size)

    def job(seed: int | None) -> SeedJob:
        return SeedJob(
            run_dir, request.collection, request.quality, settings, seed, source, request.resume, cache, device
        )

    data, run = job(None).run_from_data()  # fails here, before any process starts
    refuse_other_run(run_dir, run)
    to_do = tuple(job(seed) for seed in seeds if not request.resume or last_step(run_dir, seed) < settings.total_steps)
    if to_do:
        _refuse_context_larger_than_tests(collection, request.quality, settings.context_size)
    ready = not isinstance(settings, MbmlSettings) or first_stage_is_there(run_dir.parent, run, data)
    kept = teachers_folder(run_dir.parent, run, data) if isinstance(settings, MbmlSettings) else None
    command = " && ".join(train_commands(run_dir, run, collection, resume=True))
    return PlannedRun(run_dir, settings, source, None if ready or not to_do else job(None), kept, to_do, command)


def train_planned(
    planned: Sequence[PlannedRun], workers: int = 0, progress: TrainProgress | None = None, ray: str | None = None
) -> None:
    """Train what is still to do for several runs, as `train_jobs` does. Raises `FocalError` for the first failure."""
    again = functools.partial(_train_again, planned)
    raise_failure(train_jobs(planned, workers, progress, ray, again), planned, again)


def same_command() -> str:
    """How a command goes on that does more than train."""
    return "continue with the same command"


def train_jobs(
    planned: Sequence[PlannedRun],
    workers: int = 0,
    progress: TrainProgress | None = None,
    ray: str | None = None,
    again: Callable[[], str] = same_command,
) -> dict[tuple[Path, int | None], BaseException]:
    """Train what is still to do for several runs in one pool of worker processes; 0 `workers`: as many as cores.

    With `ray`, the address that they were planned with, the pool is that cluster's cores or GPUs.

    First stages go first, and seeds that wait for one last, so that no core waits for them. Returns the failures, in
    that order, by run folder and seed (None: the first stage); what the others did is kept. Raises `StoppedError` on
    Ctrl-C; `again` says how to go on.
    """
    progress, workers = progress or TrainProgress(), workers or available_cores()
    first = [one.first_stage for one in planned if one.first_stage]
    waiting = [job for one in planned if one.first_stage for job in one.seeds]
    others = [job for one in planned if not one.first_stage for job in one.seeds]
    if not (others or ray):  # nothing else for the other cores
        first = [dataclasses.replace(job, threads=max(1, workers // len(first))) for job in first]
    for one in planned:
        if one.seeds:
            progress.begin(one.run_dir, tuple(job.seed or 0 for job in one.seeds), one.settings.total_steps)
    jobs = {(job.run_dir, job.seed): job for job in (*first, *others, *waiting)}
    if ray and jobs:
        failures = _train_on_cluster(jobs, ray, _report_to(progress), again())
    else:
        try:
            failures = run_jobs(train_job, jobs, workers, _report_to(progress), again())
        except KeyboardInterrupt:
            raise StoppedError(f"stopped; steps up to each seed's last checkpoint are kept, {again()}") from None
    return {key: failures[key] for key in jobs if key in failures}


def _train_on_cluster(
    jobs: Mapping[tuple[Path, int | None], SeedJob], address: str, on_report: Any, how_to_continue: str
) -> dict[tuple[Path, int | None], BaseException]:
    """Do the jobs on a cluster's nodes; return the failures, when this machine sees what the others left."""
    one = next(iter(jobs.values()))
    runs = one.run_dir.parent
    runs.mkdir(parents=True, exist_ok=True)
    documents = [one.collection / "dataset.json"] if isinstance(one.collection, Path) else []
    with tempfile.NamedTemporaryFile(prefix=".ray-", dir=runs) as witness:  # no other storage has one of that name
        cluster = Cluster(address, one.device, (Path(witness.name), *documents))
        failures = run_on_cluster(_train_on_node, jobs, cluster, on_report, how_to_continue)
    if all(isinstance(error, DivergedError) for error in failures.values()):
        wait_until(lambda: all(_is_seen(job, failures.get(key)) for key, job in jobs.items()))
    return failures


def _train_on_node(job: SeedJob, report: Any) -> None:
    """Do a job on whatever node this is; a dead node's locks may outlive it."""
    train_job(dataclasses.replace(job, device="cuda" if has_gpu() else "cpu", patience=PATIENCE), report)


def _is_seen(job: SeedJob, error: BaseException | None) -> bool:
    """Whether this machine sees what a seed left: its last checkpoint, or why it diverged."""
    if job.seed is None or (error and isinstance(job.settings, MbmlSettings)):  # its first stage may have diverged
        return True
    if error:
        return (seed_folder(job.run_dir, job.seed) / DIVERGED).exists()
    return last_step(job.run_dir, job.seed) >= job.settings.total_steps


def raise_failure(
    failures: Mapping[tuple[Path, int | None], BaseException],
    planned: Sequence[PlannedRun],
    again: Callable[[], str] = same_command,
) -> None:
    """Raise `FocalError` for the first of the `failures` of `train_jobs`, if there are any."""
    for (run_dir, seed), error in failures.items():
        who = f"{run_dir.name}, " * (len(planned) > 1) + ("the first stage" if seed is None else f"seed {seed}")
        if isinstance(error, DiskFullError):
            raise FocalError(f"{who}: {error.where_full}; free space, then {again()}") from error
        if isinstance(error, FocalError):
            raise error
        if isinstance(error, OSError) and error.filename is not None:
            raise FocalError(
                f"{who}: cannot write or read {error.filename} ({error.strerror}), expected folders that can be "
                f"written; mend that, or choose another folder with --runs, then {again()}"
            ) from error
        raise FocalError(f"{who} failed: {type(error).__name__}: {error}; steps are kept, {again()}") from error


def _train_again(planned: Sequence[PlannedRun]) -> str:
    if len(planned) > 1:
        return same_command()
    one = planned[0]
    begun = (one.run_dir / "settings.json").exists()  # then it says what else the run is
    return f"continue with: {resume_command(one.run_dir, one.source) if begun else one.command}"


def _report_to(progress: TrainProgress) -> Any:
    """Turn workers' reports into calls of `progress`; a first stage is announced by its first one."""
    begun: set[Path] = set()

    def report(folder: Path, seed: int | None, step: int, total: int, metrics: Mapping[str, float]) -> None:
        if seed is None and folder not in begun:
            begun.add(folder)
            progress.begin(folder, (0,), total)
        progress.update(folder, seed or 0, step, metrics)

    return report


def choose_device(name: str) -> str:
    """Return "cpu" or "cuda"; "auto" is cuda where there is one. Raises `UsageError` when cuda is asked for in vain."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA device here; --device cpu")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


def idle_settings(planned: PlannedRun, assignments: Sequence[str]) -> list[str]:
    """Return a line for each of `--set` words that changes nothing beside the run's other settings."""
    idle = planned.settings.idle()
    names = [name for name in parse_assignments(assignments) if name in idle]
    return [f"{name} has no effect here, with {idle[name]} it would" for name in names]


def resume_command(run_dir: Path, source: RunSource) -> str:
    """The command that continues a run with its own settings and seeds."""
    words = ["focal-cli", "train", "--collection", source.collection_path, "--data", source.quality]
    return shlex.join([*words, "--runs", str(run_dir.parent), "--name", run_dir.name, "--resume"])


def train_job(job: SeedJob, report: Any) -> None:
    """Train one seed, or make a run's first stage, in this process."""
    torch.set_num_threads(job.threads)
    data, run = job.run_from_data()
    folder = job.run_dir if job.seed is not None else teachers_folder(job.run_dir.parent, run, data)
    last = [0.0]

    def show(step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if metrics or step == total or now - last[0] > 0.5:  # a queue is slower than a gradient step
            last[0] = now
            report(folder, job.seed, step, total, dict(metrics))

    if job.seed is None:
        replay = TaskReplay(data.tasks, run.transform, run.settings, job.device)
        first_stage(job.run_dir.parent, run, data, replay, show)
        return
    tests = _test_tasks_or_none(open_collection(job.collection), job.quality)
    size = job.source.test_context_size or job.settings.context_size

    def evaluate(agent: Agent, step: int) -> dict[str, Any]:
        assert tests is not None
        most = min(len(context.rows) for context in tests.contexts)  # another method's size may be more than there is
        return quick_test(agent, tests, min(size, most), QUICK_EPISODES, QUICK_SEED)

    train(
        job.run_dir, data, job.settings, job.seed, evaluate if tests else None, job.resume, show, job.source,
        job.device, job.patience,
    )  # fmt: skip


def _test_tasks_or_none(collection: Collection, quality: str) -> TestTasks | None:
    """The tasks of the meta-test during training; None where no test task has data of that quality."""
    have, _ = collection.tasks_with(quality, collection.test_tasks())
    return select_test_tasks(collection, quality) if have else None


def _refuse_context_larger_than_tests(collection: Collection, quality: str, size: int) -> None:
    """Raise `FocalError` for contexts that the meta-tests during training would refuse, thousands of steps later."""
    tests = _test_tasks_or_none(collection, quality)
    if tests is None:
        return
    entry, data = min(zip(tests.entries, tests.contexts, strict=True), key=lambda pair: len(pair[1].rows))
    part = "" if entry.split == "test" else ", held-out episodes alone,"  # of a task that is trained on
    refuse_larger_context(size, len(data.rows), f"test task {entry.index}{part}")


def training_data(collection: Collection, quality: str, cache: Path | None = None) -> TrainingData:
    """Load the training tasks' transitions of one quality, held-out episodes excluded; see `load_training`."""
    loaded = collection.load_training(quality, cache=cache)
    family = get_family(collection.family)
    return TrainingData(
        family=collection.family,
        task_indices=tuple(entry.index for entry, _ in loaded),
        tasks=[transitions for _, transitions in loaded],
        obs_dim=family.obs_dim,
        act_dim=family.act_dim,
        absolute_x=family.absolute_x,
        content_hash=collection.content_hash,
    )


def _with_whole_paths(request: TrainRequest) -> TrainRequest:
    """The request for processes that work in other folders."""
    collection = request.collection.resolve() if isinstance(request.collection, Path) else request.collection
    cache = request.cache and request.cache.resolve()
    return dataclasses.replace(request, collection=collection, runs=request.runs.resolve(), cache=cache)


def _run_folder(request: TrainRequest, collection: Collection) -> Path:
    if request.name is not None:
        return request.runs / request.name
    if request.resume:
        return newest_run(request.runs)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return request.runs / f"{collection.family}-{request.quality}-{request.algo or 'focal'}-{stamp}"


def _settings_and_seeds(
    request: TrainRequest, collection: Collection, run_dir: Path
) -> tuple[TrainSettings, tuple[int, ...]]:
    """What was asked for; a run that is continued starts from its own, so that nothing need be typed again."""
    run = read_run(run_dir) if request.resume and (run_dir / "settings.json").exists() else None
    seeds = request.seeds or (run.source.seeds if run else (0,))
    if run and request.scale is None:
        base, seeds = run.settings, tuple(sorted({*run.source.seeds, *seeds}))
        if request.algo not in (None, base.algo):
            raise FocalError(f"{run_dir} is a run of {base.algo}, this command asks for {request.algo}; leave --algo "
                             "out, or use another name: focal-cli train ... --name OTHER")  # fmt: skip
    else:
        base = train_settings(collection.family, request.scale or collection.scale, request.algo or "focal")
    return override(base, parse_assignments(request.assignments)), seeds


def _test_context_size(request: TrainRequest, run_dir: Path) -> int:
    """A run that is continued keeps its own, whatever command continues it: a curve is of one size."""
    saved = read_run(run_dir).source.test_context_size if (run_dir / "settings.json").exists() else None
    return request.test_context_size if saved is None else saved


def test_run(
    run_dir: Path,
    stores: Path,
    quality: str | None,
    context_size: int | None,
    episodes: int,
    test_seed: int,
    protocol: str = "offline",  # noqa: PT028 (this is no pytest function)
    unit: str | None = None,  # noqa: PT028
    *,
    seeds: tuple[int, ...] | None = None,  # noqa: PT028
    shared: tuple[str, ...] = (),  # noqa: PT028
) -> RunTest:
    """Meta-test all seeds of a run, or some, on its collection's test tasks; every raw return is saved in RUN/tests.

    With `shared` only on tasks that have all these qualities. Raises `FocalError` when a seed is not fully trained, or
    when the run or its collection is missing or does not fit, and `UsageError` for a seed that the run does not have.
    """
    run, tasks = testable(run_dir, stores, quality, seeds, shared)
    source = context_source(protocol, unit, context_size, run.settings.context_size)
    results = {}
    for seed in seeds or run.source.seeds:
        agent = load_agent(run_dir, seed)
        results[seed] = meta_test(agent, load_untrained_agent(run_dir, seed), tasks, source, episodes, test_seed)
    tested = RunTest(run_dir, run, tasks.collection, source, episodes, test_seed, results, shared)
    write_json(run_dir / "tests" / f"{tested.name}.json", tested.to_json())
    return tested


def testable(
    run_dir: Path,
    stores: Path,
    quality: str | None,
    seeds: tuple[int, ...] | None = None,  # noqa: PT028
    shared: tuple[str, ...] = (),  # noqa: PT028
) -> tuple[Run, TestTasks]:
    """Return a run, fully trained in `seeds` (default: all), and its test tasks with `quality` data (the training's).

    Raises as `test_run` does.
    """
    run = read_run(run_dir)
    if unknown := set(seeds or ()) - set(run.source.seeds):
        has = ",".join(map(str, run.source.seeds))
        raise UsageError(f"{run_dir} has no seed {min(unknown)}, it has {has}; --only-seeds {has}")
    _refuse_unfinished(run_dir, run, seeds or run.source.seeds)
    return run, select_test_tasks(collection_of(run, stores), quality or run.source.quality, shared)


def last_step(run_dir: Path, seed: int) -> int:
    """Return the step of a seed's last checkpoint, 0 where there is none."""
    checkpoints = list_checkpoints(seed_folder(run_dir, seed) / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0


def has_ended(run_dir: Path, seed: int, total_steps: int) -> bool:
    """Whether a seed is trained to the end, or was stopped as diverged."""
    return last_step(run_dir, seed) >= total_steps or (seed_folder(run_dir, seed) / DIVERGED).exists()


def divergence(run_dir: Path, seed: int) -> dict[str, Any] | None:
    """Return what diverged.json says of a seed that was stopped: metric, value, step, bound; None where it was not."""
    path = seed_folder(run_dir, seed) / DIVERGED
    return read_json(path, "delete it to train the seed again") if path.exists() else None


def tested_seeds(run_dir: Path) -> tuple[int, ...]:
    """Return a run's seeds less those whose values diverged, or all, for a test to refuse, where nothing is left."""
    run = read_run(run_dir)
    diverged = {seed for seed in _unfinished(run_dir, run) if (seed_folder(run_dir, seed) / DIVERGED).exists()}
    return tuple(seed for seed in run.source.seeds if seed not in diverged) or run.source.seeds


def _unfinished(run_dir: Path, run: Run) -> list[int]:
    return [seed for seed in run.source.seeds if last_step(run_dir, seed) < run.settings.total_steps]


def _refuse_unfinished(run_dir: Path, run: Run, seeds: Sequence[int]) -> None:
    """A table must never show a half-trained network as a result."""
    total, unfinished = run.settings.total_steps, _unfinished(run_dir, run)
    ended = [seed for seed in run.source.seeds if seed not in unfinished]
    for seed in seeds:
        if seed in ended:
            continue
        found = f"{run_dir}: seed {seed} is at step {last_step(run_dir, seed)} of {total}"
        if not (seed_folder(run_dir, seed) / DIVERGED).exists():
            raise FocalError(f"{found}; finish it: {resume_command(run_dir, run.source)}")
        others = (
            f"the others alone: focal-cli test {shlex.quote(str(run_dir))} --only-seeds {','.join(map(str, ended))}"
        )
        raise FocalError(
            f"{found}, where its values diverged, and would do so again; "
            + (others if ended else f"train under another --name with {SMALLER_STEPS}")
        )


def collection_of(run: Run, stores: Path) -> Collection:
    """Open the collection a run was trained on: where it was then, or wherever below `stores` it is now."""
    where = run.source.collection_path
    places: list[Path | str] = [*find_collections(stores)]
    if "://" in where:
        places.append(where)  # last: a copy on this machine is nearer
    elif is_committed(where):
        places.insert(0, Path(where))
    damaged: list[FocalError] = []
    for place in places:
        try:
            collection = open_collection(place)
        except FocalError as error:
            damaged.append(error)  # a good copy may be elsewhere
            continue
        if collection.content_hash == run.content_hash:
            return collection
    also = f"; and {damaged[0]}" if damaged else ""
    raise FocalError(
        f"neither {where} nor anything in {stores} is the data this run was trained on (content hash "
        f"{run.content_hash[:12]}); say with --stores where it is, or train again{also}"
    )


def save_figures(tested: RunTest) -> list[Path]:
    """Draw the run's pictures into RUN/figures; return the files."""
    from .evaluation.run_figures import draw_run

    return draw_run(tested.run_dir, tested.run, tested.collection, tested.results)
