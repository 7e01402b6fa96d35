"""Round trips: what is exported and imported again is the same data, and other readers see what they should."""

import json
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from focal.cli import main
from focal.datasets import (
    CollectionHeader,
    End,
    QualityRule,
    begin_collection,
    commit_collection,
    find_collections,
    open_collection,
    seal_task,
    verify_collection,
    write_segment,
)
from focal.datasets.exporting import export_collection
from focal.datasets.foreign import RESTATED, FamilyFacts, ImportTask
from focal.datasets.importing import ImportRequest, import_collection, list_tasks
from focal.datasets.store import episode_arrays
from focal.errors import DiskFullError, FocalError, UsageError

FORMATS = ("minari", "d4rl")
POINT = FamilyFacts("sparse-point-robot", "focal/SparsePointRobot-v0", 20, 2, 2, None, False, ("sparse_reward",))


def request_of(source, form, path, facts=POINT, **changes):
    tasks = [ImportTask(task, task.exported.record.params, task.exported.record.split)
             for task in list_tasks(source, form)]  # fmt: skip
    return ImportRequest(source, form, path, facts, tuple(tasks), **{"licence": "CC-BY-4.0", **changes})


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


def assert_same(found, expected):
    """Every array of every task, bit for bit, and everything that is said about the tasks."""
    assert found.content_hash == expected.content_hash
    for ours, theirs in zip(found.tasks, expected.tasks, strict=True):
        assert ours.record == theirs.record
        assert (ours.rule, ours.heldout_seeds, ours.labels) == (theirs.rule, theirs.heldout_seeds, theirs.labels)
        assert ours.counts == theirs.counts
        arrays, others = (episode_arrays(entry.store.read_episodes()) for entry in (ours, theirs))
        for name, values in arrays.items():
            assert values.dtype == others[name].dtype
            assert np.array_equal(values, others[name]), name
    fields = (
        "name",
        "family",
        "version",
        "licence",
        "authors",
        "seed",
        "tasks_from",
        "scale",
        "settings",
        "train",
        "test",
    )
    for field in fields:
        assert getattr(found.header, field) == getattr(expected.header, field), field


@pytest.fixture(scope="module")
def varied(tmp_path_factory, make_episodes, make_record):
    """A collection with every kind of end, one task for training and test, infos that differ in sign, odd numbers."""
    path = tmp_path_factory.mktemp("varied") / "walks.of-all kinds".replace(" ", "_")
    header = CollectionHeader(
        name=path.name, family="sparse-point-robot", authors=("Ada Lovelace", "Émilie du Châtelet"), seed=3,
        tasks_from="seed", scale="smoke", settings={"a": {"b": [1, 2.5]}}, train=(0, 7), test=(2, 7),
    )  # fmt: skip
    begin_collection(path, header)
    for index in header.indices:
        goal = (0.6, 0.8 - index / 100)
        for step, skill in ((0, 0.0), (1000, 0.4), (2000, 1.0)):
            walks = make_episodes(goal, skill, 6, sac_step=step, seed=index, terminate_from=4)
            ends = walks.ends.copy()
            ends[2] = End.CUT
            write_segment(path, index, step, replace(walks, ends=ends))
        record = make_record(index, header.split_of(index), goal, header.family, index != 2)
        seal_task(path, record, QualityRule(heldout_fraction=0.3), 3)
    return commit_collection(path, header, {"software": "this test"})


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_is_exact(form, varied, tmp_path):
    losses = export_collection(varied, form, tmp_path / "out")
    assert any("9 episodes that the collector cut short are marked as truncated" in loss for loss in losses)
    back = import_collection(request_of(tmp_path / "out", form, tmp_path / "back"))
    assert_same(back, varied)
    verify_collection(tmp_path / "back")
    assert back.derived_from == ({"name": varied.name, "version": "1.0.0", "content_hash": varied.content_hash},)
    assert not back.header.notes, "nothing is lost, so there is nothing to say"


def test_rewards_changed_outside_give_other_returns(varied, tmp_path):
    """What was edited after the export imports as data that verify, and the card says so."""
    export_collection(varied, "d4rl", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "task_0000.hdf5", "r+") as file:
        file["rewards"][:] = file["rewards"][:] / 2
    back = import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back"))
    verify_collection(back)
    assert np.allclose(back.load(0).returns, varied.load(0).returns / 2, atol=1e-5)
    assert f"{RESTATED}: {varied.load(0).num_episodes}" in back.header.notes


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_of_data_without_infos_and_labels(form, make_collection, tmp_path):
    collection = make_collection(tmp_path / "plain", sparse=False, episodes=3, tasks=2, unreached=(0, 1))
    export_collection(collection, form, tmp_path / "out")
    facts = replace(POINT, infos=())
    assert_same(import_collection(request_of(tmp_path / "out", form, tmp_path / "back", facts)), collection)


@pytest.mark.parametrize("form", FORMATS)
def test_a_round_trip_of_a_round_trip(form, varied, tmp_path):
    export_collection(varied, form, tmp_path / "1")
    once = import_collection(request_of(tmp_path / "1", form, tmp_path / "once"))
    export_collection(once, form, tmp_path / "2")
    twice = import_collection(request_of(tmp_path / "2", form, tmp_path / "twice"))
    assert_same(twice, varied)
    assert len(twice.derived_from) == 2


def test_minari_reads_the_export(varied, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    export_collection(varied, "minari", tmp_path / "out")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "out"))
    local = minari.list_local_datasets()
    assert sorted(local) == [f"focal/walks_of-all_kinds-task000{index}-v0" for index in (0, 2, 7)]
    for entry in varied.tasks:
        dataset = minari.load_dataset(f"focal/walks_of-all_kinds-task{entry.index:04d}-v0")
        episodes = entry.store.read_episodes()
        assert (dataset.total_episodes, dataset.total_steps) == (episodes.num_episodes, episodes.num_steps)
        assert dataset.observation_space.shape == (2,)
        assert dataset.action_space.low.tolist() == [-1, -1]
        assert dataset.storage.metadata["author"] == {"Ada Lovelace", "Émilie du Châtelet"}
        step = row = 0
        for number, episode in enumerate(dataset.iterate_episodes()):
            length = episodes.lengths[number]
            assert np.array_equal(episode.observations, episodes.observations[row : row + length + 1])
            assert np.array_equal(episode.actions, episodes.actions[step : step + length])
            assert np.array_equal(episode.rewards, episodes.rewards[step : step + length])
            sparse = episode.infos["sparse_reward"]
            assert np.isnan(sparse[0]), "nothing was rewarded at the reset"
            assert np.array_equal(sparse[1:], episodes.infos["sparse_reward"][step : step + length])
            terminated = episodes.ends[number] == End.TERMINATED
            assert episode.terminations.tolist() == [False] * (length - 1) + [terminated]
            assert episode.truncations.tolist() == [False] * (length - 1) + [not terminated]
            step, row = step + length, row + length + 1
        metadata = list(dataset.storage.get_episode_metadata(range(episodes.num_episodes)))
        assert [one["seed"] for one in metadata] == episodes.seeds.tolist()
        assert [one["quality"] for one in metadata] == episodes.qualities.tolist()


def test_d4rl_readers_see_transitions(varied, tmp_path):
    """A file as d4rl.qlearning_dataset reads it, and timeouts where an episode ends without a terminal."""
    export_collection(varied, "d4rl", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "task_0000.hdf5", "task_0002.hdf5", "task_0007.hdf5",
    ]  # fmt: skip
    episodes = varied.load(2)
    steps = episodes.transitions()
    with h5py.File(tmp_path / "out" / "task_0002.hdf5") as file:
        assert np.array_equal(file["observations"][()], episodes.observations[steps.rows])
        assert np.array_equal(file["next_observations"][()], episodes.observations[steps.rows + 1])
        assert np.array_equal(file["terminals"][()], steps.terminated)
        last = np.cumsum(episodes.lengths) - 1
        assert np.flatnonzero(file["timeouts"][()] | file["terminals"][()]).tolist() == last.tolist()
        assert not (file["timeouts"][()] & file["terminals"][()]).any()
        assert file["rewards"].shape == (episodes.num_steps,)


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_says_what_it_cannot_carry(form, varied, tmp_path):
    out = cli("data", "export", varied.path, "--format", form, "-o", tmp_path / "out")
    assert f"{tmp_path / 'out'}: exported as {form}" in out
    assert "not carried: readers other than focal-cli see no" in out
    assert "not carried: 9 episodes that the collector cut short" in out
    line = cli("data", "export", varied.path, "--format", form, "-o", tmp_path / "out", code=1)
    assert "exists, expected a new folder" in line
    back = cli("data", "import", tmp_path / "out", "--format", form, "--env", "point", "--licence", "cc-by-4.0",
               "-o", tmp_path / "back")  # fmt: skip
    assert varied.content_hash[:12] in back
    assert open_collection(tmp_path / "back").content_hash == varied.content_hash


def test_policies_stay_behind_and_that_is_said(make_collection, tmp_path):
    path = tmp_path / "with-policy"
    make_collection(path, commit=False, tasks=2)
    policy = path / "policies" / "task_0000" / "step_000000000.safetensors"
    policy.parent.mkdir(parents=True)
    policy.write_bytes(b"weights")
    header = CollectionHeader.from_json(json.loads((path / "staging" / "header.json").read_text()), "header")
    collection = commit_collection(path, header, {})
    assert "the 1 behaviour policies stay behind" in export_collection(collection, "d4rl", tmp_path / "out")[-1]


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_data_are_not_exported(form, make_collection, tmp_path):
    collection = make_collection(tmp_path / "source")
    chunk = next((tmp_path / "source" / "tasks" / "task_0002.zarr" / "rewards" / "c").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(FocalError, match="array rewards"):
        export_collection(collection, form, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], "nothing half-made is left"


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk(form, varied, tmp_path, monkeypatch):
    from focal.datasets import d4rl, minari

    def full(path, data, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr({"d4rl": d4rl, "minari": minari}[form], "write_file", full)
    with pytest.raises(DiskFullError, match="disk full while writing"):
        export_collection(varied, form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("number", [0, 100, "rename"])
def test_a_killed_import_leaves_nothing_that_opens(form, make_collection, tmp_path, number):
    """The process dies at a flush to the disk, or just before the last rename; the same command again succeeds."""
    collection = make_collection()
    export_collection(collection, form, tmp_path / "source")
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from focal.tests.test_datasets_exporting import import_collection, request_of\n"
        "count = 0\n"
        "def dying(*arguments, flush=os.fsync):\n"
        "    global count\n"
        f"    if count == {number!r}: os._exit(9)\n"
        "    count += 1\n"
        "    flush(*arguments)\n"
        "os.fsync = dying\n"
        f"if {number!r} == 'rename': os.rename = lambda *arguments: os._exit(9)\n"
        f"import_collection(request_of(Path('source'), {form!r}, Path('out')))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    left = [path.name for path in tmp_path.iterdir() if path.name != "source"]
    assert "out" not in left
    assert len(left) == 1
    assert left[0].startswith(".tmp-out-")
    assert not find_collections(tmp_path)
    assert_same(import_collection(request_of(tmp_path / "source", form, tmp_path / "out")), collection)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# ---- exports that were changed on the way ----


def change_episode(folder, form, change):
    """Apply `change(table)` to the exported quality, held-out mark and end of the first episode of task 0."""
    if form == "d4rl":
        with h5py.File(folder / "task_0000.hdf5", "a") as file:
            change(lambda name, value: file[f"focal/episodes/{name}"].__setitem__(0, value))
    else:
        with h5py.File(next(folder.rglob("*task0000-v0/data/main_data.hdf5")), "a") as file:
            change(lambda name, value: file["episode_0"].attrs.modify(name, np.uint8(value)))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "value"), [("quality", 3), ("heldout", 1)])
def test_levels_changed_outside_are_kept_as_given(form, varied, tmp_path, name, value):
    """They no longer follow from the rule, and are not passed off as if they did."""
    export_collection(varied, form, tmp_path / "out")
    changed = 1 - value if varied.load(0).heldout[0] == value and name == "heldout" else value
    change_episode(tmp_path / "out", form, lambda set_: set_(name, changed))
    back = import_collection(request_of(tmp_path / "out", form, tmp_path / "back"))
    assert [entry.labels for entry in back.tasks] == ["given", "scores", "scores"]
    field = {"quality": "qualities", "heldout": "heldout"}[name]
    assert getattr(back.load(0), field)[0] == changed
    assert "exported tasks whose levels or held-out marks were changed since: 1" in back.header.notes
    verify_collection(tmp_path / "back")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "value", "message"), [("quality", 9, "qualities has 9"), ("end", 0, "ends has 0")])
def test_impossible_values_are_refused(form, varied, tmp_path, name, value, message):
    export_collection(varied, form, tmp_path / "out")
    change_episode(tmp_path / "out", form, lambda set_: set_(name, value))
    with pytest.raises(FocalError, match=message):
        import_collection(request_of(tmp_path / "out", form, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def edit_document(folder, change):
    """Change the export document of every Minari data set in `folder`."""
    for path in folder.rglob("metadata.json"):
        metadata = json.loads(path.read_text())
        change(metadata["focal"])
        path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="focal-export/9"), "found format 'focal-export/9', expected 'focal-export/1'"),
        (lambda d: d["task"].update(env_id="os:system"), "env_id is 'os:system'"),
        (lambda d: d["task"].update(env_id="focal/X-v0"), "the data are of sparse-point-robot in focal/X-v0"),
        (lambda d: d["task"].update(family="walker"), "the data are of walker in focal/SparsePointRobot-v0"),
        (lambda d: d["task"].update(params={"goal": "x"}), "params is"),
        (lambda d: d["task"].update(horizon=3), "has an episode of .* steps, expected at most its horizon, 3"),
        (
            lambda d: d["task"].update(absolute_x=1),
            "has its absolute x in column 1, expected None of sparse-point-robot",
        ),
        (lambda d: d["quality"].update(labels="guessed"), "labels are 'guessed'"),
        (lambda d: d["quality"].update(heldout_seeds=[-1]), "heldout_seeds are"),
        (
            lambda d: d["quality"].update(heldout_seeds=[-1] * 10**6),
            r"heldout_seeds are \([-1, ]{79}, expected 0 or more$",
        ),
        (lambda d: d.update(infos=[".."]), "expected sorted lower-case names"),
        (lambda d: d.update(infos=["x_velocity"]), "has no 'x_velocity'"),
        (lambda d: d["task"].update(index=d["task"]["index"] + 10**9), "train tasks are"),
        (lambda d: d["task"].update(index=0), "has 3 tasks of 1 numbers"),
        (lambda d: d["collection"].update(name="../x"), "collection name is '../x'"),
        (lambda d: d["collection"].update(derived_from="x"), "'derived_from' is 'x'"),
        (lambda d: d.pop("collection"), "'collection' is missing"),
    ],
)
def test_hostile_documents(varied, tmp_path, change, message):
    export_collection(varied, "minari", tmp_path / "out")
    edit_document(tmp_path / "out", change)
    with pytest.raises((FocalError, UsageError), match=message):
        import_collection(request_of(tmp_path / "out", "minari", tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_licence_is_not_changed_by_a_round_trip(varied, tmp_path):
    export_collection(varied, "d4rl", tmp_path / "out")
    with pytest.raises(UsageError, match=r"licensed under CC-BY-4\.0, found --licence CC0-1\.0"):
        import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back", licence="CC0-1.0"))
    with pytest.raises(UsageError, match="levels of its own, found --label expert"):
        import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back", label="expert"))
    other = replace(POINT, name="half-cheetah-vel", env_id="focal/HalfCheetahVel-v0")
    with pytest.raises(UsageError, match="expected half-cheetah-vel in focal/HalfCheetahVel-v0"):
        import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back", other))


def test_exports_of_two_collections_in_one_folder(varied, make_collection, tmp_path):
    export_collection(varied, "d4rl", tmp_path / "out")
    export_collection(make_collection(), "d4rl", tmp_path / "other")
    (tmp_path / "other" / "task_0001.hdf5").rename(tmp_path / "out" / "task_0001.hdf5")
    with pytest.raises(FocalError, match="mixes exports of different collections"):
        import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back"))


def test_some_tasks_of_an_export(varied, tmp_path):
    export_collection(varied, "d4rl", tmp_path / "out")
    (tmp_path / "out" / "task_0002.hdf5").unlink()
    back = import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back"))
    assert [entry.index for entry in back.tasks] == [0, 7]
    assert [entry.split for entry in back.tasks] == ["train", "both"]
    assert back.content_hash != varied.content_hash


def test_an_export_with_episodes_removed_is_refused(varied, tmp_path):
    export_collection(varied, "d4rl", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "task_0000.hdf5", "a") as file:
        file["timeouts"][:] = False
    with pytest.raises(FocalError, match=r"lists 18 episodes, expected \d+ as in terminals and timeouts"):
        import_collection(request_of(tmp_path / "out", "d4rl", tmp_path / "back"))
