"""Stage one of a collection: tasks, or fleets of them, in parallel processes or on a cluster; then the commit."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..datasets import (
    Collection,
    CollectionHeader,
    begin_collection,
    commit_collection,
    is_committed,
    is_sealed,
    open_collection,
    settings_in_effect,
)
from ..datasets.records import differences
from ..envs import TaskSet, get_family
from ..errors import FocalError, StoppedError, UsageError
from ..provenance import provenance
from ..settings import to_dict
from ..workers import available_cores, run_jobs
from .cluster import run_on_ray
from .fleet_worker import FleetJob, TasksFailed, run_fleet
from .memory import check_memory
from .settings import GenerateSettings
from .worker import Report, TaskJob, run_task

AGAIN = "run the same command again to continue"


@dataclass(frozen=True)
class GenerateRequest:
    """What `focal-cli data generate` asks for."""

    family: str
    path: Path
    settings: GenerateSettings
    scale: str = "laptop"
    seed: int = 0
    tasks_from: str = "seed"
    licence: str = "CC-BY-4.0"
    authors: tuple[str, ...] = ()
    workers: int = 0  # processes side by side; 0: as many as there are cores, or GPUs where the device is one
    device: str = "auto"  # of the fleet engine: cpu, cuda, or auto: cuda where there is one
    ray: str | None = None  # address of a Ray cluster to run on; `path` must then be on storage that all nodes share


class Progress:
    """Called by `generate` as tasks move; the command line draws bars from it. This one shows nothing."""

    def begin(self, tasks: int, steps_per_task: int, sealed: int) -> None:
        """Announce the work: number of tasks, steps of each, tasks already sealed by an earlier run."""

    def update(self, task: int, what: str, value: Any) -> None:
        """Take one report of a worker: "steps" and how many more (or fewer), "sealed", or "retried" and why."""


def generate(request: GenerateRequest, progress: Progress | None = None) -> Collection:
    """Generate a collection, continuing an interrupted one, and return it opened.

    A collection already complete with the same settings is returned as it is. Raises `FocalError` when the folder
    holds another collection, a task failed (all others are finished first), or the disk is full.
    """
    progress = progress or Progress()
    family = get_family(request.family)
    settings = request.settings
    settings.check()
    if request.ray:
        request = dataclasses.replace(request, path=request.path.resolve())  # the nodes work in other folders
    tasks = family.sample_tasks(settings.n_train, settings.n_test, request.seed, request.tasks_from)
    header = _header(request, tasks)
    if is_committed(request.path):
        collection = open_collection(request.path)
        if changed := differences(_content(collection.header).to_json(), _content(header).to_json()):
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise FocalError(
                f"{request.path} holds a complete collection made with other settings: {changed[0]}{more}; "
                "choose another folder with -o, or remove that one"
            )
        return commit_collection(request.path, collection.header, {})  # only clears what a kill after the commit left
    origin = provenance()
    jobs = [
        TaskJob(request.path, family.name, index, tasks.split_of(index), parameters, settings, request.seed, origin)
        for index, parameters in enumerate(tasks.parameters)
    ]
    fleets = _fleets(request, jobs)
    begin_collection(request.path, header)
    sealed = sum(is_sealed(request.path, job.index) for job in jobs)
    progress.begin(len(jobs), settings.sac.total_steps, sealed)
    failures = _run(request, jobs, fleets, progress)
    if failures:
        index, reason = min(failures.items())
        others = sorted(set(failures) - {index})
        more = f"; so did {', '.join(map(str, others))}" if others else ""
        raise FocalError(
            f"{len(failures)} of {len(jobs)} tasks failed, first task {index}: {reason}{more}; "
            "the others are finished and kept; run the same command again to continue"
        )
    return commit_collection(request.path, header, origin)


def _fleets(request: GenerateRequest, tasks: Sequence[TaskJob]) -> dict[int, FleetJob]:
    """Partition the tasks as the settings say. Raises before anything is written where the fleets have no room."""
    settings, size = request.settings, request.settings.fleet.size
    if settings.engine != "fleet":
        if request.device not in ("auto", "cpu"):
            raise UsageError(f"--device {request.device} needs --engine fleet; stable-baselines3 runs on the CPU here")
        return {}
    parts = [tuple(tasks[start : start + size]) for start in range(0, len(tasks), size)]
    if request.ray:  # the nodes' devices and memory are theirs to check
        return {number: FleetJob(number, part, request.device) for number, part in enumerate(parts)}
    gpus = torch.cuda.device_count() if request.device != "cpu" else 0
    if request.device == "cuda" and not gpus:
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu")
    family = get_family(request.family)
    check_memory(family, [len(part) for part in parts], settings, _workers(request), "cuda" if gpus else "cpu")
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    return {number: FleetJob(number, part, devices[number % len(devices)]) for number, part in enumerate(parts)}


def _workers(request: GenerateRequest) -> int:
    gpus = torch.cuda.device_count() if request.settings.engine == "fleet" and request.device != "cpu" else 0
    return request.workers or gpus or available_cores()


def _run(
    request: GenerateRequest, tasks: Sequence[TaskJob], fleets: Mapping[int, FleetJob], progress: Progress
) -> dict[int, str]:
    """Do what is left to do of every task; return why tasks failed, by their index."""
    work: Callable[[Any, Report], None] = run_fleet if fleets else run_task
    jobs: dict[int, Any] = dict(fleets) or {task.index: task for task in tasks}
    members = {key: job.tasks if fleets else (job,) for key, job in jobs.items()}
    left = {key: job for key, job in jobs.items() if not all(is_sealed(request.path, t.index) for t in members[key])}
    if request.ray:
        errors = run_on_ray(work, left, request.ray, tasks, progress.update, AGAIN)
    else:
        try:
            errors = run_jobs(work, left, _workers(request), progress.update, AGAIN)
        except KeyboardInterrupt:
            raise StoppedError(f"stopped; finished tasks and checkpoints are kept, {AGAIN}") from None
    reasons: dict[int, str] = {}
    for key, error in sorted(errors.items()):
        if isinstance(error, TasksFailed):
            reasons |= error.reasons
        elif isinstance(error, FocalError):
            raise error
        elif isinstance(error, OSError) and error.filename is not None:
            raise FocalError(
                f"cannot write {error.filename}: {error.strerror}; "
                "make the folder writable and run the same command again"
            ) from error
        else:
            unsealed = [task.index for task in members[key] if not is_sealed(request.path, task.index)]
            reasons |= dict.fromkeys(unsealed, f"{type(error).__name__}: {error}")
    return reasons


def _content(header: CollectionHeader) -> CollectionHeader:
    """The part of a header that decides the data; authors and licence of a complete collection stay as they are."""
    settings = settings_in_effect(header.settings)
    return dataclasses.replace(header, authors=(), licence="CC0-1.0", settings=settings)


def _header(request: GenerateRequest, tasks: TaskSet) -> CollectionHeader:
    family = get_family(request.family)
    return CollectionHeader(
        name=f"{family.name}-{request.scale}",
        family=family.name,
        licence=request.licence,
        authors=request.authors,
        seed=request.seed,
        tasks_from=request.tasks_from,
        scale=request.scale,
        settings=to_dict(request.settings),
        train=tasks.train,
        test=tasks.test,
    )
