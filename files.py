"""Files that are born whole: written beside their place, flushed to the disk, then renamed."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FocalError

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, else removed.

    Raises `FocalError` when the disk is full.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder`; only for a folder that this process alone writes to."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an exception, or one that caused it, says that no space is left.

    safetensors reports the operating system's error as text only, hence the second test.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if type(error).__name__ == "SafetensorError" and "os error 28" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path) -> FocalError:
    """Return the error for a full disk at `path`."""
    return FocalError(
        f"no space left on the disk while writing {path}; nothing finished was lost: "
        "free some space, then run the same command again"
    )
