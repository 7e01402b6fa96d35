"""Which pictures a tested run gets: return curve, embeddings by task, the data it learnt from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import QUALITIES, Collection, Quality
from ..envs import get_family
from ..trainer.journal import read_rows
from ..trainer.runs import Run, seed_folder
from . import figures
from .metatest import MetaTestResult

LEVELS = [quality for quality in QUALITIES if quality != "mixed"]
TASKS_DRAWN, EPISODES_DRAWN = 5, 8


def draw_run(run_dir: Path, run: Run, collection: Collection, results: Mapping[int, MetaTestResult]) -> list[Path]:
    """Draw a run whose seeds gave `results` into RUN/figures; return the files written.

    The return curve is left out where training logged no meta-test (no test task had data of its quality).
    """
    folder, result = run_dir / "figures", next(iter(results.values()))
    where = "held-out context" if result.heldout_only else "unseen tasks"
    saved = []
    if curves := _curves(run_dir, results):
        saved.append(folder / "return_curve.png")
        ylabel = f"{'sparse return' if get_family(run.family).sparse else 'return'} on {where}"
        figures.return_curve(saved[-1], curves, ylabel, f"{run.family}, {run.source.quality} data")
    count, episodes, latent = result.embeddings.shape
    saved.append(folder / "embeddings.png")
    figures.embeddings_by_task(
        saved[-1],
        result.embeddings.reshape(count * episodes, latent),
        np.repeat(np.arange(count), episodes),
        [f"task {index}" for index in result.task_indices],
        f"{run.family}: embeddings, {where}",
    )
    saved.append(folder / "data_by_quality.png")
    draw_data(saved[-1], collection, result.task_indices)
    return saved


def draw_data(path: Path, collection: Collection, tasks: tuple[int, ...]) -> None:
    """Draw some of `tasks`' episodes by quality: trajectories on the plane, or a histogram of returns."""
    if collection.family != "sparse-point-robot":
        loaded = [collection.load(entry.index) for entry in collection.tasks]
        returns = {
            level: np.concatenate([e.returns[e.qualities == Quality[level.upper()]] for e in loaded])
            for level in LEVELS
        }
        figures.returns_by_quality(path, returns, f"{collection.family}: episodes by quality")
        return
    panels: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
    for index in tasks[:: -(-len(tasks) // TASKS_DRAWN)]:
        episodes, goal = collection.load(index), collection.task(index).record.params["goal"]
        starts = np.concatenate([[0], np.cumsum(episodes.lengths + 1)])
        for level in LEVELS:
            for e in np.flatnonzero(episodes.qualities == Quality[level.upper()])[:EPISODES_DRAWN]:
                panels[level].append({"positions": episodes.observations[starts[e] : starts[e + 1]], "goal": goal})
    figures.trajectories_by_quality(path, panels, f"{collection.family}: episodes by quality, goal region circled")


def _curves(run_dir: Path, seeds: Mapping[int, Any]) -> dict[str, dict[int, dict[int, float]]]:
    """`curves[name][seed][step]` from the meta-tests logged during training; names that lack a seed are left out."""
    keys = {"right context": "test/return", "wrong context": "test/wrong_context_return"}
    curves: dict[str, dict[int, dict[int, float]]] = {name: {} for name in keys}
    for seed in seeds:
        rows: Any = read_rows(seed_folder(run_dir, seed) / "evaluation.jsonl")
        for name, key in keys.items():
            curves[name][seed] = {row["step"]: row[key] for row in rows if key in row}
    return {name: curve for name, curve in curves.items() if all(curve.values())}
