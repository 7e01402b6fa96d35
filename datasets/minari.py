"""Minari's layout: one data set per task (Minari has no task axis), which this module writes and reads.

    focal/walker-2d-params-task0003-v0/data/
      metadata.json       what Minari asks for; its entry "focal" is the export document (exporting.py)
      main_data.hdf5      episode_0/  observations (T+1, obs_dim)   actions (T, act_dim)
                                      rewards, terminations, truncations (T,)   infos/<name> (T+1,), row 0 of the reset
                                      attributes id, total_steps, seed; end, return, quality, sac_step, heldout

Only files are handled here: the minari package is not needed, and nothing a file names is made or run.
"""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import FocalError
from .collection import Collection
from .episodes import PER_EPISODE, Array, End, Episodes
from .exporting import TABLE, export_document, exported_from_json, table_of
from .foreign import (
    FamilyFacts,
    ImportTask,
    Notes,
    SourceTask,
    make_episodes,
    restored_ends,
    with_sparse_reward,
)
from .hdf5 import Group, Hdf5File
from .storage import MAX_JSON_BYTES, list_files, read_json, write_file
from .tasks import TaskEntry

MINARI_VERSION = "0.5.4"
"""The version whose layout this is."""
LOSSES = (
    "readers other than focal-cli see no task parameters or references (metadata.json keeps them under 'focal'), and "
    "recover_environment finds none: make it with gymnasium.make and the parameters",
)
NO_CUT = "Minari has no other mark for them (focal-cli restores them from the attribute 'end')"

_MAIN = "data/main_data.hdf5"


def write_task(folder: Path, collection: Collection, entry: TaskEntry, episodes: Episodes) -> None:
    """Write one task into `folder`. The file is made in memory first: a full disk is then noticed like any other."""
    name = re.sub(r"[^-_A-Za-z0-9]", "_", collection.name)
    identifier = f"focal/{name}-task{entry.index:04d}-v0"
    with h5py.File("in memory", "w", driver="core", backing_store=False, track_order=True) as file:
        _write_episodes(file, episodes)
        file.flush()
        image = file.id.get_file_image()
    sizes = entry.store.sizes
    metadata = {
        "dataset_id": identifier,
        "minari_version": MINARI_VERSION,
        "data_format": "hdf5",
        "total_episodes": episodes.num_episodes,
        "total_steps": episodes.num_steps,
        "dataset_size": round(len(image) / 1e6, 1),
        "observation_space": _box(sizes.observation_dim, np.inf),
        "action_space": _box(sizes.action_dim, 1.0),
        "author": list(collection.authors),
        "algorithm_name": str(entry.record.behaviour.get("algorithm", "")),
        "license": collection.licence,
        "description": f"Task {entry.index} of {collection.name} {collection.version}, a collection for offline "
        f"meta-reinforcement learning; family {collection.family}.",
        "focal": export_document(collection, entry),
    }
    write_file(folder / identifier / _MAIN, image)
    write_file(folder / identifier / "data" / "metadata.json", json.dumps(metadata, indent=2, allow_nan=False).encode())


def _write_episodes(file: h5py.File, episodes: Episodes) -> None:
    table = table_of(episodes)
    stops = np.cumsum(episodes.lengths, dtype=np.int64)
    for number, (stop, length) in enumerate(zip(stops.tolist(), episodes.lengths.tolist(), strict=True)):
        steps = slice(stop - length, stop)
        end = episodes.ends[number]
        flags = np.arange(length) == length - 1
        group = file.create_group(f"episode_{number}")
        group.attrs["id"], group.attrs["total_steps"] = number, length
        for name, values in table.items():
            group.attrs[name] = values[number]
        group["observations"] = episodes.observations[steps.start + number : stop + number + 1]
        group["actions"], group["rewards"] = episodes.actions[steps], episodes.rewards[steps]
        group["terminations"] = flags & (end == End.TERMINATED)
        group["truncations"] = flags & (end != End.TERMINATED)
        for name, values in episodes.infos.items():
            group[f"infos/{name}"] = np.concatenate([[np.float32(np.nan)], values[steps]])


def _box(width: int, bound: float) -> str:
    box = {"type": "Box", "dtype": "float32", "shape": [width], "low": [-bound] * width, "high": [bound] * width}
    return json.dumps(box)  # JSON within JSON, with -Infinity as Minari spells it


def list_tasks(source: Path) -> tuple[SourceTask, ...]:
    """Return the data sets in `source` (one data set, or a folder with any number of them), by path."""
    names = [name.removesuffix(_MAIN) for name in list_files(source) if f"/{name}".endswith(f"/{_MAIN}")]
    tasks = []
    for name in names:
        path = source / name / "data" / "metadata.json"
        metadata = read_json(path, MAX_JSON_BYTES)
        if metadata.get("data_format", "hdf5") != "hdf5":
            raise FocalError(f"{path}: data_format is {metadata['data_format']!r}, expected 'hdf5'")
        exported = None
        if "focal" in metadata:
            document = metadata["focal"] if isinstance(metadata["focal"], dict) else {}
            exported = exported_from_json(document, f"{path}: focal")
        tasks.append(SourceTask(name.rstrip("/") or ".", exported=exported))
    return tuple(tasks)


def read_task(source: Path, task: ImportTask, facts: FamilyFacts, notes: Notes) -> Episodes:
    """Read one data set. Raises `FocalError` for one that is no such data."""
    path = source / task.source.name / _MAIN
    exported = task.source.exported
    with Hdf5File(path) as file:
        count = len(names := file.root.names())
        if set(names) != {f"episode_{number}" for number in range(count)}:
            raise FocalError(f"{path}: found {', '.join(names[:5])}, expected episode_0 to episode_{count - 1}")
        groups = [file.root.group(f"episode_{number}") for number in range(count)]
        infos = _info_names(groups, facts.infos if exported is None else exported.infos, exported is not None)
        parts = [_episode(group, facts, infos) for group in groups]
        table = _table(path, groups, exported is not None)
    if not parts:
        raise FocalError(f"{path}: no episodes, expected at least one")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = np.array([len(part["rewards"]) for part in parts], "<i4")
    if exported is None:
        last = np.cumsum(lengths) - 1
        terminated, truncated = (joined[name][last] != 0 for name in ("terminations", "truncations"))
        ends = restored_ends(lengths, terminated, truncated, facts, notes)
    else:
        ends = table.pop("ends")
    following = np.concatenate([part["observations"][1:] for part in parts])
    return make_episodes(
        str(path),
        joined["observations"],
        joined["actions"],
        joined["rewards"],
        with_sparse_reward({name: joined[name] for name in infos}, task.params, following, joined["rewards"], facts),
        lengths,
        ends,
        facts,
        notes,
        **table,
    )


def _info_names(groups: list[Group], names: tuple[str, ...], all_of_them: bool) -> list[str]:
    """The infos to read: those of an export, or of the family's where every episode has them."""
    if all_of_them:
        return list(names)
    return [name for name in names if all("infos" in group and name in group.group("infos") for group in groups)]


def _episode(group: Group, facts: FamilyFacts, infos: list[str]) -> dict[str, Array]:
    arrays = {
        "observations": group.array("observations", facts.observation_dim),
        "actions": group.array("actions", facts.action_dim),
        **{name: group.array(name) for name in ("rewards", "terminations", "truncations")},
    }
    steps = len(arrays["rewards"])
    for name in infos:
        values = group.group("infos").array(name)
        arrays[name] = values[1:] if len(values) == steps + 1 else values
    for name, values in arrays.items():
        if len(values) != (expected := steps + (name == "observations")) or not steps:
            raise FocalError(f"{group}: {name} has {len(values)} rows, expected {expected}, one more for observations")
    if arrays["terminations"][:-1].any() or arrays["truncations"][:-1].any():
        raise FocalError(f"{group} ends before its last step, expected one episode in each group")
    return arrays


def _table(path: Path, groups: list[Group], exported: bool) -> dict[str, Any]:
    """The (E,) fields that attributes hold: all of an export's, else the seed where every episode has one."""
    table = {}
    for name, field in TABLE.items() if exported else [("seed", "seeds")]:
        values = [group.number(name) for group in groups]
        if None not in values:
            found = np.array(values)
            table[field] = found.astype(PER_EPISODE[field])
            if (table[field] == found).all():
                continue
        if exported:
            raise FocalError(
                f"{path}: not every episode has an attribute '{name}' as this project exports it; "
                "delete 'focal' from metadata.json to import the data as they are"
            )
        table.pop(field, None)
    return table
