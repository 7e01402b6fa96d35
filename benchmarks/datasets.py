"""How fast collections load, beside the same arrays in HDF5 and in raw .npy files, measured in one run.

    python benchmarks/datasets.py                      100 tasks x 50,000 transitions, observations 20, actions 6
    python benchmarks/datasets.py --tasks 10 --json

Five tasks are drawn and written again and again: velocities that remember 95% of themselves, positions that sum them,
actions tanh of a linear feedback with noise, which compress as real MuJoCo data do (by a fifth). Every time is the
median of the repeats, `cold` after the operating system was told to drop the files from its cache.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from focal.datasets import (
    Collection,
    CollectionHeader,
    End,
    Episodes,
    QualityRule,
    References,
    Selection,
    TaskRecord,
    begin_collection,
    commit_collection,
    open_collection,
    seal_task,
    write_segment,
)
from focal.datasets.opening import open_source
from focal.datasets.sources import Folder
from focal.trainer.methods import train_settings
from focal.trainer.replay import TaskReplay
from focal.trainer.transform import fit_transform

OBS, ACT, HORIZON, CHECKPOINTS = 20, 6, 1000, 10
FIELDS = ("observations", "actions", "rewards")


def synthetic(seed: int, steps: int) -> Episodes:
    """One task: `steps` transitions in episodes of 1000."""
    generator = np.random.default_rng(seed)
    count, half = steps // HORIZON, OBS // 2
    gain = generator.normal(size=(OBS, ACT)) / OBS**0.5
    observations = np.empty((count, HORIZON + 1, OBS), "f4")
    noise = generator.normal(size=(HORIZON + 1, count, half)) * 0.3
    velocity = np.zeros((count, half))
    for step in range(HORIZON + 1):
        velocity = 0.95 * velocity + noise[step]
        observations[:, step, half:] = velocity
    observations[..., :half] = np.cumsum(observations[..., half:], axis=1) * 0.05
    actions = np.tanh(observations[:, :-1] @ gain + 0.1 * generator.normal(size=(count, HORIZON, ACT))).astype("f4")
    rewards = observations[:, 1:, half].astype("f8") - 0.1 * np.square(actions).sum(-1)
    return Episodes(
        observations=observations.reshape(-1, OBS),
        actions=actions.reshape(-1, ACT),
        rewards=rewards.reshape(-1).astype("f4"),
        infos={},
        lengths=np.full(count, HORIZON, "i4"),
        ends=np.full(count, End.TRUNCATED, "u1"),
        returns=rewards.sum(1),
        qualities=np.zeros(count, "u1"),
        sac_steps=np.repeat(np.arange(CHECKPOINTS) * 1000, count // CHECKPOINTS).astype("i8"),
        seeds=np.arange(count, dtype="i8"),
        heldout=np.zeros(count, "u1"),
    )


def build(folder: Path, tasks: int, steps: int) -> tuple[Collection, list[Episodes]]:
    """Write the collection through the functions stage one uses."""
    drawn = [synthetic(seed, steps) for seed in range(5)]
    header = CollectionHeader(
        name="benchmark", family="half-cheetah-vel", seed=0, tasks_from="seed", scale="smoke", settings={},
        train=tuple(range(tasks)), test=(),
    )  # fmt: skip
    begin_collection(folder, header)
    for index in range(tasks):
        episodes = drawn[index % 5]
        best = episodes.returns[episodes.sac_steps == 9000]
        record = TaskRecord(
            index=index, family=header.family, params={"velocity": 1.0 + index}, split="train", env_id="focal/None-v0",
            env_settings={}, horizon=HORIZON, spaces={}, absolute_x=None, behaviour={},
            references=References([float(best.mean()) - 1], best, [0.0], [1.0], reached_expert=True),
        )  # fmt: skip
        for step in np.unique(episodes.sac_steps):
            write_segment(folder, index, int(step), episodes.select(episodes.sac_steps == step))
        seal_task(folder, record, QualityRule(), 0)
    return commit_collection(folder, header, {}), drawn


def write_hdf5(folder: Path, tasks: int, drawn: list[Episodes], chunk_rows: int | None) -> None:
    """The same arrays, a file a task, lzf and shuffle; `chunk_rows` None leaves the chunks to h5py."""
    folder.mkdir()
    for index in range(tasks):
        with h5py.File(folder / f"{index}.hdf5", "w") as file:
            for name in FIELDS:
                values = getattr(drawn[index % 5], name)
                chunks = True if chunk_rows is None else (min(chunk_rows, len(values)), *values.shape[1:])
                file.create_dataset(name, data=values, chunks=chunks, compression="lzf", shuffle=True)


def load_hdf5(folder: Path, tasks: int) -> list[dict[str, np.ndarray]]:
    """Every array of every file."""
    loaded = []
    for index in range(tasks):
        with h5py.File(folder / f"{index}.hdf5") as file:
            loaded.append({name: file[name][()] for name in FIELDS})
    return loaded


def write_npy(folder: Path, tasks: int, drawn: list[Episodes]) -> None:
    """The same arrays as raw .npy files."""
    folder.mkdir()
    for index in range(tasks):
        for name in FIELDS:
            np.save(folder / f"{index}.{name}.npy", getattr(drawn[index % 5], name))


def load_npy(folder: Path, tasks: int) -> float:
    """Map every file and touch every byte."""
    return sum(
        float(np.load(folder / f"{index}.{name}.npy", mmap_mode="r").sum()) for index in range(tasks) for name in FIELDS
    )


def load_cache(collection: Collection, cache: Path) -> float:
    """Map every task from the cache and touch every byte."""
    loaded = Selection().load_all(collection.tasks, cache)
    return sum(float(getattr(episodes, name).sum()) for _, episodes in loaded for name in FIELDS)


def drop_from_cache(folder: Path) -> None:
    """Tell the operating system that the files' pages will not be needed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(calls: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], None]) -> dict[str, float]:
    """Median seconds of every call; the calls take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            before()
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


class CountingFolder(Folder):
    """A folder that adds up the bytes read from chunks."""

    total = 0

    def read(self, name: str, limit: int) -> bytes:
        """See `Folder`."""
        data = super().read(name, limit)
        CountingFolder.total += len(data) * ("/c/" in name)
        return data


def filter_bytes(path: Path) -> dict[str, int]:
    """Chunk bytes read by opening with a filter, and what the tables plus the chosen rows' chunks come to."""
    CountingFolder.total = 0
    collection = open_source(CountingFolder(path))
    subset = collection.select("expert")
    for _ in subset.load_all():
        pass
    allowed = 0
    for entry in subset.tasks:
        mask, lengths = subset.masks[entry.index], subset.tables[entry.index]["lengths"]
        for name, layout in entry.store.layouts.items():
            group = name.partition("/")[0]
            if group == "evaluation":
                continue
            rows = {"episodes": np.ones(len(mask), bool), "observations": np.repeat(mask, lengths + 1)}.get(
                group, np.repeat(mask, lengths)
            )
            for number, file in enumerate(layout.chunk_files()):
                if rows[number * layout.chunk_rows : (number + 1) * layout.chunk_rows].any():
                    allowed += collection.files[f"{entry.folder}/{name}/{file}"][0]
    tasks_without = [entry for entry in collection.tasks if entry not in subset.tasks]
    assert not tasks_without, "every benchmark task has expert episodes"
    return {"read": CountingFolder.total, "tables and chosen chunks": allowed}


def gather(collection: Collection, batches: int = 200) -> float:
    """Milliseconds per 1,024 transitions, in batches of 256 from each of 16 tasks, in RAM."""
    tasks = [transitions for _, transitions in collection.load_training("mixed", range(16))]
    settings = train_settings("half-cheetah-vel", "paper")
    transform = fit_transform([task.observations for task in tasks], settings.observation_scale, False, None)
    replay = TaskReplay(tasks, transform, settings)
    positions, generator = torch.arange(16), torch.Generator().manual_seed(0)
    replay.sample_batch(positions, 256, generator)
    start = time.perf_counter()
    for _ in range(batches):
        replay.sample_batch(positions, 256, generator)
    return (time.perf_counter() - start) / batches / 4 * 1000


def measure(tasks: int, steps: int, repeats: int, root: Path) -> dict[str, Any]:
    """Run everything; seconds unless a name says otherwise."""
    start = time.perf_counter()
    collection, drawn = build(root / "sealed", tasks, steps)
    result: dict[str, Any] = {"build and seal": time.perf_counter() - start}
    hdf5 = {"hdf5 lzf+shuffle, h5py's chunks": None, "hdf5 lzf+shuffle, 4,096-row chunks": 4096}
    for name, rows in hdf5.items():
        write_hdf5(root / name, tasks, drawn, rows)
    write_npy(root / "npy", tasks, drawn)
    load_cache(collection, root / "cache")  # fills it
    calls: dict[str, Callable[[], Any]] = {
        "sealed": lambda: list(open_collection(root / "sealed").select().load_all()),
        **{name: functools.partial(load_hdf5, root / name, tasks) for name in hdf5},
        "cache": lambda: load_cache(collection, root / "cache"),
        "npy": lambda: load_npy(root / "npy", tasks),
    }
    os.sync()
    for word, before in {"warm": lambda: None, "cold": lambda: drop_from_cache(root)}.items():
        seconds = timed(calls, repeats, before)
        result |= {f"{name}, {word}": value for name, value in seconds.items()}
        result[f"ratio best hdf5 / sealed, {word}"] = min(seconds[name] for name in hdf5) / seconds["sealed"]
        result[f"ratio cache / npy, {word}"] = seconds["cache"] / seconds["npy"]
    result["filter, bytes"] = filter_bytes(root / "sealed")
    result["gather, ms per 1,024 transitions"] = gather(collection)
    sealed = sum(size for size, _ in collection.files.values())
    raw = tasks * steps * 4 * (2 * OBS + ACT + 2)  # observation, action, reward, next observation, done as float32
    result["sealed bytes / five raw fields"] = sealed / raw
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="focal-benchmark-"))
    try:
        result = measure(arguments.tasks, arguments.steps, arguments.repeats, root)
    finally:
        shutil.rmtree(root)
    result["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:45} {value if isinstance(value, str | dict) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
