"""The commands that make a collection, a run or a test again, rebuilt from what was saved beside it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .datasets import Collection, settings_in_effect
from .envs import get_family
from .settings import SCALES, flatten, to_dict
from .trainer.methods import train_settings
from .trainer.runs import Run


def generate_command(collection: Collection) -> str | None:
    """The command that generates the same collection anew; None for one that was imported or derived."""
    from .datagen import generate_settings  # stage one, which the workers of stage two need not load

    header = collection.header
    if collection.derived_from or header.tasks_from not in ("seed", "published"):
        return None
    family = get_family(header.family)
    usual = to_dict(generate_settings(family.name, header.scale, fixed_tasks=family.fixed_tasks is not None))
    words = ["focal-cli", "data", "generate", "--env", family.alias, "--scale", header.scale]
    words += ["--seed", str(header.seed), "--tasks-from", header.tasks_from]
    words += _sets(flatten(settings_in_effect(header.settings)), flatten(usual))
    return shlex.join([*words, "-o", str(collection.source)])


def train_commands(run_dir: Path, run: Run, collection: Collection, resume: bool = False) -> list[str]:
    """The commands that train the same run anew, under the scale whose settings are nearest to the run's: one, or where
    its seeds have gaps one for each row of them. With `resume` they go on with what there is of it."""
    found = flatten(to_dict(run.settings))
    choices = {
        scale: _sets(found, flatten(to_dict(train_settings(run.family, scale, run.settings.algo)))) for scale in SCALES
    }
    scale = min(choices, key=lambda name: len(choices[name]))
    words = ["focal-cli", "train", "--collection", str(collection.source), "--data", run.source.quality]
    words += ["--algo", run.settings.algo, "--scale", scale]
    named = ["--runs", str(run_dir.parent), "--name", run_dir.name, *choices[scale]]
    rows: list[list[int]] = []
    for seed in sorted(run.source.seeds):
        if rows and seed == rows[-1][-1] + 1:
            rows[-1].append(seed)
        else:
            rows.append([seed])
    return [
        shlex.join(
            [*words, "--seed", str(row[0]), "--seeds", str(len(row)), *named]
            + ["--resume"] * (resume or row is not rows[0])
        )
        for row in rows
    ]


def test_command(run_dir: Path, document: Mapping[str, Any], stores: Path | None) -> str:
    """The command of one of the files in RUN/tests; `stores` is given where the collection has moved."""
    words = ["focal-cli", "test", str(run_dir), "--episodes", str(document["episodes"])]
    words += ["--stores", str(stores)] if stores else []
    words += ["--test-seed", str(document["test_seed"])]
    if {int(seed) for seed in document["seeds"]} < set(document.get("seeds_of_run", [])):
        words += ["--only-seeds", ",".join(document["seeds"])]
    if document.get("tasks_with"):
        return shlex.join([*words, "--matrix", "--context-size", str(document["context_size"])])
    if "sizes" in document:
        sizes = ",".join(map(str, document["sizes"]))
        return shlex.join([*words, "--data", str(document["quality"]), "--sweep", "--sizes", sizes])
    quality = next(iter(document["seeds"].values()))["quality"]
    words += ["--data", quality, "--protocol", document["protocol"], "--context-size", str(document["context_size"])]
    return shlex.join([*words, "--context-unit", document["context_unit"]])


def _sets(found: Mapping[str, str], usual: Mapping[str, str]) -> list[str]:
    changed = [f"{name}={value}" for name, value in found.items() if usual.get(name) != value]
    return [word for pair in changed for word in ("--set", pair)]
