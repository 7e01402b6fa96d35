"""What a reader takes from a picture: names, colours and which episodes; read back from the SVG, where text is text."""

import itertools
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from focal.evaluation import Interval, figures
from focal.evaluation.run_figures import draw_data
from focal.evaluation.tables import markdown


@pytest.fixture(autouse=True)
def text_in_svg(monkeypatch):
    monkeypatch.setitem(figures.STYLE, "svg.fonttype", "none")


def texts(files):
    svg = next(file for file in files if file.suffix == ".svg").read_text()
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_legend_names_a_method_that_the_first_panel_lacks(tmp_path):
    curve = {0: {0: 1.0, 100: 2.0}, 1: {0: 1.0, 100: 4.0}}
    panels = {"one": {"FOCAL": curve}, "two": {"FOCAL": curve, "Contextual BCQ": curve}}
    shown = texts(figures.return_curves(tmp_path / "curves.png", panels, ["sparse return", "return"]))
    assert shown.count("FOCAL (2 seeds)") == 1
    assert shown.count("Contextual BCQ (2 seeds)") == 1
    assert {"one", "two", "gradient steps", "sparse return", "return"} <= set(shown)


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_the_legend_of_four_methods_fits_below_any_number_of_panels(tmp_path, monkeypatch, panels):
    sizes = []

    def measure(figure, path):
        figure.draw_without_rendering()
        sizes.append((figure.legends[0].get_window_extent().width, figure.bbox.width))
        plt.close(figure)

    monkeypatch.setattr(figures, "save", measure)
    names = [f"{name}, diverged" for name in ("FOCAL", "Batch PEARL", "Contextual BCQ", "MBML")]
    curves = {name: {0: {0: 1.0}, 1: {0: 2.0}} for name in names}
    figures.return_curves(tmp_path / "x.png", {str(n): curves for n in range(panels)}, ["return"] * panels)
    ((legend, whole),) = sizes
    assert legend <= whole


def test_curves_are_means_with_the_interval_over_seeds(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update(axes=figure.axes) or plt.close(figure))
    curve = {0: {0: 1.0, 100: 1.0}, 1: {0: 2.0, 100: 2.0}, 2: {0: 3.0, 100: 6.0, 200: 9.0}}
    figures.return_curves(tmp_path / "x.png", {"one": {"FOCAL": curve}}, ["return"])
    line, band = drawn["axes"][0].lines[0], drawn["axes"][0].collections[0]
    assert line.get_xdata().tolist() == [0, 100], "a step that a seed lacks is left out"
    assert line.get_ydata().tolist() == [2.0, 3.0]
    corners = band.get_paths()[0].vertices
    # standard error 1 / sqrt(3) at the first step, t(0.975, 2) = 4.303
    assert corners[corners[:, 0] == 0, 1].max() == pytest.approx(2.0 + 4.302653 / np.sqrt(3), rel=1e-5)


@pytest.mark.parametrize(("first", "last"), [(250, 4500), (5000, 600_000), (1000, 3000)])
def test_steps_on_a_logarithmic_axis_can_be_read(tmp_path, monkeypatch, first, last):
    labels = []

    def measure(figure, path):
        figure.draw_without_rendering()
        axis = figure.axes[0].xaxis
        shown = [tick.label1 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if tick.label1.get_text()]
        labels.extend(sorted((x.get_window_extent().x0, x.get_window_extent().x1, x.get_text()) for x in shown))
        plt.close(figure)

    monkeypatch.setattr(figures, "save", measure)
    curves = {"FOCAL": {0: {first: 1.0, last: 2.0}}}
    figures.return_curves(tmp_path / "x.png", {str(n): curves for n in range(3)}, ["return"] * 3, log_x=True)
    assert {"1,000", "3,000"} <= {text for _, _, text in labels} or {"10,000", "100,000"} <= {x for _, _, x in labels}
    for (_, end, text), (start, _, following) in itertools.pairwise(labels):
        assert end < start, f"{text} and {following} overlap"


def test_a_seed_that_diverged_at_once_does_not_hide_the_others(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update(axes=figure.axes) or plt.close(figure))
    figures.return_curves(tmp_path / "x.png", {"one": {"FOCAL": {0: {5: 1.0}, 1: {}, 2: {5: 3.0}}}}, ["return"])
    line = drawn["axes"][0].lines[0]
    assert (line.get_label(), line.get_ydata().tolist()) == ("FOCAL (2 of 3 seeds)", [2.0])


def test_profiles_are_shares_of_tasks(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update(axes=figure.axes) or plt.close(figure))
    scores = {"FOCAL": np.array([[0.5, 1.0, 1.5, np.nan], [0.5, 0.5, 1.5, np.nan]]), "MBML": np.zeros((2, 4))}
    figures.performance_profiles(tmp_path / "x.png", scores)
    (axes,) = drawn["axes"]
    focal, mbml = axes.lines
    assert focal.get_label() == "FOCAL (2 seeds)"
    share = dict(zip(np.round(focal.get_xdata(), 3).tolist(), focal.get_ydata(), strict=True))
    assert [share[x] for x in (0.0, 0.6, 1.2)] == pytest.approx([1.0, (2 / 3 + 1 / 3) / 2, 1 / 3])
    assert set(mbml.get_ydata()[mbml.get_xdata() >= 0]) == {0.0}
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (0.0, 1.0), "shares stay shares"


def test_episodes_by_quality_are_of_tasks_spread_over_the_goals(make_collection, tmp_path):
    collection = make_collection(tmp_path / "point", tasks=12, test=9)
    shown = texts(draw_data(tmp_path / "data.png", collection))
    tasks = [text for text in shown if text.startswith("task ")]
    assert tasks == ["task 3", "task 5", "task 7", "task 9", "task 11"], "the first, the last and some between"
    assert {"random", "medium", "expert"} <= set(shown)


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_a_collapsed_encoder_is_drawn_as_the_pile_it_is(value):
    """t-SNE of points that are all the same kills the process."""
    pile = np.full((40, 5), value, np.float32)
    points, kind = figures.in_the_plane(pile)
    assert kind == "embedding"
    assert (points == pile[:, :2]).all()
    two = np.repeat(np.array([[1.0, 1, 1], [-1, 1, 1]], np.float32), 20, axis=0)
    points, kind = figures.in_the_plane(two)
    assert kind == "t-SNE"
    assert np.isfinite(points).all()


def test_context_sizes_have_returns_on_the_left_and_accuracy_on_the_right(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update(axes=figure.axes) or plt.close(figure))
    values = {("return", 1): 2.0, ("return", 10): 8.0, ("accuracy", 1): 0.25, ("accuracy", 10): 0.9}
    sweep = SimpleNamespace(
        sizes=[1, 10],
        largest_judged=10,
        expert_return=9.0,
        tasks=SimpleNamespace(entries=range(5), quality="mixed"),
        over_seeds=lambda measure, size: Interval(values[measure, size], None, None, 1),
    )
    figures.context_size_curve(tmp_path / "x.png", {"point": sweep}, {"point": "sparse return"})
    left, right = drawn["axes"]
    assert (left.get_ylabel(), right.get_ylabel()) == ("sparse return", "task accuracy")
    assert list(left.lines[0].get_ydata()) == [2.0, 8.0]
    assert list(right.lines[0].get_ydata()) == [0.25, 0.9]
    assert set(left.lines[1].get_ydata()) == {9.0}, "the experts' return"
    assert set(right.lines[1].get_ydata()) == {0.2}, "chance of five tasks"
    assert left.get_title() == "point, mixed data"
    sweep.largest_judged = 5
    figures.context_size_curve(tmp_path / "x.png", {"point": sweep}, {"point": "sparse return"})
    assert drawn["axes"][1].get_ylabel() == "task accuracy\nof at most 5 transitions"


def test_tables_show_large_numbers_in_full():
    assert markdown([{"transitions": 21012.4, "share": 0.123456, "none": None, "count": 123456}]).splitlines()[2] == (
        "| 21012 | 0.1235 | - | 123456 |"
    )


def test_markers_and_colours_tell_as_many_lines_apart():
    assert len(set(figures.COLOURS)) == len(set(figures.MARKERS)) == len(figures.COLOURS) == 7
