"""Progress bars for work on bytes and on tasks. Apart from console.py, whose imports take seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_QUIET_SECONDS = 30


class ByteBar:
    """Shows `bar(done, total)`, in bytes, on the error stream, so that standard output stays for results.

    It appears at the first call. Without a terminal it prints a line every half minute.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            *self._rate(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self.progress.add_task(what, total=None)
        self._printed = time.monotonic()

    def _rate(self) -> tuple[ProgressColumn, ...]:
        return (TransferSpeedColumn(),)

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` bytes are done."""
        self.progress.start()
        self.progress.update(self._task, completed=done, total=total)
        if self.progress.disable and time.monotonic() - self._printed > _QUIET_SECONDS:
            self._printed = time.monotonic()
            self.console.print(f"{self.what}: {done / total:.0%}")

    def __enter__(self) -> "ByteBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class TaskBar(ByteBar):
    """The same for what reads or writes a collection task by task."""

    def _rate(self) -> tuple[ProgressColumn, ...]:
        return (TextColumn("{task.completed:.0f} of {task.total:.0f} tasks"),)
