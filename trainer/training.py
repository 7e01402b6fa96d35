"""Gradient steps with logs, checkpoints and an alarm for divergence, in one folder, resumable after any kill."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DivergedError
from ..files import locked, write_json
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .diagnostics import value_drift
from .journal import Journal
from .learner import Trainable
from .replay import TaskReplay

SMALLER_STEPS = "smaller steps, for example --set critic_learning_rate=1e-4 --set tau=0.002"
DIVERGED = "diverged.json"  # in the folder of a seed whose last training was stopped: metric, value, step, bound
Progress = Callable[[int, int, Mapping[str, float]], None]  # (step, of steps, metrics; empty between log rows)


class Training:
    """Something that learns, its data, its random states, its folder."""

    def __init__(
        self,
        folder: Path,
        who: str,
        learner: Trainable,
        replay: TaskReplay,
        generator: torch.Generator,
        total_steps: int,
        log_every: int,
        checkpoint_every: int,
        value_bound: float = math.inf,
    ) -> None:
        """`who` begins error messages, for example "seed 0"; action values beyond `value_bound` stop the training."""
        self.folder, self.who, self.learner, self.replay = folder, who, learner, replay
        self.generators = {"training": generator}
        self.total_steps, self.log_every, self.checkpoint_every = total_steps, log_every, checkpoint_every
        self.value_bound = value_bound

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; returns its step or 0. Raises `FocalError` when it is damaged."""
        checkpoints = list_checkpoints(self.folder / "checkpoints")
        if not checkpoints:
            return 0
        return load_checkpoint(checkpoints[-1], self.learner, self.generators)

    def run_from(self, step: int, progress: Progress | None = None) -> None:
        """Take the remaining steps. Raises `DivergedError` when a metric is not finite or a value passes its bound."""
        if step >= self.total_steps:
            return
        (self.folder / DIVERGED).unlink(missing_ok=True)
        journal = Journal(self.folder, step)
        try:
            while step < self.total_steps:
                phase = self.phase(step)
                metrics = self.learner.train_step(self.replay, step, self.generators["training"])
                step += 1
                last = step == self.total_steps
                logs, saves = (last or step % every == 0 for every in (self.log_every, self.checkpoint_every))
                numbers: dict[str, float] = {}
                if logs or saves or self.replay.device.type == "cpu":  # elsewhere each look waits for the device
                    numbers = _floats(metrics)
                    if logs:
                        numbers |= {**value_drift(numbers, step, journal.last), **self.describe(step)}
                    self._refuse_divergence(numbers, step)
                if logs:
                    journal.write("metrics", step, numbers, phase)
                self.after_step(step, phase, journal)
                if saves:
                    self._save(journal, step)
                if progress:
                    progress(step, self.total_steps, numbers if logs else {})
        finally:
            journal.close()

    def phase(self, step: int) -> str:
        """Name what trains after `step` steps, for the log; nothing to say here."""
        return ""

    def describe(self, step: int) -> Mapping[str, float]:
        """Return further numbers for the log row at `step`; here none."""
        return {}

    def advice(self) -> str:
        """Say what else than smaller steps holds values down, ending with a comma; here nothing."""
        return ""

    def smaller_steps(self, metric: str) -> str:
        """Say which settings make the steps smaller of what `metric` is logged for."""
        return SMALLER_STEPS

    def after_step(self, step: int, phase: str, journal: Journal) -> None:
        """Do what comes after a step and before its checkpoint; here nothing."""

    def _save(self, journal: Journal, step: int) -> None:
        sums = {
            f"{name} weights": torch.stack([tensor.detach().sum() for tensor in network.parameters()]).sum()
            for name, network in self.learner.networks.items()
        }
        self._refuse_divergence(_floats({**sums, **self.learner.scalars}), step)
        journal.sync()
        save_checkpoint(self.folder / "checkpoints", step, self.learner, self.generators)

    def _refuse_divergence(self, numbers: Mapping[str, float], step: int) -> None:
        """Raise `DivergedError` for a number that is not finite, or an action value beyond the bound."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                found = f"{name} became {value} at step {step}"
                remedy = f"with {self.smaller_steps(name)}"
            elif name == "critic/value_largest" and value > self.value_bound:
                found = f"values diverge: {name} is {value:.3g} at step {step}, above the bound {self.value_bound:.3g}"
                remedy = f"with {self.advice()}{self.smaller_steps(name)}, or --set value_limit=NUMBER"
            else:
                continue
            # a value that is not finite is told by the message alone: JSON has no word for it
            stop = {"metric": name, "value": value if math.isfinite(value) else None, "step": step}
            write_json(self.folder / DIVERGED, {**stop, "bound": min(self.value_bound, sys.float_info.max)})
            kept = list_checkpoints(self.folder / "checkpoints")
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
            raise DivergedError(f"{self.who}: {found}; {where}; train under another --name {remedy}")


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring scalars () over from the device in one piece."""
    values = torch.stack([value.detach() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


@contextmanager
def only_process(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder's lock. Raises `FocalError` where another process still has it after `patience` seconds."""
    held = f"another process trains in {folder}; wait for it, or choose another --seed"
    with locked(folder / ".lock", patience, held):
        yield
