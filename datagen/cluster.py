"""Stage one on an existing Ray cluster (extra `cluster`): a fleet, or a task, per free core or GPU of any node.

Nothing but jobs and their outcomes passes through Ray. Every node writes into the collection's folder, which must be
storage that all of them share under the same path; progress is read from there. A job whose node dies is started
again on another one, where it continues at its last checkpoint, as a rerun does on one machine.
"""

import dataclasses
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..datasets import is_sealed
from ..envs import get_family
from ..errors import FocalError
from ..files import is_disk_full
from ..provenance import provenance
from ..workers import Report
from . import worker
from .fleet_worker import FleetJob
from .learner import read_progress
from .memory import check_memory
from .worker import TaskJob

RESTARTS = 10  # of a job whose node or process died
POLL = 1.0  # seconds between looks at the shared folder
PATIENCE = 180.0  # seconds; a network file system keeps a dead node's locks up to 90, and old lists of names up to 60


def run_on_ray(
    work: Callable[[Any, Report], None], jobs: Mapping[int, Any], address: str, tasks: Sequence[TaskJob],
    on_report: Callable[..., None], how_to_continue: str,
) -> dict[int, BaseException]:  # fmt: skip
    """Call `work(job, report)` for every job somewhere on the cluster at `address`; return the failures by key.

    What `run_jobs` does with processes. `tasks` are all of the collection's, which is watched for their progress.
    Raises `FocalError` without ray or without a cluster there.
    """
    if not jobs:
        return {}
    ray = _connect(address)
    try:
        gpus = _gpus_each(ray, next(iter(jobs.values())))
        place = _Place(tasks[0].collection, _header_hash(tasks[0].collection), __version__, gpus > 0)
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RESTARTS, scheduling_strategy="SPREAD")(_on_node)
        references = {remote.remote(work, job, place): key for key, job in jobs.items()}
        failures = _wait(ray, references, _Watch(tasks, on_report), how_to_continue)
    finally:
        ray.shutdown()  # leaves the cluster, and ends what this command still has running there
    deadline = time.monotonic() + PATIENCE
    while not failures and time.monotonic() < deadline and not all(is_sealed(t.collection, t.index) for t in tasks):
        time.sleep(POLL)
    return failures


@dataclasses.dataclass(frozen=True)
class _Place:
    """What every node must agree on before it writes."""

    collection: Path
    header_hash: str | None
    version: str
    gpu: bool


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise FocalError("--ray needs Ray; install it: pip install 'focal-omrl[cluster]'") from None
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "//" not in host:
            socket.create_connection((host, int(port)), timeout=10.0).close()  # Ray itself would try for minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:150]
        raise FocalError(
            f"no Ray cluster at '{address}' ({said}); start one with `ray start --head`, see docs/cluster.md"
        ) from error
    return ray


def _gpus_each(ray: Any, job: Any) -> int:
    """One for a fleet where a GPU is asked for, or there is one and nobody asked; the other engine takes none."""
    wanted = job.device if isinstance(job, FleetJob) else "cpu"
    there = ray.cluster_resources().get("GPU", 0)
    if wanted == "cuda" and not there:
        raise FocalError("--device cuda: no node of the Ray cluster has a GPU; use --device cpu")
    return 1 if wanted != "cpu" and there else 0


def _on_node(work: Callable[[Any, Report], None], job: Any, place: _Place) -> None:
    """Do one job on whatever node Ray chose."""
    import torch

    torch.set_num_threads(1)
    node = socket.gethostname()
    if place.version != __version__:
        raise FocalError(
            f"node {node} has focal {__version__}, this command is focal {place.version}; install the same on all nodes"
        )
    deadline = time.monotonic() + PATIENCE
    while place.header_hash is None or _header_hash(place.collection) != place.header_hash:
        if time.monotonic() > deadline:
            raise FocalError(
                f"node {node} does not see {place.collection} as this machine does; choose with -o a folder on storage "
                "that all nodes share under the same path"
            )
        time.sleep(POLL)
    worker.LOCK_PATIENCE = PATIENCE
    work(_placed(job, place), lambda *values: None)


def _header_hash(collection: Path) -> str | None:
    try:
        return hashlib.sha256((collection / "staging" / "header.json").read_bytes()).hexdigest()
    except OSError:
        return None


def _placed(job: Any, place: _Place) -> Any:
    """The job with this node's device and provenance; its memory is checked here."""
    origin = provenance()
    if not isinstance(job, FleetJob):
        return dataclasses.replace(job, provenance=origin)
    tasks = tuple(dataclasses.replace(task, provenance=origin) for task in job.tasks)
    device = "cuda:0" if place.gpu else "cpu"  # Ray shows a job only the GPU that it may use
    check_memory(get_family(tasks[0].family), [len(tasks)], tasks[0].settings, 1, device)
    return dataclasses.replace(job, tasks=tasks, device=device)


def _wait(ray: Any, references: Mapping[Any, int], watch: "_Watch", how_to_continue: str) -> dict[int, BaseException]:
    failures: dict[int, BaseException] = {}
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, timeout=POLL)
        watch.look()
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failures[references[reference]] = error.cause
                if is_disk_full(error.cause):
                    for other in pending:
                        ray.cancel(other, force=True)
            except ray.exceptions.RayError as error:
                said = " ".join(str(error).split())[:150]
                failures[references[reference]] = FocalError(
                    f"a job died {RESTARTS + 1} times ({said}); finished work is kept: {how_to_continue}"
                )
    return failures


class _Watch:
    """Reports what appears in the collection's folder."""

    def __init__(self, tasks: Sequence[TaskJob], on_report: Callable[..., None]):
        self._report = on_report
        self._left = {t.index: t for t in tasks if not is_sealed(t.collection, t.index)}
        self._steps = dict.fromkeys(self._left, 0)
        self._failures: dict[int, int] = {}

    def look(self) -> None:
        """Report what is new since the last look."""
        for task in list(self._left.values()):
            self._look_for_failure(task)
            sealed = is_sealed(task.collection, task.index)
            names = [path.stem for path in task.policy_path(0).parent.glob("step_*.json")]
            steps = max((int(name.removeprefix("step_")) for name in names), default=0)
            if steps != self._steps[task.index]:
                self._report(task.index, "steps", steps - self._steps[task.index])
                self._steps[task.index] = steps
            if sealed:
                self._report(task.index, "sealed", 1)
                del self._left[task.index]

    def _look_for_failure(self, task: TaskJob) -> None:
        progress = read_progress(task.learner_folder) or {}
        failures = progress.get("failures", [])
        if len(failures) > self._failures.get(task.index, 0):
            self._failures[task.index] = len(failures)
            self._report(task.index, "retried", failures[-1])
