"""Stage one on an existing Ray cluster (extra `cluster`): a fleet, or a task, per free core or GPU of any node.

Every node writes into the collection's folder, on storage that all of them share; progress is read from there.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cluster import PATIENCE, Cluster, has_gpu, run_on_cluster, wait_until
from ..datasets import is_sealed
from ..envs import get_family
from ..errors import FocalError
from ..provenance import provenance
from ..workers import Report
from . import worker
from .fleet_worker import FleetJob
from .learner import read_progress
from .memory import check_memory
from .worker import TaskJob


def run_on_ray(
    work: Callable[[Any, Report], None], jobs: Mapping[int, Any], address: str, tasks: Sequence[TaskJob],
    on_report: Callable[..., None], how_to_continue: str,
) -> dict[int, BaseException]:  # fmt: skip
    """Call `work(job, report)` for every job somewhere on the cluster at `address`; return the failures by key.

    What `run_jobs` does with processes. `tasks` are all of the collection's, which is watched for their progress.
    Raises as `run_on_cluster`.
    """
    if not jobs:
        return {}
    one = next(iter(jobs.values()))
    device = one.device if isinstance(one, FleetJob) else "cpu"  # the other engine takes no GPU
    cluster = Cluster(address, device, (tasks[0].collection / "staging" / "header.json",))
    watch = _Watch(tasks, on_report).look
    failures = run_on_cluster(functools.partial(_on_node, work), jobs, cluster, on_report, how_to_continue, watch)
    if not failures:
        wait_until(lambda: all(_is_seen_whole(task) for task in tasks))
    return failures


def _is_seen_whole(task: TaskJob) -> bool:
    """Whether this machine sees the store and all policies of a task, which the collection's commit lists."""
    steps = [task.checkpoint_step(checkpoint) for checkpoint in range(task.settings.checkpoints + 1)]
    wanted = {f"{task.policy_path(step).name}.{suffix}" for step in steps for suffix in ("safetensors", "json")}
    seen = {path.name for path in task.policy_path(0).parent.glob("step_*")}
    return is_sealed(task.collection, task.index) and wanted <= seen


def _on_node(work: Callable[[Any, Report], None], job: Any, report: Report) -> None:
    worker.LOCK_PATIENCE = PATIENCE  # a dead node's locks may outlive it
    work(_placed(job), report)


def _placed(job: Any) -> Any:
    """The job with this node's device and provenance; its memory is checked here."""
    origin = provenance()
    if not isinstance(job, FleetJob):
        return dataclasses.replace(job, provenance=origin)
    tasks = tuple(dataclasses.replace(task, provenance=origin) for task in job.tasks)
    device = "cuda:0" if has_gpu() else "cpu"
    check_memory(get_family(tasks[0].family), [len(tasks)], tasks[0].settings, 1, device)
    return dataclasses.replace(job, tasks=tasks, device=device)


class _Watch:
    """Reports what appears in the collection's folder."""

    def __init__(self, tasks: Sequence[TaskJob], on_report: Callable[..., None]):
        self._report = on_report
        self._left = {t.index: t for t in tasks if not is_sealed(t.collection, t.index)}
        self._steps = dict.fromkeys(self._left, 0)
        self._retried: set[int] = set()

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
        try:
            failures = (read_progress(task.learner_folder) or {}).get("failures", [])
        except FocalError:  # being deleted, or damaged: which the node that needs it says of this task alone
            return
        if failures and task.index not in self._retried:  # once a command
            self._retried.add(task.index)
            self._report(task.index, "retried", failures[-1])
