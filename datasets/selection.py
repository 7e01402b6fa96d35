"""Choosing episodes by what the episode tables say of them, before a transition is read.

chosen = collection.select("expert", split="train", returns=(1000, math.inf))
chosen.counts                                     {3: Count(episodes=12, steps=2400), ...}   tables only
for entry, episodes in chosen.load_all(): ...     reads the chunks that hold their rows, no others
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FocalError, UsageError, did_you_mean
from .cache import load_cached
from .episodes import PER_EPISODE, QUALITIES, Array, Episodes, Quality
from .sources import side_by_side
from .tasks import Count, TaskEntry, read_verified

_CORES = os.cpu_count() or 1
_AHEAD = 2 * _CORES  # tasks decoded ahead of the one in use: bounds the memory above what is kept


@dataclass(frozen=True)
class Selection:
    """Conditions on episodes; all hold together."""

    quality: str = "mixed"
    heldout: bool | None = None
    """None both, False the part training may see, True the held-out part."""
    returns: tuple[float, float] = (-math.inf, math.inf)
    """Least and greatest undiscounted dense return, both included."""
    sac_steps: tuple[int, int] = (0, 2**62)
    """First and last training step of the policy that collected them, both included."""

    def __post_init__(self) -> None:
        check_quality(self.quality)
        for name, (low, high) in (("returns", self.returns), ("sac_steps", self.sac_steps)):
            if not low <= high:
                raise UsageError(f"{name} are {low} to {high}, expected the lower end first")

    def __str__(self) -> str:
        words = [f"'{self.quality}'"]
        if self.heldout is not None:
            words.append("held-out" if self.heldout else "not held out")
        words += [
            f"with {name} from {low:g} to {high:g}"
            for name, (low, high) in (("return", self.returns), ("SAC step", self.sac_steps))
            if (low, high) not in ((-math.inf, math.inf), (0, 2**62))
        ]
        return ", ".join(words)

    def mask(self, table: Mapping[str, Array]) -> Array:
        """Return (E,) bool for an episode table."""
        mask = (table["returns"] >= self.returns[0]) & (table["returns"] <= self.returns[1])
        mask &= (table["sac_steps"] >= self.sac_steps[0]) & (table["sac_steps"] <= self.sac_steps[1])
        if self.quality != "mixed":
            mask &= table["qualities"] == Quality[self.quality.upper()]
        if self.heldout is not None:
            mask &= table["heldout"] == int(self.heldout)
        return mask

    def apply(self, entries: Sequence[TaskEntry]) -> "Subset":
        """Read the episode tables of `entries` and keep the tasks that have such episodes."""
        have = [entry for entry in entries if entry.counts[self.quality].episodes]
        tables = dict(side_by_side(lambda entry: (entry.index, entry.store.read_table()), have, _AHEAD))
        masks = {index: self.mask(table) for index, table in tables.items()}
        kept = tuple(entry for entry in entries if entry.index in masks and masks[entry.index].any())
        return Subset(self, kept, tables, masks)

    def load(
        self, entry: TaskEntry, cache: Path | None = None, table: Mapping[str, Array] | None = None
    ) -> Episodes | None:
        """Load such episodes of one task, memory-mapped from the folder `cache` if one is given; None if it has none.

        `table`, its episode table, saves reading it again. To fill a cache the whole task is read, and checked.
        """
        if not entry.counts[self.quality].episodes:
            return None

        if cache is not None:
            return load_cached(cache, entry, self, lambda: self._chosen(read_verified(entry)))
        known = entry.store.read_table() if table is None else table
        mask = self.mask(known)
        return entry.store.read_episodes(mask, known) if mask.any() else None

    def _chosen(self, episodes: Episodes) -> Episodes | None:
        mask = self.mask({name: getattr(episodes, name) for name in PER_EPISODE})
        return episodes.select(mask) if mask.any() else None

    def load_all(
        self,
        entries: Sequence[TaskEntry],
        cache: Path | None = None,
        tables: Mapping[int, Mapping[str, Array]] | None = None,
    ) -> Iterator[tuple[TaskEntry, Episodes]]:
        """Load each task that has such episodes, in order, a few side by side; see `load`."""

        def load(entry: TaskEntry) -> tuple[TaskEntry, Episodes | None]:
            return entry, self.load(entry, cache, None if tables is None else tables[entry.index])

        found = side_by_side(load, entries, _CORES, _AHEAD)
        return ((entry, episodes) for entry, episodes in found if episodes is not None)


@dataclass(frozen=True)
class Subset:
    """Chosen episodes of some tasks, counted but not loaded."""

    selection: Selection
    tasks: tuple[TaskEntry, ...]
    """Tasks with at least one chosen episode."""
    tables: Mapping[int, Mapping[str, Array]]
    """Per task index, the (E,) arrays of all its episodes by their name in `Episodes`,"""
    masks: Mapping[int, Array]
    """and which of them are chosen, (E,) bool."""

    @property
    def counts(self) -> dict[int, Count]:
        """Chosen episodes and steps per task index."""
        counts = {}
        for entry in self.tasks:
            mask, lengths = self.masks[entry.index], self.tables[entry.index]["lengths"]
            counts[entry.index] = Count(int(mask.sum()), int(lengths[mask].sum(dtype=np.int64)))
        return counts

    def load(self, index: int) -> Episodes:
        """Load the chosen episodes of one task. Raises `FocalError` for a task without, and for damaged chunks."""
        for entry in self.tasks:
            if entry.index == index:
                return entry.store.read_episodes(self.masks[index], self.tables[index])
        have = ", ".join(str(entry.index) for entry in self.tasks)
        raise FocalError(f"task {index} has no episode that is {self.selection}; tasks that have: {have}")

    def load_all(self, cache: Path | None = None) -> Iterator[tuple[TaskEntry, Episodes]]:
        """Load the chosen episodes of every task in turn; see `Selection.load_all`."""
        return self.selection.load_all(self.tasks, cache, self.tables)


def check_quality(quality: str) -> None:
    """Raise `UsageError` naming the nearest quality."""
    if quality not in QUALITIES:
        raise UsageError(f"quality '{quality}'; {did_you_mean(quality, QUALITIES)}")
