"""Foreign data as a collection: find the tasks, read each, label it, write the stores.

    list_tasks          what is there: names, goals, numbers, or this project's own export documents
    import_collection   all tasks into a new folder, or none: atomic like every collection

What environments a family has and which parameters a task stands for is said by the caller (importing.py in the
package's root). Formats: unicorn.py, d4rl.py, minari.py, focal_iclr.py; what each carries: docs/exchange.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import FocalError, UsageError
from . import d4rl, focal_iclr, minari, unicorn
from .collecting import derived_folder, write_document
from .collection import Collection
from .episodes import Episodes, Quality
from .foreign import ADVICE, Exported, FamilyFacts, ImportTask, Notes, SourceTask, advising
from .opening import open_collection
from .quality import QualityRule, checkpoint_scores, draw_heldout, label_episodes
from .records import CollectionHeader, References, TaskRecord
from .sources import Folder
from .tasks import Labels, labelling_that_holds, store_folder, write_task

FORMATS: dict[str, Any] = {"unicorn": unicorn, "d4rl": d4rl, "minari": minari, "focal-iclr": focal_iclr}

Label = Literal["scores", "random", "medium", "expert"]
ExpertTest = Callable[[Mapping[str, Any], Episodes, Episodes, Episodes | None], tuple[bool, str]]
"""(params, random episodes, expert episodes, deterministic expert episodes if any) to (passed, what was measured)."""
Progress = Callable[[int, int], None]

SEEN = "test tasks with the same parameters as a training task, so not unseen"


@dataclass(frozen=True)
class ImportRequest:
    """What `focal-cli data import` asks for."""

    source: Path
    form: str
    path: Path
    """The collection's new folder."""
    facts: FamilyFacts
    tasks: tuple[ImportTask, ...]
    licence: str
    authors: tuple[str, ...] = ()
    name: str | None = None
    label: Label | None = None
    """None: what the source says; a level: every episode has it; "scores": computed from returns (focal-iclr only)."""
    seed: int = 0
    """Of the held-out draw."""
    scale: str = "laptop"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    expert_test: ExpertTest | None = None


def list_tasks(source: Path, form: str) -> tuple[SourceTask, ...]:
    """Return the tasks in a source without reading their data. Raises `FocalError` when there is none."""
    if not source.exists():
        raise FocalError(f"no data at {source}, expected {_EXPECTED[form]}")
    if source.is_symlink() or (form != "d4rl" and not source.is_dir()):
        raise FocalError(f"{source} is no folder, expected {_EXPECTED[form]}")
    with advising(ADVICE):
        tasks: tuple[SourceTask, ...] = FORMATS[form].list_tasks(source)
    if not tasks:
        raise FocalError(f"{source} holds no task of format {form}, expected {_EXPECTED[form]}")
    if len({task.exported is None for task in tasks}) > 1:
        raise FocalError(f"{source} mixes this project's exports with other data; import them one after the other")
    return tasks


def import_collection(request: ImportRequest, progress: Progress | None = None) -> Collection:
    """Import every task of `request` into a new collection.

    `progress(done, total)` counts tasks. Raises `FocalError` for hostile or damaged data, data that are not the
    family's, a folder that exists, or a full disk; then there is no collection. Raises `UsageError` for a wish the
    source cannot fulfil.
    """
    exported = [task.source.exported for task in request.tasks if task.source.exported]
    header = _exported_header(request, exported) if exported else _header(request)
    if request.label == "scores" and request.form != "focal-iclr":
        raise UsageError(
            f"--label scores needs data whose source names the checkpoint of every episode (focal-iclr); "
            f"found {request.form}; say which level it is, for example --label expert"
        )
    notes = Notes()
    trained_on = [task.params for task in request.tasks if task.split == "train"]
    notes.add(SEEN, sum(task.split == "test" and task.params in trained_on for task in request.tasks))
    with derived_folder(request.path, [Folder(request.source)]) as folder:
        for number, task in enumerate(request.tasks):
            index = task.source.exported.record.index if task.source.exported else number
            store = folder / store_folder(index)
            store.mkdir(parents=True)
            write_task(store, *_read_task(request, index, task, notes))
            if progress:
                progress(number + 1, len(request.tasks))
        header = replace(header, notes=tuple(dict.fromkeys([*header.notes, *notes.sentences()])))
        origins = _origins(exported[0].collection) if exported else []
        write_document(folder, header, request.provenance, origins)
    return open_collection(request.path)


def _read_task(
    request: ImportRequest, index: int, task: ImportTask, notes: Notes
) -> tuple[TaskRecord, QualityRule, tuple[int, ...], Episodes, Labels]:
    """Read and label one task: the arguments of `write_task`."""
    with advising(ADVICE):
        episodes: Episodes | None = FORMATS[request.form].read_task(request.source, task, request.facts, notes)
    where = f"{request.source / task.source.name}"
    if episodes is None:
        raise FocalError(f"{where} holds no episode, expected {_EXPECTED[request.form]}")
    exported = task.source.exported
    if exported is not None:
        if (longest := int(episodes.lengths.max())) > exported.record.horizon:
            raise FocalError(
                f"{where} has an episode of {longest} steps, expected at most its horizon, "
                f"{exported.record.horizon}; export it again"
            )
        rule, references = exported.rule, exported.record.references
        labelling = labelling_that_holds(episodes, references, rule, exported.heldout_seeds, exported.labels)
        notes.add("exported tasks whose levels or held-out marks were changed since", labelling[1] != exported.labels)
        return exported.record, rule, labelling[0], episodes, labelling[1]
    rule, seeds = QualityRule(), (request.seed, index)
    if request.label == "scores":
        references = _references(request, task, episodes)
        scale = references.random, references.expert, references.reached_expert
        labelled = label_episodes(episodes, rule, *scale, seeds)
        return _record(request, index, task, references), rule, seeds, labelled, "scores"
    level = Quality[request.label.upper()] if request.label else Quality.NONE
    heldout = draw_heldout(episodes.sac_steps, rule.heldout_fraction, seeds)
    labelled = replace(episodes, qualities=np.full_like(episodes.qualities, level), heldout=heldout)
    return _record(request, index, task, References()), rule, seeds, labelled, "given"


def _references(request: ImportRequest, task: ImportTask, episodes: Episodes) -> References:
    """Take the earliest checkpoint for random and the best one for the expert: all that the source holds."""
    steps, means = checkpoint_scores(episodes.returns, episodes.sac_steps, 0.0, 1.0)
    first, best = int(steps[0]), int(steps[np.argmax(means)])
    random, expert = (episodes.select(episodes.sac_steps == step) for step in (first, best))
    deterministic = focal_iclr.read_task(request.source, task, request.facts, Notes(), deterministic=True)
    parts: list[Episodes | None] = [None, None]
    if deterministic is not None:
        masks = [deterministic.sac_steps == step for step in (first, best)]
        parts = [deterministic.select(mask) if mask.any() else None for mask in masks]
    reached, measured = False, "not tested"
    if request.expert_test is not None:
        reached, measured = request.expert_test(task.params, random, expert, parts[1])
    return References(
        random_returns=random.returns,
        expert_returns=expert.returns,
        random_deterministic=() if parts[0] is None else parts[0].returns,
        expert_deterministic=() if parts[1] is None else parts[1].returns,
        random_sparse_deterministic=_sparse_returns(parts[0]),
        expert_sparse_deterministic=_sparse_returns(parts[1]),
        expert_sac_step=best,
        reached_expert=reached,
        expert_test=f"{measured}; random is the source's earliest checkpoint (step {first})",
    )


def _sparse_returns(episodes: Episodes | None) -> Any:
    if episodes is None or "sparse_reward" not in episodes.infos:
        return ()
    first = np.cumsum(episodes.lengths) - episodes.lengths
    return np.add.reduceat(episodes.infos["sparse_reward"].astype("<f8"), first)


def _record(request: ImportRequest, index: int, task: ImportTask, references: References) -> TaskRecord:
    facts = request.facts
    return TaskRecord(
        index=index,
        family=facts.name,
        params=task.params,
        split=task.split,
        env_id=facts.env_id,
        env_settings={"task": task.params},
        horizon=facts.horizon,
        spaces={
            "observation": {"shape": [facts.observation_dim], "dtype": "float32"},
            "action": {"shape": [facts.action_dim], "dtype": "float32", "low": -1.0, "high": 1.0},
        },
        absolute_x=facts.absolute_x,
        behaviour={"algorithm": "not known", "imported": request.form},
        references=references,
        provenance={"imported": request.form, "source": task.source.name},
    )


def _header(request: ImportRequest) -> CollectionHeader:
    settings = {"format": request.form, "source": request.source.name, "label": request.label, "seed": request.seed}
    splits = [task.split for task in request.tasks]
    return CollectionHeader(
        name=request.name or f"{request.facts.name}-{request.form}",
        family=request.facts.name,
        licence=request.licence,
        authors=request.authors,
        seed=request.seed,
        tasks_from="import",
        scale=request.scale,
        settings={"import": settings},
        train=tuple(index for index, split in enumerate(splits) if split != "test"),
        test=tuple(index for index, split in enumerate(splits) if split != "train"),
    )


def _exported_header(request: ImportRequest, exported: list[Exported]) -> CollectionHeader:
    """The header the data had, for the tasks that are here. Raises `UsageError` for what contradicts it."""
    origin, facts = exported[0].collection, request.facts
    if any(task.collection != origin for task in exported):
        raise FocalError(f"{request.source} mixes exports of different collections; import them one after the other")
    header = CollectionHeader.from_json(origin, f"{request.source}: exported collection")
    if header.licence.lower() != request.licence.lower():
        raise UsageError(
            f"the data are licensed under {header.licence}, found --licence {request.licence}; only their owner can "
            f"change that: --licence {header.licence}"
        )
    if request.label is not None:
        raise UsageError(f"the source is an export with levels of its own, found --label {request.label}; leave it out")
    for task in exported:
        found = task.record.family, task.record.env_id
        if found != (facts.name, facts.env_id) or header.family != facts.name:
            raise UsageError(
                f"the data are of {' in '.join(found)}, expected {facts.name} in {facts.env_id} as --env says"
            )
        if task.record.absolute_x != facts.absolute_x:
            raise FocalError(
                f"task {task.record.index} of {request.source} has its absolute x in column {task.record.absolute_x}, "
                f"expected {facts.absolute_x} of {facts.name}; export it again"
            )
    indices = {task.record.index: task.record.split for task in exported}
    if len(indices) < len(exported):
        raise FocalError(f"{request.source} has {len(exported)} tasks of {len(indices)} numbers; leave the copies out")
    return replace(
        header,
        name=request.name or header.name,
        authors=tuple(dict.fromkeys([*header.authors, *request.authors])),
        train=tuple(index for index, split in indices.items() if split != "test"),
        test=tuple(index for index, split in indices.items() if split != "train"),
    )


def _origins(collection: Mapping[str, Any]) -> list[dict[str, Any]]:
    origin = {name: collection[name] for name in ("name", "version", "content_hash")}
    return [*collection["derived_from"], origin]


_EXPECTED = {
    "unicorn": "a folder of folders like seed_0_goal_1.234, each with obs.npy, actions.npy, rewards.npy, next_obs.npy "
    "and terminals.npy",
    "d4rl": "an HDF5 file, or a folder of .hdf5 files, one per task",
    "minari": "a Minari data set, or a folder of them, one per task",
    "focal-iclr": "a folder of folders like goal_idx0, each with files like trj_evalsample0_step2200.npy",
}
