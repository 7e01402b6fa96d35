"""Reading and writing of the trainer's small files, on top of the package's atomic writes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..datasets.storage import unique_keys
from ..errors import FocalError
from ..files import atomic_path

JSON_LIMIT = 16 * 2**20  # bytes; our own files are far below, so anything larger is not ours


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises `FocalError` when the disk is full."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `FocalError` ending with `remedy` when it is missing, too large or damaged."""
    return parse_json(read_bytes(path, JSON_LIMIT, remedy), path, remedy)


def parse_json(content: bytes, where: object, remedy: str) -> dict[str, Any]:
    """Parse a JSON object. Raises `FocalError` naming `where`, ending with `remedy`, when it is damaged."""
    try:
        values = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FocalError(f"{where} is damaged ({one_line(error)}); {remedy}") from None
    if not isinstance(values, dict):
        raise FocalError(f"{where} holds a {type(values).__name__}, expected a JSON object; {remedy}")
    return values


def read_bytes(path: Path, limit: int, remedy: str) -> bytes:
    """Read a file of at most `limit` bytes. Raises `FocalError` ending with `remedy` when that is not possible."""
    try:
        if path.stat().st_size > limit:
            raise FocalError(f"{path} is larger than {limit} bytes, so it is not one of ours; {remedy}")
        return path.read_bytes()
    except FileNotFoundError:
        raise FocalError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise FocalError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def sha256(content: bytes) -> str:
    """Hexadecimal digest of `content`."""
    return hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    """The error's text on one line, short enough to stand inside another message."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
