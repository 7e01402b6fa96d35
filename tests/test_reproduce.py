"""Every figure and table of the paper from one line: what is there is used, what is missing is made or named."""

import csv
import dataclasses
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from focal import FocalError, UsageError
from focal.cli import main
from focal.datasets import open_collection
from focal.paper import ITEMS, LEVELS, POINT, VEL, WIND, Material, Training
from focal.reproduce import collection_at, find_items, refuse_unknown


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An empty place for collections, runs and what is reproduced."""
    root = tmp_path_factory.mktemp("work")
    return ["--stores", root / "stores", "--runs", root / "runs", "-o", root / "out", "--scale", "smoke"]


def check(files):
    """Pictures show something; both forms of a table agree."""
    for file in files:
        if file.suffix == ".png":
            pixels = np.asarray(Image.open(file).convert("L"))
            assert min(pixels.shape) > 200
            assert 0.005 < (pixels < 250).mean() < 0.9, "neither empty nor full"
        elif file.suffix == ".csv":
            rows = list(csv.reader(file.read_text().splitlines()))
            lines = file.with_suffix(".md").read_text().splitlines()[2:]
            assert len(lines) == len(rows) + 1
            assert [cell.strip() for cell in lines[0].strip("| ").split(" | ")] == rows[0]
            assert all(len(row) == len(rows[0]) for row in rows)


def saved(printed, folders):
    files = [folders[5] / line.rpartition("/")[2] for line in printed.splitlines() if line.startswith("saved")]
    assert files
    return files


def test_every_item_of_the_paper_is_there():
    assert set(ITEMS) == {
        *(f"figure {number}" for number in ("2a", "2b", 3, "4a", "4b", "5a", "5b", 6, 7, 8, "9a", "9b", 10, 11)),
        "figure behaviour",
        "figure context-size",
        *(f"table {number}" for number in range(1, 7)),
    }
    listed = cli("reproduce")
    assert all(name in listed for name in ITEMS)
    assert [row["item"] for row in json.loads(cli("reproduce", "--json"))] == list(ITEMS)


def test_a_figure_of_two_parts_is_both():
    assert [item.name for item in find_items("figure", "9")] == ["figure 9a", "figure 9b"]
    assert [item.name for item in find_items("figure", "9b")] == ["figure 9b"]
    assert [item.name for item in find_items("figure", "10")] == ["figure 10"]


def test_runs_of_two_items_share_a_name_only_if_they_are_the_same_run():
    by_name = {}
    for item in ITEMS.values():
        for training in item.trainings:
            same = dataclasses.replace(training, label="")
            assert by_name.setdefault(training.name("laptop"), same) == same, training.name("laptop")
    assert Training(POINT, "mixed", "").name("laptop") == "point-mixed", "the run of docs/results.md"
    assert Training(POINT, "mixed", "").name("smoke") == "point-mixed-smoke"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_the_runs_of_every_item_are_possible(scale):
    for item in ITEMS.values():
        for training in item.trainings:
            training.settings(scale).check()


def test_a_part_of_an_item_is_about_the_families_asked_for():
    part = find_items("figure", "3")[0].restricted([WIND, POINT])
    assert {training.family for training in part.trainings} == {POINT, WIND}
    assert part.trainings == tuple(t for t in ITEMS["figure 3"].trainings if t.family in (POINT, WIND))
    assert part.stem == "figure_3_point_wind", "beside the whole figure, not in its place"
    assert find_items("table", "2")[0].restricted([WIND]).families == (WIND,)
    line = cli("reproduce", "figure", "4", "--env", "wind", code=2)
    assert "figure 4a is about walker, found --env wind" in line
    with pytest.raises(UsageError, match="figure 8 is about point, found --env wind"):
        find_items("figure", "8")[0].restricted([WIND])
    assert "unknown task family 'foo'" in cli("reproduce", "figure", "8", "--env", "foo", code=2)


@pytest.mark.parametrize(
    ("families", "parts"),
    [
        (("cheetah-vel",), {"figure 4b": (VEL,)}),
        (("cheetah-vel", "walker"), {"figure 4a": ("walker-2d-params",), "figure 4b": (VEL, "walker-2d-params")}),
    ],
)
def test_the_parts_of_a_figure_that_show_a_family(families, parts, monkeypatch):
    made = {}

    def reproduce(item, *_):
        made[item.name] = item.only
        return SimpleNamespace(files=[], notes=[])

    monkeypatch.setattr("focal.reproduce.reproduce", reproduce)
    cli("reproduce", "figure", "4", *(word for family in families for word in ("--env", family)))
    assert made == parts


def test_settings_tables_need_nothing(folders):
    rows = list(csv.DictReader(saved(cli("reproduce", "table", "4", *folders), folders)[0].read_text().splitlines()))
    named = {row["setting"]: row for row in rows}
    assert named["distance.power"][VEL] == "-2"
    assert named["discount"][POINT] == "0.9"
    files = saved(cli("reproduce", "table", "5", *folders), folders)
    check(files)
    named = {row["setting"]: row for row in csv.DictReader(files[0].read_text().splitlines())}
    assert [named["distance.beta"][loss] for loss in ("inverse-square", "inverse", "linear", "square")] == [
        "1.0", "2.0", "8.0", "16.0",
    ]  # fmt: skip
    assert not folders[1].exists()


def test_figure_8_generates_once_and_then_uses_what_is_there(folders):
    printed = cli("reproduce", "figure", "8", *folders)
    assert "6 tasks of" in printed
    files = saved(printed, folders)
    assert [file.suffix for file in files] == [".png", ".svg", ".json"]
    check(files)
    grounds = json.loads(files[2].read_text())
    collection = open_collection(folders[1] / POINT)
    assert grounds["collections"] == {
        POINT: {"name": collection.name, "content_hash": collection.content_hash, "unlike_scale": []}
    }
    assert (grounds["item"], grounds["scale"], grounds["runs"]) == ("figure 8", "smoke", {})
    assert "torch" in str(grounds["provenance"])
    first = files[1].read_bytes()
    printed = cli("reproduce", "figure", "8", "--env", "point", *folders)
    assert "6 tasks of" not in printed
    assert "figure_8_point.svg" in printed
    printed = cli("reproduce", "figure", "8", *folders)
    assert files[1].read_bytes() == first, "the same data, the same picture"


def test_a_collection_of_another_scale_has_a_folder_beside(make_collection, tmp_path, monkeypatch):
    stores = tmp_path / "stores"
    usual = make_collection(stores / POINT)
    before = (stores / POINT / "dataset.json").read_bytes()
    made = []

    def generate(request, bars):
        made.append((request.path, request.scale))
        return make_collection(request.path, scale=request.scale)

    monkeypatch.setattr("focal.reproduce.generate", generate)
    for _ in range(2):
        found = collection_at(POINT, "laptop", stores, lambda family: nullcontext(), 1)
        assert (found.path, found.scale) == (stores / f"{POINT}-laptop", "laptop")
    assert collection_at(POINT, "smoke", stores, lambda family: nullcontext(), 1).content_hash == usual.content_hash
    assert made == [(stores / f"{POINT}-laptop", "laptop")], "once"
    assert (stores / POINT / "dataset.json").read_bytes() == before


def test_only_seeds_that_have_ended_are_drawn(point_run, tmp_path):
    """`compare` may have been stopped in the midst of more seeds than a figure needs."""
    run_dir = tmp_path / "point"
    shutil.copytree(point_run[3] / "point", run_dir)
    training = Training(POINT, "mixed", "")
    material = Material("smoke", tmp_path, {}, {training: run_dir}, tmp_path)
    assert material.seeds(training) == (0, 1)
    for checkpoint in sorted((run_dir / "seed_1" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert material.seeds(training) == (0,)
    (run_dir / "seed_1" / "diverged.json").write_text("{}")
    assert material.seeds(training) == (0, 1), "as far as it went"


def test_a_collection_of_other_settings_is_used_with_a_note(folders, make_collection, tmp_path):
    path = tmp_path / "stores" / POINT
    collection = make_collection(path)  # says it is of scale smoke
    assert collection.scale == "smoke"
    other = ["--stores", tmp_path / "stores", "-o", tmp_path / "out"]
    before = (path / "dataset.json").read_bytes()
    words = ["reproduce", "figure", "8", *other, "--scale", "smoke", "--json"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert (path / "dataset.json").read_bytes() == before
    assert list(json.loads(result.stdout)) == ["figure 8"]
    assert f"note: figure 8 rests on {path}, which was not made with the settings of --scale smoke: " in result.stderr
    assert json.loads((tmp_path / "out" / "figure_8.json").read_text())["collections"][POINT]["unlike_scale"]


def test_what_this_version_lacks_is_named_before_anything_is_made():
    item = ITEMS["figure 8"]
    missing = dataclasses.replace(item, trainings=(Training(POINT, "mixed", "", algo="gpt"),))
    with pytest.raises(FocalError, match=r"figure 8 needs the method 'gpt', which this version does not have"):
        refuse_unknown(missing, "smoke")
    missing = dataclasses.replace(item, trainings=(Training(POINT, "mixed", "", changes=("warp=9",)),))
    with pytest.raises(FocalError, match=r"needs a setting that this version does not have: unknown setting 'warp'"):
        refuse_unknown(missing, "smoke")
    with pytest.raises(UsageError, match=r"no figure 12 here, expected figure 2a, 2b, 3"):
        find_items("figure", "12")
    assert "which table? for example: focal-cli reproduce table 6" in cli("reproduce", "table", code=2)


def check_matrix(file, stores):
    """Table 6 has a number wherever there are data to train on and to test with, and only there; return how many."""
    numbers = 0
    for row in csv.DictReader(file.read_text().splitlines()):
        collection = open_collection(stores / row["family"])
        trained = collection.tasks_with(row["trained on"], collection.train_tasks())[0]
        for quality in LEVELS:
            tested = collection.tasks_with(quality, collection.test_tasks())[0]
            cell = row[f"{quality} context"]
            assert (cell != "no such data") == bool(trained and tested), (row, quality)
            if cell != "no such data":
                assert np.isfinite(float(cell.split()[0])), cell
                numbers += 1
    return numbers


@pytest.mark.slow
def test_table_6_is_full_where_the_data_have_every_quality(make_collection, tmp_path):
    stores = tmp_path / "stores"
    make_collection(stores / POINT)
    printed = cli("reproduce", "table", "6", "--env", "point", "--scale", "smoke", "--stores", stores, "--runs",
                  tmp_path / "runs", "-o", tmp_path / "out")  # fmt: skip
    assert "saved" in printed
    check([tmp_path / "out" / "table_6_point.csv"])
    assert check_matrix(tmp_path / "out" / "table_6_point.csv", stores) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ITEMS))
def test_every_item_at_smoke(name, folders):
    """In one folder, so that later items use the data and runs of earlier ones, as a user's would."""
    files = saved(cli("reproduce", *name.split(), *folders), folders)
    check(files)
    if name == "table 6":
        assert check_matrix(files[0].with_suffix(".csv"), folders[1]) > 0
