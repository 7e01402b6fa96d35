"""`focal-cli compare`: what is trained, what is not trained again, and the numbers of its table."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from focal import UsageError
from focal.cli import METHODS, PROTOCOLS, main
from focal.comparison import (
    CompareRequest,
    _plan,
    comparison_name,
    draw_profiles,
    equal_terms,
    networks,
    rank,
    split_assignments,
)
from focal.evaluation import protocols
from focal.evaluation.run_figures import name_context_sizes
from focal.experiment import RunTest, TrainRequest
from focal.paper import ITEMS
from focal.trainer import methods
from focal.trainer.methods import train_settings

from .in_process import run_here

SHORT = ["--set", "steps=4", "--set", "mbml:teachers.steps=4", "--set", "mbml:teachers.rewards.steps=4"]


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


def test_the_command_line_names_all_methods_and_protocols():
    assert tuple(methods.METHODS) == METHODS
    assert protocols.PROTOCOLS == PROTOCOLS


def test_settings_go_to_the_methods_that_have_them():
    words = ("steps=9", "mbml:steps=8", "regularisation.kind=policy", "bcq.candidates=3", "contextual-bcq:tau=0.1")
    assert split_assignments(words, ("focal", "contextual-bcq", "mbml")) == {
        "focal": ("steps=9", "regularisation.kind=policy"),
        "contextual-bcq": ("steps=9", "bcq.candidates=3", "tau=0.1"),
        "mbml": ("steps=9", "steps=8"),
    }
    with pytest.raises(UsageError, match="for 'mbml', which is not compared; these are: focal"):
        split_assignments(("mbml:steps=3",), ("focal",))
    with pytest.raises(UsageError, match=r"none of focal, mbml has a setting 'bcq\.candidate'; did you mean"):
        split_assignments(("bcq.candidate=3",), ("focal", "mbml"))


def fake_test(scores, counted=True):
    """A run's test whose seeds have these scores (S, K), or these returns where nothing is counted."""
    results = {
        seed: SimpleNamespace(
            counted=np.full(len(row), counted),
            task_scores=lambda condition, row=row: np.array(row),
            mean=lambda condition, row=row: float(np.mean(row)),
            conditions={"right context": SimpleNamespace(reported=np.array(row)[:, None])},
        )
        for seed, row in enumerate(scores)
    }
    return SimpleNamespace(results=results, first=results[0], span=1.0 if counted else None)


def test_methods_are_ranked_by_interquartile_mean_and_compared_with_the_next():
    rows = rank(
        {
            "low": fake_test([[0.0, 0.1, 0.2, last] for last in (9.0, 9.4)]),
            "high": fake_test([[0.5, 0.6, 0.7, 0.8], [0.1, 0.6, 0.7, 0.8]]),
        }
    )
    assert [row.algo for row in rows] == ["high", "low"]
    assert rows[0].interquartile.mean == pytest.approx(0.65)  # the middle two of four, in both seeds
    assert rows[1].interquartile.mean == pytest.approx(0.15)
    # per task the chance that a seed of high beats one of low: 1, 1, 1, 0
    assert rows[0].better_than_next.mean == pytest.approx(0.75)
    assert rows[1].better_than_next is None
    # means over tasks 0.65 and 0.55 against 2.325 and 2.425; t with two degrees of freedom: 4.3027 x 0.0707
    difference = rows[0].minus_next
    assert (difference.mean, difference.high - difference.mean) == pytest.approx((-1.775, 0.3042), abs=1e-4)
    assert rows[0].verdict == "worse"
    assert (rows[1].minus_next, rows[1].verdict) == (None, None)
    assert rows[0].normalised


def test_differences_of_all_tasks_are_judged_by_all_tasks():
    first = SimpleNamespace(
        counted=np.array([True, False, False]),  # an expert that failed its test, data without references
        untrained_reference=np.array([0.0, 1.0, np.nan]),
        expert_reference=np.array([10.0, 3.0, np.nan]),
    )
    tested = RunTest(Path(), None, None, None, 1, 0, {0: first})
    assert tested.span == 6.0
    first.counted[:] = False
    assert tested.span is None


def test_profiles_are_drawn_where_there_are_scores(tmp_path):
    files = draw_profiles(tmp_path / "profiles.png", rank({"a": fake_test([[0.2, 0.9]]), "b": fake_test([[0.5, 0.1]])}))
    assert [file.name for file in files] == ["profiles.png", "profiles.svg"]
    assert files[0].stat().st_size > 10_000
    assert draw_profiles(tmp_path / "none.png", rank({"a": fake_test([[1.0, 2.0]], counted=False)})) == []


def test_returns_stand_in_where_an_expert_is_missing():
    rows = rank({"a": fake_test([[1.0, 2.0]], counted=False), "b": fake_test([[3.0, 4.0]])})
    assert not any(row.normalised for row in rows)
    assert [row.interquartile.mean for row in rows] == [3.5, 1.5]
    assert rows[0].minus_next.mean == 2.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    folders = ["--stores", root / "stores", "--runs", root / "runs"]
    cli("data", "generate", "--env", "point", "--scale", "smoke", *folders[:2])
    return folders


def test_compare_says_which_settings_have_no_effect_in_which_method(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--algos", "contextual-bcq,batch-pearl", "--seeds", 1, "--episodes", 2]
    command += ["--set", "steps=4", "--set", "regularisation.alpha=7", *folders[:2], "--runs", tmp_path]
    told = CliRunner().invoke(main, [str(word) for word in command]).stderr.splitlines()
    assert [line for line in told if line.startswith("note: ")] == [
        "note: batch-pearl: regularisation.alpha has no effect here, with regularisation.kind=policy it would"
    ]


def test_compare_trains_what_is_missing_once_and_tests_alike(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--seeds", 1, "--episodes", 2, *SHORT, "--json", *folders]
    alone = json.loads(cli(*command, "--algos", "mbml"))
    assert [row["method"] for row in alone["methods"]] == ["mbml"]
    runs = folders[3]
    first = {path: path.stat().st_mtime_ns for path in (runs / "point-mixed-smoke-mbml").rglob("state.*")}
    first |= {path: path.stat().st_mtime_ns for path in (runs / "teachers").rglob("*.safetensors")}
    both = json.loads(cli(*command, "--algos", "batch-pearl,mbml"))
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert {row["method"] for row in both["methods"]} == {"batch-pearl", "mbml"}
    assert both["context_size"] == 32  # Batch PEARL's, for MBML too, which trains with 16
    for row in both["methods"]:
        assert row["gradient_steps"] == 4
        assert len(row["scores"]) == 1
        assert set(row["returns"]) == {"right context", "wrong context", "untrained", "zero action", "expert"}
        assert (row["first_stage_seconds"] is not None) == (row["method"] == "mbml")
    first, second = both["methods"]
    assert first["better_than_next"] is not None
    means = [row["returns"]["right context"]["mean"] for row in (first, second)]
    assert first["minus_next"]["mean"] == pytest.approx(means[0] - means[1])
    assert second["minus_next"] is None
    assert (both["quality"], both["seeds"], both["episodes"], both["test_seed"]) == ("mixed", [0], 2, 0)
    assert len(both["test_tasks"]) == len(first["scores"][0])
    stores = folders[1] / "sparse-point-robot"
    assert both["collection"]["content_hash"] == json.loads((stores / "dataset.json").read_text())["content_hash"]
    files = {path.name for path in (runs / "comparisons" / "point-mixed-smoke").iterdir()}
    assert files == {
        "comparison-offline.json", "comparison-offline.md", "comparison-offline.csv", "return_curves.png",
        "return_curves.svg",
    }  # fmt: skip
    shared = "seeds of mbml share one first stage, its intervals leave that out"
    assert shared in (runs / "comparisons" / "point-mixed-smoke" / "comparison-offline.md").read_text()
    online = json.loads(cli(*command, "--algos", "batch-pearl,mbml", "--protocol", "mbml"))
    assert set(online["methods"][0]["returns"]) == {"right context", "untrained", "zero action", "expert"}
    table = (runs / "comparisons" / "point-mixed-smoke" / "comparison-mbml.md").read_text()
    assert "| method |" in table
    assert "| mbml |" in table


def test_what_cannot_be_compared_is_refused_before_training(folders):
    command = ["compare", "--data", "mixed", *folders]
    assert "did you mean 'batch-pearl'" in cli(*command, "--algos", "focal,pearl", code=2)
    assert "--algos is empty" in cli(*command, "--algos", ",", code=2)
    assert "did you mean 'steps'" in cli(*command, "--algos", "focal", "--set", "stepz=3", code=2)
    line = cli(*command, "--algos", "focal,mbml", "--name", "x", "--set", "mbml:transitions_vary=true", code=2)
    assert "--set next_observation_in_context=true" in line
    assert not list(folders[3].glob("x-*"))


def test_at_laptop_scale_all_methods_have_the_same_networks(folders):
    def planned(*words):
        words = ("context_size=32", *words)  # smoke data are few
        train = TrainRequest(folders[1] / "sparse-point-robot", "mixed", "laptop", (0,), words, folders[3])
        found = _plan(CompareRequest(train, METHODS, folders[1]), "any", "sparse-point-robot", "laptop")
        return {algo: networks(one.settings) for algo, one in found.items()}

    # the reward ensemble's single layer of 128 is smaller by its description
    equal = dict.fromkeys(METHODS, "3 x 256") | {"mbml": "3 x 256, 1 x 128"}
    assert planned() == equal
    assert planned("focal:control_hidden=64,32") == equal | {"focal": "3 x 256, 64 + 32"}
    assert networks(train_settings("sparse-point-robot", "laptop", "focal")) == "2 x 128"  # its own


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_the_runs_of_a_comparison_are_those_of_figure_3(folders, scale, tmp_path):
    train = TrainRequest(folders[1] / "sparse-point-robot", "mixed", scale, (0,), ("context_size=32",), tmp_path)
    name = comparison_name("sparse-point-robot", "mixed", scale)
    planned = _plan(CompareRequest(train, METHODS, folders[1]), name, "sparse-point-robot", scale)
    shown = {training.algo: training for training in ITEMS["figure 3"].restricted(["sparse-point-robot"]).trainings}
    assert set(shown) == set(planned)
    for algo, training in shown.items():
        same = dataclasses.replace(training, quality="mixed", changes=("context_size=32",))  # smoke data are few
        assert same.name(scale) == planned[algo].run_dir.name
        assert same.settings(scale) == planned[algo].settings
        size = {"smoke": 32, "laptop": 128}[scale]  # MBML, which trains with 16 and 64, too
        assert same.test_context_size(scale) == planned[algo].source.test_context_size == size
        assert not training.changes


def test_terms_of_a_laptop_comparison():
    words = equal_terms("sparse-point-robot", "laptop", "mbml")
    assert words == ("batch_size=64", "context_size=128", "context_size=64", "eval_every=1000", "steps=3000",
                     "meta_batch=8", "eval_every=250", "teachers.steps=1000",
                     "teachers.rewards.steps=2000")  # fmt: skip
    words = ("batch_size=32", "context_size=100", "steps=5000", "eval_every=500")
    assert equal_terms("half-cheetah-vel", "laptop", "batch-pearl") == words
    assert equal_terms("walker-2d-params", "laptop", "contextual-bcq") == words
    networks = ("encoder_hidden=256,256,256", "control_hidden=256,256,256")
    assert equal_terms("a-new-family", "laptop", "focal") == networks
    assert equal_terms("sparse-point-robot", "paper", "focal") == ()


def test_a_method_that_diverges_does_not_hide_the_others(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--seeds", 1, "--episodes", 2, "--name", "wild", *folders]
    command += ["--set", "steps=4", "--set", "batch-pearl:value_limit=1e-9"]
    told = json.loads(cli(*command, "--algos", "batch-pearl,contextual-bcq", "--json"))
    assert [row["method"] for row in told["methods"]] == ["contextual-bcq"]
    (reason,) = told["diverged"]
    assert reason.startswith("batch-pearl: seed 0: values diverge")
    assert "not in the table: batch-pearl" in cli(*command, "--algos", "batch-pearl,contextual-bcq")
    assert "values diverge" in cli(*command, "--algos", "batch-pearl", code=1)  # nothing to show


def test_a_curve_is_of_one_context_size_whatever_command_continues_its_run(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    words = ["--data", "mixed", *folders, "--set", "steps=4", "--set", "eval_every=2"]
    names = ["--set", "mbml:teachers.steps=2", "--set", "mbml:teachers.rewards.steps=2"]
    cli("compare", "--algos", "mbml", "--seeds", 1, "--episodes", 2, "--name", "begun", *words, *names)
    cli("train", "--data", "mixed", "--name", "begun-mbml", "--seed", 1, "--resume", *folders)
    logs = [folders[3] / "begun-mbml" / f"seed_{seed}" / "evaluation.jsonl" for seed in (0, 1)]
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert [row["test/context_size"] for row in rows] == [32] * 4, "MBML's own is 16"


def test_curves_name_their_context_sizes_where_they_differ(tmp_path):
    for name, sizes in {"a": (8, 8), "b": (16,), "old": (8, 16), "none": (None,)}.items():
        folder = tmp_path / name / "seed_0"
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "test/context_size": size}) for step, size in enumerate(sizes)]
        (folder / "evaluation.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def labels(*names):
        return list(name_context_sizes(dict.fromkeys([*names, "diverged"]), {n: (tmp_path / n, (0,)) for n in names}))

    assert labels("a", "none") == ["a", "none", "diverged"]
    assert labels("a", "b", "none") == ["a, contexts of 8", "b, contexts of 16", "none", "diverged"]
    assert labels("old") == ["old, contexts of 8 and 16", "diverged"]


def test_tests_that_cannot_be_are_refused_before_training(make_collection, tmp_path):
    """No test task has the quality; shift has no policies to roll out, or only one test task."""
    failed = make_collection(tasks=4, test=2, unreached=(2, 3)).path
    words = ["--runs", tmp_path, "--algos", "focal", "--seeds", 1]
    assert "no test task of" in cli("compare", "--collection", failed, "--data", "expert", *words, code=1)
    two, one = (make_collection(tasks=4, test=test).path for test in (2, 1))
    shift = ["--data", "mixed", "--protocol", "shift", "--context-size", 4, "--set", "context_size=4", *words]
    assert "--protocol shift rolls behaviour policies out" in cli("compare", "--collection", two, *shift, code=1)
    assert "--protocol shift needs another test task" in cli("compare", "--collection", one, *shift, code=1)
    assert not list(tmp_path.iterdir())


def test_a_name_is_no_markup(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--algos", "batch-pearl", "--seeds", 1, "--episodes", 2, *folders]
    assert "a[bold]b: " in cli(*command, "--name", "a[bold]b", "--set", "steps=2")


def test_the_seeds_asked_for_count(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--algos", "focal", "--episodes", 2, "--name", "counted", *folders]
    command += ["--set", "steps=4", "--set", "encoder_steps=2", "--json"]
    for seeds in (2, 1):
        (row,) = json.loads(cli(*command, "--seeds", seeds))["methods"]
        assert len(row["scores"]) == seeds
        assert list(row["seconds"]) == [str(seed) for seed in range(seeds)]


def test_settings_of_an_earlier_comparison_are_not_taken_over(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--algos", "batch-pearl", "--seeds", 1, "--episodes", 2, "--name", "other"]
    command += ["--set", "steps=4", *folders]
    (row,) = json.loads(cli(*command, "--set", "regularisation.kind=policy", "--json"))["methods"]
    assert (row["settings"]["steps"], row["settings"]["regularisation"]["kind"]) == (4, "policy")
    line = cli(*command, code=1)
    assert "is of another run: it has regularisation.kind=policy, this command asks for none" in line
    assert "use its own (--set regularisation.kind=policy)" in line


def test_contexts_of_a_comparison_can_be_chosen(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = [
        "compare",
        "--data",
        "mixed",
        "--algos",
        "batch-pearl",
        "--seeds",
        1,
        "--episodes",
        2,
        "--name",
        "chosen",
    ]
    command += ["--set", "steps=4", *folders]
    found = json.loads(cli(*command, "--context-size", 2, "--context-unit", "episodes", "--json"))
    assert (found["context_size"], found["context_unit"]) == (2, "episodes")
    assert (folders[3] / "comparisons" / "chosen" / "comparison-offline-2-episodes.md").exists()
    wrong = cli(*command, "--protocol", "online", "--context-unit", "transitions", "--name", "y", code=2)
    assert "online collects whole episodes" in wrong
    for words in (["--context-size", 10**6], ["--context-size", 10**4, "--context-unit", "episodes"]):
        assert "take at most" in cli(*command, *words, "--name", "y", code=1)
    assert not (folders[3] / "y-batch-pearl").exists(), "refused before training"


def test_a_run_is_continued_with_its_own_method(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    run = ["--data", "mixed", "--name", "mine", *folders]
    cli("train", "--algo", "contextual-bcq", *run, "--set", "steps=3")
    assert "is a run of contextual-bcq" in cli("train", "--algo", "focal", "--resume", *run, code=1)
    assert "trained; test it with" in cli("train", "--resume", *run)
    settings = json.loads((folders[3] / "mine" / "settings.json").read_text())["settings"]
    assert (settings["algo"], settings["steps"]) == ("contextual-bcq", 3)


@pytest.mark.slow
def test_all_methods_run_on_the_command_line(folders):
    command = ["compare", "--data", "mixed", "--seeds", 2, "--episodes", 2, "--name", "all", *folders]
    printed = cli(*command)
    assert all(algo in printed for algo in METHODS)
    told = json.loads(cli(*command, "--json"))
    assert len(told["methods"]) == 4
    assert all(len(row["scores"]) == 2 for row in told["methods"])
    logs = sorted(folders[3].glob("all-*/seed_*/evaluation.jsonl"))
    sizes = {json.loads(line)["test/context_size"] for log in logs for line in log.read_text().splitlines()}
    assert len(logs) == 8
    assert sizes == {32}, "MBML trains with 16, but is tested like the others while it trains, too"
