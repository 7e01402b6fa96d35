"""`focal-cli ablate`: what the rows are, what is trained and not trained again, and the numbers of its table."""

import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner

from focal import FocalError, UsageError
from focal.ablation import (
    ALPHA,
    Measured,
    ablation_page,
    ablation_rows,
    choose_rows,
    read_measured,
    table_rows,
)  # fmt: skip
from focal.cli import main
from focal.envs import FAMILIES
from focal.settings import SCALES, override, parse_assignments, to_dict
from focal.trainer.methods import train_settings
from focal.trainer.settings import differences

from .in_process import run_here


def settings_of(family, scale, row):
    settings = override(train_settings(family, scale), parse_assignments(row.changes))
    settings.check()
    return settings


def changed(family, scale, rows, name):
    """Settings in which a row differs from the one it is against."""
    row = rows[name]
    ours, theirs = (to_dict(settings_of(family, scale, each)) for each in (row, rows[row.against]))
    return set(differences(ours, theirs))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_possible_and_differs_from_its_own_comparison_in_one_choice(family, scale):
    rows = ablation_rows(family, scale)
    together = {
        frozenset({"schedule", "steps"}), frozenset({"schedule", "steps", "encoder_steps"}),
        frozenset({"context_draws", "task_replacement"}),
        frozenset({"regularisation.kind", "regularisation.alpha", "regularisation.alpha_max"}),
    }  # fmt: skip
    seen, coupled = set(), set()
    for name, row in rows.items():
        if row.against is not None:
            assert row.against in seen, "the list is in an order in which it can be trained"
            names = frozenset(changed(family, scale, rows, name))
            assert len(names) == 1 or names in together, (name, names)
            ours, theirs = (settings_of(family, scale, each) for each in (row, rows[row.against]))
            assert ours.total_steps == theirs.total_steps
            coupled |= {ours.regularisation.kind} if names == {"gradients"} else set()
            if any(each.startswith(("regularisation.", "released.p", "released.n")) for each in names):
                assert ours.regularisation.kind == "none" or ours.regularisation.alpha > 0, name
                assert {ours.regularisation.kind, theirs.regularisation.kind} != {"none"}, name
        seen.add(name)
    resolved = [json.dumps(to_dict(settings_of(family, scale, row))) for row in rows.values()]
    assert len(set(resolved)) == len(resolved), "no row twice"
    wanted = {
        "power-inverse", "power-linear", "power-square", "probabilistic", "probabilistic-weak-kl",
        "no-metric", "probabilistic-no-metric", "coupled", "wasserstein", "D1", "D2", "D3", "D4", "D6", "D7",
        "released-distance",
    }  # fmt: skip
    assert wanted <= set(rows)
    assert coupled == {"none", "value-penalty", "policy"}
    assert {settings_of(family, scale, row).schedule for row in rows.values()} == {"joint", "encoder-first"}


def test_rows_of_the_point_robots_state_their_alpha_and_are_as_long_as_their_comparison():
    rows = ablation_rows("sparse-point-robot", "laptop")
    settings = {name: settings_of("sparse-point-robot", "laptop", row) for name, row in rows.items()}
    assert settings["base"].regularisation.kind == "none"
    for name in ("value-penalty", "policy-regularisation", "coupled-value-penalty", "D2", "D3", "D4"):
        assert (settings[name].regularisation.kind != "none", settings[name].regularisation.alpha) == (True, ALPHA)
    assert {each.total_steps for each in settings.values()} == {4500}
    assert (settings["base"].schedule, settings["joint"].schedule) == ("encoder-first", "joint")
    assert rows["coupled-value-penalty"].against == "joint-value-penalty"
    assert rows["D7"].what.endswith("the base once more")  # every episode starts at the origin
    assert ablation_rows("walker-2d-params", "laptop")["D7"].what == "observation of a reset unscaled"


def test_a_chosen_row_brings_what_it_is_compared_with():
    rows = ablation_rows("sparse-point-robot", "laptop")
    assert [row.name for row in choose_rows(rows, ["D1"])] == ["base", "joint", "coupled", "D1"]
    assert len(choose_rows(rows, ["all"])) == len(rows)
    with pytest.raises(UsageError, match="unknown row 'copled'; did you mean 'coupled'"):
        choose_rows(rows, ["base", "copled"])


def measured(rows, name, returns, span=10.0, **more):
    identity = {
        "family": "sparse-point-robot",
        "quality": "mixed",
        "episodes": 10,
        "test_seed": 0,
        "content_hash": "c0ffee" * 4,
    }
    numbers = {"right context": returns, "minutes": [1.0] * len(returns), **more}
    return Measured(rows[name], tuple(range(len(returns))), {}, numbers, span, identity, {})


def test_the_table_says_what_a_difference_shows():
    rows = ablation_rows("sparse-point-robot", "laptop")
    found = {
        "base": measured(rows, "base", [10.0, 10.1, 9.9]),
        "power-linear": measured(rows, "power-linear", [5.0, 5.1, 4.9]),
        "D6": measured(rows, "D6", [10.0, 10.2, 9.8]),
        "D1": measured(rows, "D1", [10.0, 10.2, 9.8]),  # "coupled", which it is against, was not run
        "D7": measured(rows, "D7", [12.0, 2.0, 9.8]),
    }
    lines = {line["row"]: line for line in table_rows(found, rows)}
    assert list(lines) == ["base", "power-linear", "D1", "D6", "D7"]
    assert lines["power-linear"]["difference"].startswith("-5.00 [")
    assert lines["power-linear"]["difference"].endswith(", worse")
    assert lines["D6"]["difference"].endswith(", not distinguishable")
    assert lines["D7"]["difference"].endswith(", undecided")
    assert lines["D1"]["difference"] == lines["base"]["difference"] == "-"
    found["base"] = measured(rows, "base", [10.0, 10.1, 9.9, 14.0, 15.0])
    found["D7"] = measured(rows, "D7", [10.0, 10.1, 9.9])  # the base once more, with fewer seeds
    (line,) = [line for line in table_rows(found, rows) if line["row"] == "D7"]
    assert line["difference"] == "0.00 [0.00, 0.00], not distinguishable", "seed by seed, over the seeds that both have"
    found["D7"] = dataclasses.replace(found["D7"], seeds=(7, 8, 9))
    assert [line["difference"] for line in table_rows(found, rows) if line["row"] == "D7"] == ["-"]
    found["D2"] = measured(rows, "D2", [10.0, 10.2])
    page = ablation_page("point-mixed", found, rows)
    assert "    make ablation ENV=point DATA=mixed ROW=D2 SEEDS=2\n" in page, "a row's own number of seeds"
    assert "| power-linear | base |" in page
    other = found | {"D2": dataclasses.replace(found["D2"], identity={**found["D2"].identity, "test_seed": 1})}
    with pytest.raises(
        FocalError, match="row D2 was tested with test_seed 1, row base with 0, but one table is of one"
    ):
        ablation_page("point-mixed", other, rows)
    assert "- **power-linear**: distance metric loss of power 1 (`distance.power=1`)" in page
    assert "Not run: power-inverse, power-square" in page
    assert "`make ablation ENV=point DATA=mixed ROW=power-inverse` runs one)." in page
    assert "**coupled**" not in page, "of a row that was not run, the name only"
    with pytest.raises(FocalError, match="no row of point-mixed was measured"):
        ablation_page("point-mixed", {}, rows)


def test_a_diverged_row_says_so():
    rows = ablation_rows("sparse-point-robot", "laptop")
    stop = {"0": {"metric": "critic/value_largest", "value": 9.0, "step": 40, "bound": 5.0}}
    found = dataclasses.replace(measured(rows, "D6", []), diverged=stop, seeds=(0,), numbers={"minutes": [0.1]})
    (line,) = table_rows({"D6": found}, rows)
    assert line["return"] == "diverged at step 40 (seed 0)"
    assert (line["difference"], line["minutes a seed"]) == ("-", "0.1")
    (line,) = table_rows({"D6": dataclasses.replace(found, numbers={"minutes": []})}, rows)  # before its first log row
    assert line["minutes a seed"] == "-"


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    cli("data", "generate", "--env", "point", "--scale", "smoke", "--stores", root / "stores")
    return ["--stores", root / "stores", "--runs", root / "runs"]


def test_ablate_trains_tests_and_resumes(folders, monkeypatch, tmp_path):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["ablate", "--seeds", 2, "--episodes", 2, *folders]
    first = json.loads(cli(*command, "--rows", "power-linear", "--json"))
    assert [found["row"]["name"] for found in first] == ["base", "power-linear"]
    for found in first:
        assert found["seeds"] == [0, 1]
        assert {"right context", "wrong context", "untrained", "zero action", "esr, unseen tasks",
                "rms, training tasks", "minutes"} <= set(found["numbers"])  # fmt: skip
        assert all(len(values) == 2 for values in found["numbers"].values())
    runs = folders[3]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".safetensors", ".json")}
    printed = cli(*command, "--rows", "power-linear,D6", "--table", tmp_path / "page.md")
    assert "D6" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing trained or tested again"
    page = (tmp_path / "page.md").read_text()
    assert page.count("| base |") == 3  # its own line, and what the two others are against
    assert "make ablation ENV=point DATA=mixed ROW=D6 SEEDS=2" in page
    assert cli("ablate", "--table", tmp_path / "again.md", *folders).startswith("saved")
    assert (tmp_path / "again.md").read_text() == page
    assert {path.name for path in (runs / "ablations" / "point-mixed-smoke").iterdir()} == {
        "base.json", "power-linear.json", "D6.json", "values.png", "values.svg",
    }  # fmt: skip
    assert "probabilistic-no-metric" in cli("ablate", *folders)

    elsewhere = tmp_path / "elsewhere"  # where only what was measured was copied to
    shutil.copytree(runs / "ablations", elsewhere / "ablations")
    words = ["ablate", "--episodes", 2, "--rows", "power-linear", "--json", *folders[:2], "--runs", elsewhere]
    assert json.loads(cli(*words, "--seeds", 2)) == first
    assert [path.name for path in elsewhere.iterdir()] == ["ablations"], "nothing was trained"
    assert json.loads(cli(*words, "--seeds", 1)) == first, "what more seeds measured is kept"
    assert [path.name for path in elsewhere.iterdir()] == ["ablations"]
    (other,) = json.loads(cli("ablate", "--episodes", 1, "--seeds", 1, "--rows", "base", "--json", *folders))
    assert other["seeds"] == [0, 1], "another test, of all that was trained"
    assert all(len(values) == 2 for values in other["numbers"].values())
    assert "did you mean 'power-linear'" in cli(*command, "--rows", "power-liner", code=2)


def test_a_seed_that_diverges_is_a_result_and_other_failures_are_not(folders, monkeypatch):
    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["ablate", "--seeds", 2, "--episodes", 2, "--data", "mixed", "--rows", "base", "--json", *folders[:2]]
    command += ["--runs", folders[3].parent / "diverging"]
    (found,) = json.loads(cli(*command, "--set", "value_limit=1e-3"))
    assert set(found["diverged"]) == {"0", "1"}
    assert found["diverged"]["0"]["step"] == 41, "the first step after the encoder's 40"
    assert found["diverged"]["0"]["value"] > found["diverged"]["0"]["bound"] == 1e-3
    assert "right context" not in found["numbers"]
    assert json.loads(cli(*command, "--set", "value_limit=1e-3")) == [found]

    def full(*_):
        raise FocalError("some other failure")

    monkeypatch.setattr("focal.experiment.train", full)
    command[-1] = folders[3].parent / "failing"
    assert "some other failure" in cli(*command, code=1)


def test_damaged_measurements_name_the_way_out(tmp_path):
    good = measured(ablation_rows("sparse-point-robot", "laptop"), "base", [1.0, 2.0]).to_json()
    path = tmp_path / "base.json"
    path.write_text(json.dumps(good))
    assert read_measured(path).numbers == good["numbers"]
    wrong_numbers = ({"minutes": ["x"]}, {"minutes": 3}, {"right context": [1.0]}, [1.0])
    texts = [json.dumps({**good, "numbers": numbers}) for numbers in wrong_numbers]
    for text in (*texts, "{", '{"format": "focal-ablation/1"}', '{"format": "other"}', "[]"):
        path.write_text(text)
        with pytest.raises(FocalError, match=r"base\.json is damaged .* delete it"):
            read_measured(path)
