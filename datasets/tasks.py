"""One sealed task: its store with the attributes that make it a task of a collection.

attributes["focal"]
  format, sizes, infos     see store.py
  task                     the TaskRecord: parameters, split, environment, references, behaviour, provenance
  quality                  rule and the seeds of the held-out draw: enough to label the episodes again. Where `labels`
                           is "given" instead of "scores" (or missing), the levels are what the data's source said, and
                           the held-out marks, too, where there are no seeds
  counts                   episodes and steps per quality
  statistics               count, mean, m2, min, max per column, in a form that merges exactly (Chan et al. 1979)
  content                  a hash per array, independent of codec and chunks
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..errors import FocalError
from .episodes import Array, Episodes, Quality
from .quality import QualityRule, draw_heldout, label_episodes
from .records import Reader, References, Split, TaskRecord, rule_from_json
from .sources import Source
from .storage import AGAIN, canonical_json
from .store import Store, array_hash, episode_arrays, evaluation_arrays, inspect_store, write_store

_COLUMN_VALUES = 2**21  # described at a time, so that float64 copies of large arrays need little memory

Labels = Literal["scores", "given"]
"""Where the levels come from: computed from returns and references, or said by the source of imported data."""


@dataclass(frozen=True)
class Count:
    """How much data there is."""

    episodes: int
    steps: int


@dataclass(frozen=True)
class TaskEntry:
    """One task of an open collection: everything but its data."""

    index: int
    record: TaskRecord
    counts: Mapping[str, Count]
    """Per quality name (random, medium, expert, mixed), held-out episodes included."""
    rule: QualityRule
    heldout_seeds: tuple[int, ...]
    labels: Labels
    content: Mapping[str, str] = field(repr=False)
    """Content hash per array."""
    store: Store = field(repr=False)

    @property
    def folder(self) -> str:
        """Where its store is in the collection, for example `tasks/task_0003.zarr`."""
        return self.store.folder

    @property
    def split(self) -> Split:
        """`train`, `test` or `both`."""
        return self.record.split

    @property
    def content_hash(self) -> str:
        """Hash of all arrays, the parameters and the split."""
        document = {"arrays": dict(self.content), "params": self.record.params, "split": self.record.split}
        return hashlib.sha256(canonical_json(document)).hexdigest()


def task_name(index: int) -> str:
    """`task_0003`: the task's name in every folder."""
    return f"task_{index:04d}"


def store_folder(index: int) -> str:
    """Where the sealed store of a task is in its collection."""
    return f"tasks/{task_name(index)}.zarr"


def write_task(
    folder: Path,
    record: TaskRecord,
    rule: QualityRule,
    heldout_seeds: Iterable[int],
    episodes: Episodes,
    labels: Labels = "scores",
    **codec: Any,
) -> None:
    """Write the store of a task, whose episodes are labelled already, into the empty `folder`."""
    arrays = {**episode_arrays(episodes), **evaluation_arrays(episodes)}
    attributes = {
        "task": record.to_json(),
        "quality": {"rule": asdict(rule), "heldout_seeds": list(heldout_seeds), "labels": labels},
        "counts": {name: asdict(count) for name, count in count_levels(episodes).items()},
        "statistics": statistics_of(arrays),
        "content": {name: array_hash(values) for name, values in sorted(arrays.items())},
    }
    write_store(folder, episodes, attributes, **codec)


def inspect_task(source: Source, index: int, files: Mapping[str, int], documents: Mapping[str, bytes]) -> TaskEntry:
    """Check a sealed store's structure and attributes without reading its chunks; arguments as for `inspect_store`."""
    where = f"{source}: task {index}"
    store = inspect_store(source, store_folder(index), where, files, documents)
    read = Reader(store.attributes, where)
    record = TaskRecord.from_json(read.mapping("task"), where)
    if record.index != index:
        raise FocalError(f"{where}: its attributes say task {record.index}, expected {index}; {AGAIN}")
    if record.absolute_x is not None and record.absolute_x >= store.sizes.observation_dim:
        raise FocalError(
            f"{where}: absolute_x is {record.absolute_x}, of {store.sizes.observation_dim} columns; {AGAIN}"
        )
    quality = Reader(read.mapping("quality"), f"{where} quality")
    content = read.mapping("content")
    if sorted(content) != sorted(store.layouts) or not all(isinstance(value, str) for value in content.values()):
        raise FocalError(f"{where}: content hashes are not those of its arrays; {AGAIN}")
    seeds = tuple(quality.items("heldout_seeds", int))
    if min(seeds, default=0) < 0:
        raise FocalError(f"{where}: heldout_seeds are {str(seeds)[:80]}, expected 0 or more; {AGAIN}")
    labels = quality.text("labels") if "labels" in store.attributes["quality"] else "scores"
    if labels not in ("scores", "given") or (labels == "scores" and not record.references.known):
        raise FocalError(
            f"{where}: labels are {labels[:40]!r} with {len(record.references.random_returns)} reference returns, "
            f"expected 'scores', which need references, or 'given'; {AGAIN}"
        )
    return TaskEntry(
        index=index,
        record=record,
        counts=_counts(read.mapping("counts"), store, where),
        rule=rule_from_json(quality.mapping("rule"), where),
        heldout_seeds=seeds,
        labels=cast(Labels, labels),
        content=content,
        store=store,
    )


def count_levels(episodes: Episodes) -> dict[str, Count]:
    """Count episodes and steps per label, `none` included."""
    counts = {}
    for level in Quality:
        mask = episodes.qualities == level
        counts[level.name.lower()] = Count(int(mask.sum()), int(episodes.lengths[mask].sum(dtype=np.int64)))
    return counts


def with_mixed(counts: Mapping[str, Count]) -> dict[str, Count]:
    """Turn counts per label into counts per quality a user may ask for: `mixed` is the sum of all labels."""
    total = Count(sum(count.episodes for count in counts.values()), sum(count.steps for count in counts.values()))
    return {**{name: count for name, count in counts.items() if name != "none"}, "mixed": total}


def _counts(document: Mapping[str, Any], store: Store, where: str) -> dict[str, Count]:
    counts = {}
    for level in Quality:
        read = Reader(Reader(document, f"{where} counts").mapping(level.name.lower()), f"{where} counts")
        counts[level.name.lower()] = Count(read.integer("episodes"), read.integer("steps"))
    qualities = with_mixed(counts)
    if qualities["mixed"] != (expected := Count(store.sizes.episodes, store.sizes.steps)):
        raise FocalError(f"{where}: counts add up to {qualities['mixed']}, expected {expected}; {AGAIN}")
    return qualities


def statistics_of(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return the statistics of every array of transitions by its name."""
    return {
        name: statistics(values)
        for name, values in arrays.items()
        if name in ("observations", "actions", "rewards") or name.startswith("infos/")
    }


def statistics(values: Array) -> dict[str, Any]:
    """Describe the columns of `values` (T,) or (T, width) in float64.

    Two parts with counts n, m, means a, b and m2 p, q merge into mean a + (b - a) m / (n + m) and
    m2 p + q + (b - a)^2 n m / (n + m), so the statistics of any set of tasks need no second look at the data.
    """
    table = values.reshape(len(values), -1)
    found: dict[str, list[float]] = {"mean": [], "m2": [], "min": [], "max": []}
    some = max(1, _COLUMN_VALUES // len(table))
    for start in range(0, table.shape[1], some):
        # contiguous columns: reductions are several times as fast as along the first axis of a narrow array
        columns = np.array(table[:, start : start + some].T, np.float64, order="C")
        mean = columns.mean(axis=1)
        found["mean"] += mean.tolist()
        found["min"] += columns.min(axis=1).tolist()
        found["max"] += columns.max(axis=1).tolist()
        columns -= mean[:, None]
        found["m2"] += cast(Array, np.square(columns, out=columns).sum(axis=1)).tolist()
    return {"count": len(values), **found}


def read_verified(entry: TaskEntry) -> Episodes:
    """Read all episodes of a task and check them against its content hashes, so that no damage is passed on.

    Raises `FocalError` naming the array that is wrong.
    """
    episodes = entry.store.read_episodes()
    for name, values in episode_arrays(episodes).items():
        if array_hash(values) != entry.content[name]:
            raise FocalError(f"{entry.store.where}: array {name} does not have its content hash; {AGAIN}")
    return episodes


def recomputed_labels(
    episodes: Episodes, references: References, rule: QualityRule, heldout_seeds: Sequence[int], labels: Labels
) -> dict[str, Array]:
    """Compute again the (E,) fields `qualities` and `heldout` that follow from returns, references, rule and seeds.

    Given labels follow from nothing, and neither do held-out marks without seeds: those are not in the answer.
    """
    if labels == "given":
        if not heldout_seeds:
            return {}
        return {"heldout": draw_heldout(episodes.sac_steps, rule.heldout_fraction, heldout_seeds)}
    scale = references.random, references.expert, references.reached_expert
    labelled = label_episodes(episodes, rule, *scale, heldout_seeds)
    return {"qualities": labelled.qualities, "heldout": labelled.heldout}


def labelling_that_holds(
    episodes: Episodes, references: References, rule: QualityRule, heldout_seeds: Sequence[int], labels: Labels
) -> tuple[tuple[int, ...], Labels]:
    """Return the seeds and labels to declare for `episodes` as they are: the same where they still follow, else given.

    Levels and held-out marks themselves are never changed, so an episode held out stays so.
    """
    for declared in dict.fromkeys([(tuple(heldout_seeds), labels), (tuple(heldout_seeds), cast(Labels, "given"))]):
        computed = recomputed_labels(episodes, references, rule, *declared)
        if all(np.array_equal(getattr(episodes, name), values) for name, values in computed.items()):
            return declared
    return (), "given"
