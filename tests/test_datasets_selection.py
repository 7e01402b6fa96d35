"""Selection by episode tables, reading of the chosen rows' chunks only, and the memory-mapped cache."""

import math
import mmap
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from focal.datasets import Episodes, Quality, open_collection
from focal.datasets.opening import open_source
from focal.datasets.sources import Folder
from focal.datasets.tasks import write_task
from focal.errors import FocalError, UsageError

from .test_datasets_integrity import frame_of, resign


def assert_same(left: Episodes, right: Episodes) -> None:
    for field in fields(Episodes):
        if field.name == "infos":
            assert left.infos.keys() == right.infos.keys()
            pairs = [(left.infos[name], right.infos[name]) for name in left.infos]
        else:
            pairs = [(getattr(left, field.name), getattr(right, field.name))]
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), field.name


class CountingFolder(Folder):
    """A folder that notes what is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        object.__setattr__(self, "bytes_read", {})

    def read(self, name: str, limit: int) -> bytes:
        data = super().read(name, limit)
        self.bytes_read[name] = len(data)
        return data


@pytest.fixture
def counted(collection):
    source = CountingFolder(collection.path)
    opened = open_source(source)
    source.bytes_read.clear()
    return opened, source.bytes_read


def test_each_condition_by_hand(collection):
    all_of = collection.load(0)
    least = float(np.sort(all_of.returns[all_of.qualities == Quality.RANDOM])[8])
    chosen = collection.select("random", tasks=[0], returns=(least, math.inf), sac_steps=(500, 3000), heldout=False)
    quality, returns = all_of.qualities == Quality.RANDOM, all_of.returns >= least
    steps, training = (all_of.sac_steps >= 500) & (all_of.sac_steps <= 3000), all_of.heldout == 0
    expected = quality & returns & steps & training
    for condition in (quality, returns, steps, training):  # each one matters
        assert (quality.astype(int) + returns + steps + training - condition == 3).sum() > expected.sum() > 0
    assert_same(chosen.load(0), all_of.select(expected))


def test_ranges_include_their_ends_and_no_others(collection):
    episodes = collection.load(1)
    low, high = np.sort(episodes.returns)[[10, 30]]
    chosen = collection.select(tasks=[1], returns=(low, high))
    assert chosen.counts[1].episodes == 21
    assert sorted(chosen.load(1).returns) == sorted(episodes.returns)[10:31]
    assert set(collection.select(tasks=[1], sac_steps=(1000, 2000)).load(1).sac_steps.tolist()) == {1000, 2000}


def test_splits_and_counts(collection):
    train = collection.select("random", split="train")
    assert [entry.index for entry in train.tasks] == [0, 1, 2]
    assert [entry.index for entry in collection.select("random", split="test").tasks] == [3]
    assert train.counts[0] == collection.task(0).counts["random"]
    with pytest.raises(FocalError, match="task 3 is no train task, expected one of 0-2"):
        collection.select(split="train", tasks=[3])


def test_load_all_gives_every_task_in_order(collection):
    subset = collection.select("expert")
    loaded = list(subset.load_all())
    assert [entry.index for entry, _ in loaded] == [0, 1, 2, 3]
    for entry, episodes in loaded:
        assert_same(episodes, collection.load(entry.index, "expert"))


def test_selecting_reads_the_episode_tables_only(counted):
    collection, bytes_read = counted
    collection.select("expert", returns=(-100, math.inf))
    assert {name.split("/")[2] for name in bytes_read} == {"episodes"}
    assert len(bytes_read) == 7 * len(collection.tasks)


def test_loading_reads_the_chunks_of_the_chosen_rows_only(collection, tmp_path):
    episodes, entry = collection.load(0), collection.task(0)
    folder = tmp_path / "tasks/task_0000.zarr"
    folder.mkdir(parents=True)
    write_task(folder, entry.record, entry.rule, entry.heldout_seeds, episodes, chunk_bytes=1600)
    source = CountingFolder(tmp_path)
    store = replace(entry.store, source=source, layouts=_layouts(folder, entry))
    table = store.read_table()
    source.bytes_read.clear()
    mask = np.zeros(episodes.num_episodes, bool)
    mask[[0, 3]] = True  # steps 0-19 and 60-79, observation rows 0-20 and 63-83; 100 transitions of 16 bytes a chunk
    assert_same(store.read_episodes(mask, table), episodes.select(mask))
    chunks = {name.removeprefix("tasks/task_0000.zarr/") for name in source.bytes_read}
    assert {name for name in chunks if name.startswith("observations")} == {"observations/c/0/0"}
    assert {name for name in chunks if name.startswith("actions")} == {"actions/c/0/0"}
    source.bytes_read.clear()
    mask[:] = False
    mask[-1] = True  # the last episode of 50: steps 980-999, rows 1029-1049
    assert_same(store.read_episodes(mask, table), episodes.select(mask))
    chunks = {name.removeprefix("tasks/task_0000.zarr/") for name in source.bytes_read}
    assert {name for name in chunks if name.startswith("observations")} == {"observations/c/5/0"}
    assert {name for name in chunks if name.startswith("rewards")} == {"rewards/c/2"}


def _layouts(folder: Path, entry) -> dict:
    from focal.datasets.storage import list_files
    from focal.datasets.store import inspect_store

    files = list_files(folder)
    documents = {name: (folder / name).read_bytes() for name in files if name.endswith("zarr.json")}
    return dict(inspect_store(Folder(folder.parents[1]), entry.folder, "task 0", files, documents).layouts)


def test_wrong_requests_say_what_there_is(collection):
    with pytest.raises(UsageError, match="did you mean 'expert'"):
        collection.select("experts")
    with pytest.raises(UsageError, match="returns are 3 to 1, expected the lower end first"):
        collection.select(returns=(3, 1))
    with pytest.raises(FocalError, match=r"no episode is 'mixed', with return from 1e\+09 to inf, there are"):
        collection.select(returns=(1e9, math.inf))
    with pytest.raises(FocalError, match="has no task 9, expected one of 0-3"):
        collection.select(tasks=[9])


def memory_of(values: object) -> object:
    """What an array's bytes lie in."""
    while isinstance(values, np.ndarray | memoryview):
        values = values.base if isinstance(values, np.ndarray) else values.obj
    return values


def test_cache_gives_the_same_arrays_memory_mapped(collection, tmp_path):
    plain = collection.load_training("mixed")
    for _ in range(2):  # filled, then found
        cached = collection.load_training("mixed", cache=tmp_path / "cache")
        assert [entry.index for entry, _ in cached] == [entry.index for entry, _ in plain]
        for (_, ours), (_, theirs) in zip(cached, plain, strict=True):
            assert isinstance(memory_of(ours.observations), mmap.mmap)
            assert not ours.observations.flags.writeable
            for name in ("observations", "rows", "actions", "rewards", "terminated", "next_action_valid"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            assert np.array_equal(ours.infos["sparse_reward"], theirs.infos["sparse_reward"])
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)


def test_cache_is_keyed_by_content_and_selection_not_by_place(collection, tmp_path, make_collection):
    cache = tmp_path / "cache"
    collection.load_training("expert", cache=cache)
    collection.load_training("mixed", cache=cache)
    assert len(list(cache.iterdir())) == 6
    make_collection(tmp_path / "elsewhere" / "sparse-point-robot").load_training("mixed", cache=cache)
    assert len(list(cache.iterdir())) == 6  # the same data, so the same entries
    make_collection(tmp_path / "other", seed=1).load_training("mixed", cache=cache)
    assert len(list(cache.iterdir())) == 9


def test_damaged_cache_says_what_to_delete(collection, tmp_path):
    collection.load_training("mixed", tasks=[0], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    (entry / "arrays").write_bytes((entry / "arrays").read_bytes()[:-9])
    with pytest.raises(FocalError, match=rf"cache entry .* is damaged .*delete it: rm -r .*{entry.name}"):
        collection.load_training("mixed", tasks=[0], cache=tmp_path)


def test_cache_never_holds_a_damaged_store(make_collection, tmp_path):
    path = make_collection(tmp_path / "walks").path
    chunk = path / "tasks/task_0000.zarr/rewards/c/0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FocalError, match="task 0, array rewards: chunk 0 is damaged"):
        open_collection(path).load_training("mixed", tasks=[0], cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cache_never_holds_other_data_than_its_name_says(make_collection, tmp_path):
    """A stranger's collection that claims the hashes of an honest one must not take its place in a shared cache."""
    honest = make_collection(tmp_path / "honest")
    evil = Path(shutil.copytree(honest.path, tmp_path / "evil"))
    store = honest.task(0).store
    (evil / "tasks/task_0000.zarr/rewards/c/0").write_bytes(frame_of(np.full(store.sizes.steps, 777, "f4").tobytes()))
    resign(evil)
    opened = open_collection(evil)
    assert opened.content_hash == honest.content_hash
    with pytest.raises(FocalError, match="task 0: array rewards does not have its content hash"):
        opened.load_training("mixed", tasks=[0], cache=tmp_path / "cache")
    (_, found), *_ = honest.load_training("mixed", tasks=[0], cache=tmp_path / "cache")
    assert found.rewards.max() <= 0


def test_a_cache_entry_without_its_arrays_says_what_to_delete(collection, tmp_path):
    collection.load_training("mixed", tasks=[0], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    (entry / "arrays").unlink()
    with pytest.raises(FocalError, match=rf"cache entry .* is damaged .*delete it: rm -r .*{entry.name}"):
        collection.load_training("mixed", tasks=[0], cache=tmp_path)
