"""What the command line prints: tables and progress bars (rich)."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich import markup
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .comparison import Comparison
from .datagen import Progress as GenerateProgress
from .datasets import QUALITIES, Collection, Selection
from .errors import printable
from .evaluation import CONDITIONS, seed_interval
from .evaluation.metatest import RIGHT, ZERO
from .evaluation.run_figures import context_words, return_name
from .experiment import RunTest, TrainProgress
from .sweeps import Sweep

# a pipe or a log has no width of its own, and 80 columns would fold every table
console = Console() if Console().is_terminal else Console(width=160)

MOST_TASKS_SHOWN = 5  # more are in --json
MOST_BARS = 10  # of single tasks; a fleet has dozens under way


def escape(text: str) -> str:
    """Text that rich prints letter by letter, without markup and without what steers a terminal."""
    return markup.escape(printable(text))


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows that share their keys; numbers are right-aligned."""
    if not rows:
        console.print("nothing to show")
        return
    table = Table(title=None if title is None else escape(title), title_justify="left", header_style="bold")
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) or row[name] == "-" for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else escape(_text(value)) for value in row.values()))
    console.print(table)


def _text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} steps/s", style="cyan")


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    # where nobody watches, bars would only fill the log; plain lines are printed instead
    return Progress(*columns, console=console, disable=not console.is_terminal)


class _Bars:
    """Progress bars as a context manager."""

    def __init__(self) -> None:
        self.progress = _bars()

    def __enter__(self) -> Any:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class GenerateBars(_Bars, GenerateProgress):
    """One bar for the whole collection and one per task under way."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._bars: dict[int, Any] = {}

    def begin(self, tasks: int, steps_per_task: int, sealed: int) -> None:
        """Draw the overall bar."""
        self.tasks, self.steps, self.sealed = tasks, steps_per_task, sealed
        done = f", {sealed} finished earlier" if sealed else ""
        console.print(f"{self.name}: {tasks} tasks of {steps_per_task:,} environment steps{done}")
        self.done = self._before = sealed * steps_per_task
        self._tenths, self._started = 0, time.monotonic()
        self.overall = self.progress.add_task(
            "all tasks", total=tasks * steps_per_task, completed=sealed * steps_per_task
        )

    def update(self, task: int, what: str, value: Any) -> None:
        """Advance a task's bar and the overall one."""
        if what == "steps":
            if task not in self._bars and len(self._bars) < MOST_BARS:
                self._bars[task] = self.progress.add_task(f"task {task}", total=self.steps)
            if task in self._bars:
                self.progress.advance(self._bars[task], value)
            self.progress.advance(self.overall, value)
            self._print_line(value)
        elif what == "retried":
            console.print(escape(f"task {task} failed: {value}; it is tried again from its last checkpoint"))
        elif what == "sealed":
            self.sealed += 1
            if task in self._bars:
                self.progress.remove_task(self._bars.pop(task))
            if self.progress.disable:
                console.print(f"task {task} sealed ({self.sealed} of {self.tasks})")

    def _print_line(self, amount: int) -> None:
        """Without a terminal, say every tenth of the work how fast it goes and how long it will take."""
        self.done += amount
        total = self.tasks * self.steps
        if self.progress.disable and self.done // max(1, total // 10) > self._tenths:
            self._tenths = self.done // max(1, total // 10)
            rate = (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)
            left = (total - self.done) / max(rate, 1e-9)
            about = f"{left / 60:.0f} minutes" if left >= 120 else f"{left:.0f} seconds"
            console.print(f"{self.done:,} of {total:,} steps, {rate:,.0f} steps/s, about {about} left")


class TrainBars(_Bars, TrainProgress):
    """One bar per seed, of one run or of several."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: dict[tuple[Path, int], Any] = {}
        self._printed: dict[tuple[Path, int], int] = {}
        self._every: dict[Path, int] = {}

    def begin(self, folder: Path, seeds: tuple[int, ...], steps: int) -> None:
        """Draw the bars."""
        console.print(f"training {escape(str(folder))}: {steps:,} gradient steps, seeds {', '.join(map(str, seeds))}")
        self._every[folder] = max(1, steps // 10)
        for seed in seeds:
            self._bars[folder, seed] = self.progress.add_task(f"{folder.name} seed {seed}", total=steps)
            self._printed[folder, seed] = 0

    def update(self, folder: Path, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        """Advance a seed's bar; without a terminal, print a line every tenth of the run."""
        self.progress.update(self._bars[folder, seed], completed=step)
        tenths = step // self._every[folder]
        if self.progress.disable and metrics and tenths > self._printed[folder, seed]:
            self._printed[folder, seed] = tenths
            shown = ", ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:4])
            which = f"{folder.name} " * (len(self._every) > 1)
            console.print(f"{escape(which)}seed {seed} step {step:,}: {shown}")


def collection_row(collection: Collection) -> dict[str, Any]:
    """One line of `data list`."""
    tasks = collection.tasks
    episodes = sum(entry.counts["mixed"].episodes for entry in tasks)
    return {
        "path": str(collection.source),
        "name": collection.name,
        "version": collection.version,
        "family": collection.family,
        "tasks": f"{len(collection.train_tasks())} / {len(collection.test_tasks())}",
        "experts": f"{sum(entry.record.references.reached_expert for entry in tasks)} of {len(tasks)}",
        "episodes": episodes,
        "transitions": sum(entry.counts["mixed"].steps for entry in tasks),
        "licence": collection.licence,
        "content": collection.content_hash[:12],
    }


def collection_document(collection: Collection) -> dict[str, Any]:
    """Everything `data show --json` prints."""
    return {
        **collection_row(collection),
        "content": collection.content_hash,
        "authors": list(collection.authors),
        "created": collection.created,
        "derived_from": [dict(origin) for origin in collection.derived_from],
        "settings": dict(collection.settings),
        "notes": list(collection.header.notes),
        "quality": quality_rows(collection),
        "tasks_detail": task_rows(collection),
    }


def quality_rows(collection: Collection) -> list[dict[str, Any]]:
    """Tasks, episodes, transitions and mean return per quality, from the episode tables alone."""
    tables = collection.select().tables.values()
    rows = []
    for quality in QUALITIES:
        counts = [entry.counts[quality] for entry in collection.tasks]
        returns = np.concatenate([table["returns"][Selection(quality).mask(table)] for table in tables])
        rows.append(
            {
                "quality": quality,
                "tasks": sum(count.episodes > 0 for count in counts),
                "episodes": sum(count.episodes for count in counts),
                "transitions": sum(count.steps for count in counts),
                "mean return": float(returns.mean()) if len(returns) else None,
            }
        )
    return rows


def task_rows(collection: Collection) -> list[dict[str, Any]]:
    """References of every task, and what its expert's absolute test measured."""
    rows = []
    for entry in collection.tasks:
        references = entry.record.references
        rows.append(
            {
                "task": entry.index,
                "split": entry.split,
                "random": references.random if references.known else None,
                "expert": references.expert if references.known else None,
                "reached expert": "yes" if references.reached_expert else "NO" if references.known else None,
                "test": references.expert_test,
            }
        )
    return rows


def print_collection(collection: Collection, tasks: bool = False) -> None:
    """Print a collection's card."""
    row = collection_row(collection)
    place = escape(f"{row['version']} at {row['path']}, content {row['content']}")
    console.print(f"[bold]{escape(collection.name)}[/] {place}")
    by = escape(", ".join(collection.authors) or "no author given")
    console.print(f"{collection.family}, train / test tasks {row['tasks']}, licence {row['licence']}, by {by}")
    for origin in collection.derived_from:
        named = " ".join(str(origin.get(key, "?"))[:40] for key in ("name", "version", "content_hash"))
        console.print(escape(f"derived from {named}"))
    print_table(quality_rows(collection))
    tested = [entry for entry in collection.tasks if entry.record.references.known]
    failed = [entry.index for entry in tested if not entry.record.references.reached_expert]
    if not tested:
        console.print("no reference returns are known: no normalised scores, no tested expert")
    if failed:
        listed = ", ".join(map(str, failed[:20])) + (", ..." if len(failed) > 20 else "")
        console.print(f"{len(failed)} of {len(collection.tasks)} tasks never reached expert: {listed}")
    for note in collection.header.notes:
        lines = Table.grid(padding=(0, 1))  # folded, it stays in its column: no line of it looks like one of ours
        lines.add_row("note:", escape(note))
        console.print(lines)
    if tasks:
        print_table(task_rows(collection))


def _task_score_rows(tested: RunTest) -> list[dict[str, Any]]:
    """Right and wrong context for each task apart, so that one good direction cannot hide a bad one."""
    first, rows = tested.first, []
    for k in np.flatnonzero(first.counted):
        row: dict[str, Any] = {"task": first.task_indices[k]}
        for condition in CONDITIONS[:2]:
            if condition in first.conditions:
                scores = [float(result.task_scores(condition)[k]) for result in tested.results.values()]
                row[condition] = str(seed_interval(scores))
        rows.append(row)
    return rows


def print_test(tested: RunTest) -> None:
    """Print a meta-test's table: every condition with its interval over seeds."""
    result = tested.first
    where = "held-out context of the training tasks" if result.heldout_only else "unseen tasks"
    rows, name = [], return_name(result.family)
    for condition in CONDITIONS:
        if condition not in result.conditions:
            continue
        row: dict[str, Any] = {"condition": condition, name: str(tested.over_seeds("mean", condition))}
        if dense := tested.over_seeds("dense_mean", condition):
            row["dense return"] = str(dense)
        if result.optimum is not None:
            row["share of optimum"] = str(tested.over_seeds("share_of_optimum", condition))
        if result.counted.any():
            row["normalised score"] = str(tested.over_seeds("score", condition))
            row["interquartile mean"] = str(tested.interquartile(condition))
        rows.append(row)
    title = (
        f"{result.family}, {len(result.task_indices)} test tasks ({where}), {context_words(result)}, "
        f"{tested.episodes} episodes a task, {len(tested.results)} seed(s)"
    )
    print_table(rows, title)
    chance = 1 / len(result.task_indices)
    console.print(f"task told from a context's embedding: {tested.accuracy} of contexts, chance {chance:.2f}")
    if tested.spread:
        console.print(f"tasks' mean embeddings: ESR {tested.spread['esr']}, RMS {tested.spread['rms']}")
    if result.counted.any() and len(result.task_indices) <= MOST_TASKS_SHOWN:
        print_table(_task_score_rows(tested), "normalised score per task")
    console.print("intervals: 95% over training seeds")
    _print_skipped(tested)
    uncounted = len(result.counted) - int(result.counted.sum())
    if uncounted:
        console.print(
            f"{uncounted} of {len(result.counted)} behaviour experts failed their test, earn hardly more than the "
            "untrained policy, or are not known: not in the score"
        )


def print_comparison(compared: Comparison) -> None:
    """Print one line per method, best first."""
    print_table([row.cells() for row in compared.rows], compared.title)
    for reason in compared.diverged:
        console.print(escape(f"not in the table: {reason}"))


def print_sweep(swept: Sweep) -> None:
    """Print return and task accuracy for every context size."""
    rows = [
        {
            "context": size,
            return_name(swept.run.family): str(swept.over_seeds("return", size)),
            "task accuracy": str(swept.over_seeds("accuracy", size)),
        }
        for size in swept.sizes
    ]
    count = len(swept.tasks.entries)
    title = (
        f"{swept.run.family}, {count} test tasks, {swept.tasks.quality} contexts by size, {swept.episodes} episodes a "
        f"task, {len(swept.points)} seed(s); accuracy by chance {1 / count:.2f}"
    )
    print_table(rows, title)
    console.print("intervals: 95% over training seeds")
    if swept.sizes[-1] > swept.largest_judged:
        console.print(f"accuracy of larger contexts is of {swept.largest_judged} transitions, half of a task's data")
    if swept.left_out:
        listed = ", ".join(map(str, swept.left_out))
        console.print(f"sizes left out, since a test task has fewer {swept.tasks.quality} transitions: {listed}")


def print_matrix(matrix: Mapping[str, Mapping[str, RunTest]]) -> None:
    """Print the mean return of runs (rows) with contexts of several qualities (columns)."""
    rows = []
    for name, row in matrix.items():
        one = next(iter(row.values()))
        rows.append(
            {"run": name, "trained on": one.run.source.quality}
            | {f"{quality} context": str(tested.over_seeds("mean", RIGHT)) for quality, tested in row.items()}
            | {ZERO: str(one.over_seeds("mean", ZERO))}
        )
    result = one.first
    name = return_name(result.family)
    print_table(rows, f"mean {name} by training data and context, {len(result.task_indices)} test tasks")
    console.print("intervals: 95% over training seeds")
    if lacking := [quality for quality in QUALITIES if quality not in next(iter(matrix.values()))]:
        console.print(f"no test task has {', '.join(lacking)} contexts beside the others")
    _print_skipped(one)


def _print_skipped(tested: RunTest) -> None:
    """Say which test tasks were left out for want of data."""
    result = tested.first
    if result.skipped:
        qualities = " or ".join(tested.shared or (result.quality,))
        console.print(f"test tasks without {qualities} data, left out: {', '.join(map(str, result.skipped))}")
