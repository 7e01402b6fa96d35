"""Meta-training, composed: data in, run folder out, exact resume. Evaluation is handed in as a callable."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .agent import Agent
from .checkpoint import list_checkpoints
from .diagnostics import embedding_metrics, value_bound
from .journal import Journal
from .learner import Learner
from .mbml import Mbml, MbmlSettings
from .mbml_first_stage import first_stage
from .methods import METHODS
from .replay import TaskReplay, TrainingData
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
from .settings import ControlSettings, TrainSettings
from .training import Progress, Training, only_process

__all__ = ["Evaluate", "Progress", "RunSource", "load_agent", "train"]

Evaluate = Callable[[Agent, int], Mapping[str, Any]]  # (agent, step) -> numbers, and lists of them, by name


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
    patience: float = 0.0,
) -> Agent:
    """Train one seed of a run to the end and return its agent.

    `evaluate` must leave the agent and torch's generators alone (draw from its own). With `resume` a run that was
    killed continues from its last checkpoint and, on the CPU with the same number of threads, ends bit-identical to one
    that never was, logs included but for fields under "time/"; a finished run returns at once. MBML's first stage is
    taken from beside the run folder, or trained there. `patience` is how many seconds to wait for another process that
    trains this seed. Raises `UsageError` when the seed was already started and `resume` is off, `FocalError` when the
    folder is of another run, a checkpoint is damaged, or a metric stops being finite (the last good checkpoint stays).
    """
    source = source or RunSource()
    source = dataclasses.replace(source, seeds=source.seeds or (seed,))
    run = write_run(run_dir, describe_run(data, settings, source))
    folder = seed_folder(run_dir, seed)
    folder.mkdir(exist_ok=True)
    with only_process(folder, patience):
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints and not resume:
            raise UsageError(f"{folder} is already trained to step {int(checkpoints[-1].name[5:])} of "
                             f"{settings.total_steps}; to continue it, add --resume")  # fmt: skip
        replay = TaskReplay(data.tasks, run.transform, run.settings, device)
        learner = new_learner(run_dir, run, data, replay, seed)
        training = _SeedTraining(folder, seed, run, learner, replay, evaluate)
        training.run_from(training.resume(), progress)
    return learner.agent


def new_learner(run_dir: Path, run: Run, data: TrainingData, replay: TaskReplay, seed: int) -> Learner:
    """Make the untrained method of one seed; MBML's first stage is found or trained before that."""
    settings, sizes, generator = run.settings, (run.transform, run.act_dim), initial_generator(seed)
    if isinstance(settings, MbmlSettings):
        teachers, predictions = first_stage(run_dir.parent, run, data, replay)
        return Mbml(settings, *sizes, generator, teachers, predictions, replay.device)
    return METHODS[settings.algo].learner(settings, *sizes, generator, replay.device)


class _SeedTraining(Training):
    """One seed under way; with the spread of its embeddings and, now and then, a meta-test."""

    def __init__(
        self, folder: Path, seed: int, run: Run, learner: Learner, replay: TaskReplay, evaluate: Evaluate | None
    ) -> None:
        settings = run.settings
        bound = value_bound(settings, replay.rewards.abs().max().item())
        generator = training_generator(seed, replay.device)
        every = settings.log_every, settings.checkpoint_every
        super().__init__(folder, f"seed {seed}", learner, replay, generator, settings.total_steps, *every, bound)
        self.seed, self.settings, self.task_indices = seed, settings, run.task_indices
        self.agent, self.evaluate = learner.agent, evaluate

    def phase(self, step: int) -> str:
        """Name what trains: "encoder", "control" or both, "joint"."""
        return self.settings.phase(step)

    def describe(self, step: int) -> Mapping[str, float]:
        """Return the spread of the embeddings."""
        return embedding_metrics(self._embed_tasks(step))

    def advice(self) -> str:
        """Name the behaviour regularisation that acts on the values, where the method has it."""
        if not isinstance(self.settings, ControlSettings):
            return ""
        if self.settings.regularisation.kind == "value-penalty":
            return "another --set regularisation.alpha=NUMBER, "
        return "--set regularisation.kind=value-penalty, "

    def after_step(self, step: int, phase: str, journal: Journal) -> None:
        """Log the embeddings and the meta-test, every `eval_every` steps and at the end."""
        if step % self.settings.eval_every and step != self.total_steps:
            return
        journal.write_embeddings(step, self.task_indices, self._embed_tasks(step))
        if self.evaluate and phase != "encoder":
            journal.write("evaluation", step, self.evaluate(self.agent, step))

    def _embed_tasks(self, step: int) -> Tensor:
        """Return embeddings (K, L) of all training tasks, one fresh context each."""
        generator = diagnostics_generator(self.seed, step, self.replay.device)
        tasks = torch.arange(len(self.replay), device=self.replay.device)
        return self.agent.embed(self.replay.sample_context(tasks, self.settings.context_size, generator))
