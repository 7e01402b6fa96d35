"""MBML's first stage, found or made: trained once per data and settings, shared by all seeds of all runs in a folder.

RUNS/teachers/FAMILY-HASH/   HASH of what decides it: data, and the settings of the first stage
  teachers.json              that, readable
  checkpoints/, metrics.jsonl, tensorboard/    as in a seed's folder
  predictions.safetensors    what every task's ensembles say of every task's transitions; its sha256 is in
  predictions.json
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import FocalError
from ..files import write_json
from ..settings import to_dict
from .checkpoint import list_checkpoints, load_networks
from .diagnostics import value_bound
from .files import read_json, sha256, write_bytes
from .mbml import MbmlSettings
from .mbml_teachers import Predictions, Teachers
from .policies import read_tensors
from .replay import TaskReplay, TrainingData
from .runs import Run, seeded_generator
from .training import Progress, Training, only_process

FORMAT = "focal-teachers/1"
_INITIAL, _TRAINING, _POOL = 3, 4, 5  # streams of the first stage's seed


def first_stage(
    runs: Path, run: Run, data: TrainingData, replay: TaskReplay, progress: Progress | None = None
) -> tuple[Teachers, Predictions]:
    """Return the trained teachers and their predictions, on the replay's device; trains what is missing.

    `replay` holds `data`'s tasks under the run's settings and transform. Where another process is at it, waits for it.
    Raises `FocalError` for a damaged file, naming it and the way out, or when the training diverges.
    """
    settings = run.settings
    assert isinstance(settings, MbmlSettings)
    folder = teachers_folder(runs, run, data)
    folder.mkdir(parents=True, exist_ok=True)
    seed = settings.teachers.seed
    with only_process(folder, patience=math.inf):
        write_json(folder / "teachers.json", _identity(run, data))
        teachers = Teachers(
            settings.teachers,
            settings.discount,
            settings.tau,
            settings.transitions_vary,
            len(replay),
            run.transform.dim,
            run.act_dim,
            seeded_generator(seed, _INITIAL),
            replay.device,
        )
        training = _TeachersTraining(
            folder,
            "the first stage of MBML",
            teachers,
            replay,
            seeded_generator(seed, _TRAINING, device=replay.device),
            teachers.total_steps,
            settings.log_every,
            settings.checkpoint_every,
            value_bound(settings, replay.rewards.abs().max().item()),
        )
        if is_trained(folder, teachers.total_steps):  # its random states, which fit one device only, are not needed
            load_networks(list_checkpoints(folder / "checkpoints")[-1], teachers.networks)
        else:
            training.run_from(training.resume(), progress)
        return teachers, _predictions(folder, teachers, run, replay, seed)


class _TeachersTraining(Training):
    """The first stage under way; the learning rates of its networks are settings of their own."""

    def smaller_steps(self, metric: str) -> str:
        """Name the learning rate of the ensemble that `metric` is of, or of BCQ, a tenth of what it was."""
        assert isinstance(self.learner, Teachers)
        settings, group = self.learner.settings, re.split("[ /]", metric)[0]  # "rewards/loss", "rewards weights"
        ensembles = {"rewards": settings.rewards, "transitions": settings.transitions}
        if group in ensembles:
            return f"--set teachers.{group}.learning_rate={ensembles[group].learning_rate / 10:g}"
        return f"--set teachers.learning_rate={settings.learning_rate / 10:g}"


def teachers_folder(runs: Path, run: Run, data: TrainingData) -> Path:
    """Return where the first stage of an MBML run on `data` is kept; `runs` is the folder of the run folders."""
    text = json.dumps(_identity(run, data), sort_keys=True)
    return runs / "teachers" / f"{run.family}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def first_stage_is_there(runs: Path, run: Run, data: TrainingData) -> bool:
    """Tell whether the first stage of an MBML run on `data` is finished."""
    return (teachers_folder(runs, run, data) / "predictions.json").exists()


def is_trained(folder: Path, total_steps: int) -> bool:
    """Tell whether the last checkpoint in `folder` is of the last step."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    return bool(checkpoints) and int(checkpoints[-1].name.removeprefix("step_")) >= total_steps


def _identity(run: Run, data: TrainingData) -> dict[str, Any]:
    """What decides the first stage, and nothing that does not."""
    settings = to_dict(run.settings)
    names = ("teachers", "discount", "tau", "transitions_vary", "context_reward")
    return {
        "format": FORMAT,
        "family": run.family,
        "content_hash": run.content_hash,
        "quality": run.source.quality,
        "task_indices": list(run.task_indices),
        "transitions": [len(task.rows) for task in data.tasks],
        "observation_transform": run.transform.to_json(),
        "settings": {name: settings[name] for name in names},
    }


def _predictions(folder: Path, teachers: Teachers, run: Run, replay: TaskReplay, seed: int) -> Predictions:
    description = folder / "predictions.json"
    if description.exists():
        return _load_predictions(folder, teachers, run, replay)
    scale = torch.tensor(run.transform.scale, device=replay.device)
    found = teachers.predict_pool(replay, scale, seeded_generator(seed, _POOL, device=replay.device))
    tensors = {
        field.name: tensor.cpu().contiguous()
        for field in dataclasses.fields(found)
        if (tensor := getattr(found, field.name)) is not None
    }
    content = safetensors.torch.save(tensors)
    write_bytes(folder / "predictions.safetensors", content)
    write_json(description, {"format": FORMAT, "sha256": sha256(content)})
    return found


def _load_predictions(folder: Path, teachers: Teachers, run: Run, replay: TaskReplay) -> Predictions:
    remedy = f"to make it again: rm '{folder}'/predictions.* and give the same command"
    path, entry = folder / "predictions.safetensors", read_json(folder / "predictions.json", remedy)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FocalError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if sha256(content) != entry.get("sha256"):
        raise FocalError(f"{path} differs from its sha256 in predictions.json: cut or altered; {remedy}")
    tensors = {name: tensor.to(replay.device) for name, tensor in read_tensors(content, path, remedy).items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != _shapes(teachers, run.transform.dim):
        raise FocalError(f"{path} does not hold the predictions of these settings; {remedy}")
    optional: dict[str, Tensor | None] = {"next_observation": None, "next_observation_std": None}
    return Predictions(**{**optional, **tensors})  # type: ignore[arg-type]


def _shapes(teachers: Teachers, dim: int) -> dict[str, tuple[int, ...]]:
    tasks, pool = teachers.tasks, teachers.settings.pool
    pairs = (tasks, tasks, pool)
    shapes: dict[str, tuple[int, ...]] = {"steps": (tasks, pool), "reward": pairs, "reward_std": pairs}
    if teachers.transitions is not None:
        shapes |= {"next_observation": (*pairs, dim), "next_observation_std": pairs}
    return shapes
