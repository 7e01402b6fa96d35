"""Reading `.npy` files that others wrote: plain numbers only, every claim checked before memory is asked for.

`numpy.load` allocates what the header claims before it looks at the rest of the file; here the header must account for
the file to the byte.
"""

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .episodes import Array
from .storage import read_bytes

MAX_HEADER_BYTES = 4096
"""NumPy pads headers to 64 bytes and needs 128 for any plain array."""


@dataclass(frozen=True)
class Header:
    """What the header of an `.npy` file claims."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int
    """Where the content begins."""

    @property
    def content_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(path: Path, limit: int) -> Array:
    """Read an array of real numbers from a plain file of at most `limit` bytes.

    Raises `FocalError` for objects (a pickle), any other type, or a header that does not describe the file's content.
    """
    return parse_npy(read_bytes(path, limit), path)


def parse_npy(data: bytes, where: object) -> Array:
    """See `read_npy`; `where` names the bytes in error messages. The array shares the memory of `data`."""
    header = parse_header(data, where)
    if header.dtype.hasobject:
        raise FocalError(
            f"{where} holds pickled objects, expected numbers: nothing is unpickled here; "
            "save it again as numbers, or, for data of the original FOCAL code, use --format focal-iclr"
        )
    if header.dtype.kind not in "fiub" or header.dtype.itemsize > 8:
        raise _refused(where, f"type {header.dtype}", "real numbers of at most 8 bytes")
    if (found := len(data) - header.offset) != header.content_bytes:
        raise _refused(where, f"{found} bytes of content", f"the {header.content_bytes} its header claims")
    values = np.frombuffer(data, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran else "C")


def parse_header(data: bytes, where: object) -> Header:
    """Parse the header at the beginning of `data`. Raises `FocalError` when there is none."""
    stream = BytesIO(data[: MAX_HEADER_BYTES + 16])
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, MAX_HEADER_BYTES)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream, MAX_HEADER_BYTES)
        else:
            raise ValueError(f"version {version}")
    except Exception as error:  # a header is a Python literal, whose parsers fail in a dozen ways
        reason = " ".join(str(error).split())[:80]
        raise _refused(where, f"no readable .npy header ({reason})", "one of format version 1.0 or 2.0") from error
    if any(type(size) is not int or size < 0 for size in shape):
        raise _refused(where, f"shape {str(shape)[:80]}", "whole numbers from 0")
    return Header(shape, dtype, fortran, stream.tell())


def _refused(where: object, found: str, expected: str) -> FocalError:
    return FocalError(f"{where}: found {found}, expected {expected}; get the file again from where it was published")
