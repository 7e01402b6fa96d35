"""Killed or out of disk at any step: nothing half-written opens, and the same calls again finish the work.

Deaths and full disks are real. The tests start this file in a fresh interpreter, which has no threads and may fork:
a child dies by os._exit, or writes under a file-size limit, and the parent looks at what is left.
"""

import errno
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from focal.datasets import (
    CollectionHeader,
    Episodes,
    QualityRule,
    TaskRecord,
    begin_collection,
    commit_collection,
    is_committed,
    list_segments,
    open_collection,
    read_segment,
    relabel_collection,
    seal_task,
    storage,
    verify_collection,
    write_segment,
)
from focal.errors import FocalError

GOAL = (0.6, 0.8)
HEADER = CollectionHeader(
    name="walks",
    family="sparse-point-robot",
    seed=0,
    tasks_from="seed",
    scale="smoke",
    settings={},
    train=(0,),
    test=(1,),
)
Inputs = tuple[dict[tuple[int, int], Episodes], list[TaskRecord]]


def make_inputs(make_episodes: Callable, make_record: Callable) -> Inputs:
    """Two tasks with two checkpoints of two short episodes each."""
    walks = {
        (index, step): make_episodes(GOAL, skill, 2, horizon=5, sac_step=step, seed=index)
        for index in (0, 1)
        for step, skill in ((0, 0.0), (100, 1.0))
    }
    return walks, [make_record(index, HEADER.split_of(index), GOAL, HEADER.family, horizon=5) for index in (0, 1)]


def calls_of_stage_one(path: Path, inputs: Inputs) -> list[Callable[[], object]]:
    """The calls that build the collection, in order."""
    walks, records = inputs
    return [
        partial(begin_collection, path, HEADER),
        *(partial(write_segment, path, *key, episodes) for key, episodes in walks.items()),
        *(partial(seal_task, path, record, QualityRule(), 0) for record in records),
        partial(commit_collection, path, HEADER, {}),
    ]


def build(path: Path, inputs: Inputs) -> None:
    """Build the collection, or finish it."""
    calls = calls_of_stage_one(path, inputs)
    for call in calls[-1:] if is_committed(path) else calls:
        call()


def look(path: Path) -> str:
    """Assert that what is left is complete or refused, and that every segment that counts as finished reads."""
    for index in (0, 1):
        for step in list_segments(path, index):
            read_segment(path, index, step)
    if is_committed(path):
        verify_collection(path)
        return "complete"
    with pytest.raises(FocalError, match=r"interrupted collection|no collection"):
        open_collection(path)
    return "refused"


def temporaries(path: Path) -> list[Path]:
    """What a writer left behind."""
    return list(path.rglob(".tmp-*"))


# ---- in this process: exceptions ----


@pytest.mark.parametrize(("function", "times"), [("rename", 2), ("replace", 7), ("fsync", None)])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_failure_at_each_rename_cleans_up(tmp_path, monkeypatch, make_episodes, make_record, function, times, error):
    """2 stores are renamed; header, 4 segments, card and dataset.json are replaced; fsync only fails now and then."""
    inputs, original = make_inputs(make_episodes, make_record), getattr(os, function)
    for number in range(times) if times else (1, 15, 40, 100):
        counter, path = itertools.count(), tmp_path / str(number)

        def failing(*arguments, counter=counter, number=number):
            if next(counter) == number:
                raise error
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            with pytest.raises((FocalError, KeyboardInterrupt)) as caught:
                build(path, inputs)
        if isinstance(error, OSError):
            assert_disk_full(str(caught.value))
        assert not temporaries(path), "an exception must clean up after itself"
        assert look(path) == "refused"
        build(path, inputs)
        assert look(path) == "complete"


def test_other_refusals_of_the_system_are_explained(tmp_path, monkeypatch, collection):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(FocalError, match=r"cannot write .*header.json: Permission denied; make the folder writable"):
        begin_collection(tmp_path / "walks", HEADER)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(FocalError, match=r"cannot read .*dataset.json: Permission denied; check"):
        open_collection(collection.path)


def test_the_first_writer_wins(tmp_path):
    final = tmp_path / "store"

    def write(keep_first):
        with storage.new_folder(final, keep_first) as folder:
            (folder / "mine").write_text("second")
            final.mkdir(exist_ok=True)
            (final / "theirs").write_text("first")

    write(keep_first=True)
    with pytest.raises(
        FocalError, match=r"store was made by another command meanwhile, and is kept as it is; choose another"
    ):
        write(keep_first=False)
    assert [entry.name for entry in final.iterdir()] == ["theirs"]
    assert not temporaries(tmp_path)


def test_a_live_writer_is_no_leftover(tmp_path, monkeypatch):
    """A run beside cleans up what the dead left, and nothing of the living."""
    stale = tmp_path / ".tmp-store-17"
    stale.mkdir()
    with storage.new_folder(tmp_path / "store") as folder:
        storage.write_file(folder / "first", b"1")
        storage.remove_temporaries(tmp_path, "store")
        assert not stale.exists()
        storage.write_file(folder / "second", b"2")
    assert sorted(entry.name for entry in (tmp_path / "store").iterdir()) == ["first", "second"]
    with storage.create_locked(tmp_path / ".tmp-x.zip-18") as file:
        file.write(b"half")
        storage.remove_temporaries(tmp_path, "x.zip")
        assert (tmp_path / ".tmp-x.zip-18").exists()
    storage.remove_temporaries(tmp_path, "x.zip")
    assert not temporaries(tmp_path)

    writes = storage.write_all

    def cleaned_beside(file, data):
        storage.remove_temporaries(tmp_path)
        writes(file, data)

    monkeypatch.setattr(storage, "write_all", cleaned_beside)
    storage.replace_file(tmp_path / "dataset.json", b"{}")
    assert (tmp_path / "dataset.json").read_bytes() == b"{}"


@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("published", [True, False])
def test_a_folder_deleted_while_it_is_written_is_not_published(tmp_path, more, published):
    """Nobody must find the last files under the name of the whole. Where another run has published, that one counts."""
    final = tmp_path / "store"

    def write() -> None:
        with storage.new_folder(final, keep_first=True) as folder:
            storage.write_file(folder / "first", b"1")
            shutil.rmtree(folder)
            if more:
                storage.write_file(folder / "second", b"2")
            if published:
                storage.write_file(final / "theirs", b"3")

    if published:
        write()
        assert [entry.name for entry in final.iterdir()] == ["theirs"]
    else:
        with pytest.raises(FocalError, match="was deleted while it was written; run the same command again"):
            write()
    assert not temporaries(tmp_path)


def assert_disk_full(message: str) -> None:
    """The line a user reads."""
    assert message.startswith("disk full while writing ")
    assert message.endswith(": free space and run the same command again; nothing finished was lost")
    assert "\n" not in message


# ---- in a fresh interpreter: deaths and full disks ----


@pytest.mark.parametrize(("what", "least"), [("kill", 20), ("fill", 9)])
def test_real_deaths_and_full_disks(tmp_path, what, least):
    in_memory = Path("/dev/shm")  # some thousand fsyncs: ten times faster there, and the same renames
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else tmp_path) as folder:
        command = [sys.executable, __file__, what, folder]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    outcomes = process.stdout.splitlines()
    assert len(outcomes) >= least
    if what == "kill":
        assert {"refused", "complete"} == set(outcomes)
    for line in outcomes if what == "fill" else []:
        assert_disk_full(line)


def kill(folder: Path, inputs: Inputs) -> None:
    """Kill a writer at every step and finish its work; print what each death left."""
    build(folder / "whole", inputs)
    expected = open_collection(folder / "whole").content_hash
    for number in itertools.count():
        path = folder / f"killed_{number}"
        child = os.fork()
        if child == 0:
            die_at(number)
            build(path, inputs)
            os._exit(0)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            assert status == 9, status
            print(look(path))
            build(path, inputs)
        assert open_collection(path).content_hash == expected, number
        assert not temporaries(path), number
        assert not (path / "staging").exists(), number
        verify_collection(path)
        shutil.rmtree(path)
        if not status:
            return


def die_at(number: int) -> None:
    """Die before the `number`-th rename or deletion of this process, or in the middle of a write.

    Of the many small files of a store only every fifth counts.
    """
    steps, writes, write_file = itertools.count(), itertools.count(), storage.write_file

    def mortal(function: Callable) -> Callable:
        def call(*arguments: object, **keywords: object) -> object:
            if next(steps) == number:
                os._exit(9)
            return function(*arguments, **keywords)

        return call

    def mortal_write(path: Path, data: bytes) -> None:
        if next(writes) % 5 == 0 and next(steps) == number:
            write_file(path, data[: len(data) // 2])
            os._exit(9)
        write_file(path, data)

    for name, module in list(sys.modules.items()):
        if name.startswith("focal.datasets.") and hasattr(module, "write_file"):
            module.write_file = mortal_write  # type: ignore[attr-defined]
    os.rename, os.replace, os.rmdir = mortal(os.rename), mortal(os.replace), mortal(os.rmdir)


def fill(folder: Path, inputs: Inputs) -> None:
    """Do every call once under a file-size limit, then again without; print the refusals."""
    path = folder / "walks"
    for call in calls_of_stage_one(path, inputs):
        print(refusal_under_limit(call))
        assert not temporaries(folder)
        call()
    assert look(path) == "complete"
    print(refusal_under_limit(lambda: relabel_collection(path, folder / "again", QualityRule())))
    assert not temporaries(folder)
    assert not (folder / "again").exists()


def refusal_under_limit(call: Callable[[], object]) -> str:
    """Run `call` in a child that may write no more than 100 bytes to a file; return its refusal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            call()
        except FocalError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as pipe:
        return pipe.read()


if __name__ == "__main__":
    import conftest  # beside this file

    {"kill": kill, "fill": fill}[sys.argv[1]](
        Path(sys.argv[2]), make_inputs(conftest.walk_to_goal, conftest.task_record)
    )
