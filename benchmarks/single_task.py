"""Sanity check of every method on ONE task, where nothing is to be inferred: does its control learn what the data show?

    python benchmarks/single_task.py COLLECTION [--task INDEX] [--runs FOLDER] [--only CASE] [--json]

Each method trains on one training task alone, at laptop scale with networks of 3 x 256, and is tested there on held-out
context, beside the task's behaviour expert. A score of 1 is the expert's return, 0 that of the untrained policy; 0.85
is asked for. Methods that stay near the data learn from expert data; a plain soft actor-critic, which has nothing to
hold it there, from mixed data.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from focal.datasets import Collection, open_collection
from focal.envs import get_family
from focal.errors import FocalError
from focal.evaluation import OfflineTransitions, TestTasks, meta_test
from focal.evaluation.metatest import EXPERT, RIGHT, UNTRAINED
from focal.settings import override
from focal.trainer.loop import RunSource, train
from focal.trainer.methods import train_settings
from focal.trainer.replay import TrainingData
from focal.trainer.runs import load_untrained_agent
from focal.trainer.settings import TrainSettings

WANTED = 0.85
# One task is far less data than 80: a small context, which held-out episodes can fill, and a short training.
SHARED: dict[str, Any] = {
    "steps": 1500, "meta_batch": 1, "batch_size": 128, "context_size": 64, "encoder_hidden": (256,) * 3,
    "checkpoint_every": 500, "eval_every": 1500,
}  # fmt: skip
_WIDE: dict[str, Any] = {"control_hidden": (256,) * 3}
_NEAR: dict[str, Any] = {**_WIDE, "regularisation.kind": "policy"}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # method, quality of the data, its settings
    "focal": ("focal", "mixed", {**_WIDE, "schedule": "joint"}),
    "focal, regularised": ("focal", "expert", {**_NEAR, "schedule": "joint"}),
    "batch-pearl": ("batch-pearl", "mixed", _WIDE),
    "batch-pearl, regularised": ("batch-pearl", "expert", _NEAR),
    "contextual-bcq": ("contextual-bcq", "expert", {"batch_size": 64}),
    "mbml": (
        "mbml",
        "expert",  # its ensembles have no other task to relabel
        {"batch_size": 64, "teachers.steps": 1500, "teachers.batch_size": 64, "teachers.rewards.steps": 100},
    ),
}


def case_settings(family: str, case: str) -> TrainSettings:
    """Return the settings of a case."""
    algo, _, changes = CASES[case]
    return override(train_settings(family, "laptop", algo), {**SHARED, **changes})


def data_of(collection: Collection, index: int, quality: str) -> tuple[TrainingData, TestTasks]:
    """Load one training task's data, and its held-out episodes for the context."""
    family, ((entry, transitions),) = get_family(collection.family), collection.load_training(quality, [index])
    (context,) = collection.load_context(quality, [entry])
    if context is None:
        raise FocalError(f"task {index} of {collection.source} has no held-out {quality} episode; choose another")
    data = TrainingData(
        family.name, (index,), [transitions], family.obs_dim, family.act_dim, entry.record.absolute_x,
        collection.content_hash,
    )  # fmt: skip
    return data, TestTasks(family, (entry,), (context,), (), quality, collection)


def measure(collection: Collection, index: int, case: str, runs: Path, seed: int, episodes: int = 10) -> dict[str, Any]:
    """Train one case on task `index` (continuing where it was stopped) and test it there."""
    quality = CASES[case][1]
    data, task = data_of(collection, index, quality)
    settings = case_settings(collection.family, case)
    run, began = runs / case.replace(", ", "-"), time.process_time()
    source = RunSource(collection.name, str(collection.source), quality)
    agent = train(run, data, settings, seed, resume=True, source=source)
    seconds = time.process_time() - began
    result = meta_test(
        agent, load_untrained_agent(run, seed), task, OfflineTransitions(settings.context_size), episodes, seed
    )
    returns = {name: result.mean(name) for name in (RIGHT, UNTRAINED, EXPERT)}
    score = (returns[RIGHT] - returns[UNTRAINED]) / (returns[EXPERT] - returns[UNTRAINED])
    return {"case": case, "data": quality, "task": index, "seed": seed, "steps": settings.total_steps, **returns,
            "score": score, "passed": score >= WANTED, "cpu_seconds": seconds}  # fmt: skip


def main() -> None:
    """Parse, train, print; exit 1 where a method misses the mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path)
    parser.add_argument("--task", type=int, help="a training task [default: the first]")
    parser.add_argument("--runs", type=Path, help="where runs are kept, and continued [default: nowhere]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CASES, action="append", help="may be given several times [default: all]")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        collection = open_collection(arguments.collection)
        index = collection.train_tasks()[0].index if arguments.task is None else arguments.task
        with tempfile.TemporaryDirectory() as scratch:
            rows = []
            for case in arguments.only or CASES:
                rows.append(measure(collection, index, case, arguments.runs or Path(scratch), arguments.seed))
                _show(rows[-1], arguments.as_json)
    except FocalError as error:
        sys.exit(f"single_task.py: {error}")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    verdict = "good" if row["passed"] else f"BELOW {WANTED}"
    print(f"{row['case']:25s} {row['data']:6s} data: return {row[RIGHT]:7.2f}, expert {row[EXPERT]:7.2f}, untrained "
          f"{row[UNTRAINED]:7.2f}, score {row['score']:5.2f}  {verdict}  ({row['cpu_seconds']:.0f} CPU s)",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
