"""D4RL's layout: one HDF5 file per task, all episodes end to end, which this module writes and reads.

task_0003.hdf5
  observations, next_observations (T, obs_dim)   actions (T, act_dim)   rewards (T,)
  terminals, timeouts (T,) bool                  why the step was an episode's last; timeouts also where it was cut
  infos/sparse_reward (T,)
  focal/task (bytes)  focal/episodes/end, return, quality, sac_step, seed, heldout (E,)      see exporting.py
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import FocalError
from .collection import Collection
from .episodes import Array, End, Episodes
from .exporting import TABLE, export_document, exported_from_json, table_of
from .foreign import (
    FamilyFacts,
    ImportTask,
    Notes,
    SourceTask,
    connected,
    lengths_of,
    make_episodes,
    refuse_longer,
    restored_ends,
    with_sparse_reward,
)
from .hdf5 import Group, Hdf5File
from .storage import parse_json, reading, write_file
from .tasks import TaskEntry, task_name

LOSSES = ("readers other than focal-cli see no quality, seed, held-out mark, task parameters or references",)
NO_CUT = "D4RL has no other mark for them (focal-cli restores them from focal/episodes/end)"
DROPPED = "last steps of episodes left out, because the source does not hold where they arrived"

_CHUNK_BYTES = 2**20


def write_task(folder: Path, collection: Collection, entry: TaskEntry, episodes: Episodes) -> None:
    """Write one task into `folder`. The file is made in memory first: a full disk is then noticed like any other."""
    steps = episodes.transitions()
    last = np.cumsum(episodes.lengths) - 1
    timeouts = np.zeros(episodes.num_steps, bool)
    timeouts[last] = episodes.ends != End.TERMINATED
    arrays = {
        "observations": episodes.observations[steps.rows],
        "next_observations": episodes.observations[steps.rows + 1],
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        "terminals": steps.terminated,
        "timeouts": timeouts,
        **{f"infos/{name}": values for name, values in episodes.infos.items()},
        **{f"focal/episodes/{name}": values for name, values in table_of(episodes).items()},
        "focal/task": np.frombuffer(json.dumps(export_document(collection, entry)).encode(), np.uint8),
    }
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        for name, values in arrays.items():
            rows = max(1, _CHUNK_BYTES // (values[:1].nbytes or 1))
            chunks = (min(len(values), rows), *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
        file.flush()
        write_file(folder / f"{task_name(entry.index)}.hdf5", file.id.get_file_image())


def list_tasks(source: Path) -> tuple[SourceTask, ...]:
    """Return the tasks, one per file, by name: `source` is one file, or a folder whose .hdf5 files are taken."""
    with reading(source):
        names = [source.name] if source.is_file() else sorted(os.listdir(source))
    tasks = []
    for name in names:
        if source.is_file() or name.endswith((".hdf5", ".h5")):
            with Hdf5File(_path(source, name)) as file:
                exported = None
                if "focal" in file.root:
                    where = f"{_path(source, name)}: focal/task"
                    exported = exported_from_json(parse_json(file.root.group("focal").text("task"), where), where)
                tasks.append(SourceTask(name, exported=exported))
    return tuple(tasks)


def read_task(source: Path, task: ImportTask, facts: FamilyFacts, notes: Notes) -> Episodes:
    """Read one file. Raises `FocalError` for one that is no such data."""
    path = _path(source, task.source.name)
    with Hdf5File(path) as file:
        arrays = _transitions(file.root, facts)
        names = facts.infos if task.source.exported is None else task.source.exported.infos
        infos = _infos(file.root, names, task.source.exported is not None)
        table = _table(file.root) if task.source.exported else None
    for name, values in (arrays | {f"infos/{name}": values for name, values in infos.items()}).items():
        if len(values) != len(arrays["rewards"]):
            raise FocalError(f"{path}: {name} has {len(values)} rows, expected {len(arrays['rewards'])} as in rewards")
    if not len(arrays["rewards"]):
        raise FocalError(f"{path} has no transitions, expected at least one; leave the file out, or get it again")
    terminals, timeouts = arrays["terminals"] != 0, arrays.get("timeouts")
    if timeouts is None and "next_observations" not in arrays and not terminals.any():
        raise FocalError(
            f"{path}: nothing says where its episodes end (terminals are all 0, and there are neither timeouts nor "
            "next_observations); expected a file with one of them, as version 2 of D4RL's data have"
        )
    lengths = lengths_of(terminals if timeouts is None else terminals | (timeouts != 0))
    last = np.cumsum(lengths) - 1
    limited = None if timeouts is None else timeouts[last] != 0
    if table is not None:
        if len(table["ends"]) != len(lengths):
            raise FocalError(
                f"{path}: focal/episodes lists {len(table['ends'])} episodes, expected {len(lengths)} as in terminals "
                "and timeouts; it was changed after the export: delete its group 'focal' to import it as it is"
            )
        ends = table.pop("ends")
    else:
        table = {}
        ends = restored_ends(lengths, terminals[last], limited, facts, notes)
    if "next_observations" not in arrays:
        refuse_longer(str(path), lengths, facts)  # before a step of each is left out
        arrays, infos, lengths, ends = _without_last_steps(path, arrays, infos, lengths, ends, notes)
    following = arrays["next_observations"]
    return make_episodes(
        str(path),
        connected(str(path), arrays["observations"], following, lengths),
        arrays["actions"],
        arrays["rewards"],
        with_sparse_reward(infos, task.params, following, arrays["rewards"], facts),
        lengths,
        ends,
        facts,
        notes,
        **table,
    )


def _path(source: Path, name: str) -> Path:
    return source if source.is_file() else source / name


def _transitions(root: Group, facts: FamilyFacts) -> dict[str, Array]:
    widths = {
        "observations": facts.observation_dim, "next_observations": facts.observation_dim,
        "actions": facts.action_dim, "rewards": None, "terminals": None, "timeouts": None,
    }  # fmt: skip
    optional = ("next_observations", "timeouts")
    return {name: root.array(name, width) for name, width in widths.items() if name not in optional or name in root}


def _infos(root: Group, names: tuple[str, ...], all_of_them: bool) -> dict[str, Array]:
    if "infos" not in root:
        return {}
    group = root.group("infos")
    return {name: group.array(name) for name in names if all_of_them or name in group}


def _table(root: Group) -> dict[str, Array]:
    group = root.group("focal").group("episodes")
    return {field: group.array(name) for name, field in TABLE.items()}


def _without_last_steps(
    path: Path, arrays: Mapping[str, Array], infos: Mapping[str, Array], lengths: Array, ends: Array, notes: Notes
) -> tuple[Any, Any, Array, Array]:
    """Leave out every episode's last step, for a source without next observations; what is left was cut there."""
    if (ends == End.TERMINATED).any():
        raise FocalError(
            f"{path} has episodes that terminate but no next_observations, so where they arrived is not known; "
            "expected a file with next_observations, as version 2 of D4RL's data have"
        )
    if int(lengths.max()) == 1:
        raise FocalError(
            f"{path} has episodes of one step only and no next_observations, so nothing says where a step arrived; "
            "expected longer episodes, or a file with next_observations"
        )
    notes.add(DROPPED, len(lengths))
    kept = np.ones(len(arrays["rewards"]), bool)
    kept[np.cumsum(lengths) - 1] = False
    following = np.roll(arrays["observations"], -1, axis=0)
    shorter = {name: values[kept] for name, values in {**arrays, "next_observations": following}.items()}
    longer = lengths > 1
    return (
        shorter,
        {name: values[kept] for name, values in infos.items()},
        (lengths - 1)[longer],
        np.full(int(longer.sum()), End.CUT, np.uint8),
    )
