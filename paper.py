"""The figures and tables of the paper, as data: what each needs, and how it is drawn from that. reproduce.py makes it.

Departures from the paper's pictures: the horizontal axis is gradient steps, since nothing here copies transitions from
buffer to buffer; returns of the two-task families are the mean of both directions, where the paper plots one;
embeddings are of contexts that training never saw. The sparse point robot of figure 3 shows all four methods; the paper
left out two that earned nothing there (section 5.1, footnote). At laptop scale the runs of figures 3, 4, 6, 10 and 11
are as short as `focal-cli compare` makes them, and "full length" is that.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .commands import flatten
from .comparison import comparison_name, curve_context_size, equal_terms
from .datasets import Collection, Selection, TaskEntry
from .envs import FAMILIES, get_family
from .errors import FocalError, UsageError
from .evaluation import figures
from .evaluation.embeddings import embed_tasks, spread, spread_interval
from .evaluation.metatest import RIGHT, ZERO
from .evaluation.run_figures import draw_data, logged, name_context_sizes, return_name
from .evaluation.tables import write_table
from .experiment import RunTest, divergence, has_ended, last_step
from .settings import override, parse_assignments, to_dict
from .sweeps import matrix_row, sweep_run
from .trainer.distance import PAPER_BETAS
from .trainer.methods import train_settings
from .trainer.runs import load_agent, read_run, seed_folder
from .trainer.settings import TrainSettings
from .trainer.training import DIVERGED

POINT, WIND, VEL, DIR, ANT, WALKER = FAMILIES
LEVELS = ("random", "medium", "expert")
POWERS = {"inverse-square": -2, "inverse": -1, "linear": 1, "square": 2}
# the paper's section 5.1 started from expert data, and found mixed data better for Ant and Walker
QUALITY = {family: "mixed" if family in (ANT, WALKER) else "expert" for family in FAMILIES}
TASKS_DRAWN, DRAWS, SEED = 20, 50, 0
NO_DATA, INTERVALS = "no such data", "intervals: 95% over training seeds"
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Training:
    """A run that an item needs."""

    family: str
    quality: str
    label: str  # in legends
    algo: str = "focal"
    variant: str = ""  # what distinguishes the run's name
    changes: tuple[str, ...] = ()  # as `--set` takes them
    compared: bool = False  # a run of `focal-cli compare`, with the terms that are equal for all methods there
    may_diverge: bool = False  # one that was stopped as diverged is drawn as far as it went

    def name(self, scale: str) -> str:
        """The run's folder."""
        algo = self.algo if self.compared else ""
        words = [comparison_name(self.family, self.quality, scale), algo, self.variant]
        return "-".join(word for word in words if word)

    def assignments(self, scale: str) -> tuple[str, ...]:
        """What it sets otherwise than `focal-cli train`, as `--set` takes it."""
        equal = equal_terms(self.family, scale, self.algo) if self.compared else ()
        return (*equal, *self.changes)

    def test_context_size(self, scale: str) -> int:
        """Size of the contexts of its meta-tests during training, 0 where it is the size trained with."""
        return curve_context_size(self.family, scale) if self.compared else 0

    def settings(self, scale: str) -> TrainSettings:
        """The settings it trains with."""
        return override(train_settings(self.family, scale, self.algo), parse_assignments(self.assignments(scale)))


@dataclass(frozen=True)
class Material:
    """What reproduce.py made or found for an item."""

    scale: str
    stores: Path
    collections: Mapping[str, Collection]  # by family
    runs: Mapping[Training, Path]  # those that could be trained
    out: Path  # folder of the files to write
    not_begun: tuple[Training, ...] = ()  # those whose first stage diverged

    def agent(self, training: Training) -> Any:
        """The agent of the first seed that has a checkpoint."""
        return load_agent(self.runs[training], self.trained(training)[0])

    def seeds(self, training: Training) -> tuple[int, ...]:
        """Seeds of a run that have ended; `compare` may have been stopped in the midst of more than an item needs."""
        run_dir = self.runs[training]
        run = read_run(run_dir)
        return tuple(seed for seed in run.source.seeds if has_ended(run_dir, seed, run.settings.total_steps))

    def trained(self, training: Training) -> list[int]:
        """Seeds of a run that have a checkpoint. Raises `FocalError` where all diverged before their first."""
        run_dir = self.runs[training]
        found = [seed for seed in self.seeds(training) if last_step(run_dir, seed)]
        if not found:
            raise FocalError(
                f"{run_dir}: the values of all seeds diverged before the first checkpoint, so that there is nothing to "
                f"draw; see {seed_folder(run_dir, self.seeds(training)[0]) / DIVERGED}"
            )
        return found

    def stops(self, training: Training) -> dict[str, Any]:
        """What diverged.json says of each seed of a run that was stopped."""
        found = {str(seed): divergence(self.runs[training], seed) for seed in self.seeds(training)}
        return {seed: stop for seed, stop in found.items() if stop is not None}

    def label(self, training: Training) -> str:
        """A run's name in legends, which says so where a seed was stopped as diverged."""
        stopped = training in self.not_begun or bool(self.stops(training))
        return training.label + ", diverged" * stopped


@dataclass(frozen=True)
class Item:
    """One figure or table."""

    name: str  # "figure 2a"
    what: str
    draw: Callable[["Item", Material], list[Path]]
    trainings: tuple[Training, ...] = ()
    families: tuple[str, ...] = ()  # collections needed beside those of the trainings
    seeds: Mapping[str, int] | int = 3  # at laptop and paper, by family or for all

    only: tuple[str, ...] = ()  # the families it was restricted to

    @property
    def stem(self) -> str:
        """The name of its files, without suffix."""
        words = [self.name, *(get_family(family).alias for family in self.only)]
        return "_".join(words).replace(" ", "_").replace("-", "_")

    @property
    def shown(self) -> tuple[str, ...]:
        """The families it is about."""
        return tuple(dict.fromkeys([*self.families, *(training.family for training in self.trainings)]))

    def restricted(self, families: Sequence[str]) -> "Item":
        """Return the part of the item that is about `families`. Raises `UsageError` for a family it does not show."""
        shown = self.shown
        if unknown := [family for family in families if family not in shown]:
            about = ", ".join(get_family(family).alias for family in shown) or "no family in particular"
            raise UsageError(f"{self.name} is about {about}, found --env {get_family(unknown[0]).alias}")
        return dataclasses.replace(
            self,
            trainings=tuple(training for training in self.trainings if training.family in families),
            families=tuple(family for family in self.families if family in families),
            only=tuple(family for family in shown if family in families),
        )

    def seeds_of(self, training: Training, scale: str) -> int:
        """How many seeds a run has: 2 at smoke."""
        if scale == "smoke":
            return 2
        return self.seeds if isinstance(self.seeds, int) else self.seeds[training.family]

    def file(self, material: Material) -> Path:
        """Where its picture goes."""
        return material.out / f"{self.stem}.png"


def focal(family: str, label: str = "FOCAL", variant: str = "", *changes: str) -> Training:
    """A run of FOCAL on the quality that the paper's figures use."""
    return Training(family, QUALITY[family], label, variant=variant, changes=changes, may_diverge=True)


def compared(family: str, algo: str, label: str, variant: str = "", *changes: str) -> Training:
    """A run of a method beside others."""
    return Training(family, QUALITY[family], label, algo, variant, changes, compared=True, may_diverge=True)


def growing_values(family: str) -> tuple[Training, ...]:
    """FOCAL and Batch PEARL, whose values grow without an alarm that stops them (figures 10 and 11)."""
    return (
        compared(family, "focal", "FOCAL"),
        compared(family, "batch-pearl", "Batch PEARL", "unbounded", "value_limit=1e15"),
    )


def power_law(loss: str) -> Training:
    """FOCAL with one of the four losses of Table 5, on Half-Cheetah-Vel: 5 latent dimensions, value penalty."""
    power = POWERS[loss]
    changes = (
        f"distance.power={power}", f"distance.beta={PAPER_BETAS[power]}", "latent_dim=5",
        "regularisation.kind=value-penalty",
    )  # fmt: skip
    return focal(VEL, loss, f"{loss}-value-penalty", *changes)


FOUR_LOSSES = tuple(power_law(loss) for loss in POWERS)
LABELS = {"focal": "FOCAL", "batch-pearl": "Batch PEARL", "contextual-bcq": "Contextual BCQ", "mbml": "MBML"}
MAIN = tuple(
    compared(family, algo, label) for family in (POINT, VEL, DIR, ANT, WIND, WALKER) for algo, label in LABELS.items()
)
MAIN_SEEDS = {POINT: 5, WIND: 5, VEL: 3, DIR: 3, ANT: 3, WALKER: 3}
PROBABILISTIC = ("FOCAL, probabilistic", "probabilistic", "encoder.kind=probabilistic")
BRAC = ("Batch PEARL + behaviour regularisation", "regularised", "regularisation.kind=policy")


def four_variants(family: str) -> tuple[Training, ...]:
    """FOCAL with either encoder, Batch PEARL without and with FOCAL's regularisation (figure 4)."""
    return (
        compared(family, "focal", "FOCAL"),
        compared(family, "focal", *PROBABILISTIC),
        compared(family, "batch-pearl", "Batch PEARL"),
        compared(family, "batch-pearl", *BRAC),
    )


def coupled_and_not(kind: str) -> tuple[Training, ...]:
    """FOCAL on Walker with decoupled and with coupled gradients, under one kind of regularisation (figures 5 and 9).

    Both joint, as in the paper: a frozen encoder has no gradient.
    """
    changes = ("schedule=joint", f"regularisation.kind={kind}")
    return (
        focal(WALKER, "FOCAL", f"{kind}-joint", *changes),
        focal(WALKER, "FOCAL, coupled gradients", f"{kind}-coupled", *changes, "gradients=coupled"),
    )


def draw_returns(item: Item, material: Material, log_x: bool = False) -> list[Path]:
    """Draw meta-test returns logged during training, a panel per family."""
    panels: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, tuple[Path, tuple[int, ...]]]] = {}
    for training in item.trainings:
        curve: dict[int, dict[int, float]] = {0: {}}
        if training in material.runs:
            run = material.runs[training], material.seeds(training)
            runs.setdefault(training.family, {})[material.label(training)] = run
            curve = logged(*run, "evaluation", "test/return")
        elif training not in material.not_begun:
            continue
        panels.setdefault(training.family, {})[material.label(training)] = curve
    if not any(curve for curves in panels.values() for seeds in curves.values() for curve in seeds.values()):
        raise FocalError(
            f"{item.name}: no run logged a meta-test; do the test tasks have data of its quality? "
            f"focal-cli data show {material.collections[item.trainings[0].family].source}"
        )
    panels = {family: name_context_sizes(curves, runs.get(family, {})) for family, curves in panels.items()}
    return figures.return_curves(item.file(material), panels, [return_name(family) for family in panels], log_x)


def draw_full_length(item: Item, material: Material) -> list[Path]:
    """As `draw_returns`, on a logarithmic axis."""
    return draw_returns(item, material, log_x=True)


def task_points(item: Item, material: Material) -> tuple[dict[str, Any], list[str]]:
    """Embeddings of up to 20 tasks under each run, and the tasks' names."""
    panels, names = {}, []
    for training in material.runs:
        quality, collection = read_run(material.runs[training]).source.quality, material.collections[training.family]
        found = embed_tasks(material.agent(training), collection, quality, DRAWS, SEED, TASKS_DRAWN)
        panels[material.label(training)], names = found.points, found.names
    return panels, names


def draw_embeddings(item: Item, material: Material) -> list[Path]:
    """Draw t-SNE pictures of embeddings, a panel per run."""
    return figures.embeddings_by_task(item.file(material), *task_points(item, material), item.what, SEED)


def draw_in_space(item: Item, material: Material) -> list[Path]:
    """Draw the last three dimensions of the embeddings of figure 4a."""
    return figures.embeddings_in_space(item.file(material), *task_points(item, material), item.what)


def draw_values(item: Item, material: Material) -> list[Path]:
    """Draw the critics' mean values during training."""
    panels: dict[str, dict[str, Any]] = {}
    for training in material.runs:
        curve = logged(material.runs[training], material.seeds(training), "metrics", "critic/value")
        panels.setdefault(training.family, {})[material.label(training)] = curve
    return figures.value_curves(item.file(material), panels)


def draw_trajectories(item: Item, material: Material) -> list[Path]:
    """Draw point-robot episodes by quality."""
    return draw_data(item.file(material), material.collections[POINT])


def draw_context_sizes(item: Item, material: Material) -> list[Path]:
    """Draw return and task accuracy against context size."""
    sweeps = {
        training.family: sweep_run(material.runs[training], material.stores, None, SIZES, 10, SEED)
        for training in material.runs
    }
    return figures.context_size_curve(item.file(material), sweeps, {family: return_name(family) for family in sweeps})


def draw_behaviour(item: Item, material: Material) -> list[Path]:
    """Draw what the behaviour policies of every family return, a picture per family."""
    files = []
    for family, collection in material.collections.items():
        part = item.restricted([family])
        files += figures.behaviour_data(part.file(material), collection)
    return files


def table_separation(item: Item, material: Material) -> list[Path]:
    """ESR and RMS of each loss, over training tasks (held-out contexts), as in the paper, and over unseen ones."""
    rows = []
    for training in material.runs:
        run = read_run(material.runs[training])
        measured: dict[str, list[float]] = {}
        for seed in material.trained(training):
            agent = load_agent(material.runs[training], seed)
            points = embed_tasks(agent, material.collections[training.family], run.source.quality, 10, SEED)
            for where, unseen in (("training tasks", False), ("unseen tasks", True)):
                for name, value in spread(points.of(unseen)).items():
                    measured.setdefault(f"{name.upper()}, {where}", []).append(value)
        chosen = {name: values for name, values in measured.items() if not name.startswith("DIMENSIONS")}
        label = material.label(training)
        rows.append({"loss": label} | {name: str(spread_interval(name, values)) for name, values in chosen.items()})
    return write_table(item.file(material), rows, f"{item.what}; {INTERVALS}")


def table_qualities(item: Item, material: Material) -> list[Path]:
    """The quality trained and tested on per family, and what those data return."""
    rows = []
    for family, collection in material.collections.items():
        row: dict[str, Any] = {"family": family, "training and test data": QUALITY[family]}
        for quality in (*LEVELS, "mixed"):
            row[f"mean dense return of {quality}"] = _mean_return(collection, quality)
        rows.append(row)
    return write_table(item.file(material), rows, item.what)


def table_datasets(item: Item, material: Material) -> list[Path]:
    """Checkpoints, episodes and transitions of what figure 3's runs train on; held-out ones do not count."""
    rows = []
    for family, collection in material.collections.items():
        entries = collection.train_tasks()
        chosen = [_trained_on(entry, QUALITY[family]) for entry in entries]
        lengths = [table["lengths"] for table in chosen]
        counts = np.array([[len(own), own.sum()] for own in lengths if len(own)])
        steps = np.unique(np.concatenate([table["sac_steps"] for table in chosen]))
        checkpoints = NO_DATA
        if len(steps):
            checkpoints = f"{steps[0]}:{steps[-1]}:{np.diff(steps).min() if len(steps) > 1 else 0}"
        rows.append({
            "family": family,
            "tasks, training / test": f"{len(entries)} / {len(collection.test_tasks())}",
            "quality": QUALITY[family],
            "checkpoints (start:end:spacing)": checkpoints,
            "tasks with that quality": len(counts),
            "episodes per such task": float(counts[:, 0].mean()) if len(counts) else 0.0,
            "transitions per such task": float(counts[:, 1].mean()) if len(counts) else 0.0,
            "steps per episode, at most": collection.horizon,
            "content hash": collection.content_hash[:12],
        })  # fmt: skip
    return write_table(item.file(material), rows, item.what)


def table_settings(item: Item, material: Material) -> list[Path]:
    """Every setting of FOCAL in figure 3, per family, at the scale asked for."""
    columns = {family: _settings(compared(family, "focal", "FOCAL"), material.scale) for family in FAMILIES}
    names = next(iter(columns.values()))
    rows = [{"setting": name} | {family: column[name] for family, column in columns.items()} for name in names]
    return write_table(item.file(material), rows, item.what)


def table_power_law(item: Item, material: Material) -> list[Path]:
    """The settings of figure 2 that differ between its losses, or from those of Table 4."""
    usual = _settings(compared(VEL, "focal", "FOCAL"), material.scale)
    columns = {training.label: _settings(training, material.scale) for training in item.trainings}
    names = [name for name in usual if any(column[name] != usual[name] for column in columns.values())]
    rows = [{"setting": name, "Table 4": usual[name]} | {k: column[name] for k, column in columns.items()}
            for name in names]  # fmt: skip
    return write_table(item.file(material), rows, item.what)


def table_matrix(item: Item, material: Material) -> list[Path]:
    """Mean return for every quality of training data (rows) and of test context (columns).

    A family's cells are all of the test tasks that have every quality.
    """
    rows = []
    for training in item.trainings:
        row: dict[str, Any] = {
            "family": training.family, "value": return_name(training.family), "trained on": training.quality,
        }  # fmt: skip
        cells: Mapping[str, RunTest] = {}
        if training in material.runs:
            cells = matrix_row(material.runs[training], material.stores, LEVELS, None, 10, SEED)
        for quality in LEVELS:
            row[f"{quality} context"] = str(cells[quality].over_seeds("mean", RIGHT)) if quality in cells else NO_DATA
        one = next(iter(cells.values()), None)
        row[ZERO] = str(one.over_seeds("mean", ZERO)) if one else NO_DATA
        row["test tasks"] = len(one.first.task_indices) if one else 0
        rows.append(row)
    return write_table(item.file(material), rows, f"{item.what}; {INTERVALS}, 10 episodes a task")


def _trained_on(entry: TaskEntry, quality: str) -> dict[str, np.ndarray]:
    """Columns of a task's episode table, of the episodes that training on `quality` takes."""
    table = entry.store.read_table()
    chosen = Selection(quality, heldout=False).mask(table)
    return {name: table[name][chosen] for name in ("lengths", "sac_steps")}


def _mean_return(collection: Collection, quality: str) -> float | None:
    tables = [entry.store.read_table() for entry in collection.train_tasks()]
    returns = np.concatenate([table["returns"][Selection(quality).mask(table)] for table in tables])
    return float(returns.mean()) if len(returns) else None


def _settings(training: Training, scale: str) -> dict[str, str]:
    """A run's settings by dotted name."""
    return flatten(to_dict(training.settings(scale)))


ITEMS = {
    item.name: item
    for item in [
        Item("figure 2a", "embeddings by loss, Half-Cheetah-Vel", draw_embeddings, FOUR_LOSSES),
        Item("figure 2b", "returns by loss, Half-Cheetah-Vel", draw_returns, FOUR_LOSSES),
        Item("figure 3", "returns of FOCAL and its rivals, six families", draw_returns, MAIN, seeds=MAIN_SEEDS),
        Item("figure 4a", "embeddings of four variants, Walker-2D-Params", draw_embeddings, four_variants(WALKER)),
        Item("figure 4b", "returns of four variants", draw_returns, four_variants(VEL) + four_variants(WALKER)),
        Item("figure 5a", "embeddings, gradients decoupled or coupled, value penalty", draw_embeddings,
             coupled_and_not("value-penalty")),
        Item("figure 5b", "returns, gradients decoupled or coupled, value penalty", draw_returns,
             coupled_and_not("value-penalty")),
        Item("figure 6", "returns at full length, logarithmic axis", draw_full_length, MAIN,
             seeds=MAIN_SEEDS),
        Item("figure 7", "embeddings of figure 4a, three of their dimensions", draw_in_space, four_variants(WALKER)),
        Item("figure 8", "trajectories of the behaviour policies by quality", draw_trajectories, families=(POINT,)),
        Item("figure 9a", "embeddings, gradients decoupled or coupled, policy regularisation", draw_embeddings,
             coupled_and_not("policy")),
        Item("figure 9b", "returns, gradients decoupled or coupled, policy regularisation", draw_returns,
             coupled_and_not("policy")),
        Item("figure 10", "action values, Ant-Fwd-Back", draw_values, growing_values(ANT)),
        Item("figure 11", "action values, Walker-2D-Params", draw_values, growing_values(WALKER)),
        Item("figure behaviour", "returns of the behaviour policies along training and by quality", draw_behaviour,
             families=tuple(FAMILIES)),
        Item("figure context-size", "return and task accuracy by context size", draw_context_sizes,
             (Training(POINT, "mixed", "FOCAL"), Training(VEL, QUALITY[VEL], "FOCAL"))),
        Item("table 1", "ESR and RMS of embeddings by loss, Half-Cheetah-Vel", table_separation, FOUR_LOSSES),
        Item("table 2", "Quality of the data per family", table_qualities, families=tuple(FAMILIES)),
        Item("table 3", "The fixed datasets", table_datasets, families=tuple(FAMILIES)),
        Item("table 4", "Settings of figure 3", table_settings),
        Item("table 5", "Settings of figure 2, where they differ", table_power_law, FOUR_LOSSES),
        Item("table 6", "Mean return by quality of training data and of test context", table_matrix,
             tuple(Training(family, quality, quality) for family in (POINT, VEL) for quality in LEVELS),
             seeds={POINT: 5, VEL: 3}),
    ]
}  # fmt: skip
