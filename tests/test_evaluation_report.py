"""The report: one file that fetches nothing, says what was measured and how, and works in a real browser."""

import dataclasses
import html.parser
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from plotly.offline import get_plotlyjs

from focal import commands, experiment, reporting, settings
from focal.cli import main
from focal.datagen import generate_settings
from focal.datasets import open_collection
from focal.envs import get_family, make_batch, rollout
from focal.envs.locomotion import LocomotionEnv
from focal.evaluation import Interval, animation, plots
from focal.evaluation.report import Page, render_page, table
from focal.experiment import TEST_FORMAT
from focal.reporting import main_test, saved_tests, task_scores
from focal.sweeps import SWEEP_FORMAT
from focal.trainer.methods import METHODS, train_settings

from .chromium import chromium_tab, find_chromium

TABS = ["Results", "Embeddings", "Training", "Rollouts", "Data", "Settings", "Commands"]


def cli(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def point_run(point_run, tmp_path_factory):
    """A copy of the run without the tests that other modules made of it."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(point_run[3], runs, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tests", "figures"))
    return [*point_run[:3], runs]


@pytest.fixture(scope="module")
def report(point_run, tmp_path_factory):
    """The report of a run that was never tested by hand, and of the same run beside it."""
    run = point_run[3] / "point"
    cli("test", run, "--sweep", "--sizes", "1,8", "--episodes", 2, "--no-figures", *point_run)
    cli("test", run, "--protocol", "online", "--episodes", 2, "--no-figures", *point_run)
    path = tmp_path_factory.mktemp("report") / "report.html"
    printed = cli("report", run, run, "-o", path, *point_run)
    assert f"saved {path}" in printed
    return path


class Reader(html.parser.HTMLParser):
    """Collects the text outside scripts, and every address a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.text, self.addresses, self._inside = [], [], None

    def handle_starttag(self, tag, attributes):
        self._inside = tag if tag in ("script", "style") else None
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text.append(data)


def read(document):
    reader = Reader()
    reader.feed(document)
    return reader


def test_it_is_one_file_below_ten_megabytes_that_asks_for_nothing(report):
    assert report.stat().st_size < 10 * 2**20
    document = report.read_text()
    assert read(document).addresses == ["data:,"]
    assert "default-src 'none'" in document


def test_it_holds_the_numbers_and_their_commands(report, point_run):
    text = "\n".join(read(report.read_text()).text)
    run = point_run[3] / "point"
    tests = {path.stem: json.loads(path.read_text()) for path in (run / "tests").glob("*.json")}
    main_test = tests["mixed-context32-episodes10-seed0"]
    for condition in ("right context", "wrong context", "untrained", "zero action", "expert"):
        assert condition in text
        assert str(Interval(**main_test["summary"][condition]["mean"])) in text
    for document in tests.values():
        assert commands.test_command(run, document, None) in text
    assert shlex.join(["focal-cli", "report", str(run), str(run), "-o", str(report)]) in text, "of both runs"
    collection = open_collection(point_run[1] / "sparse-point-robot")
    for fact in (collection.content_hash, collection.licence, "--env point", "context_reward", "Software and hardware"):
        assert fact in text


def test_its_commands_say_exactly_what_was_done(point_run):
    run_dir = point_run[3] / "point"
    run, tasks = experiment.testable(run_dir, point_run[1], None)
    (line,) = commands.train_commands(run_dir, run, tasks.collection)
    words = shlex.split(line)
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--scale"] == "smoke"
    assert "--set" not in options
    changed = settings.override(run.settings, {"tau": 0.5, "control_hidden": (7, 8), "hide_x": False, "steps": 61})
    source = dataclasses.replace(run.source, seeds=(0, 1, 5))
    first, second = commands.train_commands(
        run_dir, SimpleNamespace(**vars(run) | {"settings": changed, "source": source}), tasks.collection
    )
    assert "--seed 0 --seeds 2" in first
    assert "--resume" not in first
    assert "--seed 5 --seeds 1" in second
    assert second.endswith(" --resume")
    words = shlex.split(first)
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert sorted(pairs) == ["control_hidden=7,8", "steps=61", "tau=0.5"]
    base = train_settings(run.family, words[words.index("--scale") + 1])
    assert settings.override(base, settings.parse_assignments(pairs)) == changed

    words = shlex.split(commands.generate_command(tasks.collection))
    base = generate_settings("sparse-point-robot", words[words.index("--scale") + 1])
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    rebuilt = settings.override(base, settings.parse_assignments(pairs))
    assert settings.to_dict(rebuilt) == tasks.collection.settings


def test_a_run_with_a_seed_that_diverged_is_reported_without_it(point_run, tmp_path):
    run = tmp_path / "runs" / "point"
    shutil.copytree(point_run[3] / "point", run, ignore=shutil.ignore_patterns("tests"))
    for checkpoint in sorted((run / "seed_1" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    (run / "seed_1" / "diverged.json").write_text("{}")
    path = tmp_path / "report.html"
    cli("report", run, "--no-rollouts", "-o", path, *point_run[:2])
    text = "\n".join(read(path.read_text()).text)
    assert "without seed 1, whose values diverged" in text
    assert "(1 seed)" in text
    assert "--only-seeds 0" in text
    whole = path.read_text().count("application/json")
    for log in (run / "seed_1").glob("*.jsonl"):
        log.write_text("")  # it diverged before it logged anything
    cli("report", run, "--no-rollouts", "-o", path, *point_run[:2])
    assert path.read_text().count("application/json") == whole > 10, "what the other seed logged is shown"


def test_scores_keep_their_tasks_names_where_an_expert_failed():
    seed = {"tasks": [4, 7, 9], "scored": [True, False, True],
            "conditions": {"right context": {"task_scores": [0.5, None, 0.9]}}}  # fmt: skip
    names, scores = task_scores({"seeds": {"0": seed, "1": seed}})
    assert names == ["task 4", "task 9"]
    assert scores["right context"].tolist() == [[0.5, 0.9]] * 2
    drawn = plots.task_scores(scores, names, "score")["data"][0]
    assert (drawn["x"], drawn["y"]) == (["task 4", "task 9"], [0.5, 0.9])
    failed = seed | {"scored": [False] * 3}
    assert task_scores({"seeds": {"0": failed}}) == ([], {})


def test_what_does_not_exist_is_a_dash_in_a_table():
    interval = {"mean": 1.0, "low": None, "high": None, "seeds": 1}
    test = {
        "protocol": "offline", "context_size": 8, "context_unit": "transitions", "episodes": 2, "test_seed": 0,
        "summary": {"right context": {"mean": interval, "score": None}}, "task_accuracy": interval,
        "seeds": {"0": {"quality": "mixed", "family": "half-cheetah-vel", "tasks": [3, 4]}},
    }  # fmt: skip
    command_of = partial(commands.test_command, Path("runs/x"), stores=None)
    row = reporting.test_row(test, command_of)
    assert row["normalised score"] is None
    assert row["return"] == "1.00 (1 seed)"
    assert "<td>-</td>" in table([row])
    row = reporting.test_row(test | {"tasks_with": ["random", "mixed"]}, command_of)
    assert row["context"] == "mixed, 8 transitions, the 2 tasks with every quality"
    assert "--matrix" in row["command"]


def test_the_main_test_is_that_of_trainings_own_conditions():
    usual = {
        "format": TEST_FORMAT, "protocol": "offline", "context_unit": "transitions", "context_size": 32, "episodes": 5,
        "seeds": {"0": {"quality": "mixed"}, "1": {"quality": "mixed"}},
    }  # fmt: skip
    run = SimpleNamespace(settings=SimpleNamespace(context_size=32), source=SimpleNamespace(quality="mixed"))
    longest = usual | {"episodes": 20}
    others = [
        usual | {"protocol": "shift", "episodes": 99},
        usual | {"context_unit": "episodes", "episodes": 99},
        usual | {"context_size": 8, "episodes": 99},
        usual | {"seeds": {"0": {"quality": "mixed"}}, "episodes": 99},
        usual | {"seeds": {"0": {"quality": "expert"}, "1": {"quality": "expert"}}, "episodes": 99},
        usual | {"tasks_with": ["random", "mixed"], "episodes": 99},
        {"format": SWEEP_FORMAT},
    ]
    assert main_test([usual, *others, longest], run, (0, 1)) is longest
    assert main_test(others, run, (0, 1)) is None
    assert main_test(others, run, (0,)) is others[3], "where seed 1 diverged"


def test_tests_of_other_data_or_of_fewer_steps_are_not_shown(tmp_path):
    run = SimpleNamespace(content_hash="c0ffee", settings=SimpleNamespace(total_steps=10))
    good = {"format": TEST_FORMAT, "collection": {"content_hash": "c0ffee"}, "gradient_steps": 10}
    (tmp_path / "tests").mkdir()
    documents = [
        good,
        good | {"gradient_steps": 5},
        good | {"collection": {"content_hash": "bad"}},
        {"format": "x"},
        [],
    ]
    for number, document in enumerate(documents):
        (tmp_path / "tests" / f"{number}.json").write_text(json.dumps(document))
    (tmp_path / "tests" / "cut.json").write_text('{"format": "focal-te')
    assert saved_tests(tmp_path, run) == [good]


def test_error_bars_reach_both_ends_of_an_interval_that_is_not_symmetric():
    row = {"mean": 2.0, "low": 1.5, "high": 4.0}
    document = {"sizes": [1], "summary": {"return": {"1": row}, "accuracy": {"1": row | {"low": None}}}}
    drawn = [plots.sweep(document | {"accuracy_of_at_most": most}, "sparse return") for most in (0.5, 1)]
    titles = [plot["layout"]["yaxis2"]["title"]["text"] for plot in drawn]
    assert titles == ["task accuracy, of at most 0.5 transitions", "task accuracy"]
    first, second = drawn[0]["data"]
    assert (first["error_y"]["array"], first["error_y"]["arrayminus"]) == ([2.0], [0.5])
    assert first["error_y"]["symmetric"] is False
    assert "error_y" not in second


@pytest.mark.parametrize("algo", list(METHODS))
def test_every_setting_survives_the_form_that_set_takes(algo):
    usual = train_settings("walker-2d-params", "paper", algo)
    assert settings.override(METHODS[algo].settings(), commands.flatten(settings.to_dict(usual))) == usual


def test_names_from_data_cannot_become_code():
    page = Page("<script>alert(1)</script>", "a & b")
    page.add(
        "Results", table([{"<b>": "</td><script>alert(2)</script>"}]), page.plot({"data": ["</script><script>"]}, "<i>")
    )
    document = render_page("x", "y", [page])
    shown = document.partition("<main>")[2].partition(f"<script>{get_plotlyjs()[:80]}")[0]
    assert shown.count("alert(") == shown.count("&lt;script&gt;alert(") > 1
    opened = re.findall(r"<script[^>]*>", shown)
    assert [tag.partition(" id=")[0] for tag in opened] == ["<script type='application/json'"], "the plot's own"
    assert shown.count("</script>") == 1
    assert "<b>" not in shown
    assert "<i>" not in shown


def test_mujoco_episodes_are_rendered_or_it_says_why():
    family = get_family("cheetah-dir")
    params = family.fixed_tasks
    envs = make_batch(family, params, threads=1)
    actions = iter(np.random.default_rng(0).uniform(-1, 1, (200, 2, 6)).astype(np.float32))
    rollouts = rollout(envs, lambda obs: next(actions), [1, 2])
    envs.close()
    played = animation.Played((0, 1), params, (1, 2), rollouts, None)
    frames, how = animation.render_frames(SimpleNamespace(family=family), played)
    if frames is None:
        assert "MUJOCO_GL=egl" in how
        assert "MUJOCO_GL=osmesa" in how
        pytest.skip(f"no renderer here: {how}")
    assert [len(one) for one in frames] == [animation.FRAMES, animation.FRAMES]
    assert all(frame.startswith("data:image/jpeg;base64,") for frame in frames[0])
    assert len(set(frames[0])) > animation.FRAMES // 2, "the robot moves"


def test_where_nothing_renders_it_is_said(monkeypatch):
    family = get_family("cheetah-dir")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(animation, "BACKENDS", ("nonsense",))
    rollouts = SimpleNamespace(actions=np.zeros((1, 2, 6), np.float32), lengths=np.array([2]))
    played = animation.Played((0,), family.fixed_tasks[:1], (1,), rollouts, None)
    frames, how = animation.render_frames(SimpleNamespace(family=family), played)
    assert frames is None
    assert how.startswith("MuJoCo could not render here (MUJOCO_GL=nonsense: ")
    own = SimpleNamespace(env_id="focal/Own-v0")
    monkeypatch.setattr(animation, "env_class", lambda family: type("OwnEnv", (LocomotionEnv,), {}))
    how = animation.render_frames(SimpleNamespace(family=own), played)[1]
    assert how == "they are drawn of the built-in MuJoCo families only"


@pytest.fixture(scope="module")
def browser_tab(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found; install one, or name it in CHROMIUM")
    with chromium_tab(executable, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser_tab, report):
    browser_tab.problems.clear()
    browser_tab.open(report)
    yield browser_tab
    assert browser_tab.problems == [], "no error on the console, nothing asked of the network"


class TestInChromium:
    """Each test opens the page anew."""

    def test_it_opens_on_the_results_with_plots_drawn(self, tab):
        tab.wait("document.querySelectorAll('#run0-tab0 .plot').length > 0")
        tab.wait("[...document.querySelectorAll('#run0-tab0 .plot')].every(p => p.querySelector('.main-svg'))")
        assert tab.evaluate("document.title").startswith("FOCAL report")
        assert tab.evaluate("document.querySelector('#run0-tab0').offsetHeight") > 300
        assert tab.evaluate("document.querySelector('#run1').offsetHeight") == 0

    def test_tabs_show_their_panel_and_draw_its_plots(self, tab):
        names = tab.evaluate("[...document.querySelectorAll('#run0 > nav button')].map(b => b.textContent)")
        assert names == TABS
        for number, name in enumerate(names):
            tab.evaluate(f"document.querySelectorAll('#run0 > nav button')[{number}].click()")
            shown = tab.evaluate("[...document.querySelectorAll('#run0 > section')].map(s => s.offsetHeight > 0)")
            assert shown == [i == number for i in range(len(names))], name
            panel = f"[...document.querySelectorAll('#run0-tab{number} .plot')]"
            tab.wait(f"{panel}.every(p => p.querySelector('.main-svg, .gl-container canvas'))")
            widths = tab.evaluate(f"{panel}.map(p => p.querySelector('.svg-container').offsetWidth)")
            assert all(width > 300 for width in widths), name

    def test_plots_show_the_data(self, tab):
        tab.evaluate("document.querySelectorAll('#run0 > nav button')[1].click()")
        tab.wait("document.querySelector('#run0-tab1 .plot .main-svg')")
        points = tab.evaluate("document.querySelector('#run0-tab1 .plot').data[0].x.length")
        assert points == 2 * 10, "two test tasks, ten contexts each"
        assert tab.evaluate("document.querySelectorAll('#run0-tab1 .scatterlayer .point').length") == points

    def test_episodes_play(self, tab):
        tab.evaluate("document.querySelectorAll('#run0 > nav button')[3].click()")
        pixels = "document.querySelector('#run0 .player canvas').getContext('2d').getImageData(0, 0, 260, 260).data"
        drawn = f"{pixels}.reduce((a, b) => a + b)"
        slider = "document.querySelector('#run0 .player input')"
        last = tab.evaluate(drawn)
        tab.evaluate(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")
        assert tab.evaluate(drawn) != last
        tab.evaluate("document.querySelector('#run0 .player button').click()")
        tab.wait(f"Number({slider}.value) > 2")
        tab.evaluate("document.querySelector('#run0 .player button').click()")

    def test_the_other_run_is_one_click_away(self, tab):
        tab.evaluate("document.querySelectorAll('main > nav button')[1].click()")
        assert tab.evaluate("document.querySelector('#run0').offsetHeight") == 0
        tab.wait("[...document.querySelectorAll('#run1-tab0 .plot')].every(p => p.querySelector('.main-svg'))")

    def test_arrow_keys_move_between_tabs(self, tab):
        tab.evaluate("document.querySelectorAll('main > nav button')[1].click()")
        tab.evaluate(
            "document.querySelector('#run1 > nav button').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
        )
        assert tab.evaluate("document.querySelector('#run1-tab1').offsetHeight") > 0
        assert tab.evaluate("document.activeElement.textContent") == TABS[1]


def test_plots_hold_no_value_that_json_lacks(report):
    document = report.read_text()
    payloads = re.findall(r"<script type='application/json' id='[^']+'>(.*?)</script>", document, re.S)
    assert len(payloads) > 20
    for payload in payloads:
        json.loads(payload, parse_constant=lambda name: pytest.fail(f"{name} in a payload"))
