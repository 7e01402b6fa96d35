"""Foreign data for the import tests, written as their own projects write them."""

import io
import pickle
from pathlib import Path

import numpy as np

from focal.datasets import Episodes


def object_array(steps: list[list]) -> np.ndarray:
    """An array of objects, one row per step, as the original FOCAL code builds it."""
    array = np.empty((len(steps), 4), object)
    for row, step in enumerate(steps):
        for column, value in enumerate(step):
            array[row, column] = value
    return array


def old_names(pickled: bytes, protocol: int) -> bytes:
    """Spell a pickle of protocol 0 to 3 as NumPy 1 wrote it: modules were called numpy.core then."""
    assert protocol <= 3  # from 4 on names carry their length
    return pickled.replace(b"cnumpy._core.", b"cnumpy.core.")


def npy_of_pickle(pickled: bytes, shape: tuple[int, ...]) -> bytes:
    """Put an .npy header before a pickle."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": shape})
    return stream.getvalue() + pickled


def split(episodes: Episodes) -> list[tuple[np.ndarray, ...]]:
    """Every episode's observations (T+1, obs_dim), actions, rewards."""
    stops = np.cumsum(episodes.lengths)
    return [
        (
            episodes.observations[stop - length + number : stop + number + 1],
            episodes.actions[stop - length : stop],
            episodes.rewards[stop - length : stop],
        )
        for number, (stop, length) in enumerate(zip(stops, episodes.lengths, strict=True))
    ]


def write_focal_iclr(folder: Path, episodes: Episodes, protocol: int = 3, sample: bool = True) -> None:
    """Write one file per episode into a goal_idx folder, numbered within its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[int, int] = {}
    for step, (observations, actions, rewards) in zip(episodes.sac_steps.tolist(), split(episodes), strict=True):
        rows = [
            [observations[t].astype("f8"), actions[t], float(rewards[t]), observations[t + 1].astype("f8")]
            for t in range(len(actions))
        ]
        number = numbers.setdefault(step, 0)
        numbers[step] += 1
        pickled = pickle.dumps(object_array(rows), protocol=protocol)
        name = f"trj_eval{'sample' if sample else ''}{number}_step{step}.npy"
        (folder / name).write_bytes(npy_of_pickle(old_names(pickled, protocol), (len(rows), 4)))


def write_unicorn(folder: Path, episodes: Episodes, terminals: np.ndarray | None = None) -> None:
    """Write the five arrays of a replay buffer, in float64 as the source does."""
    folder.mkdir(parents=True)
    parts = split(episodes)
    arrays = {
        "obs": np.concatenate([observations[:-1] for observations, _, _ in parts]),
        "next_obs": np.concatenate([observations[1:] for observations, _, _ in parts]),
        "actions": episodes.actions,
        "rewards": episodes.rewards[:, None],
        "terminals": np.zeros((len(episodes.rewards), 1)) if terminals is None else terminals[:, None],
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.astype("f8"))
