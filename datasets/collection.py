"""A committed collection: open it (which checks its structure), choose tasks and qualities, load them into memory.

Opening reads metadata only. Everything a file could lie about is settled there: the list of files and their sizes
against dataset.json, every zarr.json against its sha256, every shape, type, codec and chunk file against the declared
sizes, and the content hash of the whole. Loading then decodes chunks under their crc32c.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError, UsageError, did_you_mean
from .episodes import QUALITIES, Array, Episodes, Quality, Transitions
from .records import CollectionHeader, Reader, Split
from .storage import AGAIN, canonical_json, list_files, parse_json, read_bytes, read_json
from .store import MAX_ATTRIBUTE_BYTES, check_format
from .tasks import TaskEntry, inspect_task, task_name

COLLECTION_FORMAT = "focal-collection/1"
DOCUMENT = "dataset.json"
STAGING = "staging"
MAX_DOCUMENT_BYTES = 64 * 2**20

_ALLOWED = re.compile(
    r"README\.md|LICENSE\.data\.txt|dataset\.json"
    r"|tasks/task_\d{4,6}\.zarr/[a-z0-9_/]+(\.json)?|tasks/task_\d{4,6}\.zarr/zarr\.json"
    r"|policies/task_\d{4,6}/[A-Za-z0-9_-]+\.(safetensors|json)"
)


@dataclass(frozen=True)
class Collection:
    """One family's stores, complete and never changed again."""

    path: Path
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
    def settings(self) -> Mapping[str, Any]:
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
            f"{self.path} has no task {index}, expected one of {_ranges([entry.index for entry in self.tasks])}; "
            f"see focal-cli data show {_quoted(self.path)}"
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
        _check_quality(quality)
        have = tuple(entry for entry in entries if entry.counts[quality].episodes)
        return have, tuple(entry for entry in entries if not entry.counts[quality].episodes)

    def load(self, index: int, quality: str = "mixed", heldout: bool | None = None) -> Episodes:
        """Load the episodes of one task into memory.

        `heldout` None is all of them, False the training part, True the held-out part. Raises `FocalError` when there
        is none, or when a chunk is damaged, naming task, array and chunk.
        """
        entry = self.task(index)
        episodes = self._select(entry, quality, heldout)
        if episodes is None:
            part = "" if heldout is None else " held-out" if heldout else " training"
            raise FocalError(
                f"{self.path}: task {index} has no{part} '{quality}' episodes, it has {_levels([entry])}; "
                f"see focal-cli data show {_quoted(self.path)}"
            )
        return episodes

    def load_training(
        self, quality: str, tasks: Sequence[TaskEntry | int] | None = None
    ) -> list[tuple[TaskEntry, Transitions]]:
        """Load what training may see: training tasks (all, or `tasks`), never a held-out episode.

        Tasks that lack the level are left out. Raises `FocalError` when every one does, or for a test task.
        """
        _check_quality(quality)
        entries = self.train_tasks() if tasks is None else [self.task(t) if isinstance(t, int) else t for t in tasks]
        loaded = []
        for entry in entries:
            if entry.split == "test":
                raise FocalError(
                    f"{self.path}: task {entry.index} is a test task and never trained on, expected one of "
                    f"{_ranges([task.index for task in self.train_tasks()])}"
                )
            if (episodes := self._select(entry, quality, heldout=False)) is not None:
                loaded.append((entry, episodes.transitions()))
        if not loaded:
            raise FocalError(
                f"{self.path}: no training task has '{quality}' episodes, there are {_levels(entries)}; "
                f"run focal-cli train --collection {_quoted(self.path)} --data mixed"
            )
        return loaded

    def load_context(self, quality: str, entries: Sequence[TaskEntry]) -> list[Transitions | None]:
        """Load what meta-testing may draw its context from, one item per entry, None where the level is missing.

        A task that was also trained on (split `both` or `train`) gives its held-out episodes only.
        """
        contexts = [self._select(entry, quality, None if entry.split == "test" else True) for entry in entries]
        return [None if episodes is None else episodes.transitions() for episodes in contexts]

    def load_evaluation(self, index: int) -> tuple[Array, Array]:
        """Return the checkpoints of a task, sac_step (C,) i8, and all their returns (C, R) f8, padded with NaN."""
        store = self.task(index).store
        return store.read("evaluation/sac_step"), store.read("evaluation/returns")

    def _select(self, entry: TaskEntry, quality: str, heldout: bool | None) -> Episodes | None:
        _check_quality(quality)
        if not entry.counts[quality].episodes:
            return None
        episodes = entry.store.read_episodes()
        mask = np.ones(episodes.num_episodes, bool)
        if quality != "mixed":
            mask &= episodes.qualities == Quality[quality.upper()]
        if heldout is not None:
            mask &= episodes.heldout == int(heldout)
        return episodes.select(mask) if mask.any() else None


def open_collection(path: Path | str) -> Collection:
    """Open a committed collection after checking its structure; the module docstring says what is checked.

    Raises `FocalError` for one that is interrupted, of another format, damaged or hostile.
    """
    path = Path(path)
    if not (path / DOCUMENT).is_file():
        raise _not_a_collection(path)
    document = read_json(path / DOCUMENT, MAX_DOCUMENT_BYTES)
    where = str(path / DOCUMENT)
    check_format(document, COLLECTION_FORMAT, where)
    if document.get("document_hash") != document_hash(document):
        raise FocalError(f"{where} was changed after it was written (its document_hash differs); {AGAIN}")
    header = CollectionHeader.from_json(document, where)
    files = _listed_files(document, where)
    present = list_files(path, skip=(STAGING,))
    _check_files(path, files, present)
    tasks = tuple(_open_tasks(path, header, files))
    read = Reader(document, where)
    content = collection_hash(tasks)
    if content != read.text("content_hash"):
        raise FocalError(f"{path}: content hash is {content[:12]}, expected {read.text('content_hash')[:12]}; {AGAIN}")
    return Collection(
        path=path,
        header=header,
        content_hash=content,
        tasks=tasks,
        created=read.text("created"),
        provenance=read.mapping("provenance"),
        derived_from=tuple(read.items("derived_from", dict)),
        files=files,
    )


def find_collections(stores: Path | str) -> list[Path]:
    """Return the committed collections directly inside the folder `stores`, by name; none where it does not exist."""
    folder = Path(stores)
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if is_committed(entry) and not entry.name.startswith("."))


def is_committed(collection: Path | str) -> bool:
    """Whether the collection is complete: dataset.json, written last, is there."""
    return (Path(collection) / DOCUMENT).is_file()


def document_hash(document: Mapping[str, Any]) -> str:
    """Hash of everything dataset.json says, but this hash: finds a changed digit in the settings, too."""
    return hashlib.sha256(
        canonical_json({key: value for key, value in document.items() if key != "document_hash"})
    ).hexdigest()


def collection_hash(tasks: Sequence[TaskEntry]) -> str:
    """The content hash: over the content hash of every task, by index."""
    return hashlib.sha256(canonical_json([[entry.index, entry.content_hash] for entry in tasks])).hexdigest()


def inspect_tasks(path: Path, indices: Sequence[int], files: Mapping[str, int]) -> list[TaskEntry]:
    """Check the structure of every sealed task; `files` maps the collection's files to bytes."""
    stores: dict[str, dict[str, int]] = {task_name(index): {} for index in indices}
    for name, size in files.items():
        parts = name.split("/", 2)
        if parts[0] == "tasks":
            task = parts[1].removesuffix(".zarr")
            if task not in stores:
                raise FocalError(f"{path}: {name!r} belongs to no task of this collection; {AGAIN}")
            stores[task][parts[2]] = size
    entries = [inspect_task(path, index, stores[task_name(index)]) for index in indices]
    for entry in entries[1:]:
        sizes, first = entry.store.sizes, entries[0].store.sizes
        widths, expected = (
            (sizes.observation_dim, sizes.action_dim, entry.store.attributes["infos"]),
            (first.observation_dim, first.action_dim, entries[0].store.attributes["infos"]),
        )
        if widths != expected:
            raise FocalError(
                f"{path}: task {entry.index} has observation width, action width and infos {widths}, "
                f"expected {expected} as in task {entries[0].index}; {AGAIN}"
            )
    return entries


def check_allowed(path: Path, name: str) -> None:
    """Refuse a file no collection has: the list holds nothing that could be executed or unpickled."""
    if not _ALLOWED.fullmatch(name):
        raise FocalError(
            f"{path}: unexpected file {name!r}, expected only tasks/, policies/ (safetensors, json) and README.md; "
            "delete it and run the same command again"
        )


def _open_tasks(path: Path, header: CollectionHeader, files: Mapping[str, tuple[int, str]]) -> list[TaskEntry]:
    for name, (_, sha256) in files.items():
        if name.endswith("/zarr.json"):
            found = hashlib.sha256(read_bytes(path / name, MAX_ATTRIBUTE_BYTES)).hexdigest()
            if found != sha256:
                raise FocalError(
                    f"{path}: {name} was changed after the collection was written (sha256 differs); {AGAIN}"
                )
    entries = inspect_tasks(path, header.indices, {name: size for name, (size, _) in files.items()})
    for entry in entries:
        check_belongs(path, header, entry.index, entry.record.family, entry.split)
    return entries


def check_belongs(path: Path, header: CollectionHeader, index: int, family: str, split: Split) -> None:
    """Check that a task has the family and split the collection gives it."""
    if index not in header.indices:
        raise FocalError(f"{path}: task {index} is not among the collection's tasks {_ranges(header.indices)}; {AGAIN}")
    if (family, split) != (header.family, header.split_of(index)):
        raise FocalError(
            f"{path}: task {index} is a {split} task of {family}, expected a {header.split_of(index)} task of "
            f"{header.family}; {AGAIN}"
        )


def _listed_files(document: Mapping[str, Any], where: str) -> dict[str, tuple[int, str]]:
    files = {}
    for name, facts in Reader(document, where).mapping("files").items():
        read = Reader(facts if isinstance(facts, dict) else {}, f"{where} file {name[:200]!r}")
        files[name] = read.integer("bytes"), read.text("sha256")
    return files


def _check_files(path: Path, listed: Mapping[str, tuple[int, str]], present: Mapping[str, int]) -> None:
    """Compare the files that are there with those dataset.json lists: names and sizes."""
    for name in sorted({*listed, *present} - {DOCUMENT}):
        if name not in present:
            raise FocalError(f"{path}: {name!r} is missing, dataset.json lists it; {AGAIN}")
        if name not in listed:
            raise FocalError(f"{path}: extra file {name!r}, dataset.json does not list it; delete it")
        if present[name] != listed[name][0]:
            raise FocalError(
                f"{path}: {name!r} has {present[name]} bytes, dataset.json lists {listed[name][0]}; {AGAIN}"
            )
        check_allowed(path, name)


def _not_a_collection(path: Path) -> FocalError:
    if not path.exists():
        return FocalError(f"no collection at {path}; see which there are: focal-cli data list")
    if path.is_file():
        return FocalError(
            f"{path} is a file, expected a collection's folder; unpack it: focal-cli bundle unpack {_quoted(path)}"
        )
    if not (path / STAGING).is_dir():
        return FocalError(f"{path} has no {DOCUMENT}, so it is no collection; see which there are: focal-cli data list")
    return FocalError(
        f"{path} is an interrupted collection ({DOCUMENT} is missing); finish it by running the same command again: "
        f"{generate_command(path)}"
    )


def generate_command(path: Path) -> str:
    """The command that began the collection under way at `path`, as far as its header tells."""
    try:
        document = parse_json(read_bytes(path / STAGING / "header.json", MAX_DOCUMENT_BYTES), "header.json")
        header = CollectionHeader.from_json(document, "header.json")
    except FocalError:
        return f"focal-cli data generate -o {_quoted(path)}"
    words = ["focal-cli", "data", "generate", "--env", header.family, "--scale", header.scale]
    return shlex.join([*words, "--seed", str(header.seed), "--tasks-from", header.tasks_from, "-o", str(path)])


def _check_quality(quality: str) -> None:
    if quality not in QUALITIES:
        raise UsageError(f"quality '{quality}'; {did_you_mean(quality, QUALITIES)}")


def _levels(entries: Sequence[TaskEntry]) -> str:
    """`random (80 tasks), mixed (80 tasks)`: the qualities these tasks have."""
    counts = {quality: sum(entry.counts[quality].episodes > 0 for entry in entries) for quality in QUALITIES}
    return ", ".join(f"{quality} ({count} task{'s' * (count != 1)})" for quality, count in counts.items() if count)


def _ranges(indices: Sequence[int]) -> str:
    """`0-7, 9`: consecutive indices shortened."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
