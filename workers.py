"""Independent jobs in worker processes with one torch thread each, reporting progress to the parent.

Single-thread processes side by side beat fewer processes with more threads by far at these network sizes. Workers
die with their parent, so that a killed command can be run again at once.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from .errors import FocalError
from .files import is_disk_full

Key = TypeVar("Key", bound=Hashable)
Report = Callable[..., None]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    work: Callable[[Any, Report], None],
    jobs: Mapping[Key, Any],
    workers: int,
    on_report: Callable[..., None],
    how_to_continue: str,
) -> dict[Key, BaseException]:
    """Call `work(job, report)` for every job in up to `workers` processes; return the failures by key.

    What a job passes to `report` arrives at `on_report` in this process. One failing job does not stop the others,
    except when the disk is full or a worker died, which nothing else would survive either. Ctrl-C, or any error here,
    ends all workers at once. `how_to_continue` ends the message about a worker that died.
    """
    if not jobs:
        return {}
    context = multiprocessing.get_context("spawn")  # torch's thread pools do not survive a fork
    reports: Any = context.Queue()
    failures: dict[Key, BaseException] = {}
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (reports, os.getpid()))
    try:
        futures: dict[Future[None], Key] = {pool.submit(_run, work, job): key for key, job in jobs.items()}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(reports, on_report)
            for future in done:
                error = None if future.cancelled() else future.exception()
                if error is None:
                    continue
                failures[futures[future]] = _explain(error, how_to_continue)
                if isinstance(error, BrokenProcessPool) or is_disk_full(error):
                    for other in pending:
                        other.cancel()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # jobs survive SIGKILL by design; finishing them could take hours
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    _drain(reports, on_report)
    return failures


def _explain(error: BaseException, how_to_continue: str) -> BaseException:
    if not isinstance(error, BrokenProcessPool):
        return error
    return FocalError(
        "a worker process died (killed, or out of memory); finished work is kept: "
        f"{how_to_continue}, with fewer --workers if memory is short"
    )


def _drain(reports: Any, on_report: Callable[..., None]) -> None:
    while True:
        try:
            on_report(*reports.get_nowait())
        except queue.Empty:
            return


_REPORTS: Any = None


def _start(reports: Any, parent: int) -> None:
    global _REPORTS
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, which then ends the workers
    torch.set_num_threads(1)
    _REPORTS = reports
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run(work: Callable[[Any, Report], None], job: Any) -> None:
    work(job, lambda *values: _REPORTS.put(values))
