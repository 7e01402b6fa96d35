"""The bundle's file: a bag as one ZIP file without compression, written so that the same bag gives the same bytes.

    header NAME-VERSION/bag-info.txt | its bytes      sorted by name, one after the other without a gap,
    header NAME-VERSION/bagit.txt    | its bytes      all dated 1980-01-01, all plain files of mode 0644
    ...
    central directory                                 the headers again, with their places
    [zip64 end, zip64 locator]                        from 65,535 files or 4 GiB on
    end

Name, size, CRC-32 and place of the files determine every other byte. So the reader works them out again and refuses a
file that differs anywhere: there is no room for hidden data, overlapping or compressed entries, links or headers that
contradict each other, which Python's zipfile lets pass. What it refuses is named before anything is read or written.
"""

import contextlib
import hashlib
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import FocalError, MadeMeanwhileError
from .bag import FETCH_AGAIN, MAX_FILES, MAX_NAME, check_names, check_sizes, name_fault
from .storage import (
    atomic_path,
    create_locked,
    make_folder,
    reading,
    remove_temporaries,
    write_all,
    writing,
)

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_OFFSET64 = struct.Struct("<2HQ")

_VERSION, _VERSION64, _UNIX = 20, 45, 3 << 8
_DATE = 1 << 5 | 1  # 1980-01-01, the first day the format knows
_MODE = (stat.S_IFREG | 0o644) << 16
_MAX16, _MAX32 = 2**16 - 1, 2**32 - 1
_PIECE = 2**20

_REPACKED = (
    "expected a file as `focal-cli bundle pack` writes it; if somebody you trust packed it anew with another program, "
    "unzip it and give the folder instead: focal-cli bundle verify FOLDER"
)
_TOP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")


class Entry(NamedTuple):
    """One file inside a bundle file."""

    place: int
    """Where its content begins."""
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """A bundle file whose structure was checked, read in place; a `Source` of the bag inside."""

    path: Path
    name: str
    """The one folder at the top, NAME-VERSION, which is left out of all names."""
    entries: Mapping[str, Entry] = field(repr=False)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """See `Source`."""
        return {name: entry.size for name, entry in self.entries.items() if name.partition("/")[0] not in skip}

    def read(self, name: str, limit: int) -> bytes:
        """See `Source`. Raises `FocalError` when the content does not have its CRC-32."""
        size = self._entry(name).size
        if size > limit:
            raise FocalError(f"{self}: {name!r} is larger than the {limit} bytes allowed there; {FETCH_AGAIN}")
        return b"".join(self._pieces(name, max(size, 1)))

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        return ((name, self.read(name, limit)) for name in names)

    def sha256(self, name: str) -> str:
        """See `Source`."""
        digest = hashlib.sha256()
        for piece in self._pieces(name, _PIECE):
            digest.update(piece)
        return digest.hexdigest()

    def exists(self, name: str) -> bool:
        """See `Source`."""
        return name in self.entries

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise FocalError(f"{self}: {name!r} is missing; {FETCH_AGAIN}")
        return self.entries[name]

    def _pieces(self, name: str, length: int) -> Iterator[bytes]:
        place, size, expected = self._entry(name)
        crc = 0
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            for start in range(0, size, length):
                piece = _read_at(file, place + start, min(length, size - start))
                crc = zlib.crc32(piece, crc)
                yield piece
        if crc != expected:
            raise FocalError(f"{self}: {name!r} is damaged (its CRC-32 differs); {FETCH_AGAIN}")


def write_archive(path: Path, top: str, names: Iterable[str], read: Callable[[str], bytes]) -> None:
    """Write the files `names`, whose content `read` gives, to the bundle file `path` below the folder `top`.

    It is born whole: written under a temporary name, then renamed. Raises `FocalError` for a full disk, or where `path`
    is there by then, which is kept.
    """
    make_folder(path.parent)
    remove_temporaries(path.parent, path.name)
    with (
        writing(path), _new_file(path), atomic_path(path, replace=False) as temporary, create_locked(temporary) as file,
    ):  # fmt: skip
        directory, place, count = [], 0, 0
        for name in sorted(names):
            data = read(name)
            full, crc = f"{top}/{name}".encode("ascii"), zlib.crc32(data)
            write_all(file, _local_header(full, len(data), crc))
            write_all(file, data)
            directory.append(_central_header(full, len(data), crc, place))
            place, count = place + _LOCAL.size + len(full) + len(data), count + 1
        size = sum(map(len, directory))
        write_all(file, b"".join(directory) + _end(count, size, place))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise MadeMeanwhileError(path) from None


def open_archive(path: Path, max_size: int) -> Archive:
    """Check the structure of a bundle file of at most `max_size` bytes; no content is read, nothing is written.

    Raises `FocalError` naming the first entry that is wrong, and how.
    """
    with reading(path):
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
            raise FocalError(f"{path} is no plain file, expected a bundle's file or folder; {FETCH_AGAIN}")
        if facts.st_size > max_size:
            raise FocalError(f"{path} has {facts.st_size} bytes, more than the {max_size} allowed; raise --max-size")
        with open(path, "rb", buffering=0) as file:
            count, directory, size = _read_end(path, file, facts.st_size)
            top, entries = _read_directory(path, file, count, directory, size)
    return Archive(path, top, entries)


class _Central(NamedTuple):
    """One header of the central directory, as found."""

    raw: bytes
    name: str
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    kind: int
    place: int


def _read_end(path: Path, file: BinaryIO, length: int) -> tuple[int, int, int]:
    """Return number of entries, place and size of the central directory; the file's end must be as we write it."""
    if length < _END.size or _read_at(file, 0, 4) not in (b"PK\3\4", b"PK\5\6"):
        raise FocalError(f"{path} is no bundle: it does not begin like a ZIP file; {FETCH_AGAIN}")
    signature, _, _, _, count, size, place, _ = _END.unpack(_read_at(file, length - _END.size, _END.size))
    if signature != b"PK\5\6":
        raise FocalError(f"{path} was cut short, or data were added at its end; {FETCH_AGAIN}")
    if count == _MAX16 or _MAX32 in (size, place):
        start = length - _END.size - _LOCATOR64.size - _END64.size
        if start < 0:
            raise FocalError(f"{path}: its zip64 end record is missing; {FETCH_AGAIN}")
        *_, count, size, place = _END64.unpack(_read_at(file, start, _END64.size))
    if count > MAX_FILES:
        raise FocalError(f"{path}: claims {count} files, expected at most {MAX_FILES}; {FETCH_AGAIN}")
    if size > count * (_CENTRAL.size + 2 * MAX_NAME):
        raise FocalError(f"{path}: claims a central directory of {size} bytes for {count} files; {FETCH_AGAIN}")
    if place + size > length:
        raise FocalError(f"{path}: claims a central directory behind its end; {FETCH_AGAIN}")
    end = _end(count, size, place)
    if place + size + len(end) != length:
        raise FocalError(
            f"{path}: its central directory ends at byte {place + size}, expected {length - len(end)}: data are hidden "
            f"or missing before its end; {FETCH_AGAIN}"
        )
    if _read_at(file, place + size, len(end)) != end:
        raise FocalError(f"{path}: its end record has unexpected fields (disks, zip64, comment); {_REPACKED}")
    return count, place, size


def _read_directory(path: Path, file: BinaryIO, count: int, place: int, size: int) -> tuple[str, dict[str, Entry]]:
    """Return the top folder and the entries, every header checked."""
    found = list(_central_headers(path, _read_at(file, place, size), count))
    for header in found:
        if header.name.endswith("/"):
            raise FocalError(f"{path}: {header.name[:200]!r} is a folder's entry, expected files only; {_REPACKED}")
        if fault := name_fault(header.name):
            raise FocalError(f"{path}: file name {header.name[:200]!r} {fault}; {FETCH_AGAIN}")
    top = found[0].name.partition("/")[0] if found else ""
    if not _TOP.fullmatch(top):
        raise FocalError(f"{path} holds no folder NAME-VERSION at its top, found {top[:80]!r}; {FETCH_AGAIN}")
    for header in found:
        if not header.name.startswith(f"{top}/"):
            raise FocalError(f"{path}: {header.name[:200]!r} lies outside its one folder {top!r}; {FETCH_AGAIN}")
    names = [header.name.removeprefix(f"{top}/") for header in found]
    check_names(path, names)
    expected, entries = 0, {}
    for name, header in zip(names, found, strict=True):
        if fault := _entry_fault(header, expected):
            raise FocalError(f"{path}: {name!r} {fault}")
        encoded = header.name.encode("ascii")
        if expected + _LOCAL.size + len(encoded) + header.size > place:
            raise FocalError(f"{path}: {name!r} claims {header.size} bytes, more than there are; {FETCH_AGAIN}")
        if header.raw != _central_header(encoded, header.size, header.crc, expected):
            raise FocalError(f"{path}: {name!r} has unexpected header fields (date, mode, extra fields); {_REPACKED}")
        local = _local_header(encoded, header.size, header.crc)
        if _read_at(file, expected, len(local)) != local:
            raise FocalError(
                f"{path}: {name!r} has another header before its content than in the central directory; {FETCH_AGAIN}"
            )
        entries[name] = Entry(expected + len(local), header.size, header.crc)
        expected += len(local) + header.size
    if expected != place:
        raise FocalError(
            f"{path}: {place - expected} bytes are hidden between the last file and the central directory; "
            f"{FETCH_AGAIN}"
        )
    if names != sorted(names):
        raise FocalError(f"{path}: its files are not sorted by name; {_REPACKED}")
    check_sizes(path, {name: entry.size for name, entry in entries.items()})
    return top, entries


def _central_headers(path: Path, data: bytes, count: int) -> Iterator[_Central]:
    start = 0
    for _ in range(count):
        fixed = data[start : start + _CENTRAL.size]
        if len(fixed) < _CENTRAL.size or fixed[:4] != b"PK\1\2":
            raise FocalError(
                f"{path}: its central directory is damaged, or lists fewer files than {count}; {FETCH_AGAIN}"
            )
        values = _CENTRAL.unpack(fixed)
        _, _, _, flags, method, _, _, crc, stored, size, name_size, extra_size, comment_size, _, _, mode, place = values
        named = start + _CENTRAL.size + name_size
        end = named + extra_size + comment_size
        name, extra = data[named - name_size : named], data[named : named + extra_size]
        if place == _MAX32 and len(extra) == _OFFSET64.size:
            place = _OFFSET64.unpack(extra)[2]
        text = name.decode("utf-8", "backslashreplace")
        yield _Central(data[start:end], text, flags, method, crc, stored, size, stat.S_IFMT(mode >> 16), place)
        start = end
    if start != len(data):
        raise FocalError(f"{path}: its central directory is longer than its {count} files need; {FETCH_AGAIN}")


def _entry_fault(header: _Central, expected: int) -> str | None:
    """What is wrong with an entry, when its content should begin at byte `expected`."""
    if header.flags & 1:
        return f"is encrypted; {FETCH_AGAIN}"
    if header.method != 0:
        return f"is compressed (method {header.method}), expected stored; {_REPACKED}"
    if header.stored != header.size:
        return f"claims {header.stored} bytes stored and {header.size} unpacked; {FETCH_AGAIN}"
    if header.kind == stat.S_IFLNK:
        return f"is a symbolic link, expected plain files only; {FETCH_AGAIN}"
    if header.kind not in (0, stat.S_IFREG):
        return f"is not a plain file; {FETCH_AGAIN}"
    if header.place < expected:
        return f"begins at byte {header.place}, expected {expected}: it overlaps the file before it; {FETCH_AGAIN}"
    if header.place > expected:
        return f"begins at byte {header.place}, expected {expected}: data are hidden before it; {FETCH_AGAIN}"
    return None


def _local_header(name: bytes, size: int, crc: int) -> bytes:
    return _LOCAL.pack(b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, size, size, len(name), 0) + name


def _central_header(name: bytes, size: int, crc: int, place: int) -> bytes:
    far = place >= _MAX32
    extra = _OFFSET64.pack(1, 8, place) if far else b""
    version = _VERSION64 if far else _VERSION
    fixed = _CENTRAL.pack(
        b"PK\1\2", _UNIX | version, version, 0, 0, 0, _DATE, crc, size, size,
        len(name), len(extra), 0, 0, 0, _MODE, min(place, _MAX32),
    )  # fmt: skip
    return fixed + name + extra


def _end(count: int, size: int, place: int) -> bytes:
    """The end of a file whose central directory of `count` entries and `size` bytes begins at `place`."""
    few, short, near = min(count, _MAX16), min(size, _MAX32), min(place, _MAX32)
    end = _END.pack(b"PK\5\6", 0, 0, few, few, short, near, 0)
    if (few, short, near) == (count, size, place) and few < _MAX16 and _MAX32 not in (short, near):
        return end
    size64 = _END64.size - 12  # without the signature and this number
    record = _END64.pack(b"PK\6\6", size64, _VERSION64, _VERSION64, 0, 0, count, count, size, place)
    return record + _LOCATOR64.pack(b"PK\6\7", 0, place + size, 1) + end


def _read_at(file: BinaryIO, place: int, length: int) -> bytes:
    """Read exactly `length` bytes. Raises `OSError` where the file ends before."""
    data = b""
    while len(data) < length:
        piece = os.pread(file.fileno(), length - len(data), place + len(data))
        if not piece:
            raise OSError(f"it ends before byte {place + length}")
        data += piece
    return data
