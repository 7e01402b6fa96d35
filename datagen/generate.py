"""Stage one of a collection: tasks in parallel processes, then the commit."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..datasets import (
    Collection,
    CollectionHeader,
    begin_collection,
    commit_collection,
    is_committed,
    is_sealed,
    open_collection,
)
from ..envs import TaskSet, get_family
from ..errors import FocalError
from ..provenance import provenance
from ..settings import to_dict
from ..workers import available_cores, run_jobs
from .settings import GenerateSettings
from .worker import TaskJob, run_task

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
    workers: int = 0  # 0: as many as there are cores


class Progress:
    """Called by `generate` as tasks move; the command line draws bars from it. This one shows nothing."""

    def begin(self, tasks: int, steps_per_task: int, sealed: int) -> None:
        """Announce the work: number of tasks, steps of each, tasks already sealed by an earlier run."""

    def update(self, task: int, what: str, amount: int) -> None:
        """Take one report of a worker: `what` is "steps" or "sealed"."""


def generate(request: GenerateRequest, progress: Progress | None = None) -> Collection:
    """Generate a collection, continuing an interrupted one, and return it opened.

    A collection already complete with the same settings is returned as it is. Raises `FocalError` when the folder
    holds another collection, a task failed (all others are finished first), or the disk is full.
    """
    progress = progress or Progress()
    family = get_family(request.family)
    settings = request.settings
    settings.check()
    tasks = family.sample_tasks(settings.n_train, settings.n_test, request.seed, request.tasks_from)
    header = _header(request, tasks)
    if is_committed(request.path):
        collection = open_collection(request.path)
        if _content(collection.header) != _content(header):
            raise FocalError(
                f"{request.path} holds a complete collection made with other settings; "
                "choose another folder with -o, or remove that one"
            )
        return commit_collection(request.path, collection.header, {})  # only clears what a kill after the commit left
    begin_collection(request.path, header)
    origin = provenance()
    jobs = {
        index: TaskJob(
            request.path, family.name, index, tasks.split_of(index), parameters, settings, request.seed, origin
        )
        for index, parameters in enumerate(tasks.parameters)
        if not is_sealed(request.path, index)
    }
    count = len(tasks.parameters)
    progress.begin(count, settings.sac.total_steps, count - len(jobs))
    failures = run_jobs(run_task, jobs, request.workers or available_cores(), progress.update, AGAIN)
    if failures:
        index, error = min(failures.items())
        if isinstance(error, FocalError):
            raise error
        raise FocalError(
            f"{len(failures)} of {count} tasks failed, first task {index}: {type(error).__name__}: {error}; "
            "the others are finished and kept; run the same command again to continue"
        ) from error
    return commit_collection(request.path, header, origin)


def _content(header: CollectionHeader) -> CollectionHeader:
    """The part of a header that decides the data; authors and licence of a complete collection stay as they are."""
    return dataclasses.replace(header, authors=(), licence="CC0-1.0")


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
