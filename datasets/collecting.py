"""Building a collection: begin, write segments, seal tasks, commit. Every step is atomic and may be repeated.

    begin_collection   staging/header.json                    what is being built; a rerun must agree with it
    write_segment      staging/task_0003/ckpt_000050000.npz   the episodes of one checkpoint
    seal_task          tasks/task_0003.zarr/                  all segments, labelled, with a held-out draw
    commit_collection  README.md, dataset.json                checksums; from here on it is complete and read-only
                       staging/ is deleted

Killed anywhere, the same calls again finish the work and lose the step under way at most. One process at a time works
on a task; different tasks may be written by different processes.

A segment is one npz file, not a store: it is read once, by the machine that wrote it, and a store's 40 files would
cost 40 times the fsyncs at every checkpoint.
"""

import contextlib
import datetime
import io
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .card import dataset_card
from .collection import Collection
from .episodes import Episodes
from .opening import (
    COLLECTION_FORMAT,
    DOCUMENT,
    HEADER,
    STAGING,
    check_allowed,
    check_belongs,
    collection_hash,
    describe_task,
    document_hash,
    generate_command,
    inspect_tasks,
    is_committed,
    open_collection,
    quoted,
    read_documents,
)
from .quality import QualityRule, label_episodes
from .records import CollectionHeader, TaskRecord, differences, settings_in_effect
from .sources import Folder, Source, read_checked
from .storage import (
    AGAIN,
    TEMPORARY,
    file_hash,
    list_files,
    make_folder,
    new_folder,
    read_json,
    remove_temporaries,
    replace_file,
    to_json,
    write_file,
    writing,
)
from .store import episode_arrays, episodes_of
from .tasks import TaskEntry, store_folder, task_name, write_task

_SEGMENT = re.compile(r"ckpt_(\d{9,})\.npz")


def begin_collection(path: Path, header: CollectionHeader) -> None:
    """Start a collection at `path`, or find the one under way there that has the same header.

    Raises `FocalError` when the folder holds a complete collection, one begun with another header (naming what
    differs), or anything else.
    """
    if is_committed(path):
        raise FocalError(f"{path} is complete and never changed; choose another folder with -o, or delete {path}")
    staging = path / STAGING
    if (staging / HEADER).is_file():
        _check_header(path, header)
        return
    if path.exists() and (strange := _strange_entries(path)):
        raise FocalError(
            f"{path} holds {strange[0]!r}, expected a new or empty folder or a collection under way; "
            "choose another folder with -o"
        )
    make_folder(staging)
    remove_temporaries(staging, HEADER)
    replace_file(staging / HEADER, to_json(header.to_json()))


def _strange_entries(path: Path) -> list[str]:
    """What is in the way of a new collection; a staging folder without a header is a beginning that was killed."""
    if not path.is_dir():
        return [path.name]
    names = [entry.name for entry in path.iterdir() if entry.name != STAGING]
    names += [entry.name for entry in (path / STAGING).glob("*") if not entry.name.startswith(TEMPORARY)]
    return sorted(names)


def _check_header(path: Path, header: CollectionHeader) -> None:
    document = read_json(path / STAGING / HEADER)
    if isinstance(document.get("settings"), dict):
        document["settings"] = settings_in_effect(document["settings"])
    if changed := differences(document, header.to_json()):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise FocalError(
            f"{path} was begun with other settings: {changed[0]}{more}; choose another folder with -o, drop what "
            f"is there with rm -r {quoted(path)}, or finish it: {generate_command(path)}"
        )


def write_segment(collection: Path, task_index: int, sac_step: int, episodes: Episodes) -> None:
    """Store the episodes of one checkpoint durably. One that exists is kept, and the call does nothing.

    Raises `FocalError` for inconsistent episodes or a full disk.
    """
    where = f"task {task_index}, segment at step {sac_step}"
    if not (collection / STAGING / HEADER).is_file():
        raise FocalError(f"{collection} is no collection under way; run focal-cli data generate")
    final = _segment_path(collection, task_index, sac_step)
    if final.exists():
        return
    episodes.validate(where)
    if not episodes.num_episodes or (episodes.sac_steps != sac_step).any():
        raise FocalError(
            f"{where}: found sac_steps {episodes.sac_steps[:3].tolist()}, expected {sac_step} in all episodes"
        )
    make_folder(final.parent)
    buffer = io.BytesIO()
    np.savez(buffer, **episode_arrays(episodes))  # type: ignore[arg-type]
    replace_file(final, buffer.getvalue())


def list_segments(collection: Path, task_index: int) -> list[int]:
    """Return the SAC steps of a task's complete segments, ascending, and delete what a killed writer left."""
    folder = collection / STAGING / task_name(task_index)
    remove_temporaries(folder)
    if not folder.is_dir():
        return []
    matches = [_SEGMENT.fullmatch(entry.name) for entry in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def read_segment(collection: Path, task_index: int, sac_step: int) -> Episodes:
    """Read a segment back. Raises `FocalError` telling to delete it when it is damaged."""
    path = _segment_path(collection, task_index, sac_step)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            episodes = episodes_of(dict(arrays))
        episodes.validate(f"{path}")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, FocalError) as error:
        raise FocalError(
            f"{path} is damaged ({' '.join(str(error).split())[:100]}), expected the episodes of one checkpoint; "
            f"delete it and run the same command again: {generate_command(collection)}"
        ) from error
    return episodes


def _segment_path(collection: Path, task_index: int, sac_step: int) -> Path:
    return collection / STAGING / task_name(task_index) / f"ckpt_{sac_step:09d}.npz"


def is_sealed(collection: Path, index: int) -> bool:
    """Whether the task's store is complete."""
    return (collection / store_folder(index)).is_dir()


def seal_task(collection: Path, record: TaskRecord, rule: QualityRule, seed: int) -> None:
    """Join a task's segments in training order, label them, draw the held-out episodes, and publish the store.

    A task that is sealed already is left as it is. `seed` is the collection's; the draw also depends on the index.
    Raises `FocalError` when there is no segment, a segment is damaged, or the record contradicts the header.
    """
    if is_sealed(collection, record.index):
        return
    document = read_json(collection / STAGING / HEADER)
    header = CollectionHeader.from_json(document, f"{collection} {HEADER}")
    check_belongs(collection, header, record.index, record.family, record.split)
    steps = list_segments(collection, record.index)
    if not steps:
        raise FocalError(
            f"{collection}: task {record.index} has no segments to seal; collect them: {generate_command(collection)}"
        )
    episodes = Episodes.concatenate([read_segment(collection, record.index, step) for step in steps])
    references = record.references
    seeds = (seed, record.index)
    labelled = label_episodes(episodes, rule, references.random, references.expert, references.reached_expert, seeds)
    final = collection / store_folder(record.index)
    make_folder(final.parent)
    remove_temporaries(final.parent, final.name)
    with new_folder(final, keep_first=True) as folder:
        write_task(folder, record, rule, seeds, labelled)


def commit_collection(collection: Path, header: CollectionHeader, provenance: Mapping[str, Any]) -> Collection:
    """Complete a collection whose tasks are all sealed: checksums, card, and dataset.json last; then drop staging/.

    `provenance` is JSON: software versions, hardware, commit. Repeating it on a complete collection only removes a
    staging folder left over. Raises `FocalError` naming the tasks that are not sealed.
    """
    if not is_committed(collection):
        _check_header(collection, header)
        missing = [index for index in header.indices if not is_sealed(collection, index)]
        if missing:
            raise FocalError(
                f"{collection}: {len(missing)} of {len(header.indices)} tasks are not sealed (first: {missing[0]}); "
                f"finish them: {generate_command(collection)}"
            )
        for folder in (collection, collection / "tasks", *_subfolders(collection / "policies")):
            remove_temporaries(folder)
        write_document(collection, header, provenance)
    with writing(collection / STAGING):
        if (collection / STAGING).exists():
            shutil.rmtree(collection / STAGING)
    return open_collection(collection)


def _subfolders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []


def write_document(
    folder: Path,
    header: CollectionHeader,
    provenance: Mapping[str, Any],
    derived_from: Sequence[Mapping[str, Any]] = (),
) -> list[TaskEntry]:
    """Write the card and, last, dataset.json for the sealed tasks in `folder`: the commit point. Return the tasks."""
    present = list_files(folder, skip=(STAGING, DOCUMENT, "README.md"))
    for name in present:
        check_allowed(folder, name)
    source = Folder(folder)
    tasks = inspect_tasks(source, header.indices, present, read_documents(source, present))
    for entry in tasks:
        check_belongs(folder, header, entry.index, entry.record.family, entry.split)
    replace_file(folder / "README.md", dataset_card(header, tasks).encode(errors="replace"))
    files = {}
    for name, size in list_files(folder, skip=(STAGING, DOCUMENT)).items():
        files[name] = {"bytes": size, "sha256": file_hash(folder / name)}
    document = {
        "format": COLLECTION_FORMAT,
        **header.to_json(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "derived_from": list(derived_from),
        "provenance": dict(provenance),
        "tasks": [describe_task(entry) for entry in tasks],
        "content_hash": collection_hash(tasks),
        "files": files,
    }
    replace_file(folder / DOCUMENT, to_json({**document, "document_hash": document_hash(document)}))
    return tasks


def relabel_collection(src: Path | str, dst: Path, rule: QualityRule) -> Collection:
    """Copy the collection `src`, a folder or a URL, to the new folder `dst` with its qualities cut by another rule.

    The copy is the next minor version and names `src` in `derived_from`; `src` is not touched. Raises `FocalError`
    when `dst` exists, lies inside `src`, `src` is damaged, or its levels were given by the source of imported data.
    """
    source = open_collection(src)
    if given := [entry.index for entry in source.tasks if entry.labels == "given"]:
        raise FocalError(
            f"{src}: the levels of task {given[0]} were given by its source, not computed from scores, so no rule can "
            f"re-cut them; choose episodes by level: focal-cli data merge {quoted(src)} --data expert -o NEW"
        )
    major, minor, _ = source.version.split(".")
    settings = {**source.settings, "quality": asdict(rule)}
    header = replace(source.header, version=f"{major}.{int(minor) + 1}.0", settings=settings)
    origin = {"name": source.name, "version": source.version, "content_hash": source.content_hash}
    with derived_folder(dst, [source.source]) as folder:
        for entry in source.tasks:
            episodes, references = entry.store.read_episodes(), entry.record.references
            labelled = label_episodes(
                episodes, rule, references.random, references.expert, references.reached_expert, entry.heldout_seeds
            )
            store = folder / store_folder(entry.index)
            store.mkdir(parents=True)
            write_task(store, entry.record, rule, entry.heldout_seeds, labelled)
        for name, (size, sha256) in source.files.items():
            if name.startswith("policies/"):
                write_file(folder / name, read_checked(source.source, name, size, sha256))
        copies = write_document(folder, header, source.provenance, [*source.derived_from, origin])
        for entry, copy in zip(source.tasks, copies, strict=True):
            changed = {name for name, value in copy.content.items() if value != entry.content[name]}
            if damaged := sorted(changed - {"episodes/quality", "episodes/heldout"}):
                raise FocalError(
                    f"{src}: task {entry.index}, array {damaged[0]} does not have its content hash; {AGAIN}"
                )
    return open_collection(dst)


@contextlib.contextmanager
def derived_folder(dst: Path, sources: Sequence[Source]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `dst` when the block ends: for what is written in one go.

    Killed anywhere, `dst` does not exist and the next run removes what was left. Raises `FocalError` when `dst` exists
    or lies inside one of the `sources`, and for a full disk.
    """
    for source in sources:
        if isinstance(source, Folder) and dst.resolve().is_relative_to(source.path.resolve()):
            raise FocalError(f"{dst} lies inside {source}, expected a new folder elsewhere; choose another one with -o")
    if dst.exists():
        raise FocalError(f"{dst} exists, expected a new folder; choose another one with -o")
    make_folder(dst.parent)
    remove_temporaries(dst.parent, dst.name)
    with new_folder(dst) as folder:
        yield folder
