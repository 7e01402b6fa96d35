"""Files that are born whole: written beside their place, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DiskFullError, FocalError

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def atomic_path(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, else removed.

    With `replace` False a `path` that there is by then is kept: `FileExistsError`. Raises `DiskFullError`.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename it refuses a path that there is
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # a file system without hard links: somebody may still come between these two lines
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder`; only for a folder that this process alone writes to.

    safetensors has temporary names of its own, such as .tmpCpVdAk.
    """
    for leftover in folder.glob(".tmp*"):
        leftover.unlink()


def sync(path: Path | str) -> None:
    """Flush a file's content, or the names in a folder, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(final: Path) -> Path:
    """A name to build `final` under, in the same folder so that the rename is atomic.

    Nobody else has it: machines that share a folder have processes with the same ids.
    """
    return final.parent / f"{TEMPORARY}{final.name}-{secrets.randbits(48)}"


@contextlib.contextmanager
def locked(path: Path, patience: float, held: str) -> Iterator[None]:
    """Hold the lock file `path`, made if it is not there. A process gives up its lock by dying, however it dies.

    Raises `FocalError` saying `held` where another process still has it after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise FocalError(held) from None
                time.sleep(0.2)
        yield


def check_writable(path: Path) -> None:
    """Make the folder of `path`. Raises `FocalError` where a file `path` could not be written in it."""
    probe = temporary_name(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FocalError(
            f"cannot write {path} ({error.strerror}), expected a file in a folder that can be written; choose another "
            "place with -o"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an exception, or one that caused it, says that no space is left.

    A file-size limit (EFBIG, ulimit -f) stops a writer exactly as a full disk does. safetensors reports the
    operating system's error as text only, hence the last test.
    """
    while error is not None:
        if isinstance(error, DiskFullError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if type(error).__name__ == "SafetensorError" and any(f"os error {n}" in str(error) for n in (27, 28, 122)):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path) -> DiskFullError:
    """Return the error for a full disk at `path`."""
    return DiskFullError(f"disk full while writing {path}")
