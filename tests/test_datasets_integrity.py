"""Every fault ends in one line that names the thing and the next command, before anything large is allocated.

Accidents are done to the files alone. A hostile author signs the lie: `resign` makes dataset.json agree with it.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc

from focal.datasets import (
    CollectionHeader,
    QualityRule,
    begin_collection,
    commit_collection,
    open_collection,
    seal_task,
    store,
    tasks,
    verify_collection,
    write_segment,
)
from focal.datasets.opening import document_hash
from focal.datasets.storage import file_hash, list_files, read_bytes
from focal.errors import FocalError

NEXT_COMMAND = "focal-cli bundle unpack|focal-cli data generate|delete it|focal-cli data list"


@pytest.fixture(scope="module")
def pristine(make_collection) -> Path:
    """A small complete collection: two tasks, three checkpoints."""
    return make_collection(tasks=2, skills=(0.0, 0.4, 1.0), episodes=4).path


@pytest.fixture
def path(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "walks"))


def refused(call: Callable[[], object]) -> str:
    """The message of the refusal, which must be one line that ends in a next command."""
    with pytest.raises(FocalError, match=NEXT_COMMAND) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def resign(path: Path) -> None:
    """Make dataset.json list the files as they are now, as a hostile author would."""

    def sign(document: dict) -> None:
        files = list_files(path, skip=("dataset.json",))
        document["files"] = {name: {"bytes": size, "sha256": file_hash(path / name)} for name, size in files.items()}
        document["document_hash"] = document_hash(document)

    edit(path / "dataset.json", sign)


def set_nested(document: Any, dotted: str, value: object) -> None:
    """Assign to `a.b.0.c`."""
    *parents, last = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    for part in parents:
        document = document[part]
    document[last] = value


STORE = "tasks/task_0001.zarr"


# ---- accidents ----


def test_pristine_verifies_and_reports_progress(pristine):
    seen: list[tuple[int, int]] = []
    report = verify_collection(pristine, lambda done, total: seen.append((done, total)))
    assert (report.episodes, report.transitions) == (24, 480)
    assert report.files == len(list_files(pristine)) - 1
    assert report.bytes == sum(list_files(pristine, skip=("dataset.json",)).values())
    assert seen == sorted(seen)
    assert seen[-1] == (2 * report.bytes, 2 * report.bytes)


def test_truncated_chunk(path):
    chunk = path / STORE / "observations/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    assert f"'{STORE}/observations/c/0/0' has" in refused(lambda: open_collection(path))


def test_missing_chunk(path):
    (path / STORE / "rewards/c/0").unlink()
    assert f"'{STORE}/rewards/c/0' is missing" in refused(lambda: open_collection(path))
    resign(path)
    assert "task 1, array rewards: chunk 0 of 1 is missing" in refused(lambda: open_collection(path))


def test_flipped_byte_in_every_array(path):
    collection = open_collection(path)
    for name in collection.task(1).store.layouts:
        chunk = next(file for file in sorted((path / STORE / name / "c").rglob("*")) if file.is_file())
        data = chunk.read_bytes()
        for position in (0, 5, len(data) // 2, len(data) - 1):  # blosc version, decoded size, content, checksum
            chunk.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
            message = refused(lambda: verify_collection(path))
            assert f"(task 1, array {name}, chunk 0) is damaged" in message
            if name.startswith("evaluation/"):
                message = refused(lambda: collection.load_evaluation(1))
            else:
                message = refused(lambda: collection.load(1))
            assert f"task 1, array {name}: chunk 0 is damaged" in message
        chunk.write_bytes(data)
    verify_collection(path)


def test_flipped_digit_in_a_task_parameter(path):
    file = path / STORE / "zarr.json"
    goal = json.loads(file.read_text())["attributes"]["focal"]["task"]["params"]["goal"]
    text = repr(goal[0])
    digit = text[-1]
    file.write_text(file.read_text().replace(text, text[:-1] + str((int(digit) + 1) % 10)))
    assert f"{STORE}/zarr.json was changed" in refused(lambda: open_collection(path))
    resign(path)
    assert "task 1 is not the one dataset.json lists" in refused(lambda: open_collection(path))


def test_flipped_digit_in_the_document(path):
    text = (path / "dataset.json").read_text()
    (path / "dataset.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "dataset.json was changed after it was written" in refused(lambda: open_collection(path))


def test_wrong_format_version(path):
    edit(path / "dataset.json", lambda document: document.update(format="focal-collection/2"))
    assert "found format 'focal-collection/2', expected 'focal-collection/1'" in refused(lambda: open_collection(path))


def test_wrong_task_format_version(path):
    edit(path / STORE / "zarr.json", lambda d: set_nested(d, "attributes.focal.format", "focal-task/9"))
    resign(path)
    assert "task 1: found format 'focal-task/9', expected 'focal-task/1'" in refused(lambda: open_collection(path))


@pytest.mark.parametrize("name", ["notes.txt", f"{STORE}/rewards/c/1", "tasks/task_0007.zarr/zarr.json", "a\nb"])
def test_extra_file(path, name):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("{}")
    assert f"extra file {name!r}" in refused(lambda: open_collection(path))
    resign(path)
    refused(lambda: open_collection(path))


@pytest.mark.parametrize("name", [f"{STORE}/rewards/c/0", "README.md", f"{STORE}/infos"])
def test_symbolic_link(path, name, tmp_path):
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name!r} is a symbolic link" in refused(lambda: open_collection(path))


def test_interrupted_collection(tmp_path, make_collection):
    walks = tmp_path / "my stores" / "walks"
    make_collection(walks, tasks=2, skills=(0.0, 1.0), commit=False, episodes=2)
    message = refused(lambda: open_collection(walks))
    assert "is an interrupted collection (dataset.json is missing)" in message
    command = message[message.index("focal-cli data generate") :]
    assert command.startswith(
        "focal-cli data generate --env sparse-point-robot --scale smoke --seed 0 --tasks-from seed"
    )
    assert f"--author 'Ada Lovelace' --set episodes=2 --set skills=0.0,1.0 -o '{walks}'" in command


def test_document_lost(path):
    (path / "dataset.json").unlink()
    assert "has tasks but no dataset.json" in refused(lambda: open_collection(path))


def test_what_is_no_collection_at_all(tmp_path):
    assert "no collection at" in refused(lambda: open_collection(tmp_path / "nothing"))
    assert "so it is no collection" in refused(lambda: open_collection(tmp_path))
    (tmp_path / "x.focal.zip").write_text("zip")
    message = refused(lambda: open_collection(tmp_path / "x.focal.zip"))
    assert "is a file, expected a collection's folder; unpack it: focal-cli bundle unpack" in message


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"a": NaN}', '{"a": 1e999}', '{"a": 1%s}' % ("0" * 400), "[" * 100000, "\xff",
        '{"a":' * 40 + "1" + "}" * 40, '{"a": 1, "b": [{"c": 1, "d": 2, "c": 1}]}',
    ],
)  # fmt: skip
def test_unreadable_document(path, text):
    (path / "dataset.json").write_text(text, encoding="latin-1")
    assert "dataset.json is not readable JSON" in refused(lambda: open_collection(path))


# ---- hostile authors ----


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("shape", [10**9], "array rewards: found shape [1000000000], expected [240]"),
        ("data_type", "float64", "found data_type 'float64', expected 'float32'"),
        ("data_type", {"name": "struct"}, "found data_type"),
        ("fill_value", 1.0, "found fill_value 1.0"),
        ("chunk_grid.configuration.chunk_shape", [10**9], "found chunk rows 1000000000, expected 1 to 240"),
        ("chunk_grid.configuration.chunk_shape", [0], "found chunk rows 0"),
        ("chunk_grid.configuration.chunk_shape", [True], "found chunk rows True"),
        ("chunk_grid.name", "rectilinear", "found chunk_grid"),
        ("chunk_key_encoding.name", "v2", "found chunk_key_encoding"),
        ("codecs.1.name", "pickle", "found codecs ['bytes', 'pickle', 'crc32c'], expected bytes, blosc, crc32c"),
        ("codecs.1.configuration.cname", "snappy", "found blosc settings"),
        ("codecs.0.configuration.endian", "big", "found byte order"),
        ("codecs", [{"name": "bytes"}], "found codecs ['bytes']"),
        ("codecs", "blosc", "found codecs ['blosc']"),
        ("storage_transformers", [{"name": "evil"}], "found storage_transformers"),
        ("zarr_format", 2, "found zarr_format 2"),
        ("attributes", {"x": 1}, "found attributes"),
        ("must_run", "rm", "found must_run 'rm', expected None"),
    ],
)
def test_hostile_array_metadata(path, dotted, value, message):
    edit(path / STORE / "rewards/zarr.json", lambda document: set_nested(document, dotted, value))
    resign(path)
    assert message in refused(lambda: open_collection(path))


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("sizes.steps", 10**9, "'steps' is 1000000000, expected 12 to 100000000"),
        ("sizes.steps", 241, "array observations: found shape [252, 2], expected [253, 2]"),
        ("sizes.episodes", 0, "'episodes' is 0"),
        ("sizes.observation_dim", -1, "'observation_dim' is -1"),
        ("sizes.rollouts", "4", "'rollouts' is '4', expected a whole number"),
        ("infos", ["../x"], "infos is"),
        ("infos", [], "extra file 'infos/"),
        ("infos", ["sparse_reward", "x_velocity"], "array infos/x_velocity is missing"),
        ("task.index", 0, "its attributes say task 0, expected 1"),
        ("task.split", "train", "task 1 is a train task of sparse-point-robot, expected a test task"),
        ("task.family", "walker", "task 1 is a test task of walker"),
        ("task.params", {"goal": "__import__('os')"}, "expected numbers or lists of numbers only"),
        ("task.horizon", 0, "'horizon' is 0"),
        ("task.references.expert_returns", [], "references have 20 random and 0 expert returns"),
        ("quality.labels", "guessed", "labels are 'guessed' with 20 reference returns"),
        ("quality.rule", {"random_below": 0.1}, "quality rule has"),
        ("quality.rule.random_below", 0.6, "quality thresholds are"),
        ("quality.heldout_seeds", [-1], "heldout_seeds are (-1,)"),
        ("counts.random.steps", 1, "counts add up to"),
        ("content", {}, "content hashes are not those of its arrays"),
        ("content.rewards", "0" * 64, "task 1 is not the one dataset.json lists"),
    ],
)
def test_hostile_task_attributes(path, dotted, value, message):
    edit(path / STORE / "zarr.json", lambda document: set_nested(document, f"attributes.focal.{dotted}", value))
    resign(path)
    assert message in refused(lambda: open_collection(path))


@pytest.mark.parametrize(
    ("name", "key"),
    [("dataset.json", "licence"), (f"{STORE}/zarr.json", "attributes"), (f"{STORE}/rewards/zarr.json", "shape")],
)
def test_a_key_twice(path, name, key):
    """Two readers of such a file may see two licences, or two shapes."""
    (path / name).write_text((path / name).read_text().replace("{", f'{{"{key}": "CC0-1.0",', 1))
    if name != "dataset.json":
        resign(path)
    assert f"is not readable JSON (the key {key!r} is there twice)" in refused(lambda: open_collection(path))


def test_a_rule_of_before_the_first_checkpoint_had_a_cut_of_its_own(path):
    edit(
        path / STORE / "zarr.json",
        lambda document: document["attributes"]["focal"]["quality"]["rule"].pop("first_random_below"),
    )
    resign(path)
    collection = open_collection(path)
    assert collection.tasks[1].rule == QualityRule(first_random_below=0.1)
    verify_collection(collection)


def test_consolidated_metadata_must_agree(path):
    change = "consolidated_metadata.metadata.rewards.shape"
    edit(path / STORE / "zarr.json", lambda document: set_nested(document, change, [10**9]))
    resign(path)
    assert "the consolidated metadata differ" in refused(lambda: open_collection(path))


@pytest.mark.parametrize("name", ["policies/task_0000/agent.pkl", "policies/run.py", "tasks/task_0000.zarr/evil.so"])
def test_listed_files_must_be_data(path, name):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("x")
    resign(path)
    assert name in refused(lambda: open_collection(path))


def test_a_great_claim_that_agrees_with_itself_is_refused_before_allocating(path):
    """10^8 rows in every array of one store, chunk files and all: 800 MB of observations in 8 kB."""
    rows, chunk_rows = 10**8, 2**23
    store = path / STORE
    edit(store / "zarr.json", lambda d: set_nested(d, "attributes.focal.sizes.steps", rows))
    edit(store / "zarr.json", lambda d: set_nested(d, "attributes.focal.counts.random.steps", rows - 160))
    edit(store / "zarr.json", lambda d: d.pop("consolidated_metadata"))
    for name, width in (("observations", 2), ("actions", 2), ("rewards", 1), ("infos/sparse_reward", 1)):
        total = rows + 12 * (name == "observations")
        shape = [total, width] if width > 1 else [total]
        edit(store / name / "zarr.json", partial(set_nested, dotted="shape", value=shape))
        grid = [chunk_rows, width] if width > 1 else [chunk_rows]
        edit(store / name / "zarr.json", partial(set_nested, dotted="chunk_grid.configuration.chunk_shape", value=grid))
        for chunk in range(-(-total // chunk_rows)):
            file = store / name / f"c/{chunk}" / ("0" if width > 1 else "")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"\0" * 24)
    resign(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(lambda: open_collection(path))
    assert "claim to decode to 2400000" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_a_claim_of_many_tiny_chunks_is_refused_at_the_first_missing_one(path):
    store, rows = path / STORE, 10**8
    edit(store / "zarr.json", lambda d: set_nested(d, "attributes.focal.sizes.steps", rows))
    edit(store / "observations/zarr.json", lambda d: d.update(shape=[rows + 12, 2]))
    edit(store / "observations/zarr.json", lambda d: set_nested(d, "chunk_grid.configuration.chunk_shape", [1, 2]))
    (store / "observations/c/0/0").unlink()
    resign(path)
    assert "array observations: chunk 0 of 100000012 is missing" in refused(lambda: open_collection(path))


def frame_of(data: bytes, decoded: int | None = None) -> bytes:
    """A chunk with a right checksum, its blosc header claiming to decode to `decoded` bytes."""
    frame = bytearray(blosc.compress(data, b"zstd", 3, 1, 0, 4))
    if decoded is not None:
        frame[4:8] = decoded.to_bytes(4, "little")
    return bytes(frame) + google_crc32c.value(bytes(frame)).to_bytes(4, "little")


@pytest.mark.parametrize(
    "chunk",
    [
        frame_of(bytes(600 * 2**20)),  # a real bomb: 600 MB of zeros
        frame_of(bytes(960), decoded=2**31 - 1),  # a lie in the header
        frame_of(bytes(959)),
        b"",
        b"\0" * 10,
        b"\0" * 24,
    ],
    ids=["bomb", "lie", "short", "empty", "stub", "zeros"],
)
def test_oversized_blosc_frame_is_refused_before_decoding(path, chunk):
    (path / STORE / "rewards/c/0").write_bytes(chunk)
    resign(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(lambda: open_collection(path).load(1))
    assert "task 1, array rewards" in message
    assert "chunk 0" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_a_lying_frame_with_right_sizes_is_refused_by_the_decoder(path):
    frame = bytearray(frame_of(np.arange(240, dtype="f4").tobytes())[:-4])
    frame[16:] = b"\xff" * (len(frame) - 16)
    data = bytes(frame)
    (path / STORE / "rewards/c/0").write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
    resign(path)
    assert "blosc cannot decode it" in refused(lambda: open_collection(path).load(1))


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("episodes/length", 0, 10**6, "1000220 as its sum, expected at least 1 and 240"),
        ("episodes/length", 0, -5, "episodes/length has -5 as its least"),
        ("episodes/end", 3, 9, "ends has 9"),
        ("rewards", 5, np.nan, "rewards has a value that is not finite"),
    ],
)
def test_hostile_values_never_leave_load(path, name, index, value, message):
    values = open_collection(path).task(1).store.read(name)
    values[index] = value
    (path / STORE / name / "c/0").write_bytes(frame_of(values.tobytes()))
    resign(path)
    assert message in refused(lambda: open_collection(path).load(1))


@pytest.mark.parametrize("name", ["rewards", "episodes/quality", "episodes/heldout"])
def test_verify_finds_content_that_is_not_what_was_hashed(path, name):
    values = open_collection(path).task(1).store.read(name)
    values[0] = 1 - values[0]
    (path / STORE / name / "c/0").write_bytes(frame_of(values.tobytes()))
    resign(path)
    assert f"task 1: array {name} has content hash" in refused(lambda: verify_collection(path))


def test_actions_and_returns_and_lengths_that_no_episode_can_have(tmp_path, make_episodes, make_record):
    """Whoever writes the lie with all its hashes: it contradicts the rewards, the action space or the horizon."""
    walks = make_episodes((0.6, 0.8), 0.4, 6)
    returns, actions = walks.returns.copy(), walks.actions.copy()
    returns[4] += 10
    actions[17, 1] = 278_861
    lies = {
        "episode 4 has return .*, expected .*, the sum of its rewards": replace(walks, returns=returns),
        "actions of up to 278861, expected -1 to 1": replace(walks, actions=actions),
        "an episode of 20 steps, expected at most 19, its horizon": walks,
    }
    for number, (message, episodes) in enumerate(lies.items()):
        path = tmp_path / str(number)
        header = CollectionHeader(
            name="walks", family="sparse-point-robot", seed=0, tasks_from="seed", scale="smoke", settings={},
            train=(0,), test=(),
        )  # fmt: skip
        begin_collection(path, header)
        write_segment(path, 0, 0, episodes)
        record = make_record(0, "train", (0.6, 0.8), header.family)
        seal_task(path, replace(record, horizon=19) if episodes is walks else record, QualityRule(), 0)
        collection = commit_collection(path, header, {})
        with pytest.raises(FocalError, match=message):
            verify_collection(collection)


def test_checkpoints_that_would_make_a_table_of_padding(tmp_path, make_episodes, make_record, monkeypatch):
    """5,000 checkpoints of one episode and one of 5,000: a table of 25 million. Refused when writing and verifying."""
    walks = make_episodes((0.6, 0.8), 0.4, 10_000, horizon=1)
    episodes = replace(walks, sac_steps=np.concatenate([np.arange(5000), np.full(5000, 5000)]))
    with monkeypatch.context() as patched:
        patched.setattr(store, "BOMB_BYTES", 2**20)
        with pytest.raises(FocalError, match="10000 episodes are of 5001 checkpoints, one of which has 5000"):
            store.evaluation_arrays(episodes)
    table = store.evaluation_arrays(replace(walks, sac_steps=np.arange(10_000) % 3 * 7))
    assert table["evaluation/sac_step"].tolist() == [0, 7, 14]
    assert np.array_equal(table["evaluation/returns"][1, :3333], walks.returns[1::3])
    assert np.isnan(table["evaluation/returns"]).sum(axis=1).tolist() == [0, 1, 1]
    header = CollectionHeader(
        name="walks", family="sparse-point-robot", seed=0, tasks_from="seed", scale="smoke", settings={}, train=(0,),
        test=(),
    )  # fmt: skip
    lie = {"evaluation/sac_step": np.zeros(1, "i8"), "evaluation/returns": np.zeros((1, 1))}
    begin_collection(tmp_path / "walks", header)
    write_segment(tmp_path / "walks", 0, 0, make_episodes((0.6, 0.8), 0.4, 6))
    with monkeypatch.context() as patched:
        for module in (store, tasks):
            patched.setattr(module, "evaluation_arrays", lambda episodes: lie)
        seal_task(tmp_path / "walks", make_record(0, "train", (0.6, 0.8), header.family), QualityRule(), 0)
    collection = commit_collection(tmp_path / "walks", header, {})
    with pytest.raises(FocalError, match="episodes are of 1 checkpoints with at most 6 each, expected 1 and 1 as decl"):
        verify_collection(collection)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("rewards.mean", [3.0]),
        ("rewards.m2", [0.0]),
        ("observations.max", [9.0, 9.0]),
        ("actions.min", ["-1", "-1"]),
        ("actions.min", []),
        ("rewards.count", 12),
        ("infos/sparse_reward", {}),
    ],
)
def test_verify_computes_the_statistics_again(path, dotted, value):
    edit(
        path / STORE / "zarr.json",
        lambda document: set_nested(document, f"attributes.focal.statistics.{dotted}", value),
    )
    resign(path)
    name = dotted.partition(".")[0]
    assert f"task 1: the statistics of {name} are not those of its values" in refused(lambda: verify_collection(path))
    edit(path / STORE / "zarr.json", lambda document: document["attributes"]["focal"].pop("statistics"))
    resign(path)
    assert "the statistics of observations are not those" in refused(lambda: verify_collection(path))


def test_digits_of_other_scripts_are_no_task_number(path):
    folder = path / "policies" / "task_\N{ARABIC-INDIC DIGIT ZERO}\N{ARABIC-INDIC DIGIT ZERO}00"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    resign(path)
    assert "a.json" in refused(lambda: open_collection(path))


def test_a_pipe_is_no_file(path):
    (path / "README.md").unlink()
    os.mkfifo(path / "README.md")
    assert "not a plain file" in refused(lambda: open_collection(path))
    assert "is a pipe or a device" in refused(lambda: read_bytes(path / "README.md", 10))
