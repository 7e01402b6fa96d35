"""Several collections of one family as one, or a part of one: whole tasks renumbered, episodes chosen by quality.

    A  tasks 0 1 2     B  tasks 0 1           C = merge A B          tasks 0 1 2 | 3 4
    A  tasks 0 1 2     B  tasks 1' 7          C = merge A B --join   tasks 0 1+1' 2 | 3     (1' has the parameters of 1)

- Tasks keep their order, parameters, split, references and provenance; later inputs are numbered after earlier ones.
- Two inputs with the same task are refused, unless asked to `join` its episodes; the same task twice always is. An
  episode that two of the joined hold is there once.
- A joined task has the record and policies of the first part whose expert passed its test, else of the first. It is
  trained on and tested with held-out episodes ("both") where one part was for training and another for test.
- Held-out marks and levels stay what they are in the inputs: an episode held out never gets into training. Where they
  no longer follow from a rule and a seed they are stored as given.
- Family, environment settings, widths and the rule that cut the levels must agree; licences must be compatible.
- `derived_from` names every input with its seed, licence, authors, settings and what was chosen from it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .collecting import derived_folder, write_document
from .collection import Collection
from .episodes import Episodes
from .licences import joined_licence
from .opening import open_collection
from .records import CollectionHeader, Split, TaskRecord
from .selection import Subset
from .sources import read_checked
from .storage import canonical_json, write_file
from .tasks import Labels, TaskEntry, labelling_that_holds, read_verified, store_folder, task_name, write_task

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """One input's share of a task of the output."""

    collection: Collection
    subset: Subset
    entry: TaskEntry


def merge_collections(
    collections: Sequence[Collection],
    path: Path,
    *,
    quality: str = "mixed",
    tasks: Sequence[Sequence[int] | None] | None = None,
    join: bool = False,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Collection:
    """Write the tasks of `collections` into the new collection `path`; see the module docstring.

    `quality` keeps the episodes of one level (tasks without it are left out), `tasks` gives the indices to keep of each
    collection, or None for all. One collection is enough: the result is then a part of it. `progress(done, total)`
    counts tasks. Raises `UsageError` for what cannot be put together and `FocalError` for damaged data or a full disk.
    """
    if tasks is not None and len(tasks) != len(collections):
        raise UsageError(
            f"task lists for {len(tasks)} of {len(collections)} collections, expected one each, for example --tasks 0-9"
        )
    chosen = [
        collection.select(quality, tasks=indices)
        for collection, indices in zip(collections, tasks or [None] * len(collections), strict=True)
    ]
    licence = joined_licence([collection.licence for collection in collections])
    parts = [
        Part(collection, subset, entry)
        for collection, subset in zip(collections, chosen, strict=True)
        for entry in subset.tasks
    ]
    _check_alike(parts)
    groups = _grouped(parts, join)
    splits = [_split(group) for group in groups]
    infos = _common_infos(parts)
    header = _header(collections, name, licence, splits, {"quality": quality, "tasks": tasks, "join": join})
    header = replace(header, notes=_notes(collections, groups, chosen, infos))
    with derived_folder(path, [collection.source for collection in collections]) as folder:
        repeated = 0
        for index, (group, split) in enumerate(zip(groups, splits, strict=True)):
            store = folder / store_folder(index)
            store.mkdir(parents=True)
            written, left_out = _joined(index, split, group, infos)
            write_task(store, *written)
            repeated += left_out
            _copy_policies(folder, index, _leading(group))
            if progress:
                progress(index + 1, len(groups))
        origins = [origin for collection in collections for origin in collection.derived_from]
        origins += [
            _origin(collection, quality, subset.tasks) for collection, subset in zip(collections, chosen, strict=True)
        ]
        if repeated:
            header = replace(header, notes=(*header.notes, f"episodes that two inputs held, kept once: {repeated}"))
        write_document(folder, header, provenance or {}, list({canonical_json(o): o for o in origins}.values()))
    return open_collection(path)


def _check_alike(parts: Sequence[Part]) -> None:
    """Refuse tasks that could not be trained on together."""
    first = parts[0]
    for part in parts[1:]:
        here, there = _kind(part.entry), _kind(first.entry)
        for what, value in here.items():
            if value != there[what]:
                raise UsageError(
                    f"task {part.entry.index} of {part.collection.source} has {what} {str(value)[:80]}, expected "
                    f"{str(there[what])[:80]} as task {first.entry.index} of {first.collection.source}; "
                    "they cannot be merged"
                )
    rules = {part.entry.rule: part for part in parts if part.entry.labels == "scores"}
    if len(rules) > 1:
        one, other = list(rules.values())[:2]
        raise UsageError(
            f"{one.collection.source} and {other.collection.source} cut their levels by different rules; give one the "
            "other's: focal-cli data relabel PATH -o NEW --set NAME=VALUE"
        )


def _kind(entry: TaskEntry) -> dict[str, Any]:
    record, sizes = entry.record, entry.store.sizes
    return {
        "family": record.family,
        "environment": record.env_id,
        "environment settings": {key: value for key, value in record.env_settings.items() if key != "task"},
        "time limit": record.horizon,
        "spaces": record.spaces,
        "observation width": sizes.observation_dim,
        "action width": sizes.action_dim,
        "column of the absolute x": record.absolute_x,
        "a sparse reward": "sparse_reward" in entry.store.attributes["infos"],
    }


def _grouped(parts: Sequence[Part], join: bool) -> list[list[Part]]:
    """Group the parts by task: one part each, or all of the same parameters where they are to be joined."""
    groups: dict[bytes, list[Part]] = {}
    content: dict[tuple[str, str], Part] = {}
    for part in parts:
        arrays = part.entry.content["observations"], part.entry.content["actions"]
        if (twin := content.setdefault(arrays, part)) is not part:
            raise UsageError(f"{_named(part)} and {_named(twin)} hold the same episodes; leave one out with --tasks")
        groups.setdefault(canonical_json(part.entry.record.params), []).append(part)
    if join:
        return list(groups.values())
    for group in groups.values():
        for part in group[1:]:
            if part.collection is not group[0].collection:
                raise UsageError(
                    f"{_named(part)} is the same task as {_named(group[0])}; join their episodes with --join, or leave "
                    "one out with --tasks"
                )
    return [[part] for part in parts]


def _named(part: Part) -> str:
    return f"task {part.entry.index} of {part.collection.source}"


def _leading(group: Sequence[Part]) -> Part:
    """The part whose references and policies a joined task keeps."""
    return max(
        group, key=lambda part: (part.entry.record.references.reached_expert, part.entry.record.references.known)
    )


def _split(group: Sequence[Part]) -> Split:
    splits = {part.entry.split for part in group}
    return splits.pop() if len(splits) == 1 else "both"


def _common_infos(parts: Sequence[Part]) -> list[str]:
    infos = [set(part.entry.store.attributes["infos"]) for part in parts]
    return sorted(set.intersection(*infos))


def _joined(
    index: int, split: Split, group: Sequence[Part], infos: Sequence[str]
) -> tuple[tuple[TaskRecord, Any, tuple[int, ...], Episodes, Labels], int]:
    """Load and join the parts of one task: the arguments of `write_task`, and how many episodes it left out."""
    entry = _leading(group).entry
    loaded = [read_verified(part.entry).select(part.subset.masks[part.entry.index]) for part in group]
    once = _without_repeats(group, loaded) if len(group) > 1 else loaded
    episodes = Episodes.concatenate([replace(part, infos={name: part.infos[name] for name in infos}) for part in once])
    record = replace(entry.record, index=index, split=split)
    if len(group) > 1:
        left_out = sum(part.num_episodes for part in loaded) - episodes.num_episodes
        return (record, entry.rule, (), episodes, "given"), left_out
    seeds, labels = labelling_that_holds(episodes, record.references, entry.rule, entry.heldout_seeds, entry.labels)
    return (record, entry.rule, seeds, episodes, labels), 0


def _without_repeats(group: Sequence[Part], loaded: Sequence[Episodes]) -> list[Episodes]:
    """Return the parts without the episodes that an earlier part holds: those of two runs from the same seed are the
    same until their agents learn. Held out in one part they are held out. Raises `UsageError` where nothing is left.
    """
    kept = [np.ones(episodes.num_episodes, bool) for episodes in loaded]
    heldout = [episodes.heldout.copy() for episodes in loaded]
    places: dict[bytes, list[tuple[int, int]]] = {}
    for number, episodes in enumerate(loaded):
        rows = np.cumsum([0, *episodes.lengths])
        for e in range(episodes.num_episodes):
            start, end = rows[e], rows[e + 1]
            digest = hashlib.sha256(np.array([episodes.seeds[e], episodes.sac_steps[e]]).tobytes())
            digest.update(np.ascontiguousarray(episodes.observations[start + e : end + e + 1]).data)
            digest.update(np.ascontiguousarray(episodes.actions[start:end]).data)
            found = places.setdefault(digest.digest(), [])
            if not found or found[0][0] == number:
                found.append((number, e))
                continue
            kept[number][e] = False
            if heldout[number][e]:
                for first, place in found:
                    heldout[first][place] = 1
        if not kept[number].any():
            others = " and ".join(_named(part) for part in group[:number])
            raise UsageError(f"{others} hold every episode of {_named(group[number])}; leave it out with --tasks")
    return [
        replace(episodes, heldout=marks).select(mask)
        for episodes, marks, mask in zip(loaded, heldout, kept, strict=True)
    ]


def _copy_policies(folder: Path, index: int, part: Part) -> None:
    prefix = f"policies/{task_name(part.entry.index)}/"
    for file, (size, sha256) in part.collection.files.items():
        if file.startswith(prefix):
            data = read_checked(part.collection.source, file, size, sha256)
            write_file(folder / "policies" / task_name(index) / file.removeprefix(prefix), data)


def _header(
    collections: Sequence[Collection], name: str | None, licence: str, splits: Sequence[Split], merge: dict[str, Any]
) -> CollectionHeader:
    first = collections[0].header
    sources = {collection.header.tasks_from for collection in collections}
    tasks = None if merge["tasks"] is None else [None if one is None else list(one) for one in merge["tasks"]]
    return CollectionHeader(
        name=name or f"{first.family}-merged",
        family=first.family,
        licence=licence,
        authors=tuple(dict.fromkeys(author for collection in collections for author in collection.authors)),
        seed=first.seed,
        tasks_from=first.tasks_from if len(sources) == 1 else "merge",
        scale=first.scale,
        settings={"merge": {**merge, "tasks": tasks}},
        train=tuple(index for index, split in enumerate(splits) if split != "test"),
        test=tuple(index for index, split in enumerate(splits) if split != "train"),
    )


def _notes(
    collections: Sequence[Collection], groups: Sequence[Sequence[Part]], chosen: Sequence[Subset], infos: Sequence[str]
) -> tuple[str, ...]:
    """Say what merging left out, besides what the inputs say."""
    notes = [note for collection in collections for note in collection.header.notes]
    joined = sum(len(group) > 1 for group in groups)
    if joined:
        notes.append(
            f"tasks joined from several parts: {joined:,}; references and policies are one part's, and a "
            "sac_step may stand for several policies"
        )
    everywhere = {name for subset in chosen for entry in subset.tasks for name in entry.store.attributes["infos"]}
    if dropped := sorted(everywhere - set(infos)):
        notes.append(f"left out, because not every input has it: {', '.join(dropped)}")
    return tuple(dict.fromkeys(notes))


def _origin(collection: Collection, quality: str, tasks: Sequence[TaskEntry]) -> dict[str, Any]:
    header = collection.header
    return {
        "name": header.name,
        "version": header.version,
        "content_hash": collection.content_hash,
        "seed": header.seed,
        "licence": header.licence,
        "authors": list(header.authors),
        "settings": header.settings,
        "provenance": dict(collection.provenance),
        "chosen": {"quality": quality, "tasks": [entry.index for entry in tasks]},
    }
