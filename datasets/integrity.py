"""The one integrity checker, behind `focal-cli data verify`, bundles and the tests.

`open_collection` checks structure in milliseconds; this reads every byte as well: sha256 of every file, hash of every
array, everything that can be computed again (returns, counts, labels, held-out draw, evaluation returns, statistics),
and that actions and episodes are within the bounds of every family.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .collection import Collection
from .episodes import LARGEST_ACTION, Episodes
from .opening import open_collection
from .sources import side_by_side
from .storage import AGAIN
from .store import array_hash, episodes_of, evaluation_arrays
from .tasks import TaskEntry, count_levels, recomputed_labels, statistics_of, with_mixed

Progress = Callable[[int, int], None]
_LABEL_ARRAYS = {"qualities": "episodes/quality", "heldout": "episodes/heldout"}

_CORES = os.cpu_count() or 1
_MEMORY, _COPIES = 4 * 2**30, 4  # bytes for tasks verified side by side; what one takes, in its decoded arrays
_AT_ONCE = 8  # files hashed side by side: far away, they wait more than they compute


@dataclass(frozen=True)
class VerifyReport:
    """What was verified."""

    files: int
    bytes: int
    episodes: int
    transitions: int


def verify_collection(path: Path | str | Collection, progress: Progress | None = None) -> VerifyReport:
    """Verify every byte of a collection, given by its folder, its URL, or opened.

    Raises `FocalError` naming the first file, array or chunk that is wrong.

    `progress(done, total)` is called with bytes after every file and every task; each byte counts twice, once for its
    checksum and once for its content.
    """
    collection = path if isinstance(path, Collection) else open_collection(path)
    source = collection.source
    total = sum(size for size, _ in collection.files.values())
    done = 0
    hashes = side_by_side(source.sha256, collection.files, _AT_ONCE)
    for (name, (size, sha256)), found in zip(collection.files.items(), hashes, strict=True):
        if found != sha256:
            raise FocalError(f"{source}: {_describe(name)} is damaged (sha256 differs from dataset.json); {AGAIN}")
        done += size
        if progress:
            progress(done, 2 * total)
    episodes = transitions = 0
    largest = max((entry.store.decoded_bytes for entry in collection.tasks), default=1)
    at_once = max(1, min(_CORES, _MEMORY // (_COPIES * largest)))
    for entry, _ in zip(collection.tasks, side_by_side(_verify_task, collection.tasks, at_once, at_once), strict=True):
        episodes += entry.store.sizes.episodes
        transitions += entry.store.sizes.steps
        done += sum(size for name, (size, _) in collection.files.items() if name.startswith(f"{entry.folder}/"))
        if progress:
            progress(done, 2 * total)
    if progress:
        progress(2 * total, 2 * total)
    return VerifyReport(len(collection.files), total, episodes, transitions)


def _verify_task(entry: TaskEntry) -> None:
    where = entry.store.where
    arrays = entry.store.read_arrays(dict.fromkeys(entry.store.layouts))
    for name, values in arrays.items():
        if (found := array_hash(values)) != entry.content[name]:
            raise FocalError(
                f"{where}: array {name} has content hash {found[:12]}, expected {entry.content[name][:12]}; {AGAIN}"
            )
    episodes = episodes_of(arrays)
    episodes.validate(where)
    _check_bounds(entry, episodes)
    sizes, counts = entry.store.sizes, np.unique(episodes.sac_steps, return_counts=True)[1]
    if (len(counts), int(counts.max())) != (sizes.checkpoints, sizes.rollouts):
        raise FocalError(  # before an array of what the episodes say is made: only the declared sizes were bounded
            f"{where}: its episodes are of {len(counts)} checkpoints with at most {counts.max()} each, expected "
            f"{sizes.checkpoints} and {sizes.rollouts} as declared; {AGAIN}"
        )
    labels = recomputed_labels(episodes, entry.record.references, entry.rule, entry.heldout_seeds, entry.labels)
    computed = {**{_LABEL_ARRAYS[name]: values for name, values in labels.items()}, **evaluation_arrays(episodes)}
    for name, values in computed.items():
        if not np.array_equal(arrays[name], values, equal_nan=values.dtype.kind == "f"):
            raise FocalError(f"{where}: array {name} does not follow from the returns, the rule and the seed; {AGAIN}")
    if with_mixed(count_levels(episodes)) != dict(entry.counts):
        raise FocalError(f"{where}: the counts are not those of its episodes; {AGAIN}")
    stated = entry.store.attributes.get("statistics")
    for name, described in statistics_of(arrays).items():
        if not _same_statistics(described, stated, name):
            raise FocalError(f"{where}: the statistics of {name} are not those of its values; {AGAIN}")


def _check_bounds(entry: TaskEntry, episodes: Episodes) -> None:
    """Refuse what no episode of a family can be: other returns than its rewards add up to, actions outside [-1, 1]."""
    where = entry.store.where
    if len(wrong := np.flatnonzero(episodes.misstated)):
        stated, computed = episodes.returns[wrong[0]], episodes.reward_sums[wrong[0]]
        raise FocalError(
            f"{where}: episode {wrong[0]} has return {stated:g}, expected {computed:g}, the sum of its rewards; {AGAIN}"
        )
    if not (largest := float(np.abs(episodes.actions).max())) <= LARGEST_ACTION:
        raise FocalError(f"{where}: actions of up to {largest:g}, expected -1 to 1; {AGAIN}")
    if (longest := int(episodes.lengths.max())) > entry.record.horizon:
        raise FocalError(
            f"{where}: an episode of {longest} steps, expected at most {entry.record.horizon}, its horizon; {AGAIN}"
        )


def _same_statistics(computed: Mapping[str, Any], stated: Any, name: str) -> bool:
    """Whether stated statistics are the computed ones, up to the order in which a machine adds."""
    found = stated.get(name) if isinstance(stated, dict) else None
    if not isinstance(found, dict) or sorted(found) != sorted(computed) or found["count"] != computed["count"]:
        return False
    scale = np.maximum(np.abs(computed["min"]), np.abs(computed["max"]))
    for key, power in (("mean", 1), ("m2", 2), ("min", 1), ("max", 1)):
        values = found[key]
        if not isinstance(values, list) or len(values) != len(scale):
            return False
        if not all(isinstance(value, int | float) for value in values):
            return False
        allowed = 1e-6 * scale**power * (computed["count"] if key == "m2" else 1)
        if not (np.abs(np.subtract(values, computed[key])) <= allowed).all():
            return False
    return True


def _describe(name: str) -> str:
    """`tasks/task_0003.zarr/rewards/c/0 (task 3, array rewards, chunk 0)`."""
    parts = name.split("/")
    if parts[0] != "tasks" or "c" not in parts:
        return name
    index = int(parts[1].removeprefix("task_").removesuffix(".zarr"))
    chunk = parts.index("c")
    return f"{name} (task {index}, array {'/'.join(parts[2:chunk])}, chunk {parts[chunk + 1]})"
