"""The pictures of a run: return curve, embeddings by task, trajectories by quality. Colour-blind safe, PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE

from ..datasets import Collection, Selection
from ..envs.point_robot import GOAL_RADIUS
from ..errors import UsageError
from .statistics import seed_interval

# Okabe and Ito's palette
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "figure.dpi": 130,
         "axes.grid": True, "grid.alpha": 0.25}  # fmt: skip


def return_curve(path: Path, curves: Mapping[str, Mapping[int, Mapping[int, float]]], ylabel: str, title: str) -> None:
    """Draw return against gradient steps: `curves[name][seed][step]`, mean over seeds with its 95% interval."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
        for colour, (name, seeds) in zip(COLOURS, curves.items(), strict=False):
            steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
            intervals = [seed_interval([curve[step] for curve in seeds.values()]) for step in steps]
            means = [interval.mean for interval in intervals]
            axes.plot(steps, means, color=colour, label=f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
            if 1 < len(seeds) < 10:  # few enough to show each
                for curve in seeds.values():
                    axes.plot(steps, [curve[step] for step in steps], ".", color=colour, ms=3, alpha=0.6)
            if len(seeds) > 1:
                low, high = [i.low for i in intervals], [i.high for i in intervals]
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)  # type: ignore[arg-type]
        axes.set(xlabel="gradient steps", ylabel=ylabel, title=title)
        axes.legend(frameon=False)
        _save(figure, path)


def embeddings_by_task(
    path: Path, embeddings: np.ndarray, task_of: np.ndarray, names: Sequence[str], title: str, seed: int = 0
) -> None:
    """Draw embeddings (n, L) in the plane (t-SNE), coloured by task (n,) in the tasks' order along `names`."""
    points, axis = embeddings, "embedding"
    if embeddings.shape[1] > 2 and len(embeddings) > 4:  # t-SNE needs neighbours
        axis = "t-SNE"
        perplexity = min(30.0, (len(embeddings) - 1) / 3.0)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(embeddings)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
        dots = axes.scatter(points[:, 0], points[:, -1], c=task_of, cmap="viridis", s=14, lw=0)
        bar = figure.colorbar(dots, ax=axes, label="test task, ordered")
        bar.set_ticks(range(len(names)) if len(names) <= 6 else [0, len(names) - 1])
        bar.set_ticklabels(list(names) if len(names) <= 6 else [names[0], names[-1]])
        axes.set(xlabel=f"{axis} 1", ylabel=f"{axis} 2", title=title)
        _save(figure, path)


def trajectories_by_quality(path: Path, panels: Mapping[str, Sequence[dict[str, Any]]], title: str) -> None:
    """Draw point-robot episodes, one panel per quality; each entry holds `positions` (H + 1, 2) and `goal` (2,).

    The circle is the goal region, where the sparse reward is not zero (FOCAL figure 8).
    """
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(
            1,
            len(panels),
            figsize=(3.3 * len(panels), 3.2),
            layout="constrained",
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        goals = sorted({tuple(episode["goal"]) for episodes in panels.values() for episode in episodes})
        for axes, (quality, episodes) in zip(row[0], panels.items(), strict=True):
            for episode in episodes:
                colour = COLOURS[goals.index(tuple(episode["goal"])) % len(COLOURS)]
                axes.plot(*episode["positions"].T, color=colour, lw=0.9, alpha=0.7)
            for goal in goals:
                axes.add_patch(plt.Circle(goal, GOAL_RADIUS, color="#B00020", fill=False, lw=1.2))
            axes.plot(0, 0, "k+", ms=8)
            axes.set(title=quality if episodes else f"{quality} (no episodes)", xlabel="x (m)", aspect="equal")
        row[0][0].set_ylabel("y (m)")
        figure.suptitle(title)
        _save(figure, path)


def returns_by_quality(path: Path, returns: Mapping[str, np.ndarray], title: str) -> None:
    """Draw the distribution of episode returns per quality, for families that have no plane to draw in."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        filled = {quality: values for quality, values in returns.items() if len(values)}
        for colour, (quality, values) in zip(COLOURS, filled.items(), strict=False):
            axes.hist(values, bins=40, histtype="step", lw=1.6, color=colour, label=f"{quality} ({len(values)})")
        axes.set(xlabel="episode return", ylabel="episodes", title=title)
        axes.legend(frameon=False)
        _save(figure, path)


def behaviour_data(path: Path, collection: Collection) -> None:
    """Draw a collection's behaviour data from its episode tables: returns along training, and their distribution."""
    tables = [entry.store.read_table() for entry in collection.tasks]
    colours = dict(zip(("random", "medium", "expert"), (COLOURS[6], COLOURS[4], COLOURS[2]), strict=True))
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"picture {path}, expected a name that ends in .png, .svg or .pdf")
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for table in tables:
            steps, checkpoint = np.unique(table["sac_steps"], return_inverse=True)
            means = np.bincount(checkpoint, weights=table["returns"]) / np.bincount(checkpoint)
            left.plot(steps, means, color=COLOURS[0], lw=0.8, alpha=max(0.15, 1 / len(tables)))
        left.set(xlabel="SAC steps of the behaviour policy", ylabel="mean return", title="each line is a task")
        every = np.concatenate([table["returns"] for table in tables])
        bins = np.linspace(every.min(), every.max() + 1e-9, 41)
        right.hist(every, bins, color="0.85", label=f"mixed ({len(every):,})")
        for quality, colour in colours.items():
            returns = np.concatenate([table["returns"][Selection(quality).mask(table)] for table in tables])
            if len(returns):
                right.hist(returns, bins, color=colour, histtype="step", lw=1.6, label=f"{quality} ({len(returns):,})")
        right.set(xlabel="return of an episode", ylabel="episodes", title="by quality")
        right.legend(frameon=False)
        figure.suptitle(f"{collection.name} {collection.version}, {len(tables)} tasks")
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
