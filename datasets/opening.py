"""Opening a collection: every claim its files make is settled before a chunk is decoded.

    dataset.json      its own hash, its format, the header
    every file        listed with its size, nothing missing, nothing extra, no symbolic links, no name that is no data
    every zarr.json   sha256; shapes, types, codecs, chunk files against the declared sizes, sizes against limits
    every task        family, split and the content hash over its parameters and array hashes

Only metadata are read: some milliseconds per task. `verify_collection` (integrity.py) reads the rest.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FocalError, unless_default
from .collection import Collection, quoted, ranges
from .records import CollectionHeader, Reader, Split
from .sources import Folder, Source, sha256_of
from .storage import AGAIN, MAX_JSON_BYTES, canonical_json, parse_json, read_json
from .store import MAX_ATTRIBUTE_BYTES, check_format, consolidated_documents
from .tasks import TaskEntry, inspect_task, store_folder

COLLECTION_FORMAT = "focal-collection/1"
DOCUMENT = "dataset.json"
STAGING = "staging"
PAYLOAD = "data"
"""Where the collection is inside a bundle."""
HEADER = "header.json"

_ALLOWED = re.compile(
    r"README\.md|LICENSE\.data\.txt|dataset\.json"
    r"|tasks/task_[0-9]{4,6}\.zarr/([a-z0-9_]+/)*(zarr\.json|[0-9]+)"
    r"|policies/task_[0-9]{4,6}/[A-Za-z0-9_-]+\.(safetensors|json)"
)


def open_collection(path: Path | str) -> Collection:
    """Open a committed collection after checking its structure (see the module docstring).

    `path` is its folder, or the s3:// (or other) URL of a bundle that was pushed. Raises `FocalError` for one that is
    interrupted, of another format, damaged or hostile.
    """
    if "://" in str(path):
        from .remote import open_remote  # an optional dependency

        return open_source(open_remote(str(path), PAYLOAD), consolidated=True)
    folder = Folder(Path(path))
    if not folder.exists(DOCUMENT):
        raise _not_a_collection(folder.path)
    return open_source(folder)


def open_source(source: Source, consolidated: bool = False) -> Collection:
    """Open the collection whose files `source` holds; see `open_collection`.

    With `consolidated`, the metadata of arrays come from their task's zarr.json where that has their listed sha256,
    instead of from a file each: far away, a request per task instead of twenty.
    """
    where = f"{source}/{DOCUMENT}"
    document = parse_json(source.read(DOCUMENT, MAX_JSON_BYTES), where)
    check_format(document, COLLECTION_FORMAT, where)
    if document.get("document_hash") != document_hash(document):
        raise FocalError(f"{where} was changed after it was written (its document_hash differs); {AGAIN}")
    header = CollectionHeader.from_json(document, where)
    files = _listed_files(document, where)
    _check_files(source, files, source.sizes(skip=(STAGING,)))
    tasks = tuple(_open_tasks(source, header, files, consolidated))
    read = Reader(document, where)
    listed = read.items("tasks", dict)
    if len(listed) != len(tasks):
        raise FocalError(f"{where}: lists {len(listed)} tasks, expected {len(tasks)} as in train and test; {AGAIN}")
    for entry, expected in zip(tasks, listed, strict=True):
        if describe_task(entry) != expected:
            raise FocalError(
                f"{source}: task {entry.index} is not the one {DOCUMENT} lists (its parameters, split, counts or "
                f"content hashes differ); {AGAIN}"
            )
    if (content := collection_hash(tasks)) != read.text("content_hash"):
        raise FocalError(f"{source}: the content hash in {DOCUMENT} is not that of its tasks; {AGAIN}")
    return Collection(
        source=source,
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
    return sha256_of(canonical_json({key: value for key, value in document.items() if key != "document_hash"}))


def collection_hash(tasks: Sequence[TaskEntry]) -> str:
    """The content hash: over the content hash of every task, by index."""
    return sha256_of(canonical_json([[entry.index, entry.content_hash] for entry in tasks]))


def describe_task(entry: TaskEntry) -> dict[str, Any]:
    """What dataset.json says about a task."""
    counts = asdict(entry.counts["mixed"])
    return {"index": entry.index, "split": entry.split, **counts, "content_hash": entry.content_hash}


def inspect_tasks(
    source: Source, indices: Sequence[int], files: Mapping[str, int], documents: Mapping[str, bytes]
) -> list[TaskEntry]:
    """Check the structure of every sealed task.

    `files` maps the collection's files to bytes, `documents` every `zarr.json` to its content.
    """
    stores: dict[str, tuple[dict[str, int], dict[str, bytes]]] = {store_folder(index): ({}, {}) for index in indices}
    for name, size in files.items():
        if name.startswith("tasks/"):
            folder, inside = "/".join(name.split("/", 2)[:2]), name.split("/", 2)[-1]
            if folder not in stores:
                raise FocalError(f"{source}: {name!r} belongs to no task of this collection; {AGAIN}")
            stores[folder][0][inside] = size
            if name in documents:
                stores[folder][1][inside] = documents[name]
    entries = [inspect_task(source, index, *stores[store_folder(index)]) for index in indices]
    for entry in entries[1:]:
        sizes, first = entry.store.sizes, entries[0].store.sizes
        widths, expected = (
            (sizes.observation_dim, sizes.action_dim, entry.store.attributes["infos"]),
            (first.observation_dim, first.action_dim, entries[0].store.attributes["infos"]),
        )
        if widths != expected:
            raise FocalError(
                f"{source}: task {entry.index} has observation width, action width and infos {widths}, "
                f"expected {expected} as in task {entries[0].index}; {AGAIN}"
            )
    return entries


def read_documents(source: Source, names: Iterable[str]) -> dict[str, bytes]:
    """Read every `zarr.json` among `names`."""
    return dict(source.read_many([name for name in names if name.endswith("/zarr.json")], MAX_ATTRIBUTE_BYTES))


def check_allowed(where: object, name: str) -> None:
    """Refuse a file no collection has: the list holds nothing that could be executed or unpickled."""
    if not _ALLOWED.fullmatch(name):
        raise FocalError(
            f"{where}: unexpected file {name!r}, expected only tasks/, policies/ (safetensors, json) and README.md; "
            "delete it and run the same command again"
        )


def _open_tasks(
    source: Source, header: CollectionHeader, files: Mapping[str, tuple[int, str]], consolidated: bool
) -> list[TaskEntry]:
    names = [name for name in files if name.endswith("/zarr.json")]
    documents: dict[str, bytes] = {}
    if consolidated:
        documents = _read_listed(source, files, [name for name in names if name.count("/") == 2])
        for root, data in list(documents.items()):
            for name, copy in consolidated_documents(data, f"{source}/{root}").items():
                listed = f"{root.removesuffix('zarr.json')}{name}"
                if listed in files and sha256_of(copy) == files[listed][1]:
                    documents[listed] = copy
    documents |= _read_listed(source, files, [name for name in names if name not in documents])
    entries = inspect_tasks(source, header.indices, {name: size for name, (size, _) in files.items()}, documents)
    for entry in entries:
        check_belongs(source, header, entry.index, entry.record.family, entry.split)
    return entries


def _read_listed(source: Source, files: Mapping[str, tuple[int, str]], names: list[str]) -> dict[str, bytes]:
    documents = read_documents(source, names)
    for name, data in documents.items():
        if sha256_of(data) != files[name][1]:
            raise FocalError(f"{source}: {name} was changed after the collection was written (sha256 differs); {AGAIN}")
    return documents


def check_belongs(source: object, header: CollectionHeader, index: int, family: str, split: Split) -> None:
    """Check that a task has the family and split the collection gives it."""
    if index not in header.indices:
        raise FocalError(
            f"{source}: task {index} is not among the collection's tasks {ranges(header.indices)}; {AGAIN}"
        )
    if (family, split) != (header.family, header.split_of(index)):
        raise FocalError(
            f"{source}: task {index} is a {split} task of {family}, expected a {header.split_of(index)} task of "
            f"{header.family}; {AGAIN}"
        )


def _listed_files(document: Mapping[str, Any], where: str) -> dict[str, tuple[int, str]]:
    files = {}
    for name, facts in Reader(document, where).mapping("files").items():
        read = Reader(facts if isinstance(facts, dict) else {}, f"{where} file {name[:200]!r}")
        files[name] = read.integer("bytes"), read.text("sha256")
    return files


def _check_files(source: object, listed: Mapping[str, tuple[int, str]], present: Mapping[str, int]) -> None:
    """Compare the files that are there with those dataset.json lists: names and sizes."""
    for name in sorted({*listed, *present} - {DOCUMENT}):
        if name not in present:
            raise FocalError(f"{source}: {name!r} is missing, dataset.json lists it; {AGAIN}")
        if name not in listed:
            raise FocalError(f"{source}: extra file {name!r}, dataset.json does not list it; delete it")
        if present[name] != listed[name][0]:
            raise FocalError(
                f"{source}: {name!r} has {present[name]} bytes, dataset.json lists {listed[name][0]}; {AGAIN}"
            )
        check_allowed(source, name)


def _not_a_collection(path: Path) -> FocalError:
    if not path.exists():
        return FocalError(f"no collection at {path}; see which there are: {_list_command(path.parent)}")
    if path.is_file():
        return FocalError(
            f"{path} is a file, expected a collection's folder; unpack it: focal-cli bundle unpack {quoted(path)}"
        )
    if (path / "bagit.txt").is_file():
        return FocalError(
            f"{path} is a bundle's folder, expected a collection's; unpack it: focal-cli bundle unpack {quoted(path)}"
        )
    if (path / STAGING).is_dir():
        return FocalError(
            f"{path} is an interrupted collection ({DOCUMENT} is missing); finish it with the same command again: "
            f"{generate_command(path)}"
        )
    if (path / "tasks").is_dir():
        return FocalError(
            f"{path} has tasks but no {DOCUMENT}, so it was copied or deleted in part; delete the folder, then {AGAIN}"
        )
    return FocalError(f"{path} has no {DOCUMENT}, so it is no collection; see which there are: "
                      f"{_list_command(path if find_collections(path) else path.parent)}")  # fmt: skip


def _list_command(stores: Path) -> str:
    return "focal-cli data list" + unless_default("--stores", stores, "stores")


def generate_command(path: Path) -> str:
    """The command that began the collection under way at `path`, as far as its header tells."""
    try:
        header = CollectionHeader.from_json(read_json(path / STAGING / HEADER), HEADER)
    except FocalError:
        return f"focal-cli data generate -o {quoted(path)}"
    words = ["focal-cli", "data", "generate", "--env", header.family, "--scale", header.scale]
    words += ["--seed", str(header.seed), "--tasks-from", header.tasks_from, "--licence", header.licence]
    words += [word for author in header.authors for word in ("--author", author)]
    words += [word for pair in _assignments(header.settings) for word in ("--set", pair)]
    return shlex.join([*words, "-o", str(path)])


def _assignments(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as the NAME=VALUE pairs of `--set`."""
    pairs = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _assignments(value, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append(f"{prefix}{name}={text}")
    return pairs
