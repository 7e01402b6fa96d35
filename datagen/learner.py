"""Agents in training on disk, without a pickle: what a killed command continues from.

    learner.safetensors   networks, optimisers, temperatures; and how far training got, as JSON in its header.
                          Replaced last and atomically: the commit point of a checkpoint
    replay_0001.npz       the replay rows that chunk 1 of training added; never changed

The folder is one task's with stable-baselines3, and a fleet's with the other engine.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FocalError
from ..files import atomic_path

LEARNER_FILE = "learner.safetensors"


def save_learner(folder: Path, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
    """Replace the learner file. `progress` holds JSON values, among them the chunk reached."""
    with atomic_path(folder / LEARNER_FILE) as path:
        path.touch()  # where nothing can be written, an OSError that names the place, which safetensors' is not
        save_file(dict(tensors), path, metadata={"learner": json.dumps(progress)})


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Return how far training got, or None where nothing was saved. Raises `FocalError` for a damaged file."""
    if not (folder / LEARNER_FILE).exists():
        return None
    with explain_damage(folder), safe_open(folder / LEARNER_FILE, framework="pt") as file:
        return json.loads(file.metadata()["learner"])


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the learner file's tensors."""
    with safe_open(folder / LEARNER_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def save_rows(folder: Path, chunk: int, rows: Mapping[str, np.ndarray]) -> None:
    """Write the replay rows of one chunk."""
    with atomic_path(_rows_file(folder, chunk)) as path, open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **rows)


def read_rows(folder: Path, chunk: int) -> dict[str, np.ndarray]:
    """Return the replay rows of one chunk."""
    with np.load(_rows_file(folder, chunk), allow_pickle=False) as rows:
        return dict(rows)


def _rows_file(folder: Path, chunk: int) -> Path:
    return folder / f"replay_{chunk:04d}.npz"


@contextmanager
def explain_damage(folder: Path) -> Iterator[None]:
    """Turn whatever a missing or damaged file raises into a `FocalError`: starting anew gives the same episodes."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, AssertionError, zipfile.BadZipFile, SafetensorError) as error:
        raise FocalError(
            f"{folder} is damaged ({' '.join(str(error).split())[:100]}); "
            f"type rm -r {folder}, then run the same command again: its training starts anew"
        ) from error
