"""Independent jobs on an existing Ray cluster (extra `cluster`), as workers.py does them in processes of one machine.

Only jobs, their reports and their outcomes pass through Ray. What they make they write themselves, on storage that all
nodes share under the same path. A job whose node dies is started again on another one, where it must continue what it
finds there, as it does when a command is given again.
"""

import functools
import hashlib
import importlib.util
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from . import __version__
from .errors import FocalError
from .files import is_disk_full
from .workers import Key, Report

RESTARTS = 10  # of a job whose node or process died
SCRIPT: Path | None = None
"""Whose families or methods were added (extend.py): a node runs it as worker processes do, before its first job."""
POLL = 1.0  # seconds between looks at what the nodes do
LAST_WORDS = 10.0  # seconds that a job which has ended waits for its last report to arrive, on a busy machine
PATIENCE = 180.0  # seconds; a network file system keeps a dead node's locks up to 90, and old lists of names up to 60


@dataclass(frozen=True)
class Cluster:
    """Where jobs run, and what they need there."""

    address: str  # host:port of its head node, or auto
    device: str  # of every job: cpu, cuda, or auto: cuda where the cluster has a GPU
    shared: tuple[Path, ...]  # files that a node must see as this machine does before it starts a job


class UnfitNodeError(FocalError):
    """A node has other software or other storage; no job can be done there."""


def run_on_cluster(
    work: Callable[[Any, Report], None],
    jobs: Mapping[Key, Any],
    cluster: Cluster,
    on_report: Callable[..., None],
    how_to_continue: str,
    watch: Callable[[], None] | None = None,
) -> dict[Key, BaseException]:
    """Call `work(job, report)` for every job, one per free core (or GPU) of any node; return the failures by key.

    As `run_jobs` does in processes: what a job passes to `report` arrives at `on_report` in this process, and one
    failing job does not stop the others, except when the disk is full or a node is unfit. `watch`, called every second,
    is for a caller who sees progress otherwise; reports then go nowhere. Raises `FocalError` without Ray, without a
    cluster at the address, or for a GPU that no node has.
    """
    if not jobs:
        return {}
    ray = _connect(cluster.address)
    try:
        gpus = _gpus_each(ray, cluster.device)
        shared = (*cluster.shared, *((SCRIPT,) if SCRIPT else ()))
        place = _Place({path: _content_hash(path) for path in shared}, __version__, SCRIPT)
        mailbox = None if watch else _open_mailbox(ray)
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RESTARTS, scheduling_strategy="SPREAD")(_on_node)
        references = {remote.remote(work, job, place, mailbox): key for key, job in jobs.items()}
        look = watch or (lambda: _pass_on(ray, mailbox, on_report))
        return _wait(ray, references, look, how_to_continue)
    finally:
        ray.shutdown()  # leaves the cluster, and ends what this command still has running there


def has_gpu() -> bool:
    """Tell a job on its node whether it was given a GPU, the only one that it sees."""
    import ray

    return bool(ray.get_gpu_ids())


def wait_until(seen: Callable[[], bool]) -> bool:
    """Look until shared storage shows what was waited for, or patience ends; return whether it did."""
    deadline = time.monotonic() + PATIENCE
    while not seen():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    return True


@dataclass(frozen=True)
class _Place:
    """What every node must agree on before it writes."""

    files: Mapping[Path, str]  # path and content hash
    version: str
    script: Path | None = None

    def refuse_unfit_node(self) -> None:
        """Raise `UnfitNodeError` where this node has another version, or does not come to see the same files."""
        node = socket.gethostname()
        if self.version != __version__:
            raise UnfitNodeError(
                f"node {node} has focal {__version__}, this command is focal {self.version}; install the same on all "
                "nodes"
            )
        for path, content_hash in self.files.items():
            if not wait_until(functools.partial(_is_seen, path, content_hash)):
                raise UnfitNodeError(
                    f"node {node} does not see {path.parent} as this machine does; choose folders on storage that all "
                    "nodes share under the same path, see docs/cluster.md"
                )

    def import_script(self) -> None:
        """Add what the user's script adds, once in a process, under the name that spawned processes give it, too."""
        if self.script is None or str(self.script) == getattr(sys.modules.get("__mp_main__"), "__file__", None):
            return
        loader = SourceFileLoader("__mp_main__", str(self.script))
        spec = importlib.util.spec_from_loader("__mp_main__", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sys.modules["__mp_main__"] = module


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_seen(path: Path, content_hash: str) -> bool:
    try:
        return _content_hash(path) == content_hash
    except OSError:
        return False


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise FocalError(
            "--ray needs Ray; install it in the checkout: pip install -c constraints.txt -e '.[cluster]'"
        ) from None
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


def _gpus_each(ray: Any, device: str) -> int:
    there = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not there:
        raise FocalError("--device cuda: no node of the Ray cluster has a GPU; use --device cpu")
    return 1 if device != "cpu" and there else 0


def _on_node(work: Callable[[Any, Report], None], job: Any, place: _Place, mailbox: Any) -> None:
    """Do one job on whatever node Ray chose."""
    import ray
    import torch

    torch.set_num_threads(1)
    place.refuse_unfit_node()
    place.import_script()
    last: list[Any] = []

    def report(*values: Any) -> None:
        if mailbox is not None:
            last[:] = [mailbox.put.remote(values)]

    try:
        work(job, report)
    finally:
        if last:  # reports arrive in order, so all did when the last has
            ray.wait(last, timeout=LAST_WORDS)


class _Mailbox:
    """Keeps the jobs' reports until the command takes them."""

    def __init__(self) -> None:
        self._reports: list[tuple[Any, ...]] = []

    def put(self, values: tuple[Any, ...]) -> None:
        self._reports.append(values)

    def take(self) -> list[tuple[Any, ...]]:
        taken, self._reports = self._reports, []
        return taken


def _open_mailbox(ray: Any) -> Any:
    """Start a mailbox, on the node of this process, with which it may die."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()


def _pass_on(ray: Any, mailbox: Any, on_report: Callable[..., None]) -> None:
    try:
        reports = ray.get(mailbox.take.remote())
    except ray.exceptions.RayActorError:  # killed; work goes on without its reports
        return
    for values in reports:
        on_report(*values)


def _wait(
    ray: Any, references: Mapping[Any, Key], look: Callable[[], None], how_to_continue: str
) -> dict[Key, BaseException]:
    """Return the failures of jobs; those that were stopped because of another one are none."""
    failures: dict[Key, BaseException] = {}
    pending, stopped = list(references), False
    while pending:
        done, pending = ray.wait(pending, timeout=POLL)
        look()
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failures[references[reference]] = error.cause
                if not stopped and (is_disk_full(error.cause) or isinstance(error.cause, UnfitNodeError)):
                    stopped = True
                    for other in pending:
                        ray.cancel(other, force=True)
            except ray.exceptions.RayError as error:
                if not stopped:
                    said = " ".join(str(error).split())[:150]
                    failures[references[reference]] = FocalError(
                        f"a job died {RESTARTS + 1} times ({said}); finished work is kept: {how_to_continue}"
                    )
    return failures
