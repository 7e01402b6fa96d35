"""Errors a user can cause.

Every message says what was found, what was expected and the next command to type, on one line, and the command
line prints it without a traceback. Our own broken invariants stay plain assertions.
"""

import difflib
import shlex
import unicodedata
from collections.abc import Iterable

_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """`text` on one line, without what steers a terminal or turns the line round: a stranger's file could else draw a
    verdict, or write one on a line of its own.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(char) else char for char in text.replace("\n", " "))


def _steers(char: str) -> bool:
    return (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char != "\t") or char in _DIRECTIONS


class FocalError(Exception):
    """Something outside the program is wrong (a file, a disk, a missing task); `focal-cli` exits with 1."""

    exit_code = 1


class MadeMeanwhileError(FocalError):
    """Somebody else made a file or folder while it was written here; what they made is kept."""

    def __init__(self, path: object):
        super().__init__(f"{path} was made by another command meanwhile, and is kept as it is; choose another with -o")


class DiskFullError(FocalError):
    """No space is left; whatever else runs beside would fail alike. `where_full` is the message without advice."""

    def __init__(self, where_full: str, advice: str = "free space and run the same command again"):
        super().__init__(where_full, advice)
        self.where_full, self.advice = where_full, advice

    def __str__(self) -> str:
        return f"{self.where_full}: {self.advice}; nothing finished was lost"


class DivergedError(FocalError):
    """A training's numbers grew without bound, or stopped being numbers: a result of that method, too."""


class StoppedError(FocalError):
    """Somebody pressed Ctrl-C; says how to go on."""

    exit_code = 130  # what shells give a command that SIGINT ended


class UsageError(FocalError):
    """The command or a setting is wrong; `focal-cli` exits with 2."""

    exit_code = 2


def unless_default(option: str, value: object, default: str) -> str:
    """Return ` --stores OTHER` to end a command with, nothing where OTHER is what the command would take anyway."""
    return "" if str(value) == default else f" {option} {shlex.quote(str(value))}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? ` for the closest known name, else the whole list, to end an error message with."""
    known = sorted(known)
    if tails := [one for one in known if one.rpartition(".")[2] == name]:  # encoder.kl_weight, asked for as kl_weight
        return f"did you mean '{tails[0]}'?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)
