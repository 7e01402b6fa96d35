"""The layout of UNICORN, CORRO and FOCAL-latest: one folder per task, named after a seed and the goal.

    seed_3_goal_1.378/
      obs.npy, next_obs.npy (T, obs_dim)   actions.npy (T, act_dim)   rewards.npy, terminals.npy (T, 1)

Nothing there says where episodes begin: the original loader cuts every 200 rows, which is wrong for the walker. Here
an episode ends where a step arrives elsewhere than the next one begins.
"""

import os
import re
from pathlib import Path

import numpy as np

from ..errors import FocalError
from .episodes import Array, Episodes
from .foreign import (
    FamilyFacts,
    ImportTask,
    Notes,
    SourceTask,
    connected,
    lengths_of,
    make_episodes,
    restored_ends,
    with_sparse_reward,
)
from .npy import read_npy
from .storage import reading

MAX_FILE_BYTES = 4 * 2**30
GOALS_ROUNDED = "task parameters rounded to 3 decimals, as the source's folder names hold them"
SHORT = "episodes shorter than the time limit without a terminal flag, taken for terminated"
UNKNOWN_POLICY = "tasks whose source does not say which policy collected an episode: sac_step is 0 throughout"

_FOLDER = re.compile(r"seed_(\d{1,9})_goal((?:_-?\d{1,6}(?:\.\d{1,12})?)+)")


def list_tasks(source: Path) -> tuple[SourceTask, ...]:
    """Return the tasks by seed. Raises `FocalError` for a folder name that cannot be understood, or a link."""
    with reading(source):
        entries = [entry for entry in os.scandir(source) if entry.name.startswith("seed_")]
    found = []
    for entry in entries:
        match = _FOLDER.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            raise FocalError(f"{source}: found {entry.name[:120]!r}, expected folders like seed_0_goal_1.234")
        goal = tuple(float(number) for number in match[2].split("_")[1:])
        found.append((int(match[1]), SourceTask(entry.name, goal=goal)))
    return tuple(task for _, task in sorted(found, key=lambda pair: (pair[0], pair[1].name)))


def read_task(source: Path, task: ImportTask, facts: FamilyFacts, notes: Notes) -> Episodes:
    """Read one task's replay buffer. Raises `FocalError` for files that are no such data."""
    folder = source / task.source.name
    observations = _columns(folder / "obs.npy", facts.observation_dim)
    following = _columns(folder / "next_obs.npy", facts.observation_dim, len(observations))
    actions = _columns(folder / "actions.npy", facts.action_dim, len(observations))
    rewards = _columns(folder / "rewards.npy", 1, len(observations))[:, 0]
    terminals = _columns(folder / "terminals.npy", 1, len(observations))[:, 0] != 0
    jumps = np.append((following[:-1] != observations[1:]).any(axis=1), True)
    lengths = lengths_of(terminals | jumps)
    terminated = terminals[np.cumsum(lengths) - 1]
    if facts.terminates:
        short = (lengths < facts.horizon) & ~terminated
        short[-1] = False  # the end of the buffer, not of the episode
        notes.add(SHORT, int(short.sum()))
        terminated = terminated | short
    notes.add(GOALS_ROUNDED)
    notes.add(UNKNOWN_POLICY)
    return make_episodes(
        str(folder),
        connected(str(folder), observations, following, lengths),
        actions,
        rewards,
        with_sparse_reward({}, task.params, following, rewards, facts),
        lengths,
        restored_ends(lengths, terminated, None, facts, notes),
        facts,
        notes,
    )


def _columns(path: Path, width: int, rows: int | None = None) -> Array:
    values = read_npy(path, MAX_FILE_BYTES)
    if width == 1 and values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[1] != width or not len(values) or len(values) != (rows or len(values)):
        expected = f"({'rows' if rows is None else rows}, {width})"
        raise FocalError(f"{path}: found shape {values.shape}, expected {expected} as in this family")
    return values
