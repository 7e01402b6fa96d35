"""`focal-cli report`: what a run's folder holds, and some episodes played for it, as one HTML page."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .commands import flatten, generate_command, test_command, train_commands
from .console import quality_rows, task_rows
from .datasets import QUALITIES, Collection, Selection
from .evaluation import CONDITIONS, Interval, TestTasks, plots
from .evaluation.animation import HEIGHT, WIDTH, is_point, play_some, point_paths, render_frames
from .evaluation.embeddings import spread_interval
from .evaluation.report import Page, command, heading3, paragraph, render_page, table
from .evaluation.run_figures import context_curves, logged, return_name
from .experiment import TEST_FORMAT, test_run, testable, tested_seeds
from .files import write_text
from .settings import to_dict
from .sweeps import SWEEP_FORMAT
from .trainer.journal import WALL_CLOCK, read_rows
from .trainer.runs import Run, load_agent, seed_folder

CommandOf = Callable[[Mapping[str, Any]], str]  # that makes a saved meta-test again
CURVE_POINTS = 200  # of a training curve; more cannot be seen
CANVAS = 260
INTERVALS = "Intervals are 95% over training seeds; one seed is one trained network, and a single seed has none."
MEASURES = (
    "Accuracy: contexts whose embedding is nearest to the mean of 20 of their own task, of other logged episodes. "
    "ESR: share of pairs of tasks whose squared distance exceeds 2L/3, what two uniform points of the L-dimensional "
    "cube (-1, 1) have on average. RMS: standard deviation over the K tasks, mean of the L "
    "dimensions, times the square root of 2K / (K - 1); uniform points have 0.82 (paper, section 5.2.1 and Table 1). "
    "Both of the tasks' mean embeddings."
)


def write_report(run_dirs: Sequence[Path], stores: Path, output: Path, rollouts: bool = True) -> Path:
    """Write the report of some runs to `output` and return it. A run without a meta-test is tested first.

    Raises `FocalError` when a run is not fully trained or its collection is not found.
    """
    run_dirs = [run_dir if run_dir.name not in ("", "..") else run_dir.resolve() for run_dir in run_dirs]
    words = ["focal-cli", "report", *map(str, run_dirs), "-o", str(output), *([] if rollouts else ["--no-rollouts"])]
    again = shlex.join([*words, *(["--stores", str(stores)] if stores != Path("stores") else [])])
    pages = [run_page(run_dir, stores, again, f"run{number}", rollouts) for number, run_dir in enumerate(run_dirs)]
    title = pages[0].title if len(pages) == 1 else f"{len(pages)} runs"
    introduction = (
        "Offline meta-reinforcement learning: trained on logged data alone, tested on tasks from logged contexts."
    )
    write_text(output, render_page(f"FOCAL report: {title}", introduction, pages))
    return output


def run_page(run_dir: Path, stores: Path, again: str, prefix: str, rollouts: bool) -> Page:
    """Gather one run's page; `again` is the command that writes the report."""
    seeds = tested_seeds(run_dir)
    run, tasks = testable(run_dir, stores, None, seeds)
    tests = saved_tests(run_dir, run)
    document = main_test(tests, run, seeds)
    if document is None:
        document = test_run(run_dir, stores, None, None, 10, 0, seeds=seeds).to_json()
        tests = saved_tests(run_dir, run)
    first = next(iter(document["seeds"].values()))
    where = "tasks it was trained on, with held-out contexts" if first["heldout_context_only"] else "unseen tasks"
    subtitle = (
        f"{run.settings.algo} on {run.family}, {run.source.quality} data, tested on {len(first['tasks'])} {where}"
    )
    if diverged := [str(seed) for seed in run.source.seeds if seed not in seeds]:
        subtitle += f"; without seed {', '.join(diverged)}, whose values diverged"
    page = Page(run_dir.name, subtitle, prefix=prefix)
    collection = tasks.collection
    moved = str(collection.source) != run.source.collection_path
    command_of = partial(test_command, run_dir, stores=stores if moved else None)
    add_results(page, run, document, tests, command_of)
    add_embeddings(page, document, command_of)
    add_training(page, run_dir, run, seeds)
    if rollouts:
        add_rollouts(page, run_dir, run, tasks, document)
    add_data(page, collection)
    add_settings(page, run)
    add_commands(page, run_dir, run, collection, [document, *tests], again, command_of)
    return page


def saved_tests(run_dir: Path, run: Run) -> list[dict[str, Any]]:
    """Return the meta-tests in RUN/tests that are of this run's finished networks, by file name."""
    found = []
    for path in sorted((run_dir / "tests").glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # cut by a kill or not ours
        if isinstance(document, dict) and document.get("format") in (TEST_FORMAT, SWEEP_FORMAT):
            same = document["collection"]["content_hash"] == run.content_hash
            if same and document["gradient_steps"] == run.settings.total_steps:
                found.append(document)
    return found


def main_test(tests: Sequence[Mapping[str, Any]], run: Run, seeds: Sequence[int]) -> Mapping[str, Any] | None:
    """The test under training's own conditions, of `seeds`, with the most episodes."""
    usual = [
        test
        for test in tests
        if test["format"] == TEST_FORMAT
        and (test["protocol"], test["context_unit"]) == ("offline", "transitions")
        and test["context_size"] == run.settings.context_size
        and not test.get("tasks_with")  # a quality matrix's, of fewer tasks
        and {int(seed) for seed in test["seeds"]} == set(seeds)
        and all(seed["quality"] == run.source.quality for seed in test["seeds"].values())
    ]
    return max(usual, key=lambda test: test["episodes"], default=None)


def add_results(
    page: Page, run: Run, document: Mapping[str, Any], tests: Sequence[Mapping[str, Any]], command_of: CommandOf
) -> None:
    """The table of conditions, scores task by task, and every other meta-test of the run."""
    conditions = (
        f"{document['episodes']} episodes a task, a fresh {run.source.quality} context of {document['context_size']} "
        f"transitions for each. {INTERVALS}"
    )
    page.add("Results", heading3("Return beside the controls", conditions), table(condition_rows(document)))
    page.add("Results", command(command_of(document)))
    page.add("Results", heading3("Do embeddings tell the tasks apart?", MEASURES), table(embedding_rows(document)))
    names, scores = task_scores(document)
    if scores:
        page.add(
            "Results",
            page.plot(
                plots.task_scores(scores, names, "normalised score"),
                "Score task by task",
                "0 is the untrained behaviour policy, 1 the behaviour expert of the same task.",
            ),
        )
        page.add("Results", page.plot(plots.profile(scores), "Performance profile"))
    for sweep in (test for test in tests if test["format"] == SWEEP_FORMAT):
        heading = f"How many transitions are enough ({sweep['quality']} context)"
        drawn = plots.sweep(sweep, return_name(run.family))
        page.add("Results", page.plot(drawn, heading), command(command_of(sweep)))
    others = [test for test in tests if test["format"] == TEST_FORMAT]
    if len(others) > 1:
        page.add(
            "Results", heading3("All meta-tests of this run"), table([test_row(test, command_of) for test in others])
        )


def condition_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns, share of the optimum, normalised score and its interquartile mean by condition."""
    reported = return_name(next(iter(document["seeds"].values()))["family"])
    headings = {"mean": reported, "dense_mean": "dense return", "share_of_optimum": "share of optimum",
                "score": "normalised score", "interquartile_score": "its interquartile mean"}  # fmt: skip
    summary = {name: document["summary"][name] for name in CONDITIONS if name in document["summary"]}
    shown = [measure for measure in headings if any(row.get(measure) for row in summary.values())]
    return [
        {"condition": name} | {headings[measure]: _interval(row[measure]) for measure in shown}
        for name, row in summary.items()
    ]


def embedding_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Task accuracy, ESR, RMS and effective dimensions with intervals over seeds."""
    seeds = list(document["seeds"].values())
    chance = 1 / len(seeds[0]["tasks"])
    rows = [{"measure": f"task accuracy (chance {chance:.2f})", "value": _interval(document["task_accuracy"])}]
    for name, words in (("esr", "ESR"), ("rms", "RMS"), ("dimensions", "effective dimensions")):
        if name in seeds[0]:
            rows.append({"measure": words, "value": str(spread_interval(name, [seed[name] for seed in seeds]))})
    return rows


def task_scores(document: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the tasks (K) that have a normalised score, and these scores (S, K) of three conditions.

    Both are empty where no task has one.
    """
    seeds = list(document["seeds"].values())
    counted = np.array(seeds[0]["scored"], bool)
    scores = {}
    for condition in (CONDITIONS[0], CONDITIONS[1], CONDITIONS[-1]):
        rows = [seed["conditions"].get(condition, {}).get("task_scores") for seed in seeds]
        if all(rows) and counted.any():
            scores[condition] = np.array(rows, np.float64)[:, counted]  # None, for a task that is not counted: NaN
    names = [f"task {index}" for index, passed in zip(seeds[0]["tasks"], counted, strict=True) if passed]
    return (names if scores else []), scores


def test_row(test: Mapping[str, Any], command_of: CommandOf) -> dict[str, Any]:
    """One meta-test as a line."""
    right = test["summary"][CONDITIONS[0]]
    first = next(iter(test["seeds"].values()))
    context = f"{first['quality']}, {test['context_size']} {test['context_unit']}"
    if test.get("tasks_with"):
        context += f", the {len(first['tasks'])} tasks with every quality"
    return {
        "protocol": test["protocol"],
        "context": context,
        return_name(first["family"]): _interval(right["mean"]),
        "normalised score": _interval(right["score"]),
        "task accuracy": _interval(test["task_accuracy"]),
        "command": command_of(test),
    }


def add_embeddings(page: Page, document: Mapping[str, Any], command_of: CommandOf) -> None:
    """The first seed's embeddings, in the plane and to be turned in space."""
    seed, first = next(iter(document["seeds"].items()))
    embeddings = np.array(first["embeddings"])  # (K, E, L)
    count, episodes, latent = embeddings.shape
    points, task_of = embeddings.reshape(-1, latent), np.repeat(np.arange(count), episodes)
    names = [f"task {index}" for index in first["tasks"]]
    note = (
        f"Seed {seed}: a point is a context of {document['context_size']} transitions, coloured by its task in order."
    )
    page.add(
        "Embeddings",
        page.plot(plots.embeddings_flat(points, task_of, names), "In the plane", note),
        page.plot(plots.embeddings_in_space(points, task_of, names), "In space", "Principal directions; drag to turn."),
        command(command_of(document)),
    )


def add_training(page: Page, run_dir: Path, run: Run, seeds: Sequence[int]) -> None:
    """Meta-test returns of the tested `seeds` during training, then everything that any seed logged."""
    if curves := context_curves(run_dir, seeds):
        note = (
            "Two episodes a task at each point, on other episode seeds than the results. Command: see the Commands tab."
        )
        drawn = plots.curves(curves, return_name(run.family))
        page.add("Training", page.plot(drawn, "Return on the test tasks", note))
    every = run.source.seeds
    rows: list[Any] = [row for seed in every for row in read_rows(seed_folder(run_dir, seed) / "metrics.jsonl")]
    keys = sorted({key for row in rows for key in row if "/" in key and not key.startswith(WALL_CLOCK)})
    lines = {key: {seed: _thin(c) for seed, c in logged(run_dir, every, "metrics", key).items() if c} for key in keys}
    small = [page.plot(plots.seed_lines(values, key), key) for key, values in lines.items() if values]
    page.add("Training", heading3("Everything that training logged", "A line per seed."), page.grid(small))


def add_rollouts(page: Page, run_dir: Path, run: Run, tasks: TestTasks, document: Mapping[str, Any]) -> None:
    """Recorded episodes of the first seed."""
    seed = int(next(iter(document["seeds"])))
    played = play_some(load_agent(run_dir, seed), tasks, document["context_size"], document["test_seed"])
    returns = played.right.returns if played.right.sparse_returns is None else played.right.sparse_returns
    name = return_name(run.family)
    captions = [f"task {index}: {name} {value:.2f}" for index, value in zip(played.tasks, returns, strict=True)]
    note = f"Seed {seed}, deterministic, one episode a task, with a context of {document['context_size']} transitions."
    if is_point(tasks.family):
        colours = "Blue: right context. Orange: the context of the task half-way round. Red circle: goal region."
        recorded = point_paths(tasks, played) | {"milliseconds": 150}
        page.add(
            "Rollouts", heading3("Episodes", f"{note} {colours}"), page.player(recorded, captions, (CANVAS, CANVAS))
        )
        return
    frames, how = render_frames(tasks, played)
    if frames is None:
        page.add("Rollouts", paragraph(f"No frames: {how}."))
        return
    recorded = {"frames": frames, "milliseconds": 80}
    page.add(
        "Rollouts",
        heading3("Episodes", f"{note} Rendered with {how}."),
        page.player(recorded, captions, (WIDTH, HEIGHT)),
    )


def add_data(page: Page, collection: Collection) -> None:
    """Where the data came from, and what is in them."""
    header = collection.header
    facts = {
        "collection": f"{collection.name} {collection.version}",
        "content hash": collection.content_hash,
        "where": collection.source,
        "licence": collection.licence,
        "authors": ", ".join(collection.authors) or "none given",
        "created": collection.created,
        "scale, seed, tasks from": f"{header.scale}, {header.seed}, {header.tasks_from}",
        "derived from": "; ".join(" ".join(map(str, origin.values())) for origin in collection.derived_from)
        or "nothing",
    }
    page.add("Data", heading3("Provenance"), table(_pairs(facts)), table(_pairs(flatten(collection.provenance))))
    page.add("Data", command(f"focal-cli data show {shlex.quote(str(collection.source))}"))
    page.add("Data", heading3("Episodes by quality"), table(quality_rows(collection)))
    tables = [entry.store.read_table() for entry in collection.tasks]
    steps, means = [], []
    for one in tables:
        checkpoints, which = np.unique(one["sac_steps"], return_inverse=True)
        steps.append(checkpoints.tolist())
        means.append((np.bincount(which, weights=one["returns"]) / np.bincount(which)).tolist())
    names = [f"task {entry.index}" for entry in collection.tasks]
    returns = {
        quality: np.concatenate([one["returns"][Selection(quality).mask(one)] for one in tables])
        for quality in reversed(QUALITIES)
    }
    page.add(
        "Data",
        page.plot(plots.behaviour(steps, means, names), "Behaviour policies along their training"),
        page.plot(
            plots.histograms({name: values for name, values in returns.items() if len(values)}), "Returns by quality"
        ),
        heading3("Tasks", "What the absolute test of each behaviour expert measured."),
        table(task_rows(collection)),
    )


def add_settings(page: Page, run: Run) -> None:
    """Every resolved setting, and where training ran."""
    page.add("Settings", heading3("Resolved settings"), table(_pairs(flatten(to_dict(run.settings)))))
    page.add("Settings", heading3("Observation transform"), table(_pairs(flatten(run.transform.to_json()))))
    page.add(
        "Settings", heading3("Software and hardware of the training"), table(_pairs(flatten(run.source.provenance)))
    )


def add_commands(
    page: Page, run_dir: Path, run: Run, collection: Collection, tests: Sequence[Mapping[str, Any]], again: str,
    command_of: CommandOf,
) -> None:  # fmt: skip
    """The commands that make everything on this page again, in order."""
    generated = generate_command(collection)
    page.add("Commands", heading3("1. Data"))
    page.add("Commands", command(generated) if generated else paragraph("imported or derived: see the Data tab"))
    page.add("Commands", heading3("2. Training"), *map(command, train_commands(run_dir, run, collection)))
    if size := run.source.test_context_size:
        page.add("Commands", paragraph(
            f"Trained by focal-cli compare or reproduce, whose meta-tests during training have contexts of {size}, not "
            f"of {run.settings.context_size} as with this command. The networks are the same."
        ))  # fmt: skip
    page.add("Commands", heading3("3. Meta-tests"), *map(command, dict.fromkeys(map(command_of, tests))))
    page.add("Commands", heading3("4. This report"), command(again))


def _interval(saved: Mapping[str, Any] | None) -> str | None:
    """A saved interval as a table shows it; None where there is no such number."""
    return None if saved is None else str(Interval(**saved))


def _pairs(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def _thin(curve: Mapping[int, float]) -> dict[int, float]:
    steps = sorted(curve)
    kept = steps[:: -(-len(steps) // CURVE_POINTS)] if steps else []
    return {step: curve[step] for step in dict.fromkeys([*kept, *steps[-1:]])}
