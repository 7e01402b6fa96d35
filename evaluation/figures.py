"""How every picture is drawn: one look, colour-blind safe, PNG and SVG. What goes into them is chosen elsewhere.

Lines have Okabe and Ito's colours and a marker of their own; tasks, which are ordered, have viridis, whose lightness
rises evenly. A curve is `curves[name][seed][step]`; its band is the 95% interval over seeds.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.manifold import TSNE

from ..datasets import Collection, Selection
from ..envs.point_robot import GOAL_RADIUS
from ..errors import UsageError
from .statistics import PROFILE_THRESHOLDS, Interval, profile_intervals, seed_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUALITY_COLOURS = {"random": COLOURS[6], "medium": COLOURS[4], "expert": COLOURS[2], "mixed": "#d0d4da"}
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "figure.dpi": 130,
         "axes.grid": True, "grid.alpha": 0.25, "svg.hashsalt": "focal"}  # fmt: skip

Curves = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Values by name, seed and gradient step."""


def return_curves(
    path: Path, panels: Mapping[str, Curves], ylabels: Sequence[str], log_x: bool = False, columns: int = 3,
    xlabel: str = "gradient steps",
) -> list[Path]:  # fmt: skip
    """Draw return against gradient steps, one panel per title: mean over seeds with its 95% interval."""
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), columns, (4.4, 3.3))
        names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
        for axis, (title, curves), ylabel in zip(axes, panels.items(), ylabels, strict=True):
            for name, seeds in curves.items():
                _draw_curve(axis, names.index(name), name, seeds)
            axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
            if log_x:
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axis.xaxis.set_major_formatter("{x:,.0f}")
                axis.xaxis.set_minor_formatter(NullFormatter())  # whose labels lie on top of each other
        # a panel may lack a method that others have, so the legend is that of all
        handles = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        _legend_below(figure, handles)
        return save(figure, path)


def _legend_below(figure: Any, handles: Mapping[str, Any]) -> None:
    """Draw a legend below the panels, of as many columns, at most four, as the picture is wide."""
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _draw_curve(axis: Any, number: int, name: str, seeds: Mapping[int, Mapping[int, float]]) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    number_of = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    logged = {seed: curve for seed, curve in seeds.items() if curve}  # a seed may diverge before its first meta-test
    if logged and len(logged) < len(seeds):
        number_of = f"{len(logged)} of {number_of}"
    seeds = logged or seeds
    steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
    label = f"{name} ({number_of if steps else 'no meta-test logged'})"
    intervals = [seed_interval([curve[step] for curve in seeds.values()]) for step in steps]
    means = [interval.mean for interval in intervals]
    every = max(1, len(steps) // 8)
    axis.plot(steps, means, color=colour, marker=marker, markevery=every, ms=4, lw=1.5, label=label)
    if 1 < len(seeds) < 10:  # few enough to show each
        for curve in seeds.values():
            axis.plot(steps, [curve[step] for step in steps], ".", color=colour, ms=2.5, alpha=0.6)
    _draw_band(axis, steps, intervals, colour)


def _draw_band(axis: Any, x: Sequence[float] | np.ndarray, intervals: Sequence[Interval], colour: str) -> None:
    if intervals and all(interval.low is not None for interval in intervals):
        low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def performance_profiles(path: Path, scores: Mapping[str, np.ndarray]) -> list[Path]:
    """Draw the share of test tasks above each normalised score, for `scores` (S, K) by name: mean, 95% interval."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        for number, (name, values) in enumerate(scores.items()):
            intervals = profile_intervals(values, PROFILE_THRESHOLDS)
            colour, label = COLOURS[number % len(COLOURS)], f"{name} ({len(values)} seed{'s' * (len(values) > 1)})"
            axis.plot(PROFILE_THRESHOLDS, [interval.mean for interval in intervals], color=colour, lw=1.5, label=label)
            _draw_band(axis, PROFILE_THRESHOLDS, intervals, colour)
        axis.set(xlabel="normalised score", ylabel="share of test tasks above it", ylim=(-0.02, 1.02))
        axis.legend(frameon=False, fontsize=8)
        return save(figure, path)


def value_curves(path: Path, panels: Mapping[str, Curves]) -> list[Path]:
    """Draw the critics' mean value against gradient steps; a panel with one beyond +-10,000 is logarithmic from +-100.

    One line per seed, so that one that diverges is not averaged away.
    """
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), 3, (4.6, 3.4))
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for number, (name, seeds) in enumerate(curves.items()):
                for i, curve in enumerate(seeds.values()):
                    steps = sorted(curve)
                    label = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" if i == 0 else None
                    axis.plot(steps, [curve[step] for step in steps], color=COLOURS[number], lw=1.1, label=label)
            drawn = (value for seeds in curves.values() for curve in seeds.values() for value in curve.values())
            if any(abs(value) > 10_000 for value in drawn):
                axis.set_yscale("symlog", linthresh=100)
            axis.set(xlabel="gradient steps", ylabel="mean value of the batch", title=title)
            axis.locator_params(axis="x", nbins=6)
            # below its panel: beside the curves there is no room for many, and panels differ in theirs
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        return save(figure, path)


def embeddings_by_task(
    path: Path,
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    title: str = "",
    seed: int = 0,
) -> list[Path]:
    """Draw embeddings (n, L) in the plane, coloured by task (n,) along the ordered `names`; one panel per title.

    t-SNE (scikit-learn, PCA start, seeded) where L > 2, else the embedding itself.
    """
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), 4, (3.7, 3.4), beside=1.2)
        for axis, (heading, (embeddings, task_of)) in zip(axes, panels.items(), strict=True):
            points, kind = in_the_plane(embeddings, seed)
            dots = axis.scatter(points[:, 0], points[:, -1], c=task_of, cmap="viridis", s=9, lw=0, vmin=0,
                                vmax=max(1, len(names) - 1))  # fmt: skip
            axis.set(xlabel=f"{kind} 1", ylabel=f"{kind} 2", title=heading)
            axis.set_axisbelow(True)
        _task_bar(figure, dots, list(axes), names)
        figure.suptitle(title)
        return save(figure, path)


def in_the_plane(embeddings: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """Return points (n, 2 or less) to draw embeddings (n, L) at, and what they are: "t-SNE" or "embedding".

    t-SNE needs neighbours, and in scikit-learn 1.9 it kills the process where all points are one: a collapsed encoder.
    """
    if embeddings.shape[1] <= 2 or len(embeddings) <= 4 or np.ptp(embeddings, axis=0).max() < 1e-6:
        return embeddings[:, :2], "embedding"
    perplexity = min(30.0, (len(embeddings) - 1) / 3.0)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(embeddings), "t-SNE"


def embeddings_in_space(
    path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str], title: str = ""
) -> list[Path]:
    """Draw the last three dimensions of embeddings (n, L >= 3) in the cube (-1, 1)^3, as FOCAL's figure 7; no t-SNE."""
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), 4, (3.7, 3.7), beside=1.2, projection="3d")
        for axis, (heading, (embeddings, task_of)) in zip(axes, panels.items(), strict=True):
            dots = axis.scatter(*embeddings[:, -3:].T, c=task_of, cmap="viridis", s=7, lw=0, vmin=0,
                                vmax=max(1, len(names) - 1))  # fmt: skip
            limit = max(1.0, float(np.abs(embeddings[:, -3:]).max()))
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-limit, limit), title=heading)
        _task_bar(figure, dots, list(axes), names)
        figure.suptitle(title)
        return save(figure, path)


def _task_bar(figure: Any, dots: Any, axes: list[Any], names: Sequence[str]) -> None:
    ticks = range(len(names)) if len(names) <= 6 else [0, len(names) - 1]
    bar = figure.colorbar(dots, ax=axes, shrink=0.85, aspect=25)
    bar.set_ticks(list(ticks), labels=[names[tick] for tick in ticks])
    bar.ax.set_title("tasks in order", fontsize=8, loc="left")


def context_size_curve(path: Path, sweeps: Mapping[str, Any], ylabels: Mapping[str, str]) -> list[Path]:
    """Draw return and task accuracy against context size, a row per title; see sweeps.py for `Sweep`."""
    with plt.rc_context(STYLE):
        figure, rows = plt.subplots(
            len(sweeps), 2, figsize=(8.6, 3.2 * len(sweeps)), layout="constrained", squeeze=False
        )
        for (title, sweep), (left, right) in zip(sweeps.items(), rows, strict=True):
            for axis, measure, colour in ((left, "return", COLOURS[0]), (right, "accuracy", COLOURS[2])):
                intervals = [sweep.over_seeds(measure, size) for size in sweep.sizes]
                axis.plot(sweep.sizes, [i.mean for i in intervals], marker="o", ms=4, color=colour)
                _draw_band(axis, sweep.sizes, intervals, colour)
                axis.set(xscale="log", xlabel="context transitions", title=f"{title}, {sweep.tasks.quality} data")
                axis.xaxis.set_major_formatter("{x:,.0f}")
            if np.isfinite(sweep.expert_return):
                left.axhline(sweep.expert_return, color="0.4", lw=1, ls="--")
                left.text(0.02, sweep.expert_return, "behaviour experts", ha="left", va="top",
                          transform=left.get_yaxis_transform())  # fmt: skip
            chance = 1 / len(sweep.tasks.entries)
            right.axhline(chance, color="0.4", lw=1, ls="--")
            right.text(0.99, chance + 0.01, f"chance {chance:.2f}", ha="right", va="bottom",
                       transform=right.get_yaxis_transform())  # fmt: skip
            left.set_ylabel(ylabels[title])
            most = sweep.largest_judged
            limited = "" if sweep.sizes[-1] <= most else f"\nof at most {most:,} transitions"
            right.set(ylabel=f"task accuracy{limited}", ylim=(0, 1.05))
        return save(figure, path)


def trajectories_by_quality(path: Path, panels: Mapping[str, Sequence[dict[str, Any]]], title: str) -> list[Path]:
    """Draw point-robot episodes, one panel per quality, a colour per task (FOCAL figure 8).

    Each entry holds `positions` (H + 1, 2), `goal` (2,) and the `task` it is of. The circle round a goal has the radius
    within which a sparse reward is not zero.
    """
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), len(panels), (3.3, 3.5), sharex=True, sharey=True)
        figure.set_layout_engine("compressed")  # panels of equal scale leave gaps otherwise
        goals = {episode["task"]: tuple(episode["goal"]) for episodes in panels.values() for episode in episodes}
        colours = dict(zip(goals, itertools.cycle(COLOURS), strict=False))
        shared = len(set(goals.values())) == 1
        for axis, (quality, episodes) in zip(axes, panels.items(), strict=True):
            for episode in episodes:
                axis.plot(*episode["positions"].T, color=colours[episode["task"]], lw=0.9, alpha=0.7)
            for task, goal in goals.items():
                edge = "0.4" if shared else colours[task]
                axis.add_patch(plt.Circle(goal, GOAL_RADIUS, color=edge, fill=False, lw=1.6, zorder=3))
            axis.plot(0, 0, "k+", ms=8, zorder=4)
            axis.set(title=quality if episodes else f"{quality} (no episodes)", xlabel="x (m)", aspect="equal")
        axes[0].set_ylabel("y (m)")
        lines = [plt.Line2D([], [], color=colours[task], lw=1.5, label=task) for task in goals]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
        figure.suptitle(title)
        return save(figure, path)


def returns_by_quality(path: Path, returns: Mapping[str, np.ndarray], title: str) -> list[Path]:
    """Draw the distribution of episode returns per quality, for families that have no plane to draw in."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        filled = {quality: values for quality, values in returns.items() if len(values)}
        for quality, values in filled.items():
            colour, label = QUALITY_COLOURS[quality], f"{quality} ({len(values):,})"
            axes.hist(values, bins=40, histtype="step", lw=1.6, color=colour, label=label)
        axes.set(xlabel="episode return", ylabel="episodes", title=title)
        axes.legend(frameon=False)
        return save(figure, path)


def behaviour_data(path: Path, collection: Collection, both: bool = True) -> list[Path]:
    """Draw a collection's behaviour data from its episode tables: returns along training, and their distribution."""
    tables = [entry.store.read_table() for entry in collection.tasks]
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"picture {path}, expected a name that ends in .png, .svg or .pdf")
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for table in tables:
            steps, checkpoint = np.unique(table["sac_steps"], return_inverse=True)
            means = np.bincount(checkpoint, weights=table["returns"]) / np.bincount(checkpoint)
            left.plot(steps, means, color=COLOURS[0], lw=0.8, alpha=max(0.15, 1 / len(tables)))
        left.set(xlabel="SAC steps of the behaviour policy", ylabel="mean dense return", title="each line is a task")
        every = np.concatenate([table["returns"] for table in tables])
        bins = np.linspace(every.min(), every.max() + 1e-9, 41)
        right.hist(every, bins, color=QUALITY_COLOURS["mixed"], label=f"mixed ({len(every):,})")
        for quality in ("random", "medium", "expert"):
            returns = np.concatenate([table["returns"][Selection(quality).mask(table)] for table in tables])
            if len(returns):
                right.hist(returns, bins, color=QUALITY_COLOURS[quality], histtype="step", lw=1.6,
                           label=f"{quality} ({len(returns):,})")  # fmt: skip
        right.set(xlabel="dense return of an episode", ylabel="episodes", title="by quality")
        right.legend(frameon=False)
        figure.suptitle(f"{collection.name} {collection.version}, {len(tables)} tasks")
        return save(figure, path, both)


def save(figure: Any, path: Path, both: bool = True) -> list[Path]:
    """Write a figure to `path`, and beside a PNG the same as SVG; close it; return the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path, path.with_suffix(".svg")] if both and path.suffix == ".png" else [path]
    for file in files:
        # a date in the file would make the same picture another file every time
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def _grid(
    panels: int,
    columns: int,
    size: tuple[float, float],
    beside: float = 0.0,
    projection: str | None = None,
    **share: Any,
) -> Any:
    """Return a figure and its `panels` axes in rows of at most `columns`.

    `size` is that of a panel, `beside` the width of what stands beside all of them, in inches.
    """
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns + beside, size[1] * rows), layout="constrained", squeeze=False,
        subplot_kw={"projection": projection} if projection else None, **share,
    )  # fmt: skip
    flat = axes.ravel()
    for axis in flat[panels:]:
        axis.remove()
    return figure, flat[:panels]
