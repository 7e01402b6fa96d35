"""Files that are born whole: written under a temporary name, fsynced, then renamed.

A process killed anywhere leaves either the finished file or folder under its real name, or a leftover called
`.tmp-NAME-NUMBER` that nothing reads and the next run deletes. Whoever writes one here holds a lock on it, so that a
run beside it does not take it for a leftover. (Folders on NFS cannot be locked: there, two runs that write the same
place may still stop each other, but neither publishes a part.)

    tasks/.tmp-task_0003.zarr-4711/   written, every file and folder fsynced
    tasks/task_0003.zarr/             one rename later, and `tasks/` itself fsynced
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FocalError, MadeMeanwhileError
from ..files import TEMPORARY, atomic_path, disk_full, is_disk_full, sync, temporary_name

AGAIN = "unpack the bundle again (focal-cli bundle unpack) or generate the data again (focal-cli data generate)"
"""The next command where data are damaged: nothing here can repair them."""

MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 32


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `target` into a `FocalError` that says what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(target) from error
        raise FocalError(
            f"cannot write {target}: {error.strerror or error}; make the folder writable and run the same command again"
        ) from error


@contextlib.contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turn the operating system's refusals while reading `source` into a `FocalError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FocalError(f"cannot read {source}: {reason}; check that it exists and that you may read it") from error


@contextlib.contextmanager
def new_folder(final: Path, keep_first: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `final` when the block ends, and vanishes when it fails.

    A `final` that somebody else made meanwhile is never replaced: `MadeMeanwhileError`, or with `keep_first`, for what
    every writer would write the same, the temporary folder is dropped. Its parent must exist. Raises `FocalError` for a
    full disk.
    """
    temporary = temporary_name(final)
    with writing(final):
        try:
            temporary.mkdir()
            with _open_locked(temporary) as descriptor:
                yield temporary
                sync_tree(temporary)
                # Were it cleaned away, `write_file` would have made another of that name, with only the last files.
                if not _is_still(temporary, descriptor):
                    if final.is_dir():
                        raise FileExistsError(errno.EEXIST, "another run was first")
                    raise FocalError(f"{temporary} was deleted while it was written; run the same command again")
                os.rename(temporary, final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and final.is_dir():
                if keep_first:
                    return
                raise MadeMeanwhileError(final) from None
            raise
        sync(final.parent)


@contextlib.contextmanager
def create_locked(temporary: Path) -> Iterator[BinaryIO]:
    """Create a temporary file for unbuffered writing, durable when the block ends; see `remove_temporaries`."""
    with open(temporary, "xb", buffering=0) as file:
        _lock(file.fileno())
        yield file
        os.fsync(file.fileno())


@contextlib.contextmanager
def _open_locked(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _in_use(path: str) -> bool:
    """Whether the writer of a temporary file or folder is alive; never where the file system has no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # a link, or gone
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # all that NFS gives a reader, and enough
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def replace_file(final: Path, data: bytes) -> None:
    """Write `data` to `final` so that a reader sees the old file or the new one, never a part of it."""
    with writing(final), atomic_path(final) as temporary, create_locked(temporary) as file:
        write_all(file, data)


def write_file(path: Path, data: bytes) -> None:
    """Create `path`, and its folder, with `data`; `new_folder` makes it durable. An existing file is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb", buffering=0) as file:
        write_all(file, data)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write `data` to an unbuffered file, which may take it in parts."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents so that they survive a power cut."""
    with writing(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync(folder.parent)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Delete what killed writers of `name` (or of anything) left directly inside `folder`, nothing of live ones."""
    if not folder.is_dir():
        return
    pattern = re.compile(re.escape(TEMPORARY) + (rf"{re.escape(name)}-\d+" if name else ".*"))
    for entry in [entry for entry in os.scandir(folder) if pattern.fullmatch(entry.name)]:
        if _in_use(entry.path):
            continue
        with writing(Path(entry.path)):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def sync_tree(root: Path) -> None:
    """fsync everything below `root`. Side by side, because a journal commits waiting calls together: 8 times faster."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in ("", *names)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, paths))


def list_files(root: Path, skip: tuple[str, ...] = ()) -> dict[str, int]:
    """Map every file below `root` (POSIX path relative to it) to its size in bytes, sorted; `skip` names top entries.

    Raises `FocalError` for a symbolic link or anything else that is not a plain file or folder: both make a reader
    open files outside the collection.
    """
    files: dict[str, int] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with reading(root / folder):
            entries = list(os.scandir(root / folder))
        for entry in entries:
            name = f"{folder}{entry.name}"
            if name in skip:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name + "/")
            elif entry.is_file(follow_symlinks=False):
                files[name] = entry.stat(follow_symlinks=False).st_size
            else:
                kind = "a symbolic link" if entry.is_symlink() else "not a plain file"
                raise FocalError(f"{root}: {name!r} is {kind}, expected plain files only; {AGAIN}")
    return dict(sorted(files.items()))


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole plain file of at most `limit` bytes, never through a symbolic link, nor from a pipe, which waits."""
    with reading(path), open(path, "rb", opener=_open_plain) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FocalError(f"{path} is a pipe or a device, expected a plain file; {AGAIN}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FocalError(f"{path} is larger than the {limit} bytes allowed there; {AGAIN}")
    return data


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def file_hash(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(document: Mapping[str, Any]) -> bytes:
    """Serialise for a file: indented UTF-8 whose floats are read back bit for bit (Python prints their repr)."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def canonical_json(document: Any) -> bytes:
    """Serialise for hashing: one spelling per document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Parse a JSON object from an untrusted file: finite numbers only, bounded depth, no key twice.

    Raises `FocalError`.
    """
    try:
        document = json.loads(
            data.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_finite_int,
            object_pairs_hook=unique_keys,
        )
        level = [document]
        for _ in range(MAX_JSON_DEPTH):
            level = [
                child
                for value in level
                if isinstance(value, dict | list)
                for child in (value.values() if isinstance(value, dict) else value)
            ]
            if not level:
                break
        else:
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deep"
        raise FocalError(f"{where} is not readable JSON ({reason}); {AGAIN}") from error
    return document


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read and parse a JSON object; see `parse_json`."""
    return parse_json(read_bytes(path, limit), path)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ, for `json.loads`: of a key twice, two readers may take two values."""
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return document


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite_int(text: str) -> int:
    _finite_float(text)  # who reads a number may want it as a float
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} overflows a float")
    return value
