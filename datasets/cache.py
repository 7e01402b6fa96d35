"""Chosen episodes as raw memory-mapped files: for collections that do not fit into memory, and for the next run.

    CACHE/3f9a...e1/          sha256 of the task's content hash and the selection
      arrays                  every array one after the other, each from a multiple of 64 bytes on
      index.json              where each one begins, its type and shape

An entry is written under a temporary name, synced and renamed, so it is whole or not there. Its arrays have the content
hashes that its name stands for: those were computed, so that no collection can put other data in the place of one that
is honest. It belongs to the machine and the user that made it, unlike a bundle; deleting any of it is safe.
"""

import json
import mmap
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .episodes import PER_EPISODE, Array, Episodes
from .sources import sha256_of
from .storage import (
    canonical_json,
    make_folder,
    new_folder,
    reading,
    remove_temporaries,
    to_json,
    write_file,
)
from .tasks import TaskEntry

_STEPS = ("observations", "actions", "rewards")
_INFO = "infos/"
_ALIGNED = 64  # a cache line; also more than any type's own alignment


def load_cached(cache: Path, entry: TaskEntry, selection: Any, read: Callable[[], Episodes | None]) -> Episodes | None:
    """Return episodes of `entry` memory-mapped read-only from `cache`, filling it from `read()` where needed.

    `selection` is the dataclass that says which episodes `read()` gives, checked against the content hashes of `entry`;
    None, no such episode, is not kept. Raises `FocalError` when the store is damaged, the disk is full or a cache entry
    is cut short.
    """
    folder = cache / cache_key(entry, selection)
    if not folder.is_dir():
        episodes = read()
        if episodes is None:
            return None
        make_folder(cache)
        remove_temporaries(cache, folder.name)
        with new_folder(folder, keep_first=True) as temporary:
            _write(temporary, episodes)
    return _open(folder)


def cache_key(entry: TaskEntry, selection: Any) -> str:
    """Name of a cache entry: the same data under the same selection, wherever the collection lies."""
    conditions = {name: str(value) for name, value in asdict(selection).items()}
    return sha256_of(canonical_json(["checked", entry.content_hash, conditions]))


def _write(folder: Path, episodes: Episodes) -> None:
    arrays = {name: getattr(episodes, name) for name in (*_STEPS, *PER_EPISODE)}
    arrays |= {f"{_INFO}{name}": values for name, values in episodes.infos.items()}
    index: dict[str, Any] = {}
    with open(folder / "arrays", "xb") as file:
        for name, values in arrays.items():
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            index[name] = {"place": file.tell(), "type": values.dtype.str, "shape": list(values.shape)}
            file.write(np.ascontiguousarray(values).data)
    write_file(folder / "index.json", to_json(index))


def _open(folder: Path) -> Episodes:
    with reading(folder):
        try:
            index = json.loads((folder / "index.json").read_text())
            with open(folder / "arrays", "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays = {name: _array(memory, **facts) for name, facts in index.items()}
            infos = {name.removeprefix(_INFO): values for name, values in arrays.items() if name.startswith(_INFO)}
            return Episodes(infos=infos, **{name: arrays[name] for name in (*_STEPS, *PER_EPISODE)})
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise FocalError(
                f"cache entry {folder} is damaged ({reason}); delete it: rm -r {shlex.quote(str(folder))}"
            ) from error


def _array(memory: mmap.mmap, place: int, type: str, shape: list[int]) -> Array:
    return np.frombuffer(memory, type, int(np.prod(shape)), place).reshape(shape)
