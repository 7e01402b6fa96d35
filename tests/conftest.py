"""Fixtures shared by all tests: small collections whose data mean what real data mean; a Ray cluster of two nodes.

A fake point robot walks from the origin towards a goal on the upper unit half circle. Its skill in [0, 1] is the share
of full speed it moves at: skill 0 only trembles, 1 goes straight to the goal. A checkpoint has one skill, so scores,
labels and references come out as in real data.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# before torch and BLAS are loaded: trainings have one thread each, and equal another to the bit only in as many
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest

from focal.datasets import (
    Collection,
    CollectionHeader,
    End,
    Episodes,
    QualityRule,
    References,
    TaskRecord,
    begin_collection,
    commit_collection,
    seal_task,
    write_segment,
)

SKILLS = (0.0, 0.02, 0.4, 0.7, 1.0)
GOAL_RADIUS = 0.2


def walk_to_goal(
    goal: Sequence[float],
    skill: float,
    episodes: int = 10,
    horizon: int = 20,
    obs_dim: int = 2,
    act_dim: int = 2,
    sac_step: int = 0,
    seed: int = 0,
    sparse: bool = True,
    terminate_from: int | None = None,
) -> Episodes:
    """Roll out `episodes` walks; from episode `terminate_from` on they are terminated half-way, the rest truncated."""
    generator = np.random.default_rng([seed, sac_step])
    lengths = [horizon if terminate_from is None or e < terminate_from else horizon // 2 for e in range(episodes)]
    observations, actions, rewards = [], [], []
    for length in lengths:
        state = np.zeros(obs_dim)
        observations.append(state)
        for _ in range(length):
            action = np.zeros(act_dim)
            action[:2] = np.clip((np.asarray(goal) - state[:2]) / 0.1, -1, 1) * skill
            action += (1 - skill) * 0.1 * generator.standard_normal(act_dim)
            state = state.copy()
            state[:2] += 0.1 * np.clip(action[:2], -1, 1)
            state[2:] = generator.standard_normal(obs_dim - 2)
            observations.append(state)
            actions.append(np.clip(action, -1, 1))
            rewards.append(-math.dist(state[:2], goal))
    dense = np.array(rewards)
    infos = {"sparse_reward": np.where(dense >= -GOAL_RADIUS, 1 + dense, 0).astype("f4")} if sparse else {}
    ends = [End.TRUNCATED if length == horizon else End.TERMINATED for length in lengths]
    starts = np.cumsum([0, *lengths[:-1]])
    return Episodes(
        observations=np.array(observations, "f4"),
        actions=np.array(actions, "f4"),
        rewards=dense.astype("f4"),
        infos=infos,
        lengths=np.array(lengths, "i4"),
        ends=np.array(ends, "u1"),
        returns=np.add.reduceat(dense, starts),
        qualities=np.zeros(episodes, "u1"),
        sac_steps=np.full(episodes, sac_step, "i8"),
        seeds=generator.integers(2**31, size=episodes),
        heldout=np.zeros(episodes, "u1"),
    )


def task_record(
    index: int, split: Any, goal: Sequence[float], family: str, reached_expert: bool = True, **rollout: Any
) -> TaskRecord:
    """The record of a fake task, its references measured on fresh walks of full length."""
    full = {name: value for name, value in rollout.items() if name != "terminate_from"}
    random, expert = (walk_to_goal(goal, skill, 20, seed=10**6 + index, **full) for skill in (0.0, 1.0))
    sparse = [e.infos["sparse_reward"].reshape(20, -1).sum(1, float) if e.infos else () for e in (random, expert)]
    return TaskRecord(
        index=index,
        family=family,
        params={"goal": list(goal)},
        split=split,
        env_id="focal/SparsePointRobot-v0",
        env_settings={"task": {"goal": list(goal)}},
        horizon=rollout.get("horizon", 20),
        spaces={
            "observation": {"shape": [random.observations.shape[1]], "dtype": "float32"},
            "action": {"shape": [random.actions.shape[1]], "dtype": "float32", "low": -1.0, "high": 1.0},
        },
        absolute_x=None,
        behaviour={"algorithm": "SAC", "learning_rate": 3e-4},
        references=References(
            random_returns=random.returns,
            expert_returns=expert.returns,
            random_deterministic=random.returns,
            expert_deterministic=expert.returns,
            random_sparse_deterministic=sparse[0],
            expert_sparse_deterministic=sparse[1],
            expert_sac_step=1000 * (len(SKILLS) - 1),
            reached_expert=reached_expert,
            expert_test="return 0.97 of the optimum, expected 0.8",
        ),
        provenance={"software": "conftest.py"},
    )


def build_collection(
    path: Path,
    tasks: int = 4,
    test: int = 1,
    both: bool = False,
    family: str = "sparse-point-robot",
    skills: Sequence[float] = SKILLS,
    episodes: int = 10,
    seed: int = 0,
    unreached: Sequence[int] = (),
    rule: QualityRule | None = None,
    commit: bool = True,
    scale: str = "smoke",
    **rollout: Any,
) -> Any:
    """Write a collection of `tasks` tasks, the last `test` of them for testing (all for both where `both`).

    Checkpoint i has `skills[i]`, SAC step 1000 i and `episodes` walks; `unreached` tasks failed the expert test;
    `rollout` goes to `walk_to_goal` (horizon, obs_dim, act_dim, sparse, terminate_from). Returns the open collection,
    or None when it is not to be committed.
    """
    indices = tuple(range(tasks))
    header = CollectionHeader(
        name=path.name,
        family=family,
        authors=("Ada Lovelace",),
        seed=seed,
        tasks_from="seed",
        scale=scale,
        settings={"episodes": episodes, "skills": list(skills)},
        train=indices if both else indices[: tasks - test],
        test=indices if both else indices[tasks - test :],
    )
    begin_collection(path, header)
    for index in indices:
        angle = math.pi * (index + 0.5) / tasks
        goal = (math.cos(angle), math.sin(angle))
        record = task_record(index, header.split_of(index), goal, family, index not in unreached, **rollout)
        for step, skill in enumerate(skills):
            walks = walk_to_goal(goal, skill, episodes, sac_step=1000 * step, seed=seed + index, **rollout)
            write_segment(path, index, 1000 * step, walks)
        seal_task(path, record, rule or QualityRule(), seed)
    return commit_collection(path, header, {"software": "conftest.py"}) if commit else None


@pytest.fixture(scope="session")
def make_episodes() -> Callable[..., Episodes]:
    """`walk_to_goal` as a fixture: `make_episodes(goal, skill, episodes=10, ...)`."""
    return walk_to_goal


@pytest.fixture(scope="session")
def make_record() -> Callable[..., TaskRecord]:
    """`task_record` as a fixture: `make_record(index, split, goal, family)`."""
    return task_record


@pytest.fixture(scope="session")
def make_collection(tmp_path_factory) -> Callable[..., Collection]:
    """`build_collection` as a fixture; without a path it writes to a new temporary folder named after the family."""

    def make(path: Path | None = None, **settings) -> Collection:
        family = settings.get("family", "sparse-point-robot")
        return build_collection(path or tmp_path_factory.mktemp("stores") / family, **settings)

    return make


@pytest.fixture(scope="session")
def collection(make_collection) -> Collection:
    """Three training tasks and a test task of the point robot, all levels; shared, so never changed by a test."""
    return make_collection()


@pytest.fixture(scope="session")
def point_run(tmp_path_factory) -> list[Any]:
    """A point robot generated and trained through the command line at smoke scale, two seeds: `RUNS/point`.

    Returns the words that say where, ["--stores", STORES, "--runs", RUNS].
    """
    from click.testing import CliRunner

    from focal.cli import main

    root = tmp_path_factory.mktemp("point")
    folders = ["--stores", root / "stores", "--runs", root / "runs"]
    for words in (
        ["data", "generate", "--env", "point", "--scale", "smoke", *folders[:2]],
        ["train", "--data", "mixed", "--scale", "smoke", "--seeds", 2, "--name", "point", *folders],
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    return folders


@pytest.fixture
def two_nodes(monkeypatch):
    """The cluster and its second node; every node has one core."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray reads 127.0.0.1 as the machine's other name
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    second = made.add_node(**options)
    made.wait_for_nodes()
    yield made, second
    made.shutdown()
