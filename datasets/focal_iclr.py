"""The layout of the original FOCAL code: one pickled episode per file.

    goal_idx3/trj_evalsample0_step2200.npy    a stochastic episode of the checkpoint at step 2200
    goal_idx3/trj_eval0_step2200.npy          a deterministic one: only read for references
    normalizer.npz                            if there: the observations are divided by abs_max in it

A file is an object array (steps, 4) of observation, action, reward and next observation. Unpickling happens in
unpickling.py, in another process; here only bytes and numbers are handled.
"""

import io
import os
import re
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import FocalError
from .episodes import Array, Episodes
from .foreign import (
    FamilyFacts,
    ImportTask,
    Notes,
    SourceTask,
    connected,
    make_episodes,
    restored_ends,
    with_sparse_reward,
)
from .npy import parse_header, parse_npy
from .storage import read_bytes, reading

MAX_FILE_BYTES = 16 * 2**20
MAX_REPLY_BYTES = 64 * 2**20
_MAX_ABS_MAX_BYTES = 2**20
SECONDS_PER_FILE = 60.0
"""Wall time after which a file's reader is stopped; an episode takes some milliseconds."""

NOT_NORMALISED = (
    "tasks whose observations are as in the source: it has no normalizer.npz, so nothing says whether they were "
    "normalised, as some published data are; those of the environments are not"
)
NORMALISED = "tasks whose observations were multiplied by abs_max + 1e-8 of the source's normalizer.npz"

_TASK = re.compile(r"goal_idx(\d{1,5})")
_EPISODE = re.compile(r"trj_eval(sample)?(\d{1,6})_step(\d{1,12})\.npy")


def list_tasks(source: Path) -> tuple[SourceTask, ...]:
    """Return the tasks by index. Raises `FocalError` for a folder name that cannot be understood, or a link."""
    with reading(source):
        entries = [entry for entry in os.scandir(source) if entry.name.startswith("goal_idx")]
    tasks = []
    for entry in entries:
        match = _TASK.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            raise FocalError(f"{source}: found {entry.name[:120]!r}, expected folders like goal_idx0")
        tasks.append(SourceTask(entry.name, index=int(match[1])))
    return tuple(sorted(tasks, key=lambda task: task.index or 0))


def read_task(
    source: Path, task: ImportTask, facts: FamilyFacts, notes: Notes, deterministic: bool = False
) -> Episodes | None:
    """Read the stochastic (or the deterministic) episodes of one task, by checkpoint; None where there is none."""
    folder = source / task.source.name
    with reading(folder):
        matches = [match for entry in os.scandir(folder) if (match := _EPISODE.fullmatch(entry.name))]
    chosen = sorted((int(match[3]), int(match[2]), match[0]) for match in matches if bool(match[1]) != deterministic)
    if not chosen:
        return None
    matrices = read_pickled([folder / name for _, _, name in chosen], facts.observation_dim, facts.action_dim)
    steps = np.concatenate(matrices)
    lengths = np.array([len(matrix) for matrix in matrices], "<i4")
    scale = _normaliser(source, facts)
    observations, following = (
        steps[:, columns] * scale for columns in (slice(facts.observation_dim), slice(-facts.observation_dim, None))
    )
    rewards = steps[:, facts.observation_dim + facts.action_dim]
    if not deterministic:
        notes.add(NOT_NORMALISED if np.ndim(scale) == 0 else NORMALISED)
    # the original loader makes the last row of every file terminal
    terminated = (lengths == facts.horizon) | facts.terminates
    return make_episodes(
        str(folder),
        connected(str(folder), observations, following, lengths),
        steps[:, facts.observation_dim : facts.observation_dim + facts.action_dim],
        rewards,
        with_sparse_reward({}, task.params, following, rewards, facts),
        lengths,
        restored_ends(lengths, terminated, None, facts, Notes() if deterministic else notes),
        facts,
        Notes() if deterministic else notes,
        sac_steps=np.array([step for step, _, _ in chosen], "<i8"),
    )


def _normaliser(source: Path, facts: FamilyFacts) -> Array | float:
    """What observations must be multiplied by: (obs_dim,), or 1 where nothing says that they were divided."""
    path = source / "normalizer.npz"
    if not path.exists():
        return 1.0
    data = read_bytes(path, 2**20)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = archive.getinfo("abs_max.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile("a compression that NumPy does not write")  # and zipfile does not bound
            with archive.open(info) as member:
                data = member.read(_MAX_ABS_MAX_BYTES + 1)
            if len(data) > _MAX_ABS_MAX_BYTES:
                raise zipfile.BadZipFile(f"more than {_MAX_ABS_MAX_BYTES} bytes")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise FocalError(
            f"{path} holds no readable abs_max ({' '.join(str(error).split())[:80]}), expected "
            f"{facts.observation_dim} numbers; get the file again from where it was published"
        ) from error
    scale = parse_npy(data, f"{path}: abs_max").astype("<f8").reshape(-1)
    if scale.shape != (facts.observation_dim,) or not (np.isfinite(scale) & (scale >= 0)).all():
        raise FocalError(f"{path}: abs_max is no {facts.observation_dim} numbers from 0, as this family's observations")
    return scale + 1e-8


def read_pickled(paths: Iterable[Path], obs_dim: int, act_dim: int) -> list[Array]:
    """Read pickled episodes in a process that can do nothing else: (steps, 2 obs_dim + act_dim + 1) f8 for each file.

    Columns: observation, action, reward, next observation. Raises `FocalError` for the first file that is anything
    else, or that makes the process exceed its memory or time.
    """
    paths = list(paths)
    with _Reader(obs_dim, act_dim, int(SECONDS_PER_FILE) + len(paths)) as reader:
        return [reader.read(path) for path in paths]


class _Reader:
    """The process that unpickles; a context manager."""

    def __init__(self, obs_dim: int, act_dim: int, seconds: int) -> None:
        self._width = 2 * obs_dim + act_dim + 1
        script = Path(__file__).with_name("unpickling.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), str(obs_dim), str(act_dim), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        )  # fmt: skip

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, path: Path) -> Array:
        """Read one file."""
        data = read_bytes(path, MAX_FILE_BYTES)
        header = parse_header(data, path)
        if not header.dtype.hasobject or len(header.shape) != 2 or header.shape[1] != 4:
            raise FocalError(
                f"{path}: found an array of {header.dtype} {header.shape}, expected objects (steps, 4): observation, "
                "action, reward, next observation"
            )
        reply = self._ask(path, data[header.offset :])
        if reply[:1] != b"+":
            raise FocalError(f"{path} is refused: {reply[1:].decode('utf-8', 'replace')}")
        values = parse_npy(reply[1:], path)
        if values.dtype != "<f8" or values.shape != (header.shape[0], self._width):
            raise FocalError(f"{path}: its {values.shape[0]} steps are not the {header.shape[0]} its header claims")
        return values

    def _ask(self, path: Path, request: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(SECONDS_PER_FILE, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(len(request).to_bytes(8, "little") + request)
            self._process.stdin.flush()
            length = int.from_bytes(self._process.stdout.read(8), "little")
            reply = self._process.stdout.read(min(length, MAX_REPLY_BYTES))
        except BrokenPipeError:
            length, reply = 0, b""
        finally:
            watchdog.cancel()
        if not reply or len(reply) != length:
            raise FocalError(
                f"{path} is refused: the process that unpickles it stopped, as it does beyond its limits of memory and "
                "time; no episode needs that much"
            )
        return reply
