"""Several methods on the same data, trained where they are not, tested alike, in one table and one picture.

RUNS/NAME-ALGO              a run of each method; NAME is family and quality, and the scale where it is not laptop
RUNS/comparisons/NAME/      comparison-PROTOCOL.json, .md and .csv (-SIZE-UNIT where asked for), return_curves.png and
                            .svg, and where tasks have normalised scores profiles-PROTOCOL.png and .svg
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import Collection, open_collection
from .envs import get_family
from .errors import DivergedError, FocalError, UsageError, did_you_mean
from .evaluation import (
    CONDITIONS,
    Interval,
    context_source,
    difference_interval,
    figures,
    over_seeds,
    probability_of_improvement,
    select_test_tasks,
    verdict,
)
from .evaluation.metatest import EXPERT, RIGHT, UNTRAINED, WRONG, ZERO, MetaTestResult
from .evaluation.run_figures import logged, name_context_sizes, return_name
from .evaluation.tables import write_table
from .experiment import (
    PlannedRun,
    RunTest,
    TrainProgress,
    TrainRequest,
    idle_settings,
    plan_run,
    raise_failure,
    test_run,
    train_jobs,
)
from .files import write_json
from .provenance import provenance
from .settings import field_names, override, parse_assignments, to_dict
from .trainer.journal import SECONDS, read_rows
from .trainer.methods import METHODS, find_method, train_settings
from .trainer.settings import TrainSettings, hidden_widths

# FOCAL's own laptop networks, which its results were measured with, are smaller than its rivals' 3 x 256.
_LAPTOP_NETWORKS = ("focal:encoder_hidden=256,256,256", "focal:control_hidden=256,256,256")
# Sizes meant for laptop runs of at most 15 minutes on two busy cores, and on the point robots for a first stage of MBML
# of about an hour on one; what a step costs: docs/benchmarks.md. Meta-tests often enough for a curve (figure 3).
_LAPTOP_BATCHES = ("batch_size=64", "context_size=128", "mbml:context_size=64", "eval_every=1000")
_LAPTOP_POINT = (
    *_LAPTOP_BATCHES, "steps=3000", "meta_batch=8", "eval_every=250", "mbml:teachers.steps=1000",
    "mbml:teachers.rewards.steps=2000",
)  # fmt: skip
_LAPTOP_MANY = ("batch_size=32", "context_size=100", "mbml:context_size=64", "steps=5000", "eval_every=500")
_LAPTOP_SIZES = {
    "sparse-point-robot": _LAPTOP_POINT,
    "point-robot-wind": _LAPTOP_POINT,
    "half-cheetah-vel": _LAPTOP_MANY,
    "half-cheetah-fwd-back": _LAPTOP_BATCHES,
    "ant-fwd-back": _LAPTOP_BATCHES,
    "walker-2d-params": _LAPTOP_MANY,
}


@dataclass(frozen=True)
class CompareRequest:
    """What `focal-cli compare` asks for."""

    train: TrainRequest  # of every method; `algo` and `name` are set for each
    algos: tuple[str, ...]
    stores: Path
    protocol: str = "offline"
    episodes: int = 10
    test_seed: int = 0
    name: str | None = None  # of the comparison
    context_size: int | None = None  # of every method's test contexts; None: the largest that one trained with
    unit: str | None = None  # of the size: transitions or episodes; None: the protocol's own


@dataclass(frozen=True)
class Row:
    """One method's line of the table; the methods are in order, best first."""

    algo: str
    test: RunTest
    scores: np.ndarray  # (S, K) normalised scores, or where no expert passed its test returns, of every seed and task
    normalised: bool
    better_than_next: Interval | None  # chance that a seed of it scores higher than one of the next method
    next_test: RunTest | None = None  # the next method's
    first_stage_seconds: float | None = None  # of MBML's first stage, which all its seeds share

    @property
    def interquartile(self) -> Interval:
        """Interquartile mean over tasks, with its interval over seeds."""
        return over_seeds(self.scores)

    def returns(self, condition: str) -> Interval | None:
        """Mean return of a condition, None where it was not tested."""
        return self.test.over_seeds("mean", condition) if condition in self.test.first.conditions else None

    @property
    def minus_next(self) -> Interval | None:
        """Mean return with the right context minus the next method's."""
        if self.next_test is None:
            return None
        mine, others = ([one.mean(RIGHT) for one in test.results.values()] for test in (self.test, self.next_test))
        return difference_interval(mine, others)

    @property
    def verdict(self) -> str | None:
        """What `minus_next` shows, None where there is nothing to judge it against."""
        difference, span = self.minus_next, self.test.span
        return None if difference is None or span is None else verdict(difference, span)

    def cells(self) -> dict[str, Any]:
        """The line as the table shows it."""
        name = return_name(self.test.run.family)
        unit = "normalised score" if self.normalised else name
        returns = {condition: self.returns(condition) for condition in (RIGHT, WRONG, UNTRAINED)}
        difference = ", ".join(str(word) for word in (self.minus_next, self.verdict) if word is not None)
        return {
            "method": self.algo,
            f"interquartile mean, {unit}": str(self.interquartile),
            "P(better than the next)": "-" if self.better_than_next is None else str(self.better_than_next),
            f"{name} minus the next's": difference or "-",
            **{f"{name}, {condition}": str(interval) for condition, interval in returns.items() if interval},
            "seeds": len(self.test.results),
            "steps": self.test.run.settings.total_steps,
            "networks": networks(self.test.run.settings),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the line with everything it rests on as JSON values."""
        next_ = self.better_than_next
        return {
            "method": self.algo,
            "run": str(self.test.run_dir),
            "gradient_steps": self.test.run.settings.total_steps,
            "networks": networks(self.test.run.settings),
            "settings": to_dict(self.test.run.settings),
            "normalised": self.normalised,
            "scores": [[None if np.isnan(score) else score for score in row] for row in self.scores.tolist()],
            "interquartile_mean": dataclasses.asdict(self.interquartile),
            "better_than_next": None if next_ is None else dataclasses.asdict(next_),
            "returns": {
                condition: dataclasses.asdict(interval)
                for condition in CONDITIONS
                if (interval := self.returns(condition))
            },
            "minus_next": None if self.minus_next is None else dataclasses.asdict(self.minus_next),
            "verdict": self.verdict,
            "seconds": training_seconds(self.test),
            "first_stage_seconds": self.first_stage_seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """The methods, best first."""

    name: str
    protocol: str
    rows: tuple[Row, ...]
    files: tuple[Path, ...]
    diverged: tuple[str, ...] = ()  # why methods are missing from the table

    @property
    def title(self) -> str:
        """What the table compares."""
        test = self.rows[0].test
        result = test.first
        where = "held-out context" if result.heldout_only else "unseen tasks"
        same = [f"{name} {result.mean(name):.2f}" for name in (ZERO, EXPERT) if name in result.conditions]
        staged = [row.algo for row in self.rows if row.first_stage_seconds is not None]
        shared = "".join(f"; seeds of {algo} share one first stage, its intervals leave that out" for algo in staged)
        return (
            f"{self.name}: {len(result.task_indices)} {where}, {self.protocol} protocol, contexts of "
            f"{result.context_size} {result.context_unit}, {test.episodes} episodes a task; intervals: 95% over "
            f"{len(test.results)} seed(s); returns of {', '.join(same)}{shared}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        test = self.rows[0].test
        return {
            "name": self.name,
            "protocol": self.protocol,
            "context_size": test.first.context_size,
            "context_unit": test.first.context_unit,
            "collection": {"name": test.collection.name, "content_hash": test.collection.content_hash},
            "quality": test.first.quality,
            "test_tasks": list(test.first.task_indices),
            "seeds": list(test.results),
            "episodes": test.episodes,
            "test_seed": test.test_seed,
            "methods": [row.to_json() for row in self.rows],
            "diverged": list(self.diverged),
            "provenance": provenance(),
        }


def compare(
    request: CompareRequest, progress: TrainProgress | None = None, note: Callable[[str], None] | None = None
) -> Comparison:
    """Train what is missing of every method, continue what was cut, test all, and write table and curves.

    `note` is told, before anything is trained, which settings asked for have no effect in which method. A method whose
    values diverge is named beside the table of the others. Raises `UsageError` for a method or a setting that does not
    exist before anything is trained, `FocalError` where every method diverged, and as `train_run` and `test_run` do.
    """
    collection = open_collection(request.train.collection)
    context_source(request.protocol, request.unit, request.context_size, 1)  # refuses what does not go together
    scale = request.train.scale or collection.scale
    name = request.name or comparison_name(collection.family, request.train.quality, scale)
    planned = _plan(request, name, collection.family, scale)
    if note:
        for algo, assignments in split_assignments(request.train.assignments, request.algos).items():
            for line in idle_settings(planned[algo], assignments):
                note(f"{algo}: {line}")
    size = _context_size(request, planned)
    _refuse_impossible_test(request, collection, size)  # now, not when all are trained
    failures = train_jobs(list(planned.values()), request.train.workers, progress, request.train.ray)
    diverged = _diverged(failures, planned)
    tests = {algo: _test(request, one.run_dir, size) for algo, one in planned.items() if algo not in diverged}
    rows = tuple(
        dataclasses.replace(row, first_stage_seconds=_first_stage_seconds(planned[row.algo])) for row in rank(tests)
    )
    comparison = Comparison(name, request.protocol, rows, (), tuple(diverged.values()))
    folder = request.train.runs / "comparisons" / name
    words = [request.context_size and str(request.context_size), request.unit]  # those that were asked for
    stem = folder / "-".join(["comparison", request.protocol, *(word for word in words if word)])
    write_json(stem.with_suffix(".json"), comparison.to_json())
    tables = write_table(stem.with_suffix(".csv"), [row.cells() for row in comparison.rows], comparison.title)
    profiles = draw_profiles(stem.with_name(stem.name.replace("comparison", "profiles", 1) + ".png"), rows)
    return dataclasses.replace(comparison, files=(*tables, *draw_curves(folder, name, tests), *profiles))


def comparison_name(family: str, quality: str, scale: str) -> str:
    """Return what a comparison is called where nobody says: "walker-mixed", "walker-mixed-smoke"."""
    words = [get_family(family).alias, quality, "" if scale == "laptop" else scale]
    return "-".join(word for word in words if word)


def equal_terms(family: str, scale: str, algo: str) -> tuple[str, ...]:
    """Return what a comparison sets otherwise than `focal-cli train`, as `--set` takes it.

    At laptop scale the same networks for all, and sizes meant for runs of a quarter of an hour; elsewhere nothing.
    """
    if scale != "laptop":
        return ()
    words = (*_LAPTOP_NETWORKS, *_LAPTOP_SIZES.get(family, ()))
    mine = [word.rpartition(":") for word in words]
    return tuple(word for owner, _, word in mine if owner in ("", algo))


def curve_context_size(family: str, scale: str) -> int:
    """Return the size of the contexts of every method's meta-tests during training, whichever methods are compared.

    The largest that a method trains with, as in the table where no `--set` says otherwise.
    """
    own = (
        override(train_settings(family, scale, algo), parse_assignments(equal_terms(family, scale, algo)))
        for algo in METHODS
    )
    return max(settings.context_size for settings in own)


def _plan(request: CompareRequest, name: str, family: str, scale: str) -> dict[str, PlannedRun]:
    """Check every method's settings and data and find out what is still to do. Raises as `plan_run`."""
    assignments = split_assignments(request.train.assignments, request.algos)
    size = curve_context_size(family, scale)
    planned = {}
    for algo in request.algos:
        words = (*equal_terms(family, scale, algo), *assignments[algo])  # the later of two words for a setting counts
        own = dataclasses.replace(
            request.train, algo=algo, name=f"{name}-{algo}", assignments=words, scale=scale, resume=True,
            test_context_size=size,
        )  # fmt: skip
        planned[algo] = plan_run(own)
    return planned


def _diverged(failures: Mapping[Any, BaseException], planned: Mapping[str, PlannedRun]) -> dict[str, str]:
    """Return why each method that diverged did. Raises `FocalError` for any other failure, or where all did."""
    other = {key: error for key, error in failures.items() if not isinstance(error, DivergedError)}
    raise_failure(other, list(planned.values()))
    found: dict[str, str] = {}
    for (run_dir, _), error in failures.items():
        algo = next(algo for algo, one in planned.items() if one.run_dir == run_dir)
        found.setdefault(algo, f"{algo}: {error}")
    if len(found) == len(planned):
        raise FocalError(next(iter(found.values())))
    return found


def _context_size(request: CompareRequest, planned: Mapping[str, PlannedRun]) -> int | None:
    """Return the size of every method's test contexts: the one asked for, or the largest that one trained with.

    None, the protocol's own, where contexts are whole episodes.
    """
    if request.context_size or request.unit == "episodes" or request.protocol not in ("offline", "shift"):
        return request.context_size
    return max(one.settings.context_size for one in planned.values())


def _refuse_impossible_test(request: CompareRequest, collection: Collection, size: int | None) -> None:
    tasks = select_test_tasks(collection, request.train.quality)
    context_source(request.protocol, request.unit, size, 1).check(tasks)


def _test(request: CompareRequest, run_dir: Path, size: int | None) -> RunTest:
    """Test a method; of a run that has more seeds than were asked for, those asked for count."""
    return test_run(
        run_dir, request.stores, None, size, request.episodes, request.test_seed, request.protocol,
        request.unit, seeds=request.train.seeds,
    )  # fmt: skip


def _first_stage_seconds(one: PlannedRun) -> float | None:
    if one.first_stage_folder is None:
        return None
    rows = read_rows(one.first_stage_folder / "metrics.jsonl")
    return float(str(rows[-1][SECONDS])) if rows else None


def split_assignments(assignments: tuple[str, ...], algos: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return each method's `--set` words: those that name it (`mbml:steps=100`), and the others it has a field for.

    Raises `UsageError` for a method that is not compared, or a setting that none of them has.
    """
    mine: dict[str, list[str]] = {algo: [] for algo in algos}
    known = {algo: set(field_names(find_method(algo).settings)) for algo in algos}
    for word in assignments:
        head = word.partition("=")[0]
        owner, colon, name = head.rpartition(":")
        if colon and owner not in mine:
            raise UsageError(f"--set {word} is for '{owner}', which is not compared; these are: {', '.join(algos)}")
        owners = [owner] if colon else [algo for algo in algos if name.strip() in known[algo]]
        if not owners:
            every = set().union(*known.values())
            raise UsageError(f"none of {', '.join(algos)} has a setting '{name.strip()}'; {did_you_mean(name, every)}")
        for algo in owners:
            mine[algo].append(word.removeprefix(f"{owner}:"))
    return {algo: tuple(words) for algo, words in mine.items()}


def rank(tests: dict[str, RunTest]) -> tuple[Row, ...]:
    """Put the methods in order of their interquartile means, best first, each beside the next."""
    normalised = all(test.first.counted.any() for test in tests.values())
    scores = {
        algo: np.stack([_scores(result, normalised) for result in test.results.values()])
        for algo, test in tests.items()
    }
    order = sorted(tests, key=lambda algo: -over_seeds(scores[algo]).mean)
    chances = [probability_of_improvement(scores[better], scores[worse]) for better, worse in itertools.pairwise(order)]
    return tuple(
        Row(algo, tests[algo], scores[algo], normalised, chance, None if following is None else tests[following])
        for algo, chance, following in zip(order, [*chances, None], [*order[1:], None], strict=True)
    )


def _scores(result: MetaTestResult, normalised: bool) -> np.ndarray:
    """One seed's score (K,) of every task."""
    return result.task_scores(RIGHT) if normalised else result.conditions[RIGHT].reported.mean(axis=1)


def networks(settings: TrainSettings) -> str:
    """Return every list of hidden widths in settings, once each: "3 x 256, 1 x 128"."""
    words = []
    for widths in dict.fromkeys(hidden_widths(settings)):
        same = len(set(widths)) == 1
        words.append(f"{len(widths)} x {widths[0]}" if same else " + ".join(map(str, widths)))
    return ", ".join(words)


def draw_curves(folder: Path, name: str, tests: dict[str, RunTest]) -> list[Path]:
    """Draw the meta-tests that training logged, all methods in one picture; nothing where there were none."""
    curves = {algo: logged(test.run_dir, test.results, "evaluation", "test/return") for algo, test in tests.items()}
    curves = {algo: seeds for algo, seeds in curves.items() if all(seeds.values())}
    if not curves:
        return []
    label = return_name(next(iter(tests.values())).run.family)
    curves = name_context_sizes(curves, {algo: (tests[algo].run_dir, tests[algo].results) for algo in curves})
    return figures.return_curves(folder / "return_curves.png", {name: curves}, [label])


def draw_profiles(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw the methods' performance profiles; nothing where tasks have no normalised scores."""
    if not rows[0].normalised:
        return []
    return figures.performance_profiles(path, {row.algo: row.scores for row in rows})


def training_seconds(test: RunTest) -> dict[str, float]:
    """Return the seconds that training each seed took, by the clock of its log; a first stage is not in them."""
    seconds = {}
    for seed, rows in logged(test.run_dir, test.results, "metrics", "time/seconds").items():
        seconds[str(seed)] = max(rows.values(), default=0.0)
    return seconds
