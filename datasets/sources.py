"""Where a collection's files are. Everything that reads one goes through a `Source`, so a folder, a bundle file and
an object store are opened, checked and loaded by the same code.

    Folder      a folder on this machine                                      here
    Below       a folder inside another source                                here
    Archive     a bundle file, read in place                                  archive.py
    Remote      a folder on s3:// or another object store                     remote.py
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import FocalError
from .storage import AGAIN, file_hash, list_files, read_bytes

Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """A tree of plain files, named by POSIX paths relative to its root. `str()` is what error messages call it."""

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """Map every file to its size in bytes, sorted; `skip` names top entries. Raises `FocalError` for a link."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """Read a whole file of at most `limit` bytes. Raises `FocalError` when it is missing or larger."""
        ...

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """Read several small files, side by side where that is faster, in the order given."""
        ...

    def sha256(self, name: str) -> str:
        """sha256 of a file of any size, in hexadecimal."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a plain file of that name."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine; never followed out of through a symbolic link."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """See `Source`."""
        return list_files(self.path, skip)

    def read(self, name: str, limit: int) -> bytes:
        """See `Source`."""
        return read_bytes(self.path / name, limit)

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        return ((name, self.read(name, limit)) for name in names)

    def sha256(self, name: str) -> str:
        """See `Source`."""
        return file_hash(self.path / name)

    def exists(self, name: str) -> bool:
        """See `Source`."""
        return (self.path / name).is_file()


@dataclass(frozen=True)
class Below:
    """A folder inside another source, for example the payload of a bag."""

    source: Source
    folder: str

    def __str__(self) -> str:
        return f"{self.source}/{self.folder}"

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """See `Source`."""
        prefix = f"{self.folder}/"
        inside = {
            name.removeprefix(prefix): size for name, size in self.source.sizes().items() if name.startswith(prefix)
        }
        return {name: size for name, size in inside.items() if name.partition("/")[0] not in skip}

    def read(self, name: str, limit: int) -> bytes:
        """See `Source`."""
        return self.source.read(f"{self.folder}/{name}", limit)

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        prefix = f"{self.folder}/"
        found = self.source.read_many([prefix + name for name in names], limit)
        return ((name.removeprefix(prefix), data) for name, data in found)

    def sha256(self, name: str) -> str:
        """See `Source`."""
        return self.source.sha256(f"{self.folder}/{name}")

    def exists(self, name: str) -> bool:
        """See `Source`."""
        return self.source.exists(f"{self.folder}/{name}")


def read_checked(source: Source, name: str, limit: int, sha256: str) -> bytes:
    """Read a whole file of at most `limit` bytes that must have this sha256. Raises `FocalError` when it is damaged."""
    data = source.read(name, limit)
    if sha256_of(data) != sha256:
        raise FocalError(f"{source}: {name!r} is damaged (its sha256 is not the one listed); {AGAIN}")
    return data


def sha256_of(data: bytes) -> str:
    """sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed in `workers` threads.

    At most `ahead` results (twice the workers) wait or are under way, which bounds the memory. The first error ends it:
    what has not begun then never does.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            if len(waiting) == (ahead or 2 * workers):
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
