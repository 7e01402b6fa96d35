"""What imports take from the environments: facts about families, parameters of tasks, speeds from rewards."""

import dataclasses

import numpy as np
import pytest

from focal.datasets.foreign import SourceTask
from focal.datasets.importing import list_tasks
from focal.envs import FAMILIES, get_family, make_batch, rollout
from focal.envs.locomotion import HalfCheetahVelEnv
from focal.envs.point_robot import PointRobotEnv
from focal.errors import FocalError, UsageError
from focal.importing import _velocity, expert_test, family_facts, plan_tasks

from .test_datasets_importing import made_up


def test_facts_of_every_family():
    facts = {name: family_facts(name) for name in FAMILIES}
    assert {name for name, fact in facts.items() if fact.terminates} == {"ant-fwd-back", "walker-2d-params"}
    assert {name: fact.infos for name, fact in facts.items()} == {
        name: ("sparse_reward",) if name == "sparse-point-robot" else () if "wind" in name else ("x_velocity",)
        for name in FAMILIES
    }
    assert facts["half-cheetah-vel"].absolute_x == 17
    assert family_facts("point", 7).horizon == 7


@pytest.mark.parametrize(("environment", "sparse"), [(PointRobotEnv, True), (HalfCheetahVelEnv, False)])
def test_what_is_not_known_of_an_added_family_is_not_made_up(monkeypatch, environment, sparse):
    """The rewards of the built-in families are not those of a family that somebody derived from them."""
    family = dataclasses.replace(get_family("cheetah-vel"), name="mine", alias="own", sparse=sparse)
    monkeypatch.setitem(FAMILIES, "mine", family)
    monkeypatch.setattr("focal.importing.env_class", lambda _: environment)
    facts, episodes = family_facts("mine"), made_up([200, 200], 20, 6)
    if sparse:
        with pytest.raises(UsageError, match="the source has no infos/sparse_reward, expected one"):
            facts.sparse_reward({}, episodes.observations, episodes.rewards)
    else:
        with pytest.raises(UsageError, match=r"expert test needs info x_velocity.*import without --label scores"):
            expert_test("mine", 200)({}, episodes, episodes, None)


@pytest.mark.parametrize("name", ["cheetah-vel", "cheetah-dir", "ant-dir", "walker"])
def test_speeds_are_recovered_from_rewards(name):
    """Against the speeds that the environments themselves report."""
    family = get_family(name)
    task = family.fixed_tasks[1] if family.fixed_tasks else family.draw(np.random.default_rng(0), 1)[0]
    rng = np.random.default_rng(1)
    envs = make_batch(family, [task] * 2, threads=1)
    rollouts = rollout(envs, lambda obs: rng.uniform(-1, 1, (len(obs), family.act_dim)), [1, 2])
    envs.close()
    steps = np.arange(family.horizon) < rollouts.lengths[:, None]
    episodes = made_up(rollouts.lengths, family.obs_dim, family.act_dim)
    episodes.actions[:], episodes.rewards[:] = rollouts.actions[steps], rollouts.rewards[steps]
    found, expected = _velocity(family, task, episodes), rollouts.infos["x_velocity"][steps]
    if name == "cheetah-vel":  # only the distance to the target is in the reward
        found, expected = (np.abs(values - task["target_velocity"]) for values in (found, expected))
    # the ant's contact cost, 0.0005 times at most 6 forces of 13 bodies, is taken for 0
    assert np.abs(found - expected).max() < (0.04 if name == "ant-dir" else 1e-5)


def test_an_expert_of_the_fwd_back_family():
    """4 m/s in the task's direction pass the test, in the other direction they do not."""
    episodes = made_up([200] * 4, 20, 6)
    slow = made_up([200] * 4, 20, 6)
    for some, speed in ((episodes, 4.0), (slow, 0.0)):
        some.actions[:] = 0.1
        some.rewards[:] = speed - 0.05 * 6 * 0.01
        some.returns[:] = some.rewards.reshape(4, -1).sum(1)
    test = expert_test("cheetah-dir", 200)
    assert test({"direction": 1.0}, slow, episodes, episodes) == (
        True,
        "mean directed speed 4.00 m/s, needs 1.00; 800.0 above the untrained policy, 5 standard errors are 0.0",
    )
    assert test({"direction": 1.0}, episodes, slow, None)[0] is False
    assert "a single episode" in test({"direction": 1.0}, slow.select(np.arange(4) < 1), episodes, None)[1]


@pytest.mark.parametrize(
    ("env", "goal", "params"),
    [
        ("point", (0.5, 0.866), {"goal": [0.5, 0.866]}),
        ("wind", (0.01, -0.02), {"wind": [0.01, -0.02]}),
        ("cheetah-vel", (1.378,), {"target_velocity": 1.378}),
        ("cheetah-dir", (-1.0,), {"direction": -1.0}),
        ("ant-dir", (3.142,), {"direction": -1.0}),
    ],
)
def test_parameters_from_goals(env, goal, params):
    found = tuple(SourceTask(str(number), goal=goal) for number in range(2))
    assert [task.params for task in plan_tasks(env, found)] == [params] * 2


@pytest.mark.parametrize(
    ("env", "goal", "message"),
    [
        ("ant-dir", (1.2,), "expected the form"),  # any direction in UNICORN; ours are two
        ("cheetah-dir", (0.5,), "expected the form"),
        ("cheetah-vel", (1.0, 2.0), "has 2 numbers in its goal, expected 1"),
        ("walker", (1.0,) * 32, "folder names do not hold the tasks of walker-2d-params"),
    ],
)
def test_goals_that_are_no_task(env, goal, message):
    with pytest.raises(UsageError, match=message):
        plan_tasks(env, (SourceTask("a", goal=goal), SourceTask("b", goal=goal)))


def test_two_tasks_have_no_split_to_choose():
    found = (SourceTask("a", index=0), SourceTask("b", index=1))
    assert [task.split for task in plan_tasks("ant-dir", found)] == ["both", "both"]
    with pytest.raises(UsageError, match="leave --split out"):
        plan_tasks("ant-dir", found, split="1/1")
    with pytest.raises(UsageError, match="expected index below 2"):
        plan_tasks("ant-dir", (SourceTask("a", index=2),))


def test_the_split_is_drawn_from_the_seed():
    found = tuple(SourceTask(str(number), goal=(float(number) / 10,)) for number in range(20))
    splits = [[task.split for task in plan_tasks("cheetah-vel", found, seed=seed)] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert splits[0].count("test") == 4, "80 / 20 like the family's own"


def test_a_damaged_metadata_file_says_where_to_get_it(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "main_data.hdf5").write_bytes(b"")
    (data / "metadata.json").write_text("{")
    with pytest.raises(FocalError, match=r"not readable JSON .*; get the data again from where they were published"):
        list_tasks(tmp_path, "minari")
