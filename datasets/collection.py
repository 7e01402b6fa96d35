"""A committed collection: choose tasks and qualities, and load them into memory.

`open_collection` (opening.py) makes it. Loading decodes chunks under their crc32c straight into contiguous arrays;
nothing is cached, and held-out episodes are separated here and nowhere else.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import FocalError
from .episodes import QUALITIES, Array, Episodes, Transitions
from .records import CollectionHeader
from .selection import Selection, Subset, check_quality
from .sources import Folder, Source, sha256_of
from .storage import AGAIN
from .tasks import TaskEntry


@dataclass(frozen=True)
class Collection:
    """One family's stores, complete and never changed again."""

    source: Source
    """Where its files are."""
    header: CollectionHeader
    content_hash: str
    """Hash over arrays, labels, parameters and split of every task; independent of codec and chunks."""
    tasks: tuple[TaskEntry, ...]
    """By ascending index."""
    created: str
    """UTC, ISO 8601."""
    provenance: Mapping[str, Any]
    derived_from: tuple[Mapping[str, Any], ...] = ()
    """Name, version and content hash of every collection this one was made from."""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict, repr=False)
    """Bytes and sha256 of every file but dataset.json."""

    @property
    def path(self) -> Path:
        """Its folder. Raises `FocalError` for one that is not on this machine."""
        if not isinstance(self.source, Folder):
            raise FocalError(f"{self.source} is not on this machine; fetch it: focal-cli bundle pull {self.source}")
        return self.source.path

    @property
    def name(self) -> str:
        """The name, without the version."""
        return self.header.name

    @property
    def version(self) -> str:
        """major.minor.patch; derived data get a new one."""
        return self.header.version

    @property
    def family(self) -> str:
        """The task family."""
        return self.header.family

    @property
    def licence(self) -> str:
        """SPDX expression."""
        return self.header.licence

    @property
    def authors(self) -> tuple[str, ...]:
        """Who made it."""
        return self.header.authors

    @property
    def settings(self) -> dict[str, Any]:
        """Resolved settings of stage one."""
        return self.header.settings

    @property
    def scale(self) -> str:
        """`smoke`, `laptop` or `paper`."""
        return self.header.scale

    @property
    def horizon(self) -> int:
        """H, the longest time limit of any task."""
        return max(entry.record.horizon for entry in self.tasks)

    @property
    def observation_dim(self) -> int:
        """Width of the observations, the same in every task."""
        return self.tasks[0].store.sizes.observation_dim

    @property
    def action_dim(self) -> int:
        """Width of the actions, the same in every task."""
        return self.tasks[0].store.sizes.action_dim

    def task(self, index: int) -> TaskEntry:
        """Return the task of that index. Raises `FocalError` listing the indices there are."""
        for entry in self.tasks:
            if entry.index == index:
                return entry
        raise FocalError(
            f"{self.source} has no task {index}, expected one of {ranges([entry.index for entry in self.tasks])}; "
            f"see focal-cli data show {quoted(self.source)}"
        )

    def train_tasks(self) -> tuple[TaskEntry, ...]:
        """Tasks with split `train` or `both`."""
        return tuple(entry for entry in self.tasks if entry.split != "test")

    def test_tasks(self) -> tuple[TaskEntry, ...]:
        """Tasks with split `test` or `both`."""
        return tuple(entry for entry in self.tasks if entry.split != "train")

    def tasks_with(
        self, quality: str, entries: Sequence[TaskEntry]
    ) -> tuple[tuple[TaskEntry, ...], tuple[TaskEntry, ...]]:
        """Part `entries` into those that have episodes of `quality` and those that lack them."""
        check_quality(quality)
        have = tuple(entry for entry in entries if entry.counts[quality].episodes)
        return have, tuple(entry for entry in entries if not entry.counts[quality].episodes)

    def select(
        self,
        quality: str = "mixed",
        *,
        split: Literal["train", "test"] | None = None,
        tasks: Sequence[int] | None = None,
        heldout: bool | None = None,
        returns: tuple[float, float] = (-math.inf, math.inf),
        sac_steps: tuple[int, int] = (0, 2**62),
    ) -> Subset:
        """Choose episodes by task, split, quality, held-out mark, return and training step of their policy.

        Only the episode tables are read. Ranges include both ends; `split` None and `tasks` None take every task.
        Raises `FocalError` for a task that is not there or when nothing is left.
        """
        by_split = {None: self.tasks, "train": self.train_tasks(), "test": self.test_tasks()}
        entries = by_split[split] if tasks is None else [self.task(index) for index in tasks]
        allowed = [entry.index for entry in by_split[split]]
        if strange := [entry.index for entry in entries if entry.index not in allowed]:
            raise FocalError(f"{self.source}: task {strange[0]} is no {split} task, expected one of {ranges(allowed)}")
        selection = Selection(quality, heldout, returns, sac_steps)
        subset = selection.apply(entries)
        if not subset.tasks:
            raise FocalError(
                f"{self.source}: no episode is {selection}, there are {_levels(entries)}; "
                f"see focal-cli data show {quoted(self.source)}"
            )
        return subset

    def load(self, index: int, quality: str = "mixed", heldout: bool | None = None) -> Episodes:
        """Load the episodes of one task into memory.

        `heldout` None is all of them, False the training part, True the held-out part. Raises `FocalError` when there
        is none, or when a chunk is damaged, naming task, array and chunk.
        """
        entry = self.task(index)
        episodes = Selection(quality, heldout).load(entry)
        if episodes is None:
            part = "" if heldout is None else " held-out" if heldout else " training"
            raise FocalError(
                f"{self.source}: task {index} has no{part} '{quality}' episodes, it has {_levels([entry])}; "
                f"see focal-cli data show {quoted(self.source)}"
            )
        return episodes

    def load_training(
        self, quality: str, tasks: Sequence[TaskEntry | int] | None = None, cache: Path | None = None
    ) -> list[tuple[TaskEntry, Transitions]]:
        """Load what training may see: training tasks (all, or `tasks`), never a held-out episode.

        Tasks that lack the level are left out. With `cache`, a folder, the arrays are memory-mapped from there
        (cache.py). Raises `FocalError` when every task lacks the level, or for a test task.
        """
        check_quality(quality)
        entries = self.train_tasks() if tasks is None else [self.task(t) if isinstance(t, int) else t for t in tasks]
        for entry in entries:
            if entry.split == "test":
                raise FocalError(
                    f"{self.source}: task {entry.index} is a test task and never trained on, expected one of "
                    f"{ranges([task.index for task in self.train_tasks()])}"
                )
        loaded = list(Selection(quality, heldout=False).load_all(entries, cache))
        if not loaded:
            raise FocalError(
                f"{self.source}: no training task has '{quality}' episodes, there are {_levels(entries)}; "
                f"run focal-cli train --collection {quoted(self.source)} --data mixed"
            )
        return [(entry, episodes.transitions()) for entry, episodes in loaded]

    def load_context(self, quality: str, entries: Sequence[TaskEntry]) -> list[Transitions | None]:
        """Load what meta-testing may draw its context from, one item per entry, None where the level is missing.

        A task that was also trained on (split `both` or `train`) gives its held-out episodes only.
        """
        found = [_of_context(quality, entry).load(entry) for entry in entries]
        return [None if episodes is None else episodes.transitions() for episodes in found]

    def load_evaluation(self, index: int) -> tuple[Array, Array]:
        """Return the checkpoints of a task, sac_step (C,) i8, and all their returns (C, R) f8, padded with NaN."""
        store = self.task(index).store
        return store.read("evaluation/sac_step"), store.read("evaluation/returns")

    def read_file(self, name: str, limit: int) -> bytes:
        """Read a file of the collection that is no array, for example of a behaviour policy.

        Raises `FocalError` when it is missing, larger than `limit` bytes or not the one dataset.json lists.
        """
        data = self.source.read(name, limit)
        if name in self.files and sha256_of(data) != self.files[name][1]:
            raise FocalError(f"{self.source}: {name} is damaged (sha256 differs from dataset.json); {AGAIN}")
        return data


def has_context(entry: TaskEntry, quality: str) -> bool:
    """Whether `Collection.load_context` would find something of that task; only its episode table is read."""
    return bool(entry.counts[quality].episodes) and bool(
        _of_context(quality, entry).mask(entry.store.read_table()).any()
    )


def _of_context(quality: str, entry: TaskEntry) -> Selection:
    return Selection(quality, heldout=None if entry.split == "test" else True)


def _levels(entries: Sequence[TaskEntry]) -> str:
    """`random (80 tasks), mixed (80 tasks)`: the qualities these tasks have."""
    counts = {quality: sum(entry.counts[quality].episodes > 0 for entry in entries) for quality in QUALITIES}
    return ", ".join(f"{quality} ({count} task{'s' * (count != 1)})" for quality, count in counts.items() if count)


def ranges(indices: Sequence[int]) -> str:
    """`0-7, 9`: consecutive indices shortened."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def quoted(path: object) -> str:
    return shlex.quote(str(path))
