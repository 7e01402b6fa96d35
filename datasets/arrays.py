"""One array of a store: Zarr v3 metadata and chunk files, written and read byte by byte.

The files are plain Zarr v3, and the tests read them with the zarr package and read what zarr wrote. They are not read
through zarr, because it returns zeros for a missing chunk, allocates whatever shape or frame size a file claims and
does not name the chunk that is damaged; opening and reading a small store also takes it tens of milliseconds.

    observations/zarr.json      shape, type, chunk shape, the codec chain below
    observations/c/0/0          rows 0 .. n-1 at full width:  blosc frame | crc32c of it, 4 bytes
    observations/c/1/0          rows n .. 2n-1; the last chunk is padded with zeros to n rows
                                blosc frame = 16 bytes header (decoded size at 4, frame size at 12) | data
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from ..errors import FocalError
from .episodes import Array
from .storage import AGAIN, to_json, write_file

CHUNK_BYTES = 8 * 2**20
"""A chunk aims at this size: a usual task is one file per array, and a padded last chunk costs little."""
MAX_CHUNK_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 32 * 2**30
MAX_METADATA_BYTES = 2**16

_BLOSC_HEADER = 16  # also the most a frame can be larger than its content
_CHECKSUM = 4
_COMPRESSORS = ("zstd", "lz4", "lz4hc", "blosclz", "zlib")


@dataclass(frozen=True)
class Layout:
    """The checked facts about one stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk, padding included."""
        return self.chunk_rows * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """The most bytes a chunk's file can have: blosc stores what does not shrink as it is."""
        return self.chunk_bytes + _BLOSC_HEADER + _CHECKSUM

    @property
    def num_chunks(self) -> int:
        """How many chunk files there are."""
        return -(-self.shape[0] // self.chunk_rows)

    def chunk_files(self) -> Iterator[str]:
        """Give the chunks' paths inside the array's folder, in row order; one by one, since a claim may be absurd."""
        return (f"c/{chunk}" + "/0" * (len(self.shape) - 1) for chunk in range(self.num_chunks))


def write_array(
    folder: Path, values: Array, chunk_bytes: int = CHUNK_BYTES, compressor: str = "zstd"
) -> dict[str, Any]:
    """Write `values` (rows first) as a Zarr v3 array into `folder`; return its metadata."""
    values = np.ascontiguousarray(values)
    row_bytes = max(1, values.nbytes // max(1, len(values)))
    layout = Layout(values.shape, values.dtype, max(1, min(len(values), chunk_bytes // row_bytes)))
    for index, name in enumerate(layout.chunk_files()):
        rows = values[index * layout.chunk_rows : (index + 1) * layout.chunk_rows]
        write_file(folder / name, _encode(rows.tobytes().ljust(layout.chunk_bytes, b"\0"), layout, compressor))
    metadata = array_metadata(layout, compressor)
    write_file(folder / "zarr.json", to_json(metadata))
    return metadata


def _encode(data: bytes, layout: Layout, compressor: str) -> bytes:
    frame = blosc.compress(data, compressor.encode(), 3, blosc.SHUFFLE, 0, layout.dtype.itemsize)
    return frame + google_crc32c.value(frame).to_bytes(_CHECKSUM, "little")


def array_metadata(layout: Layout, compressor: str = "zstd") -> dict[str, Any]:
    """Return the `zarr.json` of an array, as the zarr package writes it."""
    endian = {"configuration": {"endian": "little"}} if layout.dtype.itemsize > 1 else {}
    blosc_settings = {
        "typesize": layout.dtype.itemsize,
        "cname": compressor,
        "clevel": 3,
        "shuffle": "shuffle",
        "blocksize": 0,
    }
    return {
        "shape": list(layout.shape),
        "data_type": layout.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.chunk_rows, *layout.shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if layout.dtype.kind == "f" else 0,
        "codecs": [
            {"name": "bytes", **endian},
            {"name": "blosc", "configuration": blosc_settings},
            {"name": "crc32c"},
        ],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def check_metadata(found: Mapping[str, Any], where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Layout:
    """Check an array's parsed `zarr.json` against the declared shape and type, before anything is allocated or decoded.

    Whatever this format does not use is refused: other codecs, other chunk grids, claims beyond the limits. `where`
    names store and array in the `FocalError`.
    """
    _check_codecs(found.get("codecs"), where)
    layout = Layout(shape, dtype, _chunk_rows(found, where, shape))
    if layout.chunk_bytes > MAX_CHUNK_BYTES and layout.chunk_rows > 1:
        raise _unsafe(where, "chunks", f"{layout.chunk_bytes} bytes", f"at most {MAX_CHUNK_BYTES}")
    if shape[0] * layout.row_bytes > MAX_ARRAY_BYTES:
        raise _unsafe(where, "shape", f"{list(shape)}", f"at most {MAX_ARRAY_BYTES} bytes")
    expected = array_metadata(layout)
    for key in sorted(set(found) | set(expected)):
        # codecs are checked above (the compressor is free); dimension names are the one harmless extra zarr knows
        if key not in ("codecs", "dimension_names") and found.get(key) != expected.get(key):
            raise _unsafe(where, key, repr(found.get(key))[:80], repr(expected.get(key)))
    return layout


def _chunk_rows(metadata: Mapping[str, Any], where: str, shape: tuple[int, ...]) -> int:
    try:
        rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (KeyError, IndexError, TypeError):
        rows = None
    if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= shape[0]:
        raise _unsafe(where, "chunk rows", repr(rows)[:80], f"1 to {shape[0]}")
    return rows


def _check_codecs(codecs: object, where: str) -> None:
    chain: list[Any] = codecs if isinstance(codecs, list) else [codecs]
    names = [codec.get("name") if isinstance(codec, dict) else codec for codec in chain]
    if names != ["bytes", "blosc", "crc32c"] or not all(isinstance(codec, dict) for codec in chain):
        raise _unsafe(where, "codecs", repr(names)[:80], "bytes, blosc, crc32c")
    endian = chain[0].get("configuration", {"endian": "little"})
    if endian != {"endian": "little"}:
        raise _unsafe(where, "byte order", repr(endian)[:80], "little")
    settings = chain[1].get("configuration")
    if not isinstance(settings, dict) or settings.get("cname") not in _COMPRESSORS:
        raise _unsafe(where, "blosc settings", repr(settings)[:80], f"a cname of {', '.join(_COMPRESSORS)}")


def check_chunk_files(where: str, layout: Layout, sizes: Mapping[str, int]) -> None:
    """Check that exactly the chunk files of `layout` exist, none larger than a chunk can be.

    `sizes` maps the files in the array's folder to bytes. A missing chunk is damage here, never zeros.
    """
    for number, name in enumerate(layout.chunk_files()):
        if name not in sizes:
            raise FocalError(f"{where}: chunk {number} of {layout.num_chunks} is missing (file {name}); {AGAIN}")
        if sizes[name] > layout.file_bytes:
            raise _unsafe(where, f"chunk {number}", f"{sizes[name]} bytes", f"at most {layout.file_bytes}")
    if extra := sorted(set(sizes) - {*layout.chunk_files(), "zarr.json"}):
        raise _unsafe(where, "an extra file", repr(extra[0]), "only the declared chunks")


def wanted_chunks(layout: Layout, rows: Array | None = None) -> list[tuple[int, str]]:
    """Number and file of every chunk, or of those with a row where `rows` (n,) bool is True."""
    chunks = enumerate(layout.chunk_files())
    if rows is None:
        return list(chunks)
    size = layout.chunk_rows
    return [(number, name) for number, name in chunks if rows[number * size : (number + 1) * size].any()]


def decode_array(files: Iterator[tuple[str, bytes]], where: str, layout: Layout, rows: Array | None = None) -> Array:
    """Decode an array whose metadata was checked: all of it, or the rows where `rows` (n,) bool is True, in order.

    Takes the `wanted_chunks` from `files`, no more. Raises `FocalError` naming the chunk that is damaged.
    """
    count = layout.shape[0] if rows is None else int(np.count_nonzero(rows))
    values = np.empty((count, *layout.shape[1:]), layout.dtype)
    filled = 0
    for number, _ in wanted_chunks(layout, rows):
        start = number * layout.chunk_rows
        wanted = None if rows is None else rows[start : start + layout.chunk_rows]
        frame = _check_frame(next(files)[1], where, number, layout)
        whole = start + layout.chunk_rows <= layout.shape[0] and (wanted is None or wanted.all())
        chunk = values[filled : filled + layout.chunk_rows] if whole else np.empty(_chunk_shape(layout), layout.dtype)
        try:
            blosc.decompress(frame, chunk)
        except (RuntimeError, ValueError) as error:
            raise damaged(where, number, "blosc cannot decode it") from error
        if not whole:
            chunk = chunk[: layout.shape[0] - start] if wanted is None else chunk[: len(wanted)][wanted]
            values[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return values


def _chunk_shape(layout: Layout) -> tuple[int, ...]:
    return (layout.chunk_rows, *layout.shape[1:])


def _check_frame(stored: bytes, where: str, number: int, layout: Layout) -> bytes:
    frame, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
    if google_crc32c.value(frame).to_bytes(_CHECKSUM, "little") != checksum:
        raise damaged(where, number, "its crc32c does not match")
    # The checksum only finds accidents. A hostile frame has a right one and claims to decode to gigabytes, so the
    # sizes in its header are compared before the decoder sees it.
    sizes = int.from_bytes(frame[4:8], "little"), int.from_bytes(frame[12:16], "little")
    if len(frame) < _BLOSC_HEADER or sizes != (layout.chunk_bytes, len(frame)):
        raise damaged(where, number, f"its blosc frame claims {sizes[0]} bytes, expected {layout.chunk_bytes}")
    return frame


def damaged(where: str, chunk: int, why: str) -> FocalError:
    """The error for a chunk whose bytes are wrong."""
    return FocalError(f"{where}: chunk {chunk} is damaged ({why}); {AGAIN}")


def _unsafe(where: str, what: str, found: str, expected: str) -> FocalError:
    return FocalError(f"{where}: found {what} {found}, expected {expected}; {AGAIN}")
