"""Real SIGKILLs at random moments of packing and unpacking, and thousands of random mutations (slow)."""

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focal.datasets import open_collection, pack_bundle, verify_bundle, verify_collection
from focal.errors import FocalError

from .bundle_fuzz import check_bundle_bytes, check_documents, json_changes, text_changes
from .bundle_tools import Files, files_of

pytestmark = pytest.mark.slow

KILLS = 25
"""Of packing a file, of packing a folder, of unpacking, each."""


@pytest.fixture(scope="module")
def source(make_collection, tmp_path_factory) -> Path:
    """40 tasks in 1,200 files: work that takes long enough to be killed."""
    return make_collection(tmp_path_factory.mktemp("source") / "walks", tasks=40, skills=(0.0, 1.0), episodes=2).path


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    """Its bundle file."""
    return pack_bundle(source, tmp_path_factory.mktemp("packed") / "walks.focal.zip")[0]


@pytest.mark.parametrize("what", ["file", "folder", "unpack"])
def test_killed_at_random_moments(source, packed, tmp_path, what):
    words = {"file": ["pack", source], "folder": ["pack", source, "--folder"], "unpack": ["unpack", packed]}[what]
    command = [sys.executable, "-m", "focal.cli", "bundle", *map(str, words), "-o"]

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([*command, folder / "made"], stdout=subprocess.DEVNULL)

    def wait_for_writing(process: subprocess.Popen, folder: Path) -> float:
        """Until its first file, or its end. Returns the time then."""
        while not any(folder.iterdir()) and process.poll() is None:
            time.sleep(0.001)
        return time.monotonic()

    def look(path: Path) -> None:
        verify_collection(open_collection(path)) if what == "unpack" else verify_bundle(path)

    started, whole = time.monotonic(), start(tmp_path / "whole")
    writing = wait_for_writing(whole, tmp_path / "whole")
    assert whole.wait() == 0
    seconds, reading = time.monotonic() - started, writing - started
    moments, left = random.Random(7), {"nothing": 0, "part": 0, "all": 0}
    for number in range(KILLS):
        folder = tmp_path / str(number)
        process = start(folder)
        if number % 2:  # at any moment of it
            delay = moments.uniform(0, seconds)
        else:  # of its writing, whose start is seen: how long imports and reading take differs
            wait_for_writing(process, folder)
            delay = moments.uniform(0, seconds - reading)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for entry in folder.iterdir():
            if entry.name == "made":
                look(entry)
            else:
                assert entry.name.startswith(".tmp-made-")
                with suppress(FocalError):  # refused, or whole to the last byte and killed before its rename
                    look(entry)
        present = [entry.name for entry in folder.iterdir()]
        left["all" if "made" in present else "part" if present else "nothing"] += 1
        assert start(folder).wait() == 0
        look(folder / "made")
        assert [entry.name for entry in folder.iterdir()] == ["made"]
        if what == "file":
            assert (folder / "made").read_bytes() == packed.read_bytes()
            (folder / "made").unlink()
    print(f"{what}: killed {KILLS} times within {seconds:.1f} s, {seconds - reading:.1f} s of writing, leaving {left}")
    assert left["part"], "no kill hit the writing"


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """A GiB more than now; what asks for more gets a MemoryError, which is no FocalError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def small(make_collection, tmp_path_factory) -> Path:
    """A collection of two tasks."""
    return make_collection(
        tmp_path_factory.mktemp("source") / "walks", tasks=2, skills=(0.0, 0.4, 1.0), episodes=4
    ).path


@pytest.fixture(scope="module")
def small_packed(small, tmp_path_factory) -> Path:
    """Its bundle file."""
    return pack_bundle(small, tmp_path_factory.mktemp("packed") / "walks.focal.zip")[0]


@pytest.fixture(scope="module")
def bag(small, tmp_path_factory) -> Files:
    """The files of its bundle."""
    return files_of(pack_bundle(small, tmp_path_factory.mktemp("packed") / "walks-1.0.0", as_folder=True)[0])


MANY = settings(max_examples=2000, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


@pytest.mark.usefixtures("limited_memory")
class TestMutated:
    """2,000 mutations of each kind."""

    @MANY
    @given(data=st.data())
    def test_bundle_files(self, small_packed, tmp_path, data):
        check_bundle_bytes(data, small_packed.read_bytes(), tmp_path / "x.zip")

    @MANY
    @given(change=json_changes())
    def test_documents(self, bag, change):
        check_documents(bag, change)

    @MANY
    @given(change=text_changes())
    def test_tag_files(self, bag, change):
        check_documents(bag, change)
