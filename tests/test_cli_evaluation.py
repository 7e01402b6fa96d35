"""`focal-cli test` in all its forms, on a point robot generated and trained at smoke scale."""

import json
import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from focal import commands
from focal.cli import main
from focal.evaluation.metatest import CONDITIONS


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def folders(point_run):
    return point_run


def test_a_damaged_collection_does_not_hide_a_good_copy(folders, tmp_path):
    run, stores = tmp_path / "runs" / "point", tmp_path / "stores"
    shutil.copytree(folders[3] / "point", run, ignore=shutil.ignore_patterns("tests"))
    shutil.copytree(folders[1] / "sparse-point-robot", stores / "b")
    shutil.copytree(folders[1] / "sparse-point-robot", stores / "a")
    (stores / "a" / "dataset.json").write_text("{}")
    settings = json.loads((run / "settings.json").read_text())
    for place in ("a", "gone"):  # where the run's data were
        settings["collection"]["path"] = str(stores / place)
        (run / "settings.json").write_text(json.dumps(settings))
        cli("test", run, "--episodes", 1, "--no-figures", "--stores", stores)
    shutil.rmtree(stores / "b")
    line = cli("test", run, "--episodes", 1, "--no-figures", "--stores", stores, code=1)
    assert f"neither {stores / 'gone'} nor anything in {stores} is the data" in line
    assert str(stores / "a" / "dataset.json") in line


def test_a_collection_is_named_once(folders):
    words = ["--env", "walker", "--collection", folders[1] / "sparse-point-robot", "--data", "mixed", *folders[2:]]
    for verb in ("train", "compare"):
        assert "each name a collection; leave one of them out" in cli(verb, *words, code=2)


def test_protocols_are_told_and_kept(folders):
    tests = folders[3] / "point" / "tests"
    for words, name, size in (
        (["--context-size", 20], "mixed-context20", 20),
        (["--context-unit", "episodes", "--context-size", 2], "mixed-context2episodes", 2),
        (["--protocol", "shift"], "shift-mixed-context32", 32),
        (["--protocol", "online"], "online-mixed-context1episodes", 1),
    ):
        told = json.loads(cli("test", *words, "--episodes", 2, "--no-figures", "--json", *folders))
        kept = json.loads((tests / f"{name}-episodes2-seed0.json").read_text())
        assert kept["summary"] == told["summary"]
        assert kept["context_size"] == size
        assert set(kept["seeds"]) == {"0", "1"}
        for seed in kept["seeds"].values():
            for condition in CONDITIONS:
                returns = np.array(seed["conditions"][condition]["sparse_returns"])
                assert returns.shape == (2, 2), "two test tasks, two episodes, every return kept"
            assert np.array(seed["embeddings"]).shape == (2, 2, 3)
            assert 0.0 <= seed["task_accuracy"] <= 1.0
            assert seed["rms"] > 0
        shape = (
            np.shape(kept["seeds"]["0"]["context_returns"]["returns"]) if "offline" not in kept["protocol"] else None
        )
        assert shape in (None, (2, 2, 2), (2, 2, 1))


def test_summaries_are_those_of_the_raw_returns(folders):
    told = json.loads(cli("test", "--episodes", 2, "--no-figures", "--json", *folders))
    means = [np.mean(seed["conditions"]["right context"]["sparse_returns"]) for seed in told["seeds"].values()]
    found = told["summary"]["right context"]["mean"]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert found["seeds"] == 2


def test_sweep_keeps_every_return_and_draws_a_curve(folders):
    printed = cli("test", "--sweep", "--sizes", "1,4,100000", "--episodes", 2, *folders)
    assert "task accuracy" in printed
    assert "sizes left out, since a test task has fewer mixed transitions: 100000" in printed
    kept = json.loads((folders[3] / "point" / "tests" / "sweep-mixed-contexts1-4-episodes2-seed0.json").read_text())
    assert kept["sizes"] == [1, 4], "a size that the data cannot fill is left out"
    assert np.shape(kept["seeds"]["1"]["4"]["sparse_returns"]) == (2, 2)
    figures = folders[3] / "point" / "figures"
    assert (figures / "context_size_mixed.png").stat().st_size > 10_000
    assert (figures / "context_size_mixed.svg").read_text().startswith("<?xml")


def test_matrix_tests_every_quality_there_is(folders):
    told = json.loads(cli("test", "--matrix", "--episodes", 2, "--context-size", 8, "--json", *folders))
    assert "mixed" in told
    for quality, document in told.items():
        assert document["seeds"]["0"]["quality"] == quality
        assert document["tasks_with"] == list(told), "all cells are of the same tasks"
        kept = f"{quality}-context8-episodes2-seed0-tasks-with-{'+'.join(told)}.json"
        assert (folders[3] / "point" / "tests" / kept).exists()
    assert len({tuple(document["seeds"]["0"]["tasks"]) for document in told.values()}) == 1
    printed = cli("test", "--matrix", "--episodes", 2, *folders)
    assert "mean sparse return by training data and context" in printed
    assert "zero action" in printed


def test_some_seeds_alone(folders):
    told = json.loads(cli("test", "--only-seeds", "1", "--episodes", 2, "--json", *folders))
    assert list(told["seeds"]) == ["1"]
    assert told["summary"]["right context"]["mean"]["seeds"] == 1
    assert (folders[3] / "point" / "tests" / "mixed-context32-episodes2-seed0-only1.json").exists()
    swept = json.loads(cli("test", "--sweep", "--sizes", 2, "--only-seeds", "1", "--episodes", 2, "--json", *folders))
    assert list(swept["seeds"]) == ["1"]
    for document in (told, swept):
        assert "--only-seeds 1" in commands.test_command(folders[3] / "point", document, None)
    assert "has no seed 7, it has 0,1; --only-seeds 0,1" in cli("test", "--only-seeds", "1,7", *folders, code=2)


def test_a_seed_that_diverged_leaves_the_others(folders, tmp_path):
    run = tmp_path / "runs" / "point"
    shutil.copytree(folders[3] / "point", run)
    for checkpoint in sorted((run / "seed_1" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    (run / "seed_1" / "diverged.json").write_text("{}")
    line = cli("test", run, *folders[:2], code=1)
    assert "seed 1 is at step" in line
    assert "where its values diverged, and would do so again; the others alone: focal-cli test" in line
    words = shlex.split(line.split("the others alone: focal-cli ")[1])
    assert "sparse return" in cli(*words, "--episodes", 2, *folders[:2]), "the next command must work as printed"
    (run / "seed_0" / "diverged.json").write_text("{}")
    for checkpoint in (run / "seed_0" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert "train under another --name with smaller steps, for example --set critic_learning_rate" in cli(
        "test", run, *folders[:2], code=1
    )


def test_what_embeddings_and_returns_are_shown(folders):
    figures = folders[3] / "point" / "figures"
    printed = cli("test", "--episodes", 2, *folders)
    for words in ("sparse return", "dense return", "ESR", "RMS"):
        assert words in printed
    usual = (figures / "embeddings.png").read_bytes()
    printed = cli("test", "--protocol", "online", "--episodes", 2, *folders)
    assert (figures / "embeddings.png").read_bytes() == usual, "embeddings of other contexts have another picture"
    assert (figures / "embeddings-online-mixed-1-episodes.png").exists()
    told = json.loads(cli("test", "--episodes", 2, "--no-figures", "--json", *folders))
    dense = [np.mean(seed["conditions"]["zero action"]["returns"]) for seed in told["seeds"].values()]
    assert told["summary"]["zero action"]["dense_mean"]["mean"] == pytest.approx(np.mean(dense))
    assert told["spread"]["rms"]["mean"] == pytest.approx(np.mean([seed["rms"] for seed in told["seeds"].values()]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "--protocol", "online"], "--sweep and --matrix test offline contexts of transitions, one of them"),
        (["--only-seeds", "x"], "--only-seeds got 'x', expected seeds of the run such as --only-seeds 0,2"),
        (["--sweep", "--sizes", "1,x"], "--sizes got '1,x', expected context sizes such as --sizes 1,10,100"),
        (["--protocol", "online", "--context-unit", "transitions"], "online collects whole episodes"),
        (
            ["--sweep", "--context-size", 5],
            "--sweep takes its sizes from --sizes, found --context-size 5; leave it out",
        ),
        (["--matrix", "--data", "mixed"], "--matrix takes contexts of every quality, found --data mixed; leave it out"),
    ],
)
def test_misuse(folders, words, message):
    assert message in cli("test", *words, *folders, code=2)


def test_more_episodes_than_there_are(folders):
    error = cli("test", "--context-unit", "episodes", "--context-size", 10**6, *folders, code=1)
    assert "take at most --context-size" in error
