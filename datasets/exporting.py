"""Writing a collection in another project's format, and what this project adds there to read it back whole.

Every format keeps the transitions. What it has no place for goes into additions that its own readers pass over:

    focal-export/1     one JSON object per task: header and lineage of the collection, the task's record, its rule
    episode table      end, return, quality, sac_step, seed, heldout of every episode

Only `focal-cli data import` reads those; what other readers see is less, and `export_collection` says how much.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import FocalError
from .collecting import derived_folder
from .collection import Collection
from .episodes import End, Episodes
from .foreign import Exported
from .records import CollectionHeader, Reader, TaskRecord, rule_from_json
from .store import check_format, read_infos
from .tasks import Labels, TaskEntry, read_verified

EXPORT_FORMAT = "focal-export/1"
TABLE = {"end": "ends", "return": "returns", "quality": "qualities", "sac_step": "sac_steps", "seed": "seeds",
         "heldout": "heldout"}  # fmt: skip
"""What an export calls the (E,) fields of `Episodes`."""

Progress = Callable[[int, int], None]


def export_collection(
    collection: Collection, form: str, path: Path, progress: Progress | None = None
) -> tuple[str, ...]:
    """Write every task of `collection` into the new folder `path` and return what the format could not carry.

    `form` is `minari` (one data set per task under `path`, which is a MINARI_DATASETS_PATH) or `d4rl` (one file per
    task). `progress(done, total)` counts tasks. Raises `FocalError` when `path` exists, the collection is damaged or
    the disk is full; then there is no `path`.
    """
    from . import d4rl, minari  # both import this module

    writer: Any = {"minari": minari, "d4rl": d4rl}[form]
    cut = 0
    with derived_folder(path, [collection.source]) as folder:
        for number, entry in enumerate(collection.tasks):
            episodes = read_verified(entry)
            writer.write_task(folder, collection, entry, episodes)
            cut += int((episodes.ends == End.CUT).sum())
            if progress:
                progress(number + 1, len(collection.tasks))
    losses = list(writer.LOSSES)
    if cut:
        losses.append(f"{cut:,} episodes that the collector cut short are marked as truncated; {writer.NO_CUT}")
    policies = sum(name.endswith(".safetensors") for name in collection.files)
    if policies:
        losses.append(
            f"the {policies:,} behaviour policies stay behind: without them a meta-test has no expert to play"
        )
    return tuple(losses)


def export_document(collection: Collection, entry: TaskEntry) -> dict[str, Any]:
    """Everything about a task that is not an array, as JSON; the inverse is `exported_from_json`."""
    return {
        "format": EXPORT_FORMAT,
        "collection": {
            **collection.header.to_json(),
            "content_hash": collection.content_hash,
            "provenance": dict(collection.provenance),
            "derived_from": [dict(origin) for origin in collection.derived_from],
        },
        "task": entry.record.to_json(),
        "quality": {
            "rule": dataclasses.asdict(entry.rule),
            "heldout_seeds": list(entry.heldout_seeds),
            "labels": entry.labels,
        },
        "infos": list(entry.store.attributes["infos"]),
    }


def exported_from_json(document: Mapping[str, Any], where: str) -> Exported:
    """Read what this project's export says about a task. Raises `FocalError` naming the field that is wrong."""
    check_format(document, EXPORT_FORMAT, where)
    read = Reader(document, where)
    quality = Reader(read.mapping("quality"), f"{where} quality")
    labels = quality.text("labels")
    if labels not in ("scores", "given"):
        raise FocalError(f"{where}: labels are {labels[:40]!r}, expected 'scores' or 'given'")
    seeds = tuple(quality.items("heldout_seeds", int))
    if min(seeds, default=0) < 0:
        raise FocalError(f"{where}: heldout_seeds are {str(seeds)[:80]}, expected 0 or more")
    collection = read.mapping("collection")
    CollectionHeader.from_json(collection, f"{where} collection")
    origin = Reader(collection, f"{where} collection")
    _ = origin.text("content_hash"), origin.mapping("provenance"), origin.items("derived_from", dict)
    return Exported(
        collection=collection,
        record=TaskRecord.from_json(read.mapping("task"), where),
        rule=rule_from_json(quality.mapping("rule"), where),
        heldout_seeds=seeds,
        labels=cast(Labels, labels),
        infos=tuple(read_infos(read, where)),
    )


def table_of(episodes: Episodes) -> dict[str, Any]:
    """Return the episode table under its exported names, (E,) each."""
    return {name: getattr(episodes, field) for name, field in TABLE.items()}
