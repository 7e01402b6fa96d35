"""Making a figure or table of the paper from what exists, generating and training what is missing.

    STORES/FAMILY                 the collection, if it is of the scale asked for; else STORES/FAMILY-SCALE
    RUNS/walker-mixed-coupled     a run: alias, quality, scale where it is not laptop, and what varies; those of several
                                  methods are `focal-cli compare`'s: walker-mixed-mbml
    OUT/figure_5a.png, .svg       the picture; OUT/table_1.csv, .md a table
    OUT/figure_5a.json            what it rests on: collections, runs, seeds, settings, machine

Whatever exists is used: a run if its settings are the ones asked for, a collection of the scale with a note of what its
settings have otherwise. A run that was stopped goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .commands import flatten
from .datagen import GenerateRequest, generate, generate_settings
from .datasets import Collection, is_committed, open_collection, settings_in_effect
from .envs import get_family
from .errors import DivergedError, FocalError, UsageError
from .experiment import TrainRequest, has_ended, last_step, train_run
from .files import write_json
from .paper import ITEMS, Item, Material, Training, table_matrix, table_power_law, table_settings
from .provenance import provenance
from .settings import to_dict
from .trainer.methods import METHODS
from .trainer.runs import read_run

NEEDS_NOTHING = (table_settings, table_power_law)  # settings are known before anything is made


@dataclass(frozen=True)
class Reproduced:
    """What was made, and what a reader must know of it."""

    files: list[Path]
    notes: list[str]


def find_items(kind: str, number: str) -> list[Item]:
    """Return an item, or all parts of one: figure 9 is 9a and 9b. Raises `UsageError` listing those there are."""
    name = f"{kind} {number}"
    found = [ITEMS[known] for known in ITEMS if known in (name, f"{name}a", f"{name}b")]
    if not found:
        known = ", ".join(item.removeprefix(kind).strip() for item in ITEMS if item.startswith(kind))
        raise UsageError(f"no {name} here, expected {kind} {known}; focal-cli reproduce says what each is")
    return found


def reproduce(
    item: Item, scale: str, stores: Path, runs: Path, out: Path, generating: Callable[[str], Any],
    training_bars: Callable[[], Any], workers: int = 0,
) -> Reproduced:  # fmt: skip
    """Make an item's files. `generating(family)` and `training_bars()` give progress bars.

    Raises `FocalError` before anything is made when a method or setting that it needs is not in this version.
    """
    refuse_unknown(item, scale)
    if item.draw in NEEDS_NOTHING:
        return _with_grounds(item, Material(scale, stores, {}, {}, out))
    families = dict.fromkeys([*item.families, *(training.family for training in item.trainings)])
    collections = {family: collection_at(family, scale, stores, generating, workers) for family in families}
    made, not_begun = {}, []
    for training in item.trainings:
        collection = collections[training.family]
        if quality := quality_there(item, training, collection, scale):
            run_dir = train_one(item, training, quality, collection, scale, runs, training_bars, workers)
            if run_dir is None:
                not_begun.append(training)
            else:
                made[training] = run_dir
    return _with_grounds(item, Material(scale, stores, collections, made, out, tuple(not_begun)))


def _with_grounds(item: Item, material: Material) -> Reproduced:
    """Draw an item, and write what it rests on beside it."""
    files = item.draw(item, material)
    unlike = {family: _unlike_scale(one, material.scale) for family, one in material.collections.items()}
    runs = {
        str(run_dir): {**read_run(run_dir).to_json(), "diverged": material.stops(training)}
        for training, run_dir in material.runs.items()
    }
    path = material.out / f"{item.stem}.json"
    write_json(path, {
        "item": item.name,
        "what": item.what,
        "scale": material.scale,
        "collections": {
            family: {"name": one.name, "content_hash": one.content_hash, "unlike_scale": unlike[family]}
            for family, one in material.collections.items()
        },
        "runs": runs,
        "not_begun": [training.name(material.scale) for training in material.not_begun],
        "provenance": provenance(),
    })  # fmt: skip
    notes = [
        f"{item.name} rests on {material.collections[family].source}, which was not made with the settings of "
        f"--scale {material.scale}: {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''} ({path}); "
        "--stores OTHER makes such data"
        for family, found in unlike.items()
        if found
    ]
    return Reproduced([*files, path], notes)


def _unlike_scale(collection: Collection, scale: str) -> list[str]:
    """What a collection's settings have otherwise than its scale, as `n_train is 20, not 80`; task numbers first."""
    for how, words in (("import", "imported"), ("merge", "merged from others")):
        if how in collection.settings:
            return [f"it was {words}"]
    fixed = get_family(collection.family).fixed_tasks is not None
    found = flatten(settings_in_effect(collection.settings))
    usual = flatten(to_dict(generate_settings(collection.family, scale, fixed_tasks=fixed)))
    names = [name for name in {**usual, **found} if found.get(name) != usual.get(name)]
    names.sort(key=lambda name: not name.startswith("n_"))
    return [f"{name} is {found.get(name, 'missing')}, not {usual.get(name, 'set')}" for name in names]


def refuse_unknown(item: Item, scale: str) -> None:
    """Raise `FocalError` where this version lacks a method or a setting of one of the item's runs."""
    for training in item.trainings:
        if training.algo not in METHODS:
            raise FocalError(
                f"{item.name} needs the method '{training.algo}', which this version does not have "
                f"(it has: {', '.join(METHODS)}); see focal-cli train --help"
            )
        try:
            training.settings(scale)
        except UsageError as error:
            raise FocalError(f"{item.name} needs a setting that this version does not have: {error}") from error


def collection_at(family: str, scale: str, stores: Path, generating: Callable[[str], Any], workers: int) -> Collection:
    """Return the family's collection of a scale, found or generated."""
    usual, own = stores / family, stores / f"{family}-{scale}"
    for path in (usual, own):
        if is_committed(path):
            collection = open_collection(path)
            if collection.scale == scale:
                return collection
    path = own if is_committed(usual) else usual
    settings = generate_settings(family, scale, fixed_tasks=get_family(family).fixed_tasks is not None)
    with generating(family) as bars:
        return generate(GenerateRequest(family, path, settings, scale, workers=workers), bars)


def quality_there(item: Item, training: Training, collection: Collection, scale: str) -> str | None:
    """Return the quality to train on. Where there is none of it, a quality matrix leaves the run out (None), and at
    smoke, whose behaviour agents do not learn, mixed data stand in; else training says what is missing."""
    if collection.tasks_with(training.quality, collection.train_tasks())[0]:
        return training.quality
    if item.draw is table_matrix:
        return None
    return "mixed" if scale == "smoke" else training.quality


def train_one(
    item: Item, training: Training, quality: str, collection: Collection, scale: str, runs: Path,
    training_bars: Callable[[], Any], workers: int,
) -> Path | None:  # fmt: skip
    """Train a run, continue it, or find it finished; return its folder, None where its first stage diverged."""
    run_dir, seeds = runs / training.name(scale), tuple(range(item.seeds_of(training, scale)))
    if _is_there(run_dir, training, scale, quality, collection, seeds):
        return run_dir
    request = TrainRequest(
        collection=collection.path,
        quality=quality,
        algo=training.algo,
        scale=scale,
        seeds=seeds,
        assignments=training.assignments(scale),
        runs=runs,
        name=training.name(scale),
        resume=True,
        workers=workers,
        test_context_size=training.test_context_size(scale),
    )
    try:
        with training_bars() as bars:
            return train_run(request, bars)
    except DivergedError:
        if _is_there(run_dir, training, scale, quality, collection, seeds):
            return run_dir  # what it logged until it was stopped is the picture
        if training.may_diverge and not (run_dir / "settings.json").exists():
            return None
        raise


def _is_there(
    run_dir: Path, training: Training, scale: str, quality: str, collection: Collection, seeds: tuple[int, ...]
) -> bool:
    """Whether the run is the one asked for and has ended; a worker process would take seconds to say so."""
    if not (run_dir / "settings.json").exists():
        return False
    run, asked = read_run(run_dir), (training.settings(scale), quality, collection.content_hash)
    same = (run.settings, run.source.quality, run.content_hash) == asked
    total = run.settings.total_steps
    trained = all(last_step(run_dir, seed) >= total for seed in seeds)
    ended = all(has_ended(run_dir, seed, total) for seed in seeds)
    return same and set(run.source.seeds) >= set(seeds) and (trained or (ended and training.may_diverge))
