"""The report's interactive plots, as the plain JSON values that plotly.js draws: {"data": [...], "layout": {...}}."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .figures import COLOURS, QUALITY_COLOURS, Curves, in_the_plane
from .statistics import PROFILE_THRESHOLDS, profile_intervals, seed_interval

Plot = dict[str, Any]


def curves(values: Curves, ylabel: str) -> Plot:
    """Lines over gradient steps, mean over seeds with its 95% band; each seed's own points where there are few."""
    data: list[dict[str, Any]] = []
    for number, (name, seeds) in enumerate(values.items()):
        steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
        intervals = [seed_interval([curve[step] for curve in seeds.values()]) for step in steps]
        data += band(steps, intervals, name, COLOURS[number % len(COLOURS)])
        if 1 < len(seeds) < 10:
            data += [_seed_points(seed, steps, curve, COLOURS[number % len(COLOURS)]) for seed, curve in seeds.items()]
    return plot(data, "gradient steps", ylabel)


def seed_lines(values: Mapping[int, Mapping[int, float]], ylabel: str) -> Plot:
    """A thin line per seed over gradient steps, small enough for two plots beside each other."""
    data = [
        {"x": list(curve), "y": list(curve.values()), "name": f"seed {seed}", "mode": "lines",
         "line": {"color": COLOURS[number % len(COLOURS)], "width": 1.2}}
        for number, (seed, curve) in enumerate(values.items())
    ]  # fmt: skip
    return plot(
        data, "gradient steps", ylabel, height=280, showlegend=False, margin={"l": 65, "r": 10, "t": 10, "b": 45}
    )


def band(x: Sequence[float], intervals: Sequence[Any], name: str, colour: str) -> list[dict[str, Any]]:
    """A line with its confidence band."""
    means = [interval.mean for interval in intervals]
    line = {"x": list(x), "y": means, "name": name, "mode": "lines+markers", "line": {"color": colour}}
    if not intervals or intervals[0].low is None:
        return [line]
    edge = {"x": list(x), "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    low = {**edge, "y": [interval.low for interval in intervals]}
    high = {**edge, "y": [interval.high for interval in intervals], "fill": "tonexty", "fillcolor": colour + "33"}
    return [low, high, line]


def embeddings_flat(points: np.ndarray, task_of: np.ndarray, names: Sequence[str]) -> Plot:
    """Embeddings (n, L) in the plane, coloured by task along the ordered `names`; hovering names the task."""
    drawn, kind = in_the_plane(points)
    marker = _task_marker(task_of, 7)
    text = [names[task] for task in task_of]
    dots = {"type": "scatter", "mode": "markers", "x": drawn[:, 0].tolist(), "y": drawn[:, -1].tolist(),
            "text": text, "hoverinfo": "text", "marker": marker}  # fmt: skip
    return plot([dots], f"{kind} 1", f"{kind} 2", hovermode="closest")


def embeddings_in_space(points: np.ndarray, task_of: np.ndarray, names: Sequence[str]) -> Plot | None:
    """Embeddings (n, L) along their first three principal directions, to be turned; None below 3 dimensions."""
    if points.shape[1] < 3 or len(points) < 3:
        return None
    centred = points - points.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    x, y, z = (centred @ directions.T).T.tolist()
    dots = {"type": "scatter3d", "mode": "markers", "x": x, "y": y, "z": z, "text": [names[task] for task in task_of],
            "hoverinfo": "text", "marker": _task_marker(task_of, 4)}  # fmt: skip
    axes = {f"{axis}axis": {"title": {"text": f"direction {i + 1}"}} for i, axis in enumerate("xyz")}
    scene = axes | {"aspectmode": "cube", "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 0.9}}}
    return {"data": [dots], "layout": {"scene": scene, "margin": {"l": 0, "r": 0, "t": 10, "b": 0}, "height": 520}}


def task_scores(scores: Mapping[str, np.ndarray], names: Sequence[str], ylabel: str) -> Plot:
    """Per task the mean over seeds of each condition's (S, K) values, with the seeds as points."""
    data = []
    for number, (condition, values) in enumerate(scores.items()):
        intervals = [seed_interval(values[:, k]) for k in range(values.shape[1])]
        entry = {"x": list(names), "y": [i.mean for i in intervals], "name": condition, "mode": "markers",
                 "marker": {"color": COLOURS[number % len(COLOURS)], "size": 8}}  # fmt: skip
        data.append(entry | _error_bars([asdict(interval) for interval in intervals]))
    return plot(data, "test task, in the family's order", ylabel)


def profile(scores: Mapping[str, np.ndarray]) -> Plot:
    """Performance profiles: the share of test tasks above each normalised score, (S, K) per condition."""
    data: list[dict[str, Any]] = []
    for number, (condition, values) in enumerate(scores.items()):
        intervals = profile_intervals(values, PROFILE_THRESHOLDS)
        data += band(PROFILE_THRESHOLDS.tolist(), intervals, condition, COLOURS[number])
    return plot(data, "normalised score", "share of tasks above it")


def sweep(document: Mapping[str, Any], ylabel: str) -> Plot:
    """Return and task accuracy by context size, from a saved sweep; the accuracy on the right-hand axis."""
    data: list[dict[str, Any]] = []
    for number, measure in enumerate(("return", "accuracy")):
        rows = [document["summary"][measure][str(size)] for size in document["sizes"]]
        entry = {"x": document["sizes"], "y": [row["mean"] for row in rows], "name": measure, "mode": "lines+markers",
                 "line": {"color": COLOURS[2 * number]}, "yaxis": "y2" if number else "y"}  # fmt: skip
        data.append(entry | _error_bars(rows))
    result = plot(data, "context transitions", ylabel)
    result["layout"]["xaxis"] |= {"type": "log", "tickvals": document["sizes"]}
    result["layout"]["yaxis"]["rangemode"] = "tozero"
    most = document.get("accuracy_of_at_most", math.inf)
    words = "task accuracy" if document["sizes"][-1] <= most else f"task accuracy, of at most {most:,} transitions"
    right = {"title": {"text": words}, "overlaying": "y", "side": "right", "showgrid": False}
    result["layout"]["yaxis2"] = right | {"range": [0, 1.05], "tickmode": "linear", "dtick": 0.2}
    result["layout"]["margin"]["t"] = 40  # the buttons would stand on the right axis
    return result


def behaviour(steps: Sequence[Sequence[int]], means: Sequence[Sequence[float]], names: Sequence[str]) -> Plot:
    """Mean return of every task's behaviour policy along its training."""
    data = [
        {"x": list(x), "y": list(y), "name": name, "mode": "lines", "line": {"color": COLOURS[0], "width": 1},
         "opacity": 0.5, "showlegend": False}
        for x, y, name in zip(steps, means, names, strict=True)
    ]  # fmt: skip
    return plot(data, "SAC steps of the behaviour policy", "mean dense return", hovermode="closest")


def histograms(returns: Mapping[str, np.ndarray]) -> Plot:
    """Distribution of episode returns by quality; binned here, since a million returns would not fit into a page."""
    every = np.concatenate(list(returns.values()))
    edges = np.linspace(every.min(), every.max() + 1e-9, 61)
    data = []
    for quality, values in returns.items():
        counts = np.histogram(values, edges)[0].tolist()
        look = {"name": f"{quality} ({len(values):,})", "marker": {"color": QUALITY_COLOURS[quality]}, "opacity": 0.65}
        data.append({"type": "bar", "x": ((edges[1:] + edges[:-1]) / 2).tolist(), "y": counts, **look})
    result = plot(data, "dense return of an episode", "episodes")
    result["layout"] |= {"barmode": "overlay", "bargap": 0}
    return result


def plot(data: list[dict[str, Any]], xlabel: str, ylabel: str, **layout: Any) -> Plot:
    """Join traces and axis titles in the report's look."""
    axes = {"xaxis": {"title": {"text": xlabel}}, "yaxis": {"title": {"text": ylabel}}}
    legend = {"orientation": "h", "y": -0.22, "traceorder": "normal"}
    look = {"margin": {"l": 65, "r": 65, "t": 15, "b": 50}, "height": 400, "legend": legend}
    return {"data": data, "layout": axes | look | layout}


def _seed_points(seed: int, steps: Sequence[int], curve: Mapping[int, float], colour: str) -> dict[str, Any]:
    return {"x": list(steps), "y": [curve[step] for step in steps], "name": f"seed {seed}", "mode": "markers",
            "marker": {"color": colour, "size": 3}, "showlegend": False}  # fmt: skip


def _error_bars(intervals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From each mean to both ends of its interval; none where a single seed has none."""
    if any(one["low"] is None for one in intervals):
        return {}
    ends = {name: [abs(one[end] - one["mean"]) for one in intervals]
            for name, end in (("array", "high"), ("arrayminus", "low"))}  # fmt: skip
    return {"error_y": {"type": "data", "symmetric": False, **ends, "thickness": 1}}


def _task_marker(task_of: np.ndarray, size: int) -> dict[str, Any]:
    return {"color": task_of.tolist(), "colorscale": "Viridis", "size": size, "showscale": False}
