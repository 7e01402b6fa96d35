"""The restricted unpickler: NumPy's own episodes in every spelling, and nothing else, whatever it tries."""

import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from focal.datasets import focal_iclr, unpickling
from focal.datasets.focal_iclr import read_pickled
from focal.datasets.unpickling import Refused, load_episode
from focal.errors import FocalError

from .foreign_files import npy_of_pickle, object_array, old_names

OBS, ACT = 3, 2


def episode(steps=5, dtype="f8", reward=float):
    rng = np.random.default_rng(0)
    return object_array(
        [
            [rng.normal(size=OBS).astype(dtype), rng.normal(size=ACT).astype(dtype), reward(rng.normal()),
             rng.normal(size=OBS).astype(dtype)]
            for _ in range(steps)
        ]
    )  # fmt: skip


def expected(array):
    return [tuple(float(value) for cell in row for value in np.ravel(cell)) for row in array]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i4"])
@pytest.mark.parametrize("reward", [float, np.float64, np.float32, lambda value: np.array([value])])
def test_numpy_2_pickles_of_every_protocol(protocol, dtype, reward):
    array = episode(dtype=dtype, reward=reward)
    assert load_episode(pickle.dumps(array, protocol=protocol), OBS, ACT) == expected(array)


@pytest.mark.parametrize("protocol", range(4))
def test_numpy_1_pickles(protocol):
    array = episode(reward=np.float64)
    pickled = old_names(pickle.dumps(array, protocol=protocol), protocol)
    assert b"numpy.core.multiarray" in pickled
    assert b"numpy._core" not in pickled
    assert load_episode(pickled, OBS, ACT) == expected(array)


def test_numpy_1_pickles_of_protocol_4(monkeypatch):
    """Names carry their length there, so the pickler itself must use the old ones."""
    monkeypatch.setattr(pickle, "whichmodule", lambda thing, name, which=pickle.whichmodule: which(thing, name).replace(
        "numpy._core", "numpy.core"))  # fmt: skip
    stream = io.BytesIO()
    pickle._Pickler(stream, 4).dump(episode())
    assert b"numpy.core.multiarray" in stream.getvalue()
    assert load_episode(stream.getvalue(), OBS, ACT) == expected(episode())


class Python2Pickler(pickle._Pickler):
    """Writes every string and bytes as a byte string, as Python 2 did."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def test_pickles_of_python_2():
    """They become text in Python 3, which must give the same bytes back."""
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(episode(reward=np.float64))
    assert b"_codecs" not in stream.getvalue()
    assert load_episode(stream.getvalue(), OBS, ACT) == expected(episode())


def test_fortran_order():
    """NumPy lists objects in C order even then, and numbers in the array's own order."""
    array = np.asfortranarray(episode())
    array[1, 0] = np.asfortranarray(np.arange(OBS * 1.0).reshape(1, OBS))
    array[1, 3] = np.asfortranarray(np.arange(OBS * 1.0).reshape(OBS, 1))
    assert load_episode(pickle.dumps(array, protocol=2), OBS, ACT) == expected(array)
    state = (1, (2, 2), unpickling.Dtype("f8"), True, struct.pack("<4d", 1, 2, 3, 4))
    grid = unpickling.Array()
    grid.__setstate__(state)
    assert grid.items == (1, 3, 2, 4)


class Runs:
    """Runs a shell command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def build(state):
    """A pickle that sets attributes of the function that stands for numpy's scalar."""
    return b"\x80\x02cnumpy.core.multiarray\nscalar\n" + pickle.dumps(state, 2)[2:-1] + b"b."


HOSTILE = {
    "a shell command": (pickle.dumps(Runs("/nowhere"), 3), "asks for posix.system"),
    "a shell command in a cell": (None, "asks for posix.system"),
    "eval": (b"cbuiltins\neval\n(S'1+1'\ntR.", "asks for builtins.eval"),
    "another name of numpy": (b"cnumpy\nload\n(S'/etc/passwd'\ntR.", "asks for numpy.load"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "asks for numpy.ndarray.tofile"),
    "getattr": (b"c__builtin__\ngetattr\n(cnumpy\nndarray\nS'x'\ntR.", "asks for __builtin__.getattr"),
    "a persistent reference": (b"Psomething\n.", "refers to something outside"),
    "attributes of a function": (build((None, {"__defaults__": (1,)})), "sets attributes of a function"),
    "an extension code": (b"\x80\x02\x82\x01.", "no readable pickle"),
    "an instance of ndarray": (b"(inumpy\nndarray\n.", "no readable pickle"),
    "no pickle": (b"hello", "no readable pickle"),
    "half a pickle": (pickle.dumps(episode(), 3)[:-40], "no readable pickle"),
    "nothing": (b"", "no readable pickle"),
    "a dictionary": (pickle.dumps({"a": 1}), "no array of steps and 4 columns"),
    "a plain array": (pickle.dumps(np.zeros((5, 4)), 3), "step 0 has a column of 1 values, expected 3"),
    "three columns": (pickle.dumps(episode()[:, :3], 3), "no array of steps and 4 columns"),
    "no steps": (pickle.dumps(episode()[:0], 3), "0 steps"),
    "another width": (pickle.dumps(episode(), 3), "step 0 has a column of 3 values, expected 4"),
    "text in a cell": (pickle.dumps(object_array([[np.zeros(OBS), np.zeros(ACT), "1", np.zeros(OBS)]])),
                       "step 0 has a column of 1 values, expected 1 numbers"),
    "strings": (pickle.dumps(np.array(["a"]), 3), "arrays of type 'U1'"),
    "records": (pickle.dumps(np.zeros(2, [("a", "f8")]), 3), "arrays of type 'V8'"),
    "dates": (pickle.dumps(np.zeros(2, "M8[s]"), 3), "arrays of type 'M8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path):
    data, message = HOSTILE[name]
    if data is None:
        array = episode()
        array[2, 1] = Runs(tmp_path / "ran")
        data = pickle.dumps(array, 3)
    with pytest.raises(Refused, match="^" + ".*" + message):
        load_episode(data, OBS + (name == "another width"), ACT)
    assert not (tmp_path / "ran").exists()


def claims(shape, count):
    """A pickled object array that claims another shape than it has items."""
    array = pickle.dumps(np.empty(2, object), 2)
    two = pickle.dumps((2,), 2)[2:-1].split(b"q")[0]
    assert two in array
    return array.replace(two, pickle.dumps(shape, 2)[2:-1].split(b"q")[0], 1), count


@pytest.mark.parametrize("shape", [(10**9,), (2**40,), (-1,)])
def test_an_array_that_claims_another_shape(shape):
    data, _ = claims(shape, 2)
    with pytest.raises(Refused, match=r"strange array shape|an array of \d+ items|object array without its items"):
        load_episode(data, OBS, ACT)


def test_bytes_that_do_not_fit_the_shape():
    data = pickle.dumps(np.arange(4.0), 3).replace(struct.pack("<d", 3.0), b"")
    with pytest.raises(Refused):
        load_episode(data, OBS, ACT)


# ---- through the process ----


def write(path, array, protocol=3):
    path.write_bytes(npy_of_pickle(pickle.dumps(array, protocol=protocol), array.shape))
    return path


def test_files_come_back_as_numbers(tmp_path):
    arrays = [episode(5), episode(9, "f4", np.float32)]
    paths = [write(tmp_path / f"{number}.npy", array) for number, array in enumerate(arrays)]
    for values, array in zip(read_pickled(paths, OBS, ACT), arrays, strict=True):
        assert values.dtype == np.float64
        assert values.tolist() == [list(row) for row in expected(array)]


def test_what_numpy_save_writes_is_read(tmp_path):
    np.save(tmp_path / "a.npy", episode())
    assert read_pickled([tmp_path / "a.npy"], OBS, ACT)[0].tolist() == [list(row) for row in expected(episode())]


def test_a_hostile_file_runs_nothing_and_is_named(tmp_path):
    good = write(tmp_path / "good.npy", episode())
    bad = tmp_path / "bad.npy"
    bad.write_bytes(npy_of_pickle(pickle.dumps(Runs(tmp_path / "ran")), (5, 4)))
    with pytest.raises(FocalError, match=r"bad\.npy is refused: the pickle asks for posix\.system, which is no array"):
        read_pickled([good, bad], OBS, ACT)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy_of_pickle(b"\x80\x02" + b"}" * 15_000_000 + b".", (5, 4)), "refused"),  # 64 bytes for every byte
        (npy_of_pickle(b"\x80\x02]r\xff\xff\xff\x7f.", (5, 4)), "refused"),  # a memo of 2 billion entries
        (npy_of_pickle(b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", (5, 4)), "refused"),  # a bytearray of an exabyte
        (npy_of_pickle(pickle.dumps(episode()), (6, 4)), "its 5 steps are not the 6 its header claims"),
        (npy_of_pickle(b"", (10**12, 4)), "refused"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'", "no readable .npy header"),
        (b"PK\x03\x04", "no readable .npy header"),
    ],
)
def test_bombs_and_false_headers(tmp_path, data, message):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(FocalError, match=message):
        read_pickled([tmp_path / "a.npy"], OBS, ACT)


def test_plain_numbers_are_no_episode(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 4)))
    with pytest.raises(FocalError, match=r"found an array of float64 \(5, 4\), expected objects"):
        read_pickled([tmp_path / "a.npy"], OBS, ACT)


def test_large_files_and_links_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npy", episode())
    (tmp_path / "link.npy").symlink_to(path)
    with pytest.raises(FocalError, match="cannot read"):
        read_pickled([tmp_path / "link.npy"], OBS, ACT)
    monkeypatch.setattr(focal_iclr, "MAX_FILE_BYTES", 100)
    with pytest.raises(FocalError, match="larger than the 100 bytes"):
        read_pickled([path], OBS, ACT)


def test_a_reader_that_hangs_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(focal_iclr, "SECONDS_PER_FILE", 0.3)
    monkeypatch.setattr(focal_iclr, "__file__", str(tmp_path / "focal_iclr.py"))
    (tmp_path / "sleeps.py").rename(tmp_path / "unpickling.py")
    with pytest.raises(FocalError, match="the process that unpickles it stopped"):
        read_pickled([write(tmp_path / "a.npy", episode())], OBS, ACT)


def test_the_process_has_given_up_its_rights(tmp_path):
    """Inside the limits, a file cannot be opened, a process not made, and more memory not had."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import importlib.util, os, subprocess, sys\n"
        f"spec = importlib.util.spec_from_file_location('unpickling', {unpickling.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.give_up_rights(5)\n"
        "found = []\n"
        "for what in (lambda: open('/etc/hostname'), lambda: bytearray(2 * module.MEMORY_BYTES), lambda: os.pipe(),\n"
        f"             lambda: subprocess.run(['true']), lambda: open({str(tmp_path / 'made')!r}, 'w')):\n"
        "    try:\n        what(); found.append('allowed')\n"
        "    except (OSError, MemoryError) as error:\n        found.append(type(error).__name__)\n"
        "print(*found)\n"
    )
    run = subprocess.run([sys.executable, "-I", "-S", str(probe)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["OSError", "MemoryError", "OSError", "OSError", "OSError"]
    assert not (tmp_path / "made").exists()


def test_nothing_else_in_the_project_unpickles():
    """The one place is the one file, and only the process reads it."""
    root = Path(unpickling.__file__).parent.parent
    own = [path for path in root.rglob("*.py") if not {"tests", ".venv", "build"} & set(path.relative_to(root).parts)]
    users = [path.name for path in own if "import pickle" in path.read_text() or "pickle.load" in path.read_text()]
    assert users == ["unpickling.py"]
    assert not [path for path in own if "import unpickling" in path.read_text()]
    assert not [path for path in own if "allow_pickle=True" in path.read_text()]
