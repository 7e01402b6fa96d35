"""The life of a collection: collect, seal, commit, open, load, relabel; and that any Zarr reader opens it."""

import html
import json
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zarr
from markdown_it import MarkdownIt
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from focal.datasets import (
    CollectionHeader,
    Episodes,
    Quality,
    QualityRule,
    begin_collection,
    commit_collection,
    find_collections,
    is_committed,
    is_sealed,
    list_segments,
    open_collection,
    read_segment,
    relabel_collection,
    seal_task,
    tasks,
    verify_collection,
    write_segment,
)
from focal.datasets.arrays import Layout, array_metadata, decode_array, wanted_chunks, write_array
from focal.datasets.card import dataset_card
from focal.datasets.episodes import PER_EPISODE
from focal.datasets.sources import Folder
from focal.datasets.storage import list_files
from focal.datasets.store import _STORED_NAMES, episode_arrays
from focal.datasets.tasks import inspect_task, store_folder, write_task
from focal.errors import FocalError, UsageError

RULE = QualityRule()


def assert_same(found: Episodes, expected: Episodes, but: tuple[str, ...] = ()) -> None:
    """Bit for bit, types included."""
    left, right = episode_arrays(found), episode_arrays(expected)
    assert left.keys() == right.keys()
    for name in left.keys() - set(but):
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


@pytest.fixture
def begun(tmp_path, make_collection, collection):
    """A collection under way, nothing collected yet; returns its path and header."""
    path = tmp_path / "stores" / "sparse-point-robot"
    begin_collection(path, collection.header)
    return path, collection.header


def test_round_trip_is_bit_for_bit(begun, make_episodes, make_record):
    path, header = begun
    segments = {}
    for index in header.indices:
        goal = (0.6, 0.8)
        segments[index] = [
            make_episodes(goal, skill, 6, sac_step=step, seed=index, terminate_from=4)
            for step, skill in ((2000, 1.0), (0, 0.0), (500, 0.4))  # written out of order, sealed in order
        ]
        for part in segments[index]:
            write_segment(path, index, int(part.sac_steps[0]), part)
        assert list_segments(path, index) == [0, 500, 2000]
        assert_same(read_segment(path, index, 500), segments[index][2])
        seal_task(path, make_record(index, header.split_of(index), goal, header.family), RULE, header.seed)
    committed = commit_collection(path, header, {"software": "test"})
    assert not (path / "staging").exists()
    for opened in (committed, open_collection(path)):
        for index, (last, first, middle) in segments.items():
            loaded = opened.load(index)
            assert_same(loaded, Episodes.concatenate([first, middle, last]), ("episodes/quality", "episodes/heldout"))
            assert loaded.ends.tolist() == [2, 2, 2, 2, 1, 1] * 3
    assert verify_collection(path).episodes == 18 * len(header.indices)


def test_records_and_header_survive_exactly(collection, make_record):
    opened = open_collection(collection.path)
    assert opened.header == collection.header
    goal = opened.task(1).record.params["goal"]
    assert opened.task(1).record == make_record(1, "train", goal, "sparse-point-robot")
    assert (opened.name, opened.version, opened.family, opened.scale) == (
        "sparse-point-robot",
        "1.0.0",
        "sparse-point-robot",
        "smoke",
    )
    assert (opened.observation_dim, opened.action_dim, opened.horizon) == (2, 2, 20)
    assert opened.provenance == {"software": "conftest.py"}


def test_splits_and_counts(collection, make_collection):
    assert [entry.index for entry in collection.train_tasks()] == [0, 1, 2]
    assert [entry.index for entry in collection.test_tasks()] == [3]
    counts = collection.task(0).counts
    assert {name: (count.episodes, count.steps) for name, count in counts.items()} == {
        "random": (20, 400),
        "medium": (10, 200),
        "expert": (10, 200),
        "mixed": (50, 1000),
    }
    both = make_collection(tasks=2, both=True)
    assert [entry.index for entry in both.train_tasks()] == [entry.index for entry in both.test_tasks()] == [0, 1]


def test_load_by_quality_and_part(collection):
    labels = collection.load(0).qualities.reshape(5, 10)
    assert (labels == np.array([[1], [1], [Quality.MEDIUM], [Quality.NONE], [Quality.EXPERT]])).all()
    for quality, steps in (("random", {0, 1000}), ("medium", {2000}), ("expert", {4000})):
        assert set(collection.load(0, quality).sac_steps.tolist()) == steps
    everything = collection.load(0)
    training, heldout = collection.load(0, heldout=False), collection.load(0, heldout=True)
    assert (training.num_episodes, heldout.num_episodes) == (45, 5)
    assert sorted(heldout.sac_steps.tolist()) == [0, 1000, 2000, 3000, 4000], "one episode of every checkpoint"
    assert sorted([*training.seeds, *heldout.seeds]) == sorted(everything.seeds)


def test_heldout_never_reaches_training(collection):
    heldout = {int(seed) for entry in collection.tasks for seed in collection.load(entry.index, heldout=True).seeds}
    for quality in ("random", "medium", "expert", "mixed"):
        loaded = collection.load_training(quality)
        assert [entry.index for entry, _ in loaded] == [0, 1, 2]
        for entry, transitions in loaded:
            expected = collection.load(entry.index, quality, heldout=False)
            assert not heldout & set(expected.seeds.tolist())
            assert transitions.observations.tobytes() == expected.observations.tobytes()
            assert len(transitions.rows) == expected.num_steps


def test_context_of_a_task_that_was_trained_on_is_held_out(collection, make_collection):
    (context,) = collection.load_context("expert", collection.test_tasks())
    assert len(context.rows) == 200, "a test task gives all its episodes"
    both = make_collection(tasks=2, both=True)
    for entry, context in zip(both.tasks, both.load_context("random", both.test_tasks()), strict=True):
        assert context.rewards.tobytes() == both.load(entry.index, "random", heldout=True).rewards.tobytes()
        assert len(context.rows) == 2 * 20


def test_a_task_without_a_level_is_listed_and_skipped(make_collection):
    some = make_collection(tasks=3, unreached=[1])
    have, lack = some.tasks_with("expert", some.train_tasks())
    assert ([entry.index for entry in have], [entry.index for entry in lack]) == ([0], [1])
    assert [entry.index for entry, _ in some.load_training("expert")] == [0]
    assert some.load_context("expert", [some.task(1)]) == [None]
    assert "task 1: return 0.97" in (some.path / "README.md").read_text()
    with pytest.raises(FocalError, match=r"no training task has 'expert' .* random \(1 task\), medium .*--data mixed"):
        some.load_training("expert", [1])
    with pytest.raises(FocalError, match=r"task 1 has no 'expert' episodes, it has random"):
        some.load(1, "expert")


def test_a_strangers_words_are_only_words_in_the_card(collection):
    """As a renderer of Markdown shows it, with HTML allowed, as on the hub."""
    words = [
        "<script>alert(1)</script>", "![seen](https://x.example/seen.png)", "[click](https://x.example)", "`a` | b",
        "fine\n\n# signed by ada (trusted)", "&lt;b&gt;", "<https://x.example>", "\\<img src=x>", "\\\\[a](b)",
        "# Verified by FOCAL", "***", "~~~ x", "- y", "1. x", "2) x", "+ z", "*em* __em__",
    ]  # fmt: skip
    header = replace(collection.header, authors=tuple(word for word in words if word.isprintable()), notes=tuple(words))
    entry = collection.tasks[0]
    tasks = []
    for word in words:
        references = replace(entry.record.references, reached_expert=False, expert_test=word)
        tasks.append(replace(entry, record=replace(entry.record, references=references)))
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(dataset_card(header, tasks))
    assert not re.search(r"<(script|img|a|b|h1)\b(?!>sparse-point-robot 1\.0\.0<)", shown)
    text = html.unescape(re.sub(r"<[^>]*>", "", shown))
    for word in words:
        assert text.count(" ".join(word.split())) >= 2, word
    assert shown.count("<h1>") == 1
    assert not re.search(r"<(em|strong|ol)\b|<li>\s*<(ul|pre|hr)", shown)


def test_misuse_names_what_there_is(collection):
    with pytest.raises(UsageError, match="did you mean 'expert'"):
        collection.load(0, "expret")
    with pytest.raises(FocalError, match="has no task 9, expected one of 0-3"):
        collection.load(9)
    with pytest.raises(FocalError, match="task 3 is a test task and never trained on, expected one of 0-2"):
        collection.load_training("mixed", [3])


def test_evaluation_keeps_every_return(collection):
    steps, returns = collection.load_evaluation(2)
    episodes = collection.load(2)
    assert steps.tolist() == [0, 1000, 2000, 3000, 4000]
    assert returns.shape == (5, 10)
    assert returns.ravel().tolist() == episodes.returns.tolist()


def test_plain_zarr_opens_a_store(collection):
    entry = collection.task(0)
    loaded = episode_arrays(collection.load(0))
    path = collection.path / entry.folder
    groups: list[Any] = [zarr.open_group(path, mode="r"), zarr.open_consolidated(path, zarr_format=3)]
    for group in groups:
        for name, values in loaded.items():
            assert group[name][...].tobytes() == values.tobytes(), name
        assert group.attrs["focal"]["task"]["params"]["goal"] == entry.record.params["goal"]


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8", "u1"])
@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_arrays_are_what_zarr_writes_and_reads(tmp_path, dtype, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    metadata = write_array(tmp_path / "ours", values, chunk_bytes=2 * values.nbytes // 7)
    theirs = zarr.create_array(
        tmp_path / "theirs",
        shape=shape,
        dtype=dtype,
        chunks=(2, *shape[1:]),
        serializer=BytesCodec(endian="little"),
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=values.itemsize), Crc32cCodec()],
    )
    theirs[...] = values
    assert metadata == json.loads((tmp_path / "theirs" / "zarr.json").read_text())
    assert metadata == array_metadata(Layout(shape, values.dtype, 2))
    assert np.array_equal(zarr.open_array(tmp_path / "ours", mode="r")[...], values)
    layout = Layout(shape, values.dtype, 2)
    files = Folder(tmp_path / "theirs").read_many([name for _, name in wanted_chunks(layout)], layout.file_bytes)
    assert decode_array(files, "theirs", layout).tobytes() == values.tobytes()


def test_content_hash_ignores_codec_and_chunks_but_no_digit(tmp_path, make_episodes, make_record, collection):
    episodes, entry = collection.load(0), collection.task(0)

    def written(name, record=entry.record, **codec):
        folder = tmp_path / name / store_folder(0)
        folder.mkdir(parents=True)
        write_task(folder, record, entry.rule, entry.heldout_seeds, episodes, **codec)
        files, source = list_files(folder), Folder(tmp_path / name)
        documents = {file: (folder / file).read_bytes() for file in files if file.endswith("zarr.json")}
        return inspect_task(source, 0, files, documents)

    other = written("other", chunk_bytes=100, compressor="lz4")
    assert other.store.layouts["rewards"].num_chunks > 10
    assert_same(other.store.read_episodes(), episodes)
    assert other.content_hash == entry.content_hash
    goal = list(entry.record.params["goal"])
    goal[0] = float(np.nextafter(goal[0], 1))
    assert written("digit", replace(entry.record, params={"goal": goal})).content_hash != entry.content_hash
    assert written("split", replace(entry.record, split="both")).content_hash != entry.content_hash


def test_same_seed_same_content(collection, make_collection):
    assert make_collection().content_hash == collection.content_hash
    assert make_collection(seed=1).content_hash != collection.content_hash


def test_statistics_describe_and_merge(collection):
    parts = [collection.task(index).store.attributes["statistics"]["observations"] for index in (0, 1)]
    data = [collection.load(index).observations.astype(float) for index in (0, 1)]
    for part, values in zip(parts, data, strict=True):
        np.testing.assert_allclose(part["mean"], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(np.divide(part["m2"], part["count"]), values.var(0), rtol=1e-12)
        assert part["max"] == values.max(0).tolist()
    (n, m), (a, b) = [p["count"] for p in parts], [np.array(p["mean"]) for p in parts]
    m2 = np.array(parts[0]["m2"]) + parts[1]["m2"] + (b - a) ** 2 * n * m / (n + m)
    np.testing.assert_allclose(m2 / (n + m), np.concatenate(data).var(0), rtol=1e-12)


def test_statistics_of_many_columns_are_those_of_each(monkeypatch):
    values = np.random.default_rng(0).normal(3, 2, (50, 7)).astype("f4")
    whole = tasks.statistics(values)
    assert whole["count"] == 50
    np.testing.assert_allclose(whole["m2"], 50 * values.astype(float).var(0), rtol=1e-12)
    for some in (1, 100, 150):
        monkeypatch.setattr(tasks, "_COLUMN_VALUES", some)
        assert tasks.statistics(values) == whole


def test_a_column_that_is_not_there_is_no_absolute_x(tmp_path, make_collection, make_record, make_episodes):
    path = tmp_path / "store" / "tasks" / "task_0000.zarr"
    path.mkdir(parents=True)
    record = replace(make_record(0, "train", (1.0, 0.0), "sparse-point-robot"), absolute_x=2)
    tasks.write_task(path, record, QualityRule(), (0, 0), make_episodes((1.0, 0.0), 0.5))
    source, files = Folder(tmp_path / "store"), {name: (path / name).stat().st_size for name in list_files(path)}
    documents = {name: (path / name).read_bytes() for name in files if name.endswith("zarr.json")}
    with pytest.raises(FocalError, match="absolute_x is 2, of 2 columns"):
        tasks.inspect_task(source, 0, files, documents)


def test_relabel_makes_a_new_version(tmp_path, collection):
    before = list_files(collection.path), collection.content_hash
    rule = QualityRule(medium_low=0.6, medium_target=0.85, medium_high=0.89, heldout_fraction=0.2)
    new = relabel_collection(collection.path, tmp_path / "again", rule)
    assert new.version == "1.1.0"
    assert new.derived_from == (
        {"name": "sparse-point-robot", "version": "1.0.0", "content_hash": collection.content_hash},
    )
    assert new.content_hash != collection.content_hash
    assert set(new.load(0, "medium").sac_steps.tolist()) == {3000}
    assert set(collection.load(0, "medium").sac_steps.tolist()) == {2000}
    assert new.load(0, heldout=True).num_episodes == 10
    assert_same(new.load(0), collection.load(0), ("episodes/quality", "episodes/heldout"))
    assert (list_files(collection.path), open_collection(collection.path).content_hash) == before
    verify_collection(new.path)
    back = relabel_collection(new.path, tmp_path / "back", RULE)
    assert back.version == "1.2.0"
    assert len(back.derived_from) == 2
    assert back.content_hash == collection.content_hash
    with pytest.raises(FocalError, match="exists, expected a new folder"):
        relabel_collection(collection.path, new.path, RULE)
    with pytest.raises(FocalError, match="lies inside"):
        relabel_collection(collection.path, collection.path / "inner", RULE)


def test_policies_are_committed_and_copied(tmp_path, collection, make_collection):
    path = tmp_path / "walks"
    make_collection(path, tasks=2, skills=(0.0, 1.0), commit=False)
    policy = path / "policies" / "task_0000" / "step_000001000.json"
    policy.parent.mkdir(parents=True)
    policy.write_text("{}")
    (policy.parent / ".tmp-left-behind-1").write_text("half")
    header = open_header(path)
    committed = commit_collection(path, header, {})
    assert "policies/task_0000/step_000001000.json" in committed.files
    new = relabel_collection(path, tmp_path / "new", RULE)
    assert (new.path / "policies/task_0000/step_000001000.json").read_text() == "{}"


def open_header(path):
    """The header of a collection under way."""
    return CollectionHeader.from_json(json.loads((path / "staging" / "header.json").read_text()), "header")


def test_a_file_that_is_no_data_is_not_committed(tmp_path, make_collection):
    path = tmp_path / "walks"
    make_collection(path, tasks=2, skills=(0.0, 1.0), commit=False)
    (path / "policies").mkdir()
    (path / "policies" / "agent.pkl").write_text("x")
    with pytest.raises(FocalError, match=r"unexpected file 'policies/agent.pkl'.*delete it"):
        commit_collection(path, open_header(path), {})
    assert not is_committed(path)


def test_commit_refuses_another_header(tmp_path, make_collection):
    path = tmp_path / "walks"
    make_collection(path, tasks=2, skills=(0.0, 1.0), episodes=2, commit=False)
    with pytest.raises(FocalError, match=r"begun with other settings: licence is 'CC-BY-4.0' there and 'MIT' here"):
        commit_collection(path, replace(open_header(path), licence="MIT"), {})
    assert not is_committed(path)


def test_begin_refuses_another_header_and_a_complete_collection(begun, tmp_path, collection):
    path, header = begun
    begin_collection(path, header)  # the same again is a resume
    with pytest.raises(
        FocalError, match=r"seed is 0 there and 5 here; .*--env sparse-point-robot --scale smoke --seed 0"
    ):
        begin_collection(path, replace(header, seed=5))
    with pytest.raises(FocalError, match=r"scale is 'smoke' there and 'paper' here \(and 1 more\)"):
        begin_collection(path, replace(header, settings={**header.settings, "episodes": 3}, scale="paper"))
    with pytest.raises(FocalError, match=r"settings.episodes is 10 there and 3 here; choose"):
        begin_collection(path, replace(header, settings={**header.settings, "episodes": 3}))
    with pytest.raises(FocalError, match="is complete and never changed"):
        begin_collection(collection.path, collection.header)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FocalError, match=r"holds '.*', expected a new or empty folder"):
        begin_collection(tmp_path, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../evil"}, "name is '../evil'"),
        ({"version": "1.0"}, "version is '1.0'"),
        ({"authors": ("a\nb",)}, "author is"),
        ({"seed": -1}, "seed is -1"),
        ({"train": (0, 0)}, "train tasks are"),
        ({"train": (), "test": ()}, "without tasks"),
    ],
)
def test_headers_are_checked(collection, change, message):
    with pytest.raises(UsageError, match=message):
        replace(collection.header, **change)


def test_segments_are_kept_and_checked(begun, make_episodes):
    path, _ = begun
    first = make_episodes((1, 0), 0.5, 3, sac_step=500)
    write_segment(path, 0, 500, first)
    write_segment(path, 0, 500, make_episodes((1, 0), 1.0, 3, sac_step=500))
    assert_same(read_segment(path, 0, 500), first)
    with pytest.raises(FocalError, match=r"sac_steps \[500, 500, 500\], expected 600"):
        write_segment(path, 0, 600, first)
    stale = path / "staging" / "task_0000" / ".tmp-ckpt_000000700.npz-99"
    stale.write_text("half")
    assert list_segments(path, 0) == [500]
    assert not stale.exists()
    assert list_segments(path, 1) == []


def test_a_damaged_segment_tells_to_delete_it(begun, make_episodes, make_record):
    path, header = begun
    write_segment(path, 0, 0, make_episodes((1, 0), 0.5, 3))
    segment = path / "staging" / "task_0000" / "ckpt_000000000.npz"
    data = segment.read_bytes()
    for broken in (data[:-100], data[:600] + bytes([data[600] ^ 1]) + data[601:], b""):
        segment.write_bytes(broken)
        with pytest.raises(FocalError, match=r"ckpt_000000000.npz is damaged .*delete it and run .*data generate"):
            seal_task(path, make_record(0, "train", (1, 0), header.family), RULE, 0)
        assert not is_sealed(path, 0)


def test_seal_refuses_what_contradicts_the_header(begun, make_episodes, make_record):
    path, header = begun
    with pytest.raises(FocalError, match="task 0 has no segments to seal"):
        seal_task(path, make_record(0, "train", (1, 0), header.family), RULE, 0)
    with pytest.raises(FocalError, match=r"task 0 is a test task of .*, expected a train task"):
        seal_task(path, make_record(0, "test", (1, 0), header.family), RULE, 0)
    with pytest.raises(FocalError, match="task 8 is not among the collection's tasks 0-3"):
        seal_task(path, make_record(8, "train", (1, 0), header.family), RULE, 0)
    write_segment(path, 0, 0, make_episodes((1, 0), 0.5, 3))
    record = make_record(0, "train", (1, 0), header.family)
    for params in ({"goal": [float("nan")]}, {"goal": "north"}, {"goal": [np.float32(1)]}):
        with pytest.raises(FocalError, match=r"task 0: (its record is not plain JSON|params is)"):
            seal_task(path, replace(record, params=params), RULE, 0)
    with pytest.raises(
        FocalError, match=r"4 of 4 tasks are not sealed \(first: 0\); finish them: focal-cli data generate"
    ):
        commit_collection(path, header, {})


def test_a_sealed_task_is_never_touched(begun, make_episodes, make_record):
    path, header = begun
    write_segment(path, 0, 0, make_episodes((1, 0), 0.5, 3))
    record = make_record(0, "train", (1, 0), header.family)
    seal_task(path, record, RULE, 0)
    before = {name: (path / store_folder(0) / name).stat().st_mtime_ns for name in list_files(path / store_folder(0))}
    write_segment(path, 0, 100, make_episodes((1, 0), 0.5, 3, sac_step=100))
    seal_task(path, record, RULE, 0)
    assert before == {name: (path / store_folder(0) / name).stat().st_mtime_ns for name in before}


def test_find_collections(tmp_path, collection):
    assert find_collections(tmp_path / "nowhere") == []
    for name in ("b", "a"):
        shutil.copytree(collection.path, tmp_path / name)
    (tmp_path / "c").mkdir()
    assert find_collections(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_every_episode_field_is_stored():
    assert _STORED_NAMES.keys() == PER_EPISODE.keys()
