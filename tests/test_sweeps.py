"""Sweeps over context sizes, with an oracle for which the size decides what it knows."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from focal import UsageError, sweeps
from focal.envs.point_robot import optimal_action
from focal.evaluation import select_test_tasks
from focal.evaluation.metatest import TaskReturns
from focal.sweeps import Sweep, SweepPoint, parse_sizes, sweep_agent, sweep_run
from focal.trainer.settings import TrainSettings
from focal.trainer.transform import ObservationTransform


class GoalReader:
    """Reads the goal from four transitions or more, and from fewer nonsense; walks to what it read."""

    settings = TrainSettings(context_reward="dense", latent_dim=2, context_size=32)
    transform = ObservationTransform(2, (0, 1), (1.0, 1.0))
    device = torch.device("cpu")

    def embed(self, context):
        position = (context[..., :2] + 0.1 * context[..., 2:4]).double()
        matrix = 2 * (position[:, 1:] - position[:, :1])
        square = position.square().sum(-1) - context[..., 4].double().square()
        goal = torch.linalg.lstsq(matrix, (square[:, 1:] - square[:, :1]).unsqueeze(-1)).solution.squeeze(-1)
        return goal if context.shape[1] >= 4 else -torch.ones(len(context), 2, dtype=torch.double)

    def act(self, observations, embeddings, at_reset=False):
        return optimal_action(observations.astype(float), embeddings[:, None], np.zeros(2)).astype(np.float32)


@pytest.fixture(scope="module")
def tasks(make_collection, tmp_path_factory):
    return select_test_tasks(make_collection(tmp_path_factory.mktemp("stores") / "point", tasks=6, test=4), "mixed")


def test_each_size_has_its_own_contexts_and_returns(tasks):
    points = sweep_agent(GoalReader(), tasks, [1, 16], episodes=3, seed=0)
    best = [tasks.family.optimum(entry.record.params) for entry in tasks.entries]
    assert points[16].returns.sparse == pytest.approx(np.repeat(best, 3).reshape(4, 3), abs=1.0)
    assert points[16].accuracy == 1.0
    assert points[1].returns.sparse.max() == 0.0, "a size that tells it nothing of the goals"
    assert points[1].accuracy == 0.25, "one embedding for all is nearest to one task of four"


@pytest.fixture
def swept(tasks):
    sparse = {1: [1.0, 2.0], 8: [3.0, 5.0]}  # by size, of each seed
    points = {
        seed: {
            size: SweepPoint(TaskReturns(np.full((4, 3), -9.0), np.full((4, 3), values[seed])), 0.1 * size + seed)
            for size, values in sparse.items()
        }
        for seed in (0, 1)
    }
    run = SimpleNamespace(source=SimpleNamespace(seeds=(0, 1)))
    return Sweep(Path("run"), run, tasks, 3, 0, points, 100)


def test_summaries_are_of_the_reported_returns_over_seeds(swept):
    assert swept.sizes == [1, 8]
    assert swept.over_seeds("return", 8).mean == 4.0
    assert swept.over_seeds("accuracy", 8).mean == pytest.approx(1.3)
    assert swept.over_seeds("return", 1).seeds == 2


def test_the_experts_return_is_deterministic_and_of_the_reported_reward(swept):
    entries = []
    for entry in swept.tasks.entries:
        references = dataclasses.replace(
            entry.record.references, expert_sparse_deterministic=(4.0, 6.0), random_sparse_deterministic=(1.0,)
        )
        record = dataclasses.replace(entry.record, references=references)
        entries.append(dataclasses.replace(entry, record=record))
    tasks = dataclasses.replace(swept.tasks, entries=tuple(entries))
    assert dataclasses.replace(swept, tasks=tasks).expert_return == 5.0


def test_a_sweep_with_other_sizes_is_another_file(swept):
    other = dataclasses.replace(swept, points={seed: {1: by_size[1]} for seed, by_size in swept.points.items()})
    assert swept.name == "sweep-mixed-contexts1-8-episodes3-seed0"
    assert other.name == "sweep-mixed-contexts1-episodes3-seed0"


def test_many_sizes_still_make_a_file_name(swept):
    point = swept.points[0][1]
    one, other = (
        dataclasses.replace(swept, points=dict.fromkeys((0, 1), dict.fromkeys((*range(1, 101), last, 200), point))).name
        for last in (150, 151)
    )
    assert one.startswith("sweep-mixed-contexts1-to-200-102sizes-")
    assert len(one) < 100
    assert one != other, "as many sizes between the same two, but others"


def test_a_matrix_is_of_tasks_that_have_every_quality(monkeypatch, make_collection, tmp_path):
    collection = make_collection(tmp_path / "point", tasks=5, test=4, unreached=(2,))
    monkeypatch.setattr(sweeps, "read_run", lambda run_dir: None)
    monkeypatch.setattr(sweeps, "collection_of", lambda run, stores: collection)
    monkeypatch.setattr(sweeps, "test_run", lambda *_, seeds, shared: shared)
    levels = ("random", "medium", "expert")
    tests = collection.test_tasks()
    having = [{e.index for e, data in zip(tests, collection.load_context(one, tests), strict=True) if data is not None}
              for one in levels]  # fmt: skip
    shared = sweeps.shared_test_tasks(collection, levels)
    assert set(shared) == set.intersection(*having)
    assert shared
    assert 2 not in shared
    assert sweeps.matrix_row(tmp_path, tmp_path, levels, None, 1, 0) == dict.fromkeys(levels, levels)
    lacking = {(1, "medium"), (3, "medium"), (4, "medium"), (2, "expert"), (1, "expert")}
    monkeypatch.setattr(sweeps, "has_context", lambda entry, quality: (entry.index, quality) not in lacking)
    with_none = {(e.index, one) for e in tests for one in levels}
    kept = ("random", "expert")  # no task has all three, and only one has medium
    assert sweeps.matrix_row(tmp_path, tmp_path, levels, None, 1, 0) == dict.fromkeys(kept, kept)
    lacking |= with_none
    assert sweeps.matrix_row(tmp_path, tmp_path, levels, None, 1, 0) == {}


def test_a_size_is_kept_if_every_task_holds_as_many(tasks, monkeypatch, tmp_path):
    held = min(len(context.rows) for context in tasks.contexts)
    run = SimpleNamespace(source=SimpleNamespace(seeds=(3,)), settings=SimpleNamespace(total_steps=5))
    monkeypatch.setattr(sweeps, "testable", lambda *_: (run, tasks))
    monkeypatch.setattr(sweeps, "load_agent", lambda run_dir, seed: GoalReader())
    swept = sweep_run(tmp_path, tmp_path, None, (held + 1, held, 4, 4), 1, 0)
    assert swept.sizes == [4, held]
    assert swept.left_out == (held + 1,)
    assert swept.largest_judged == held // 2
    assert (tmp_path / "tests" / f"{swept.name}.json").exists()


def test_sizes_are_read_or_refused():
    assert parse_sizes("10, 1,5") == (10, 1, 5)
    for text in ("", "0", "1,,2", "-3", "1.5"):
        with pytest.raises(UsageError, match="expected context sizes such as --sizes 1,10,100"):
            parse_sizes(text)
