"""HDF5 files that others wrote, read without trusting them.

An HDF5 file can make its reader open other files and allocate any amount of memory. Everything is refused before a
byte of data is read or allocated:

    external and soft links, virtual datasets, external storage      would read any local file under the user's name
    types other than numbers (objects, references, strings, ...)     are no data here
    shapes whose data are not in the file                            unwritten values read as zeros, at any size;
                                                                     so every chunk must be there, once, in its place
    filters other than gzip and shuffle                              load plugins, or bound no memory
    datasets that decode to far more than the file's size            compression bombs, also by linking one often

The HDF5 library inflates a gzip chunk to whatever it decodes to, so gzip chunks are inflated here, up to the size of a
chunk and no further.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ..errors import FocalError
from .episodes import Array
from .storage import reading
from .store import BOMB_BYTES, BOMB_RATIO

MAX_DECODED_BYTES = 16 * 2**30
"""One file is one task, and is held in memory."""
MAX_CHUNK_BYTES = 256 * 2**20
MAX_MEMBERS = 2_000_000
MAX_TEXT_BYTES = 16 * 2**20

_GZIP, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
_PIPELINES = ((), (_SHUFFLE,), (_GZIP,), (_SHUFFLE, _GZIP))
_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "an external link"}


class Hdf5File:
    """An open file; a context manager. Its root group is `root`."""

    def __init__(self, path: Path) -> None:
        if path.is_symlink() or not path.is_file():
            raise FocalError(f"{path} is no plain file, expected an HDF5 file")
        with reading(path):
            self.size = path.stat().st_size
        self.path = path
        self._left = min(MAX_DECODED_BYTES, max(BOMB_BYTES, BOMB_RATIO * self.size))
        with translated(path):
            self._file = h5py.File(path, "r", locking="best-effort")
        self.root = Group(self, self._file, "")

    def __enter__(self) -> "Hdf5File":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def spend(self, where: str, count: int) -> None:
        """Count decoded bytes. Raises `FocalError` when the file claims to hold more than its size can."""
        self._left -= count
        if self._left < 0:
            raise FocalError(
                f"{where}: with its {count} bytes the file claims to decode to far more than its size, which no real "
                "data do; get the file again from where it was published"
            )


class Group:
    """A group whose members are reached through plain links only."""

    def __init__(self, file: Hdf5File, group: h5py.Group, name: str) -> None:
        self._file, self._group, self._name = file, group, name

    def __str__(self) -> str:
        return f"{self._file.path}: {self._name or '/'}"

    def names(self) -> list[str]:
        """Names of all members, sorted. Raises `FocalError` for a link that leads elsewhere."""
        with translated(self):
            links = self._group.id.links
            count = self._group.id.get_num_objs()
            if count > MAX_MEMBERS:
                raise FocalError(f"{self} has {count} members, expected at most {MAX_MEMBERS}")
            names: list[str] = sorted(self._group)
            for name in names:
                self._check_link(name, links.get_info(name.encode("utf-8", "surrogateescape")).type)
            return names

    def __contains__(self, name: str) -> bool:
        if "/" in name or name in ("", "."):  # HDF5 would follow the links on such a path
            raise self._refused(name, "a path", "a name")
        with translated(self):
            return self._group.id.links.exists(name.encode())

    def group(self, name: str) -> "Group":
        """Return a group in this one. Raises `FocalError` when there is none of that name."""
        member = self._open(name)
        if not isinstance(member, h5py.Group):
            raise self._refused(name, "no group", "a group")
        return Group(self._file, member, f"{self._name}/{name}")

    def array(self, name: str, width: int | None = None) -> Array:
        """Read an array of numbers: (rows, width), or (rows,) where `width` is None, with any rows.

        (rows, 1) passes as (rows,). Raises `FocalError` for any other shape or type, and for everything the module
        docstring names.
        """
        dataset = self._dataset(name)
        where = f"{self._file.path}: {self._name}/{name}"
        shape = dataset.shape
        fits = len(shape) == 2 and shape[1] == (1 if width is None else width)
        if not fits and not (width is None and len(shape) == 1):
            raise self._refused(name, f"shape {list(shape)}", f"[rows{'' if width is None else f', {width}'}]")
        with translated(where):
            values = _read(self._file, where, dataset)
        if values.dtype == bool:
            values = values.view(np.uint8) != 0  # a file may hold any byte there
        return values.reshape(len(values)) if width is None else values

    def text(self, name: str) -> bytes:
        """Read an array of bytes as one string."""
        values = self.array(name)
        if values.dtype != np.uint8 or values.nbytes > MAX_TEXT_BYTES:
            raise self._refused(name, f"{values.nbytes} bytes of {values.dtype}", f"at most {MAX_TEXT_BYTES} of uint8")
        return values.tobytes()

    def number(self, name: str) -> float | int | None:
        """Read a single-number attribute, None when there is none of that name."""
        with translated(self):
            if not h5py.h5a.exists(self._group.id, name.encode()):
                return None
            attribute = h5py.h5a.open(self._group.id, name.encode())
            kind = {h5py.h5t.INTEGER: np.int64, h5py.h5t.FLOAT: np.float64}.get(attribute.get_type().get_class())
            if kind is None or attribute.get_space().get_simple_extent_npoints() != 1:
                raise self._refused(name, "an attribute that is no single number", "one number")
            value = np.zeros(attribute.shape, kind)
            attribute.read(value)
            return value.item()

    def _dataset(self, name: str) -> h5py.Dataset:
        member = self._open(name)
        if not isinstance(member, h5py.Dataset) or member.shape is None:
            raise self._refused(name, "no array", "an array")
        return member

    def _open(self, name: str) -> Any:
        with translated(self):
            if name not in self:
                members = ", ".join(self.names()[:8]) or "nothing"
                raise FocalError(f"{self} has no '{name}', expected it beside {members}")
            self._check_link(name, self._group.id.links.get_info(name.encode()).type)
            return self._group[name]

    def _check_link(self, name: str, kind: int) -> None:
        if kind != h5py.h5l.TYPE_HARD:
            what = _LINKS.get(kind, "a link of an unknown kind")
            raise self._refused(name, what, "data inside the file: a link may read any file")

    def _refused(self, name: str, found: str, expected: str) -> FocalError:
        return FocalError(f"{self._file.path}: {self._name}/{name} is refused: found {found}, expected {expected}")


@contextlib.contextmanager
def translated(where: object) -> Iterator[None]:
    """Turn what h5py raises for a damaged file into a `FocalError`."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FocalError(
            f"{where} cannot be read as HDF5 ({reason}); get the file again from where it was published"
        ) from error


def _read(file: Hdf5File, where: str, dataset: h5py.Dataset) -> Array:
    """Check storage, type and size of a dataset, then read it."""
    plan = dataset.id.get_create_plist()
    layout = plan.get_layout()
    dtype = _number_type(where, dataset)
    pipeline = tuple(plan.get_filter(number)[0] for number in range(plan.get_nfilters()))
    if layout == h5py.h5d.VIRTUAL:
        raise _unsafe(where, "a virtual dataset", "data inside the file: a virtual dataset may read any file")
    if plan.get_external_count():
        raise _unsafe(where, "external storage", "data inside the file: external storage may read any file")
    if pipeline not in _PIPELINES:
        raise _unsafe(
            where, f"filters {list(pipeline)}", "gzip and shuffle only; convert it: h5repack -f GZIP=4 IN OUT"
        )
    count = math.prod(dataset.shape) * dtype.itemsize
    if count == 0:
        return np.zeros(dataset.shape, dtype)
    if layout != h5py.h5d.CHUNKED:
        file.spend(where, count)
        if dataset.id.get_storage_size() != count:
            raise _unsafe(where, f"{dataset.id.get_storage_size()} bytes stored", f"{count} as its shape says")
        return dataset[()]
    infos = _check_chunks(file, where, dataset, dtype, pipeline)
    return _inflate(where, dataset, dtype, pipeline, infos) if _GZIP in pipeline else dataset[()]


def _number_type(where: str, dataset: h5py.Dataset) -> np.dtype[Any]:
    """The dataset's type, if it is a plain number as NumPy knows them (booleans are enumerations in HDF5)."""
    kind = dataset.id.get_type()
    if kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM):
        raise _unsafe(where, f"type {dataset.dtype}", "numbers")
    dtype = dataset.dtype
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or not kind.equal(h5py.h5t.py_create(dtype, logical=True)):
        raise _unsafe(where, f"type {dtype}", "plain numbers of at most 8 bytes")
    return dtype


def _check_chunks(
    file: Hdf5File, where: str, dataset: h5py.Dataset, dtype: np.dtype[Any], pipeline: tuple[int, ...]
) -> list[Any]:
    """Return what the file says of every chunk. All must be there: HDF5 fills in what is not, and a file of nothing
    could claim any shape. As many as the shape has, each in a place of its own inside it: then they cover it.
    """
    shape, chunk = dataset.shape, dataset.chunks
    if (size := math.prod(chunk) * dtype.itemsize) > MAX_CHUNK_BYTES:
        raise _unsafe(where, f"chunks of {size} bytes", f"at most {MAX_CHUNK_BYTES}")
    expected = math.prod(-(-rows // step) for rows, step in zip(shape, chunk, strict=True))
    file.spend(where, expected * size)  # whole chunks are decoded, however little of the last ones is asked for
    if (found := dataset.id.get_num_chunks()) != expected:
        raise _unsafe(where, f"{found} chunks", f"{expected} as its shape says")
    least = 8 if _GZIP in pipeline else size  # 8 bytes are a chunk's address
    if expected * least > file.size:  # an index that computes addresses has any number of chunks in no bytes
        raise _unsafe(where, f"{expected} chunks in {file.size} bytes", f"at least {least} bytes for each")
    infos: dict[tuple[int, ...], Any] = {}

    def note(info: Any) -> str | None:
        place = info.chunk_offset
        if place in infos:
            return "a chunk twice"
        if any(start % step or not 0 <= start < rows for start, step, rows in zip(place, chunk, shape, strict=True)):
            return f"a chunk at {list(place)}"
        infos[place] = info
        return None  # anything else ends the iteration: a damaged index may lead round for ever

    if fault := dataset.id.chunk_iter(note):
        raise _unsafe(where, fault, f"every chunk of {list(chunk)} once, inside the shape {list(shape)}")
    if len(infos) != expected:
        raise _unsafe(where, f"{len(infos)} chunks", f"{expected} as its shape says")
    return list(infos.values())


def _inflate(
    where: str, dataset: h5py.Dataset, dtype: np.dtype[Any], pipeline: tuple[int, ...], infos: list[Any]
) -> Array:
    """Decode chunks with a bound on what each may become."""
    values = np.zeros(dataset.shape, dtype)  # never what this process had in its memory, were a chunk missing after all
    chunk: tuple[int, ...] = dataset.chunks
    size = math.prod(chunk) * dtype.itemsize
    for info in infos:
        if info.size > size + size // 8 + 1024:  # gzip never makes data longer than that
            raise _unsafe(where, f"a chunk of {info.size} bytes", f"{size} at most")
        skipped, data = dataset.id.read_direct_chunk(info.chunk_offset)
        applied = [kind for number, kind in enumerate(pipeline) if not skipped >> number & 1]
        if _GZIP in applied:
            inflater = zlib.decompressobj()
            try:
                data = inflater.decompress(data, size + 1)
            except zlib.error as error:
                raise _unsafe(where, f"a damaged chunk ({error})", "gzip data") from error
        if len(data) != size:
            raise _unsafe(where, f"a chunk that decodes to {len(data)} bytes or more", f"{size}")
        if _SHUFFLE in applied:
            data = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
        block = np.frombuffer(data, dtype).reshape(chunk)
        place = tuple(slice(start, start + step) for start, step in zip(info.chunk_offset, chunk, strict=True))
        target = values[place]  # the last chunks reach beyond the array
        target[...] = block[tuple(slice(length) for length in target.shape)]
    return values


def _unsafe(where: str, found: str, expected: str) -> FocalError:
    return FocalError(f"{where} is refused: found {found}, expected {expected}")
