"""FOCAL taken apart: one row per design choice, trained like the others but for that choice, in one table.

RUNS/point-mixed-ablation-coupled    the run of a row: alias, quality, row; with -smoke or -paper at those scales
RUNS/ablations/point-mixed/          coupled.json (what was measured of a row), values.png and .svg (curves of Q)

A row differs from the one it is `against` in its one choice; `ablation_rows` is the list.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .datasets import Collection, open_collection
from .envs import FAMILIES, get_family
from .errors import DivergedError, FocalError, UsageError, did_you_mean
from .evaluation import Interval
from .evaluation.embeddings import spread_interval
from .evaluation.metatest import RIGHT, UNTRAINED, WRONG, ZERO
from .evaluation.run_figures import logged
from .evaluation.statistics import seed_interval, verdict
from .evaluation.tables import markdown
from .experiment import (
    PlannedRun,
    RunTest,
    TrainProgress,
    TrainRequest,
    divergence,
    plan_run,
    raise_failure,
    test_run,
    train_jobs,
)
from .files import write_json
from .provenance import provenance
from .settings import override, parse_assignments, to_dict
from .trainer.methods import train_settings
from .trainer.runs import read_run
from .trainer.settings import FocalSettings

FORMAT = "focal-ablation/1"
ALPHA = 10.0  # of the rows that regularise a family whose own settings do not: the point robots

_POINT, _WIND, _VEL, _DIR, _ANT, _ = FAMILIES
# Shorter than the laptop settings, so that a row is at most 3 CPU minutes a seed on the point robots and 20 on
# half-cheetah-vel. What is not here is as in `focal-cli train`.
_SHORT_POINT = (
    "encoder_steps=1000", "steps=3500", "context_size=128", "batch_size=64", "eval_every=1000",
    "regularisation.discriminator_steps=1", "regularisation.discriminator_learning_rate=1e-3",
)  # fmt: skip
SHORT: dict[str, tuple[str, ...]] = {
    _POINT: _SHORT_POINT,
    _WIND: _SHORT_POINT,
    _VEL: ("steps=4000",),
    # a run counts as diverged at some three times reward_scale 5 times 6 m/s / (1 - discount), more than can be earned
    _DIR: ("value_limit=1e4",),
    _ANT: ("value_limit=1e4",),
}
_KINDS = {"none": "unregularised", "value-penalty": "value-penalty", "policy": "policy-regularisation"}
_RELEASED = {  # name, meaning, setting, and the kind of row that it shows in
    "D1": ("Bellman gradients never reach the encoder", "discard_bellman", "coupled"),
    "D2": ("gradient penalty on the output", "penalise_output", "value-penalty"),
    "D3": ("value penalty at s instead of s'", "penalty_at_state", "value-penalty"),
    "D4": ("no actor gradient of the divergence", "no_actor_divergence", "value-penalty"),
    "D6": ("time limits terminate", "limits_terminate", ""),
    "D7": ("observation of a reset unscaled", "raw_reset", ""),
}


@dataclass(frozen=True)
class AblationRow:
    """A variant and what it is compared with."""

    name: str
    what: str
    changes: tuple[str, ...]  # as `--set` takes them, from the family's settings at the scale
    against: str | None  # the row that differs from it in this one choice; None for the base


@dataclass(frozen=True)
class AblateRequest:
    """What `focal-cli ablate` asks for."""

    train: TrainRequest  # of every row; `name` and the row's `assignments` are set for each
    rows: tuple[str, ...]
    stores: Path
    episodes: int = 10
    test_seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What was found out about one row: numbers per seed, in the order of `seeds`."""

    row: AblationRow
    seeds: tuple[int, ...]
    diverged: Mapping[str, Any]  # by seed: the step and the value that stopped it
    numbers: Mapping[str, list[float]]  # "right context", "esr, unseen tasks", "minutes", ...; no returns if diverged
    span: float | None  # reference - untrained, of the reported return
    identity: Mapping[str, Any]  # settings, data and test that it rests on
    provenance: Mapping[str, Any]  # versions and machine that tested it

    def interval(self, name: str) -> Interval | None:
        """Mean and interval over seeds; None where it was not measured."""
        return spread_interval(name, self.numbers[name]) if self.numbers.get(name) else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Measured":
        """Rebuild what `to_json` gave.

        Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for anything else.
        """
        row = AblationRow(**{**values["row"], "changes": tuple(values["row"]["changes"])})
        numbers = {name: [float(number) for number in found] for name, found in values["numbers"].items()}
        if "minutes" not in numbers:
            raise KeyError("minutes")
        names = ("diverged", "span", "identity", "provenance")
        return Measured(row, tuple(values["seeds"]), numbers=numbers, **{name: values[name] for name in names})


def ablation_rows(family: str, scale: str) -> dict[str, AblationRow]:
    """Return the rows of a family at a scale, by name, the base first."""
    short = SHORT.get(family, ()) if scale == "laptop" else ()
    base = _settings(family, scale, short)
    rows = {"base": AblationRow("base", "the family's settings", short, None)}

    def add(name: str, what: str, against: str, *words: str) -> None:
        rows[name] = AblationRow(name, what, (*rows[against].changes, *words), against)

    for name, power in (("power-inverse", -1), ("power-linear", 1), ("power-square", 2)):
        add(name, f"distance metric loss of power {power}", "base", f"distance.power={power}")
    add("released-distance", "distance metric loss as the released code has it", "base", "distance.form=released")
    add("one-draw", "one context per task, tasks drawn with replacement", "base", "context_draws=1",
        "task_replacement=true")  # fmt: skip
    add("probabilistic", "Gaussian posterior, KL and metric loss", "base", "encoder.kind=probabilistic")
    # with the family's KL weight the posterior may stay at the prior, which says little of the kind of encoder
    add("probabilistic-weak-kl", "the same with the KL hardly weighed", "probabilistic", "encoder.kl_weight=1e-3")
    without = base.next_observation_in_context
    add("no-next-observation" if without else "next-observation", "next observation in the context: " +
        ("no" if without else "yes"), "base", f"next_observation_in_context={str(not without).lower()}")  # fmt: skip
    plain = {kind: "base" if kind == base.regularisation.kind else name for kind, name in _KINDS.items()}
    for kind in _KINDS:
        if plain[kind] != "base":
            add(plain[kind], "no behaviour regularisation" if kind == "none" else f"behaviour regularisation: {kind}",
                "base", *_regularised(base, kind))  # fmt: skip
    penalised, adaptive = plain["value-penalty"], base.regularisation.adaptive
    add("wasserstein", "dual Wasserstein instead of dual KL", penalised, "regularisation.divergence=wasserstein")
    add("fixed-alpha" if adaptive else "adaptive-alpha", f"alpha {'fixed' if adaptive else 'adaptive'}", penalised,
        f"regularisation.adaptive={str(not adaptive).lower()}")  # fmt: skip
    _add_schedules(rows, add, base, plain)
    for name, (what, setting, shows_in) in _RELEASED.items():
        against = {"coupled": "coupled", "value-penalty": penalised, "": "base"}[shows_in]
        if name == "D7" and family in (_POINT, _WIND):
            what += ", where it is 0 scaled or not: the base once more"
        add(name, what, against, f"released.{setting}=true")
    return rows


def _add_schedules(rows: dict[str, AblationRow], add: Any, base: FocalSettings, plain: Mapping[str, str]) -> None:
    """Add the other schedule at as many gradient steps, and coupled gradients beside decoupled ones, all joint."""
    joint = dict(plain)
    if base.schedule == "joint":
        first = base.steps // 5
        add("encoder-first", f"{first} steps of the encoder alone, then of control alone", "base",
            "schedule=encoder-first", f"encoder_steps={first}", f"steps={base.steps - first}")  # fmt: skip
    else:
        words = ("schedule=joint", f"steps={base.total_steps}")
        joint = {kind: "joint" if name == "base" else f"joint-{name}" for kind, name in plain.items()}
        for kind, name in joint.items():
            what = "encoder and control trained together, as many steps"
            add(name, what if name == "joint" else f"{what}; {kind}", plain[kind], *words)
    for kind, name in joint.items():
        suffix = "" if name in ("base", "joint") else f"-{_KINDS[kind]}"
        add(f"coupled{suffix}", f"coupled gradients; regularisation: {kind}", name, "gradients=coupled")
    add("no-metric", "the encoder trained by the Bellman error alone", "coupled", "distance.weight=0")
    add("probabilistic-no-metric", "the same with a Gaussian posterior and its KL", "no-metric",
        "encoder.kind=probabilistic")  # fmt: skip


def _regularised(base: FocalSettings, kind: str) -> tuple[str, ...]:
    """What turns the base into one with another kind of regularisation, at a stated alpha where it has none."""
    words = (f"regularisation.kind={kind}",)
    if base.regularisation.kind != "none":
        return words
    return (*words, f"regularisation.alpha={ALPHA}", f"regularisation.alpha_max={10 * ALPHA}")


def own_changes(row: AblationRow, known: Mapping[str, AblationRow]) -> tuple[str, ...]:
    """Return what a row changes on top of the row that it is against."""
    return row.changes[len(known[row.against].changes) if row.against else 0 :]


def _settings(family: str, scale: str, changes: Iterable[str]) -> FocalSettings:
    settings = override(train_settings(family, scale), parse_assignments(changes))
    assert isinstance(settings, FocalSettings)
    settings.check()
    return settings


def choose_rows(known: Mapping[str, AblationRow], names: Iterable[str]) -> list[AblationRow]:
    """Return the rows called `names` ("all": every one) and those that they are compared with, in the list's order.

    Raises `UsageError` naming the nearest for an unknown one.
    """
    wanted: set[str] = set()
    for name in names:
        if name != "all" and name not in known:
            raise UsageError(f"unknown row '{name}'; {did_you_mean(name, known)}")
        found: str | None = name
        wanted |= set(known) if name == "all" else set()
        while found is not None and found != "all":
            wanted.add(found)
            found = known[found].against
    return [row for name, row in known.items() if name in wanted]


def ablate(request: AblateRequest, progress: TrainProgress | None = None) -> list[Measured]:
    """Train what is missing of the rows, continue what was cut, test, and keep what was measured.

    A row that was measured with these settings, data and at least these seeds, here or where its file came from, is not
    trained again. A seed whose values diverge is not an error here but a result, and is not trained again either.
    Raises `UsageError` for an unknown row before anything is trained, and as `train_run` and `test_run` do.
    """
    collection = open_collection(request.train.collection)
    scale = request.train.scale or collection.scale
    rows = choose_rows(ablation_rows(collection.family, scale), request.rows)
    stem = ablation_name(collection, request.train.quality, scale)
    planned = {row.name: _plan(request.train, scale, f"{stem}-ablation-{row.name}", row) for row in rows}
    folder = request.train.runs / "ablations" / stem
    kept = {}
    for name, plan in planned.items():
        found = _kept(folder / f"{name}.json", _identity(request, plan, collection), plan.source.seeds)
        if found is not None:
            kept[name] = found
    _train({name: plan for name, plan in planned.items() if name not in kept}, request.train, progress)
    measured = [kept.get(row.name) or _measure(request, row, planned[row.name], collection, folder) for row in rows]
    _draw_values(folder, stem, planned, measured)
    return measured


def ablation_name(collection: Collection, quality: str, scale: str) -> str:
    """The folder of a family's rows below RUNS/ablations; laptop, the usual scale, is not named."""
    words = [get_family(collection.family).alias, quality, "" if scale == "laptop" else scale]
    return "-".join(word for word in words if word)


def _plan(train: TrainRequest, scale: str, name: str, row: AblationRow) -> PlannedRun:
    words = (*row.changes, *train.assignments)
    plan = plan_run(dataclasses.replace(train, algo="focal", scale=scale, name=name, assignments=words, resume=True))
    todo = tuple(job for job in plan.seeds if not divergence(plan.run_dir, job.seed or 0))
    return dataclasses.replace(plan, seeds=todo)


def _train(planned: Mapping[str, PlannedRun], train: TrainRequest, progress: TrainProgress | None) -> None:
    """Train what is still to do. That a seed diverged is a result, and no failure."""
    plans = [plan for plan in planned.values() if plan.seeds]
    failures = train_jobs(plans, train.workers, progress, train.ray)
    raise_failure({key: error for key, error in failures.items() if not isinstance(error, DivergedError)}, plans)


def _identity(request: AblateRequest, plan: PlannedRun, collection: Collection) -> dict[str, Any]:
    """What a row's numbers rest on: settings, data and test."""
    return {
        "settings": to_dict(plan.settings), "quality": plan.source.quality, "content_hash": collection.content_hash,
        "family": collection.family, "episodes": request.episodes, "test_seed": request.test_seed,
    }  # fmt: skip


def _kept(path: Path, identity: Mapping[str, Any], seeds: tuple[int, ...]) -> Measured | None:
    """What was measured of a row before: with these settings, data and test, and at least these seeds. Else None."""
    before = read_measured(path) if path.exists() else None
    if before is None or before.identity != identity or not set(seeds) <= set(before.seeds):
        return None
    return before


def _measure(
    request: AblateRequest, row: AblationRow, plan: PlannedRun, collection: Collection, folder: Path
) -> Measured:
    """Test a trained row, with all seeds that its run has, and keep what was found."""
    run_dir, seeds = plan.run_dir, read_run(plan.run_dir).source.seeds
    stops = {str(seed): stop for seed in seeds if (stop := divergence(run_dir, seed)) is not None}
    numbers, span = _logged_numbers(run_dir, seeds), None
    if not stops:
        tested = test_run(run_dir, request.stores, None, None, request.episodes, request.test_seed)
        numbers, span = {**_test_numbers(tested), **numbers}, tested.span
    measured = Measured(row, seeds, stops, numbers, span, _identity(request, plan, collection), provenance())
    write_json(folder / f"{row.name}.json", measured.to_json())
    return measured


def _logged_numbers(run_dir: Path, seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """What training logged last: the spread on training tasks, the mean value; and the minutes it took."""
    keys = {
        "esr, training tasks": "embedding/esr", "rms, training tasks": "embedding/rms", "value": "critic/value",
        "minutes": "time/seconds",
    }  # fmt: skip
    curves = {name: logged(run_dir, seeds, "metrics", key) for name, key in keys.items()}
    last = {name: [curve[max(curve)] for curve in by_seed.values() if curve] for name, by_seed in curves.items()}
    return {**last, "minutes": [seconds / 60 for seconds in last["minutes"]]}


def _test_numbers(tested: RunTest) -> dict[str, list[float]]:
    results = tested.results.values()
    numbers = {name: [result.mean(name) for result in results] for name in (RIGHT, WRONG, UNTRAINED, ZERO)
               if name in tested.first.conditions}  # fmt: skip
    for name in ("esr", "rms"):
        numbers[f"{name}, unseen tasks"] = [result.spread[name] for result in results if name in result.spread]
    return numbers


def _draw_values(folder: Path, title: str, planned: Mapping[str, PlannedRun], measured: Iterable[Measured]) -> None:
    """Draw the critics' mean values of up to as many rows as there are colours (figures 10 and 11)."""
    from .evaluation import figures

    curves = {
        found.row.name: logged(planned[found.row.name].run_dir, found.seeds, "metrics", "critic/value")
        for found in measured
        if planned[found.row.name].run_dir.is_dir()  # else what was measured came from elsewhere
    }
    if 0 < len(curves) <= len(figures.COLOURS):
        figures.value_curves(folder / "values.png", {title: curves})


def read_measured(path: Path) -> Measured:
    """Read what was measured of a row. Raises `FocalError` for a file that is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise KeyError(values["format"])
        return Measured.from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FocalError(f"{path} is damaged ({type(error).__name__}: {error}); delete it, then run focal-cli ablate "
                         "again") from None  # fmt: skip


def read_all(folder: Path) -> dict[str, Measured]:
    """Read what was measured of every row in a folder below RUNS/ablations."""
    return {path.stem: read_measured(path) for path in sorted(folder.glob("*.json"))}


def table_rows(measured: Mapping[str, Measured], known: Mapping[str, AblationRow]) -> list[dict[str, Any]]:
    """Return the table's lines, in the order of the list: intervals over seeds, and differences with their verdicts."""
    return [_cells(measured[name], measured) for name in known if name in measured]


def _cells(found: Measured, measured: Mapping[str, Measured]) -> dict[str, Any]:
    names = {
        "return": RIGHT, "wrong context": WRONG, "untrained": UNTRAINED, "zero action": ZERO,
        "ESR, unseen": "esr, unseen tasks", "RMS, unseen": "rms, unseen tasks", "ESR, train": "esr, training tasks",
        "RMS, train": "rms, training tasks", "Q at the end": "value",
    }  # fmt: skip
    cells: dict[str, Any] = {"row": found.row.name, "against": found.row.against or "-"}
    intervals = {title: found.interval(name) for title, name in names.items()}
    texts = {title: "-" if interval is None else str(interval) for title, interval in intervals.items()}
    if found.diverged:
        steps = ", ".join(f"{stop['step']} (seed {seed})" for seed, stop in found.diverged.items())
        texts["return"] = f"diverged at step {steps}"
    cells["return"] = texts.pop("return")
    cells["difference"] = _difference(found, measured.get(found.row.against or ""))
    minutes = found.numbers["minutes"]  # none where a run diverged before its first log row
    spent = f"{sum(minutes) / len(minutes):.1f}" if minutes else "-"
    return {**cells, **texts, "seeds": len(found.seeds), "minutes a seed": spent}


def _difference(found: Measured, other: Measured | None) -> str:
    """The difference in return to the row it is against, with what it shows (design section 9).

    Seed by seed: two rows start a seed from the same weights and draws, some share its whole encoder, so they are no
    independent trainings.
    """
    if other is None or not found.numbers.get(RIGHT) or not other.numbers.get(RIGHT):
        return "-"
    mine, others = (dict(zip(one.seeds, one.numbers[RIGHT], strict=True)) for one in (found, other))
    shared = [seed for seed in found.seeds if seed in others]
    if not shared:
        return "-"
    difference = seed_interval([mine[seed] - others[seed] for seed in shared])
    return f"{difference}, {verdict(difference, found.span)}" if found.span is not None else str(difference)


def ablation_page(name: str, measured: Mapping[str, Measured], known: Mapping[str, AblationRow]) -> str:
    """Return the table as a section of Markdown: what was measured, what each row is, and what was not run."""
    if not measured:
        raise FocalError(f"no row of {name} was measured yet; focal-cli ablate --rows base")
    first = next(iter(measured.values()))
    alias, quality = get_family(first.identity["family"]).alias, first.identity["quality"]
    for one in measured.values():
        for key in ("content_hash", "episodes", "test_seed"):
            if (found := one.identity[key]) != (expected := first.identity[key]):
                raise FocalError(
                    f"{name}: row {one.row.name} was tested with {key} {found}, row {first.row.name} with {expected}, "
                    "but one table is of one test; measure the one like the other, or choose another --runs: "
                    f"focal-cli ablate --env {alias} --data {quality} --rows {first.row.name},{one.row.name} "
                    f"--episodes {first.identity['episodes']} --test-seed {first.identity['test_seed']}"
                )
    done = [row for name, row in known.items() if name in measured]
    not_run = "Every row was run."
    if missing := [name for name in known if name not in measured]:
        not_run = (f"Not run: {', '.join(missing)} (`focal-cli ablate --env {alias}` says what each is, "
                   f"`make ablation ENV={alias} DATA={quality} ROW={missing[0]}` runs one).")  # fmt: skip
    lines = [
        f"## {name}",
        "",
        f"{first.identity['episodes']} test episodes a task; intervals: 95% over seeds; the difference is to the row "
        "in column against, seed by seed over the seeds that both have, which start from the same weights; "
        '"not distinguishable" within 10% of (behaviour expert - untrained).',
        "ESR and RMS of unseen tasks are of the mean of each task's test contexts, those of training tasks of one "
        "context each: read them down a column, not across.",
        f"Content hash of the data {first.identity['content_hash'][:12]}.",
        "",
        markdown(table_rows(measured, known)),
        f"{not_run}\n",
    ]
    for row in done:
        sets = " ".join(f"`{word}`" for word in own_changes(row, known)) or "nothing changed"
        lines.append(f"- **{row.name}**: {row.what} ({sets})")
    lines += [
        "",
        *(
            f"    make ablation ENV={alias} DATA={quality} ROW={row.name} SEEDS={len(measured[row.name].seeds)}"
            for row in done
        ),
    ]
    return "\n".join(lines) + "\n"
