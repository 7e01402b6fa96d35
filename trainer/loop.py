"""Meta-training, composed: data in, run folder out, exact resume. Evaluation is handed in as a callable."""

import dataclasses
import fcntl
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FocalError, UsageError
from .agent import Agent
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .diagnostics import embedding_metrics, value_bound, value_drift
from .focal import Focal
from .journal import Journal
from .replay import TaskReplay, TrainingData, sample_meta_batch
from .runs import (
    Run,
    RunSource,
    describe_run,
    diagnostics_generator,
    initial_generator,
    load_agent,
    seed_folder,
    training_generator,
    write_run,
)
from .settings import TrainSettings

__all__ = ["Evaluate", "Progress", "RunSource", "load_agent", "train"]

Evaluate = Callable[[Agent, int], Mapping[str, float]]  # (agent, step) -> results by name
Progress = Callable[[int, int, Mapping[str, float]], None]  # (step, of steps, metrics; empty between log rows)


def train(
    run_dir: Path,
    data: TrainingData,
    settings: TrainSettings,
    seed: int,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    source: RunSource | None = None,
    device: torch.device | str = "cpu",
) -> Agent:
    """Train one seed of a run to the end and return its agent.

    `evaluate` must leave the agent and torch's generators alone (draw from its own). With `resume` a run that was
    killed continues from its last checkpoint and, on the CPU with the same number of threads, ends bit-identical to one
    that never was, logs included but for fields under "time/"; a finished run returns at once. Raises `UsageError` when
    the seed was already started and `resume` is off, `FocalError` when the folder is of another run, a checkpoint is
    damaged, or a metric stops being finite (the last good checkpoint stays).
    """
    source = source or RunSource()
    source = dataclasses.replace(source, seeds=source.seeds or (seed,))
    run = write_run(run_dir, describe_run(data, settings, source))
    folder = seed_folder(run_dir, seed)
    folder.mkdir(exist_ok=True)
    with _only_process(folder):
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints and not resume:
            raise UsageError(f"{folder} is already trained to step {int(checkpoints[-1].name[5:])} of "
                             f"{settings.total_steps}; to continue it, add --resume")  # fmt: skip
        trainer = _SeedTrainer(folder, run, data, seed, torch.device(device))
        step = load_checkpoint(checkpoints[-1], trainer.focal, trainer.generators) if checkpoints else 0
        trainer.run_from(step, evaluate, progress)
    return trainer.focal.agent


class _SeedTrainer:
    """One seed under way: the method, its data, its random states, its folder."""

    def __init__(self, folder: Path, run: Run, data: TrainingData, seed: int, device: torch.device) -> None:
        self.folder, self.settings, self.seed = folder, run.settings, seed
        self.generators = {"training": training_generator(seed, device)}
        self.focal = Focal(run.settings, run.transform, run.act_dim, initial_generator(seed), device)
        self.replay = TaskReplay(data.tasks, run.transform, run.settings, device)
        self.task_indices = data.task_indices
        self.bound = value_bound(run.settings, self.replay.rewards.abs().max().item())

    def run_from(self, step: int, evaluate: Evaluate | None, progress: Progress | None) -> None:
        """Take the remaining steps; log, evaluate and checkpoint on the way."""
        settings, generator = self.settings, self.generators["training"]
        total = settings.total_steps
        if step >= total:
            return
        journal = Journal(self.folder, step)
        try:
            while step < total:
                rate, control = settings.encoder_rate(step), settings.trains_control(step)
                batch = sample_meta_batch(self.replay, settings, generator, rate > 0, control)
                metrics = self.focal.update(batch, generator, rate)
                step += 1
                last = step == total
                logs, saves, evaluates = (
                    last or step % every == 0
                    for every in (settings.log_every, settings.checkpoint_every, settings.eval_every)
                )
                numbers: dict[str, float] = {}
                if logs or saves or self.replay.device.type == "cpu":  # elsewhere each look waits for the device
                    numbers = _floats(metrics)
                    if logs:
                        numbers |= value_drift(numbers, step, journal.last) | embedding_metrics(self._embed_tasks(step))
                    self._refuse_divergence(numbers, step)
                if logs:
                    phase = "joint" if rate > 0 and control else "control" if control else "encoder"
                    journal.write("metrics", step, numbers, phase)
                if evaluates:
                    journal.write_embeddings(step, self.task_indices, self._embed_tasks(step))
                if evaluates and evaluate and control:
                    results = evaluate(self.focal.agent, step)
                    journal.write("evaluation", step, results)
                if saves:
                    self._save(journal, step)
                if progress:
                    progress(step, total, numbers if logs else {})
        finally:
            journal.close()

    def _save(self, journal: Journal, step: int) -> None:
        sums = {
            f"{name} weights": torch.stack([tensor.detach().sum() for tensor in network.parameters()]).sum()
            for name, network in self.focal.networks.items()
        }
        self._refuse_divergence(_floats(sums | self.focal.scalars), step)
        journal.sync()
        save_checkpoint(self.folder / "checkpoints", step, self.focal, self.generators)

    def _embed_tasks(self, step: int) -> Tensor:
        """Return embeddings (K, L) of all training tasks, one fresh context each."""
        generator = diagnostics_generator(self.seed, step, self.replay.device)
        tasks = torch.arange(len(self.replay), device=self.replay.device)
        return self.focal.embed(self.replay.sample_context(tasks, self.settings.context_size, generator))

    def _refuse_divergence(self, numbers: Mapping[str, float], step: int) -> None:
        """Raise `FocalError` for a number that is not finite, or an action value beyond the bound."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                found = f"{name} became {value} at step {step}"
                remedy = "with smaller steps, for example --set critic_learning_rate=1e-4 --set tau=0.002"
            elif name == "critic/value_largest" and value > self.bound:
                found = f"values diverge: {name} is {value:.3g} at step {step}, above the bound {self.bound:.3g}"
                remedy = "with --set regularisation.kind=value-penalty, smaller steps, or --set value_limit=NUMBER"
            else:
                continue
            kept = list_checkpoints(self.folder / "checkpoints")
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
            raise FocalError(f"seed {self.seed}: {found}; {where}; train under another --name {remedy}")


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring scalars () over from the device in one piece."""
    values = torch.stack([value.detach() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the seed's lock, which dies with the process, however it dies."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FocalError(f"another process trains in {folder}; wait for it, or choose another --seed") from None
        yield
