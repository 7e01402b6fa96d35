"""The one place in this project that reads a pickle: episodes of the original FOCAL code, in a process of its own.

Run as a script by focal_iclr.py, never imported by it; needs nothing but the standard library.

    stdin     8 bytes length | pickle, again and again        (an .npy file without its header)
    stdout    8 bytes length | b"+" and an .npy file of float64 (steps, 2 obs + act + 1), or b"-" and why not

What keeps a hostile file harmless:

- Before the first byte is read the process gives up opening files, making processes, writing files, and memory and
  processor time beyond a limit. It inherits no file but its three streams. (The limit on processes does not bind root:
  run by root, it could make processes, which would have the other limits.)
- The unpickler knows the six names by which NumPy pickles an array. Each stands for a function below that takes
  exactly what such pickles hold and only notes it down; no name of NumPy or any other module is looked up or called.
- What was noted down is checked to be one episode and turned into numbers.
"""

import io
import math
import pickle
import struct
import sys
from typing import Any, BinaryIO

MEMORY_BYTES = 512 * 2**20
MAX_STEPS = 10_000

_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
            "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?"}  # fmt: skip


class Refused(Exception):
    """The pickle holds something else than an episode."""


def _text(value: Any) -> str:
    """A name, which Python 2 may have pickled as bytes."""
    value = value.decode("latin-1") if type(value) is bytes else value
    if type(value) is not str:
        raise Refused("a type description that is no text")
    return str(value)


class Dtype:
    """Stands for a numpy.dtype: its name, and its byte order once its state is set."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        name = _text(name)
        if name not in _NUMBERS and name not in ("O", "O8"):
            raise Refused(f"arrays of type {name[:20]!r}, expected numbers")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or _text(state[1]) not in ("<", ">", "=", "|"):
            raise Refused("a strange type description")
        if len(state) > 2 and any(part is not None for part in state[2:5]):
            raise Refused("a structured type, expected numbers")
        self.order = ">" if _text(state[1]) == ">" else "<"

    def unpack(self, data: Any, count: int) -> tuple[Any, ...]:
        """Return `count` numbers."""
        data = data.encode("latin-1") if type(data) is str else data
        layout = struct.Struct(f"{self.order}{count}{_NUMBERS.get(self.name, '')}")
        if self.name not in _NUMBERS or type(data) not in (bytes, bytearray) or len(data) != layout.size:
            raise Refused("an array whose bytes do not fit its shape")
        return layout.unpack(data)


class Array:
    """Stands for an array: its shape and its items in C order, set by the pickle's state."""

    shape: tuple[int, ...] = ()
    items: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) not in (4, 5):
            raise Refused("a strange array state")
        shape, dtype, fortran, data = state[-4:]
        self._set(shape, dtype, bool(fortran), data)

    def _set(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
        if type(shape) is not tuple or len(shape) > 2 or any(type(n) is not int or n < 0 for n in shape):
            raise Refused("a strange array shape")
        count = math.prod(shape)
        if type(dtype) is not Dtype or count > 100 * MAX_STEPS:
            raise Refused(f"an array of {count} items, expected an episode")
        if dtype.name not in _NUMBERS:
            if type(data) is not list or len(data) != count:
                raise Refused("an object array without its items")
            self.shape, self.items = shape, tuple(data)  # objects are listed in C order, whatever the array's own
            return
        items = dtype.unpack(data, count)
        if fortran and len(shape) == 2:
            items = tuple(items[column * shape[0] + row] for row in range(shape[0]) for column in range(shape[1]))
        self.shape, self.items = shape, items


def reconstruct(subtype: Any, shape: Any, kind: Any) -> Array:
    """Stands for numpy's _reconstruct, which makes the empty array whose state follows."""
    if subtype is not NDARRAY or shape != (0,) or kind not in (b"b", "b"):
        raise Refused("something else than an array")
    return Array()


def frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Stands for numpy's _frombuffer, which protocol 5 uses for contiguous arrays."""
    array = Array()
    array._set(shape, dtype, order == "F", data)
    return array


def scalar(dtype: Any, data: Any) -> Any:
    """Stands for numpy's scalar."""
    if type(dtype) is not Dtype:
        raise Refused("a scalar without a type")
    return dtype.unpack(data, 1)[0]


def encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, by which protocols 0 to 2 of Python 3 spell bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Refused("a strange encoding")
    return text.encode("latin-1")


class StandIn:
    """What a pickle gets for a name: it can be called, and nothing about it can be changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        """Call what it stands for."""
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        """Refuse the pickle's attempt to set attributes."""
        raise Refused("the pickle sets attributes of a function")


NDARRAY = StandIn(None)
_KNOWN = {("numpy", "ndarray"): NDARRAY, ("numpy", "dtype"): StandIn(Dtype), ("_codecs", "encode"): StandIn(encode)}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _KNOWN[_core + ".multiarray", "_reconstruct"] = StandIn(reconstruct)
    _KNOWN[_core + ".multiarray", "scalar"] = StandIn(scalar)
    _KNOWN[_core + ".numeric", "_frombuffer"] = StandIn(frombuffer)


class Unpickler(pickle.Unpickler):
    """Knows the names above and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Raises `Refused` for every other one, without looking it up."""
        known = _KNOWN.get((module, name))
        if known is None:
            raise Refused(f"the pickle asks for {module[:60]}.{name[:60]}, which is no array")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside the pickle."""
        raise Refused("the pickle refers to something outside it")


def load_episode(data: bytes, obs_dim: int, act_dim: int) -> list[tuple[float, ...]]:
    """Unpickle one episode: rows of observation, action, reward, next observation, one per step. Raises `Refused`."""
    try:
        # text of Python 2 becomes str byte for byte
        array = Unpickler(io.BytesIO(data), fix_imports=False, encoding="latin-1").load()
    except Refused:
        raise
    except MemoryError:
        raise Refused("it needs more memory than any episode") from None
    except Exception as error:  # a hostile pickle can fail in any way; whatever it is, it is refused
        raise Refused(f"no readable pickle of an array ({type(error).__name__})") from None
    if type(array) is not Array or len(array.shape) != 2 or array.shape[1] != 4:
        raise Refused("no array of steps and 4 columns (observation, action, reward, next observation)")
    if not 1 <= array.shape[0] <= MAX_STEPS:
        raise Refused(f"{array.shape[0]} steps, expected 1 to {MAX_STEPS}")
    rows = []
    for step in range(array.shape[0]):
        row: list[float] = []
        for cell, width in zip(array.items[4 * step : 4 * step + 4], (obs_dim, act_dim, 1, obs_dim), strict=True):
            values = cell.items if type(cell) is Array else (cell,)
            if len(values) != width or not all(type(value) in (int, float, bool) for value in values):
                raise Refused(f"step {step} has a column of {len(values)} values, expected {width} numbers")
            row.extend(map(float, values))
        rows.append(tuple(row))
    return rows


def npy_bytes(rows: list[tuple[float, ...]]) -> bytes:
    """Spell rows of float64 as an .npy file, version 1.0."""
    width = len(rows[0])
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({len(rows)}, {width}), }}"
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    body = b"".join(struct.pack(f"<{width}d", *row) for row in rows)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def serve(requests: BinaryIO, replies: BinaryIO, obs_dim: int, act_dim: int) -> None:
    """Answer every request until there are no more."""
    while len(length := requests.read(8)) == 8:
        data = requests.read(int.from_bytes(length, "little"))
        try:
            reply = b"+" + npy_bytes(load_episode(data, obs_dim, act_dim))
        except (Refused, OverflowError, MemoryError) as error:
            reply = b"-" + (str(error) or "numbers too large").encode("utf-8", "replace")[:300]
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


def give_up_rights(seconds: int) -> None:
    """Limit memory and processor time, and stop opening files, writing files and making processes, for good.

    RLIMIT_NPROC does not bind root, nor a process with CAP_SYS_ADMIN or CAP_SYS_RESOURCE.
    """
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    OBS_DIM, ACT_DIM, SECONDS = map(int, sys.argv[1:4])
    give_up_rights(SECONDS)
    serve(sys.stdin.buffer, sys.stdout.buffer, OBS_DIM, ACT_DIM)
