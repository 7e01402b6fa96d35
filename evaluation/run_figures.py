"""Which pictures a tested run gets: return curve, embeddings by task, the data it learnt from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import QUALITIES, Collection, Quality, Selection
from ..envs import get_family
from ..envs.batch import env_class
from ..trainer.journal import read_rows
from ..trainer.runs import Run, only_seeds, seed_folder
from . import figures
from .animation import is_point
from .metatest import MetaTestResult

LEVELS = [quality for quality in QUALITIES if quality != "mixed"]
TASKS_DRAWN, EPISODES_DRAWN = 5, 8


def draw_run(run_dir: Path, run: Run, collection: Collection, results: Mapping[int, MetaTestResult]) -> list[Path]:
    """Draw a run whose seeds gave `results` into RUN/figures; return the files written.

    Embeddings, the first seed's, of other contexts than training's own have a picture of their own. The return curve
    is left out where training logged no meta-test (no test task had data of its quality).
    """
    folder, (seed, result) = run_dir / "figures", next(iter(results.items()))
    where = "held-out context" if result.heldout_only else "unseen tasks"
    saved, only = [], only_seeds(results, run)
    if curves := context_curves(run_dir, results):
        title = f"{run.family}, {run.source.quality} data"
        ylabel = f"{return_name(run.family)} on {where}"
        saved += figures.return_curves(folder / f"return_curve{only}.png", {title: curves}, [ylabel])
    count, episodes, latent = result.embeddings.shape
    points = result.embeddings.reshape(count * episodes, latent), np.repeat(np.arange(count), episodes)
    names = [f"task {index}" for index in result.task_indices]
    usual = (result.protocol, result.context_unit, result.context_size, result.quality) == (
        "offline", "transitions", run.settings.context_size, run.source.quality,
    )  # fmt: skip
    of = [result.protocol, result.quality, str(result.context_size), result.context_unit]
    path = folder / f"embeddings{'' if usual else '-' + '-'.join(of)}{only}.png"
    saved += figures.embeddings_by_task(
        path, {f"{run.family}: {where}, seed {seed}": points}, names, context_words(result)
    )
    return saved + draw_data(folder / "data_by_quality.png", collection)


def draw_data(path: Path, collection: Collection) -> list[Path]:
    """Draw episodes by quality: paths of some test tasks' point robots, or a histogram of all returns."""
    family = get_family(collection.family)
    if not is_point(family):
        tables = [entry.store.read_table() for entry in collection.tasks]
        returns = {
            level: np.concatenate([table["returns"][Selection(level).mask(table)] for table in tables])
            for level in LEVELS
        }
        return figures.returns_by_quality(path, returns, f"{family.name}: episodes by quality")
    tests = collection.test_tasks()
    ordered = family.ordered([entry.index for entry in tests], [entry.record.params for entry in tests])
    panels: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
    for place in np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), TASKS_DRAWN)).round().astype(int)):
        episodes, entry = collection.load(ordered[place]), collection.task(ordered[place])
        shown = {"goal": env_class(family).goal_and_wind(entry.record.params)[0], "task": f"task {entry.index}"}
        starts = np.concatenate([[0], np.cumsum(episodes.lengths + 1)])
        for level in LEVELS:
            for e in np.flatnonzero(episodes.qualities == Quality[level.upper()])[:EPISODES_DRAWN]:
                panels[level].append(shown | {"positions": episodes.observations[starts[e] : starts[e + 1]]})
    return figures.trajectories_by_quality(
        path, panels, f"{family.name}: episodes by quality, {'goal regions' if family.sparse else 'goal'} circled"
    )


def return_name(family: str) -> str:
    """What the returns that a family reports are called; the returns of behaviour data are always dense."""
    return "sparse return" if get_family(family).sparse else "return"


def context_words(result: MetaTestResult) -> str:
    """`mixed context of 256 transitions`, or what else the protocol gave."""
    amount = (
        f"{result.context_size} {result.context_unit.rstrip('s') if result.context_size == 1 else result.context_unit}"
    )
    where = {
        "offline": f"{result.quality} context of {amount}",
        "shift": f"context of {amount} rolled out by other tasks' {result.quality} behaviour policies",
        "online": f"context of {amount} that the policy collected itself",
        "mbml": f"MBML's protocol: {amount} from the prior on, mean of the last {min(3, result.context_size)}",
    }
    return where[result.protocol]


def context_curves(run_dir: Path, seeds: Iterable[int]) -> dict[str, dict[int, dict[int, float]]]:
    """`curves[name][seed][step]` from the meta-tests logged during training; names that lack a seed are left out."""
    keys = {"right context": "test/return", "wrong context": "test/wrong_context_return"}
    curves = {name: logged(run_dir, seeds, "evaluation", key) for name, key in keys.items()}
    return {name: curve for name, curve in curves.items() if all(curve.values())}


def name_context_sizes(curves: Mapping[str, Any], runs: Mapping[str, tuple[Path, Iterable[int]]]) -> dict[str, Any]:
    """Return curves by label, with their meta-tests' context sizes in the labels where these are not all the same.

    `runs[label]` is a curve's run folder and seeds; a label without a run stays as it is.
    """
    sizes = {
        label: sorted(
            {size for seed in logged(*run, "evaluation", "test/context_size").values() for size in seed.values()}
        )
        for label, run in runs.items()
    }
    if len({size for found in sizes.values() for size in found}) < 2:
        return dict(curves)
    words = {label: f", contexts of {' and '.join(map(str, found))}" for label, found in sizes.items() if found}
    return {label + words.get(label, ""): curve for label, curve in curves.items()}


def logged(run_dir: Path, seeds: Iterable[int], log: str, key: str) -> dict[int, dict[int, float]]:
    """Return `values[seed][step]` of one field of a run's logs; `log` is "metrics" or "evaluation"."""
    values: dict[int, dict[int, float]] = {}
    for seed in seeds:
        rows: Any = read_rows(seed_folder(run_dir, seed) / f"{log}.jsonl")
        values[seed] = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    return values
