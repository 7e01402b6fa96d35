"""Chosen episodes as raw .npy files, memory-mapped: for collections that do not fit into memory, and for the next run.

    CACHE/3f9a...e1/          sha256 of the task's content hash and the selection
      observations.npy  actions.npy  rewards.npy  infos.sparse_reward.npy     as in the store
      episodes.npy                                                            a record per episode

An entry is written under a temporary name, synced and renamed, so it is whole or not there. It belongs to the machine
and the user that made it, unlike a bundle; deleting any of it is safe.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .episodes import PER_EPISODE, Episodes
from .sources import sha256_of
from .storage import canonical_json, make_folder, new_folder, reading, remove_temporaries
from .tasks import TaskEntry

_STEPS = ("observations", "actions", "rewards")
_TABLE = np.dtype(list(PER_EPISODE.items()))


def load_cached(cache: Path, entry: TaskEntry, selection: Any, read: Callable[[], Episodes | None]) -> Episodes | None:
    """Return episodes of `entry` memory-mapped read-only from `cache`, filling it from `read()` where needed.

    `selection` is the dataclass that says which episodes `read()` gives; None, no such episode, is not kept. Raises
    `FocalError` when the store is damaged, the disk is full or a cache entry is cut short.
    """
    folder = cache / cache_key(entry, selection)
    if not folder.is_dir():
        episodes = read()
        if episodes is None:
            return None
        make_folder(cache)
        remove_temporaries(cache, folder.name)
        with new_folder(folder) as temporary:
            for name, values in _arrays(episodes).items():
                np.save(temporary / f"{name}.npy", values, allow_pickle=False)
    return _open(folder, entry)


def cache_key(entry: TaskEntry, selection: Any) -> str:
    """Name of a cache entry: the same data under the same selection, wherever the collection lies."""
    conditions = {name: str(value) for name, value in asdict(selection).items()}
    return sha256_of(canonical_json([entry.content_hash, conditions]))


def _arrays(episodes: Episodes) -> dict[str, np.ndarray]:
    table = np.empty(episodes.num_episodes, _TABLE)
    for name in PER_EPISODE:
        table[name] = getattr(episodes, name)
    infos = {f"infos.{name}": values for name, values in episodes.infos.items()}
    return {"episodes": table, **{name: getattr(episodes, name) for name in _STEPS}, **infos}


def _open(folder: Path, entry: TaskEntry) -> Episodes:
    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    with reading(folder):
        try:
            table = np.load(folder / "episodes.npy", allow_pickle=False)
            return Episodes(
                infos={name: load(f"infos.{name}") for name in entry.store.attributes["infos"]},
                **{name: load(name) for name in _STEPS},
                **{name: np.ascontiguousarray(table[name]) for name in PER_EPISODE},
            )
        except (ValueError, EOFError, IndexError) as error:
            raise FocalError(
                f"cache entry {folder} is damaged ({' '.join(str(error).split())[:100]}); delete it: rm -r {folder}"
            ) from error
