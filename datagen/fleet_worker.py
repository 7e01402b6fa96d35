"""Stage one of a fleet: train its tasks together, then seal them one by one. Runs in a process of its own.

    staging/learners/fleet_0002/   the state of fleet 2, see learner.py
    staging/learners/task_0027/    the state of a task that left its fleet: where this exists, its slot is parked

The writes and their order at a checkpoint are those of `worker.py`, for every task in turn, and the fleet's learner
file last. An agent that fails (numbers no longer finite, an environment that raises) leaves its fleet with the state
of its last checkpoint, and is tried again from there alone, with other random numbers, when the others are done.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..datasets import is_sealed, list_segments
from ..envs import EnvironmentFailure, get_family, make_batch
from ..errors import FocalError
from ..files import remove_leftovers
from .fleet import Fleet, single_out
from .learner import read_progress
from .worker import Report, TaskJob, lock, publish_checkpoint, seal


@dataclass(frozen=True)
class FleetJob:
    """Tasks trained together, on one device: cpu, cuda or cuda:1."""

    number: int
    tasks: tuple[TaskJob, ...]
    device: str

    @property
    def folder(self) -> Path:
        """Where the fleet's state lives until all its tasks are sealed or have left it."""
        return self.tasks[0].collection / "staging" / "learners" / f"fleet_{self.number:04d}"


class TasksFailed(FocalError):
    """Some tasks of a fleet failed twice; the others are finished. `reasons` by task index."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        index, reason = min(self.reasons.items())
        return f"task {index} failed twice: {reason}"


def run_fleet(job: FleetJob, report: Report) -> None:
    """Bring every task of a fleet to its sealed store, continuing whatever an earlier run left.

    Raises `TasksFailed` when the others are done, and `FocalError` when another process holds the fleet or the disk is
    full.
    """
    if all(is_sealed(task.collection, task.index) for task in job.tasks):
        return
    with lock(job.tasks[0].collection, job.folder.name, f"fleet {job.number}"):
        for task in job.tasks:
            for folder in (job.folder, task.learner_folder, task.policy_path(0).parent):
                remove_leftovers(folder)
        reasons: dict[int, str] = {}
        if any(not (is_sealed(task.collection, task.index) or _has_left(task)) for task in job.tasks):
            _train(job.tasks, job.folder, job.device, report)
        staying = [task for task in job.tasks if not _has_left(task)]
        sealed = [_seal(task, job, report, reasons) for task in staying]
        if all(sealed):
            shutil.rmtree(job.folder, ignore_errors=True)  # of no use now; the collection's commit clears it again
        for task in job.tasks:
            if _has_left(task) and not is_sealed(task.collection, task.index):
                failed = _train([task], task.learner_folder, job.device, report)
                if failed:
                    reasons[task.index] = failed[0]
                elif _seal(task, job, report, reasons):
                    shutil.rmtree(task.learner_folder)
        if reasons:
            raise TasksFailed(reasons)


def _has_left(task: TaskJob) -> bool:
    return read_progress(task.learner_folder) is not None


def _train(tasks: Sequence[TaskJob], folder: Path, device: str, report: Report) -> dict[int, str]:
    """Train up to the last checkpoint; return why agents failed, by slot.

    One that fails is set apart, to be tried again alone; if it is alone, only its next attempt is prepared.
    """
    settings = tasks[0].settings
    if _is_trained(tasks, folder):
        return {}
    fleet = Fleet(
        get_family(tasks[0].family), [task.parameters for task in tasks], settings.sac,
        [task.training_seed for task in tasks], device, settings.fleet.precision,
    )  # fmt: skip
    fleet.restore(folder)
    alone = folder == tasks[0].learner_folder
    gone = {slot for slot, task in enumerate(tasks) if not alone and _has_left(task)}
    for slot in set((read_progress(folder) or {}).get("left", ())) - gone:
        raise FocalError(
            f"{folder} has no state of task {tasks[slot].index}, which left it; "
            f"type rm -r {folder}, then run the same command again: its training starts anew"
        )
    for slot in gone:
        fleet.park(slot, "left earlier")
    steps = _StepCount(tasks, report)
    steps.add(fleet.live, fleet.steps)
    failed: dict[int, str] = {}
    while True:
        _publish(tasks, fleet, device)
        if fleet.saved_chunk is None:
            fleet.save(folder)  # there must be a state to start again from
        for slot in sorted(fleet.parked.keys() - gone - failed.keys()):
            failed[slot] = fleet.parked[slot]
            single_out(folder, slot, tasks[slot].learner_folder, failed[slot])
            steps.take_back(slot)
            if not alone:
                report(tasks[slot].index, "retried", failed[slot])
        if fleet.saved_chunk != fleet.chunk and fleet.live:
            fleet.save(folder, left=gone | failed.keys())
        if not fleet.live or fleet.chunk == settings.checkpoints:
            break
        fleet.train_chunk(tasks[0].checkpoint_step(fleet.chunk + 1) - fleet.steps, steps.add)
    fleet.close()
    return failed


def _is_trained(tasks: Sequence[TaskJob], folder: Path) -> bool:
    """Whether only sealing is left to do."""
    progress, last = read_progress(folder), tasks[0].settings.sac.total_steps
    return (
        progress is not None
        and progress["chunk"] == tasks[0].settings.checkpoints
        and all(_has_left(task) or last in list_segments(task.collection, task.index) for task in tasks)
    )


def _publish(tasks: Sequence[TaskJob], fleet: Fleet, device: str) -> None:
    """Write policy and episodes of every live agent's checkpoint; park those whose environments raise."""
    for slot in fleet.live:
        task = tasks[slot]
        environments = [task.parameters] * task.settings.episodes_per_checkpoint
        envs = make_batch(get_family(task.family), environments, threads=1 if device == "cpu" else None)
        try:
            publish_checkpoint(task, fleet.policy(slot), fleet.chunk, envs)
        except EnvironmentFailure as error:
            fleet.park(slot, f"at its checkpoint of step {fleet.steps:,}, {error}")
        finally:
            envs.close()


def _seal(task: TaskJob, job: FleetJob, report: Report, reasons: dict[int, str]) -> bool:
    """Seal a trained task, trying twice; return whether it is sealed, and put into `reasons` why not."""
    if is_sealed(task.collection, task.index):
        return True
    notes = {"fleet": {"number": job.number, "size": len(job.tasks), "device": job.device}}
    progress = read_progress(task.learner_folder)
    if progress is not None:
        notes["failures"] = progress["failures"]
    for _ in range(2):
        try:
            seal(task, get_family(task.family), notes)
        except EnvironmentFailure as error:
            reasons[task.index] = f"while its references were measured, {error}"
        else:
            reasons.pop(task.index, None)
            report(task.index, "sealed", 1)
            return True
    return False


class _StepCount:
    """Reports steps, and takes back those of an agent that has to do them again."""

    def __init__(self, tasks: Sequence[TaskJob], report: Report):
        self._tasks, self._report = tasks, report
        self._counts = [0] * len(tasks)

    def add(self, slots: Sequence[int], steps: int) -> None:
        for slot in slots:
            self._counts[slot] += steps
            self._report(self._tasks[slot].index, "steps", steps)

    def take_back(self, slot: int) -> None:
        self._report(self._tasks[slot].index, "steps", -self._counts[slot])
