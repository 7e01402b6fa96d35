"""The run folder, and rebuilding a trained agent from it alone.

RUN/settings.json      resolved settings, family, collection, quality, seeds, observation transform, provenance
RUN/seed_0/            one trained network
  checkpoints/step_000002000/...
  metrics.jsonl        one row every log_every steps; fields under "time/" are wall-clock, all others reproduce
  evaluation.jsonl     one row every eval_every steps once the control networks train: meta-test, spread on test tasks
  embeddings.jsonl     one row every eval_every steps: an embedding of every training task
  tensorboard/
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import FocalError, UsageError
from ..files import write_json
from ..settings import flatten, to_dict
from .agent import Agent
from .checkpoint import list_checkpoints, load_networks
from .files import read_json
from .methods import find_method, saved_settings
from .replay import TrainingData, refuse_larger_context, training_transform
from .settings import TrainSettings, differences
from .transform import ObservationTransform

FORMAT = "focal-run/1"
_REMEDY = "start the run again under another name: focal-cli train ... --name OTHER"


@dataclass(frozen=True)
class RunSource:
    """What the caller knows of a run and the trainer only records: where its data came from, and who ran it."""

    collection: str = ""  # name of the collection
    collection_path: str = ""  # where it was when the run started
    quality: str = ""  # quality level trained on
    seeds: tuple[int, ...] = ()  # all seeds of the run; name them up front where several processes train at once
    provenance: Mapping[str, Any] = field(default_factory=dict)  # plain JSON: versions, commit, hardware, command
    test_context_size: int | None = None  # of the meta-tests during training, 0: as trained; None: an older run


@dataclass(frozen=True)
class Run:
    """The content of settings.json: enough to rebuild every network of the run."""

    settings: TrainSettings
    transform: ObservationTransform
    family: str
    task_indices: tuple[int, ...]
    obs_dim: int
    act_dim: int
    content_hash: str
    source: RunSource

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        source = self.source
        return {
            "format": FORMAT,
            "family": self.family,
            "collection": {
                "name": source.collection,
                "path": source.collection_path,
                "content_hash": self.content_hash,
                "task_indices": list(self.task_indices),
            },
            "quality": source.quality,
            "seeds": list(source.seeds),
            "obs_dim": self.obs_dim,
            "act_dim": self.act_dim,
            "settings": to_dict(self.settings),
            "test_context_size": source.test_context_size,
            "observation_transform": self.transform.to_json(),
            "provenance": dict(source.provenance),
        }


def describe_run(data: TrainingData, settings: TrainSettings, source: RunSource) -> Run:
    """Return the description of a run on `data`; fits the observation transform.

    Raises `UsageError` for settings, and `FocalError` for data, that cannot be trained on, before anything is written.
    """
    settings.check()
    refuse_larger_context(settings.context_size, min(len(task.rows) for task in data.tasks))
    transform = training_transform(data, settings)
    return Run(
        settings, transform, data.family, data.task_indices, data.obs_dim, data.act_dim, data.content_hash, source
    )


def refuse_other_run(run_dir: Path, run: Run) -> None:
    """Raise `FocalError` naming the first difference in settings, data or quality if `run_dir` is of another run."""
    path = run_dir / "settings.json"
    if path.exists():
        _refuse_differences(path, _identity(read_run(run_dir)), _identity(run))


def write_run(run_dir: Path, run: Run) -> Run:
    """Write settings.json, or, where it exists, check that it is of the same run and add the new seeds.

    Returns the run as saved. Raises `FocalError` naming the first difference in settings, data or quality.
    """
    path = run_dir / "settings.json"
    if path.exists():
        refuse_other_run(run_dir, run)
        saved = read_run(run_dir)
        seeds = tuple(sorted(set(saved.source.seeds) | set(run.source.seeds)))
        if seeds == saved.source.seeds:
            return saved
        size = saved.source.test_context_size
        size = run.source.test_context_size if size is None else size
        run = dataclasses.replace(saved, source=dataclasses.replace(saved.source, seeds=seeds, test_context_size=size))
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, run.to_json())
    return run


def read_run(run_dir: Path) -> Run:
    """Read settings.json. Raises `FocalError` when it is missing, damaged or of another format version."""
    path = run_dir / "settings.json"
    if not path.exists():
        raise _not_a_run(run_dir)
    values = read_json(path, _REMEDY)
    if values.get("format") != FORMAT:
        raise FocalError(f"{path} has format {values.get('format')!r}, expected {FORMAT!r}; {_REMEDY}")
    try:
        collection = values["collection"]
        source = RunSource(
            str(collection["name"]),
            str(collection["path"]),
            str(values["quality"]),
            tuple(int(seed) for seed in values["seeds"]),
            dict(values["provenance"]),
            values.get("test_context_size"),
        )
        return Run(
            settings=saved_settings(values["settings"]),
            transform=ObservationTransform.from_json(values["observation_transform"]),
            family=str(values["family"]),
            task_indices=tuple(int(index) for index in collection["task_indices"]),
            obs_dim=int(values["obs_dim"]),
            act_dim=int(values["act_dim"]),
            content_hash=str(collection["content_hash"]),
            source=source,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FocalError(f"{path} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from None
    except UsageError as error:
        raise FocalError(f"{path}: {error}; {_REMEDY}") from None


def _not_a_run(path: Path) -> FocalError:
    if (path / "dataset.json").exists():
        return FocalError(f"{path} is a collection, expected a run's folder; train on it: focal-cli train --collection "
                          f"{shlex.quote(str(path))} --data mixed")  # fmt: skip
    near = (path, path.parent, path.parent.parent)
    found = next((runs for folder in near if (runs := sorted(folder.glob("*/settings.json")))), [])
    there = ", ".join(str(run.parent) for run in found[:5]) + (", ..." if len(found) > 5 else "")
    what = f"{path} is no run's folder (it has no settings.json)" if path.exists() else f"no run at {path}"
    return FocalError(f"{what}; " + (f"name one of {there}" if found else "train one: focal-cli train --data mixed"))


def seed_folder(run_dir: Path, seed: int) -> Path:
    """Where one seed of a run lives."""
    return run_dir / f"seed_{seed}"


def only_seeds(tested: Iterable[int], run: Run) -> str:
    """Return what a test's file name ends in where not all seeds of the run were tested: "-only0+2"."""
    return "" if set(tested) == set(run.source.seeds) else f"-only{'+'.join(map(str, tested))}"


def load_agent(run_dir: Path, seed: int, device: torch.device | str = "cpu") -> Agent:
    """Rebuild the agent of one seed from its run folder alone, at its last checkpoint.

    Never from today's defaults: settings and transform are the saved ones. Raises `FocalError` naming what is missing
    or damaged and the next command.
    """
    run = read_run(run_dir)
    checkpoints = list_checkpoints(seed_folder(run_dir, seed) / "checkpoints")
    if not checkpoints:
        trained = sorted(path.name for path in run_dir.glob("seed_*")) or ["none"]
        raise FocalError(f"{run_dir} holds no checkpoint of seed {seed} (folders: {', '.join(trained)}); "
                         f"focal-cli train ... --seed {seed}")  # fmt: skip
    agent = _new_agent(run, torch.Generator(), device)
    load_networks(checkpoints[-1], agent.networks)
    return agent


def load_untrained_agent(run_dir: Path, seed: int, device: torch.device | str = "cpu") -> Agent:
    """Rebuild the agent of one seed as it was before its first gradient step: the "untrained" beside every result."""
    return _new_agent(read_run(run_dir), initial_generator(seed), device)


def _new_agent(run: Run, generator: torch.Generator, device: torch.device | str) -> Agent:
    return find_method(run.settings.algo).new_agent(run.settings, run.transform, run.act_dim, generator, device)


def initial_generator(seed: int) -> torch.Generator:
    """Return the generator (on the CPU, for every device) that decides the initial weights of a seed."""
    return seeded_generator(seed, 0)


def training_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator of everything that a seed draws while it trains."""
    return seeded_generator(seed, 1, device=device)


def diagnostics_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the generator of a seed's log row at `step`; it has no past, so logging more or less changes nothing."""
    return seeded_generator(seed, 2, step, device=device)


def seeded_generator(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of an independent stream of `seed`."""
    word = int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(word)


def _identity(run: Run) -> dict[str, Any]:
    """What must not change within a run folder; a collection may move, and seeds may be added."""
    values = run.to_json()
    identity = {name: values[name] for name in ("family", "quality", "settings", "observation_transform")}
    collection = values["collection"]
    return identity | {"content_hash": collection["content_hash"], "task_indices": collection["task_indices"]}


def _refuse_differences(path: Path, saved: dict[str, Any], found: dict[str, Any]) -> None:
    names = sorted(differences(found, saved), key=_causes_first)
    if names:
        first, was = names[0], _lookup(saved, names[0])
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        name = first.removeprefix("settings.")
        own = "its collection"
        if first == "quality":
            own = f"--data {was}"
        elif first == "settings.algo":
            own = f"--algo {was}"
        elif first != name:
            own = "--set " + shlex.quote(f"{name}={flatten(saved['settings']).get(name)}")
        raise FocalError(
            f"{path} is of another run: it has {name}={was}, this command asks for "
            f"{_lookup(found, first)}{more}; use its own ({own}), another --name, or another folder: --runs OTHER"
        )


def _causes_first(name: str) -> tuple[int, bool]:
    """Sort data before settings, and the observation transform, which follows from them, last; of the settings first
    those that others depend on."""
    causes = ("family", "quality", "content_hash", "task_indices", "settings", "observation_transform")
    return causes.index(name.split(".")[0]), name.rpartition(".")[2] not in ("algo", "kind", "schedule", "adaptive")


def _lookup(values: dict[str, Any], dotted: str) -> str:
    value: Any = values
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
