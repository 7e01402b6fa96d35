"""Task families: registration, sampling, splits, published sets, and the experts' absolute tests."""

import json
import math

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from focal import UsageError
from focal.envs import FAMILIES, Rollouts, get_family
from focal.envs.point_robot import SparsePointRobotEnv, optimal_return

NAMES = list(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*infinity.*", "ignore:.*unwrapped.*")
def test_gymnasium_accepts_the_environment(name):
    family = get_family(name)
    env = gymnasium.make(family.env_id, task=family.sample_tasks().parameters[0])
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space.shape == (family.obs_dim,)
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (family.act_dim,), np.float32)
    assert env.unwrapped.horizon == family.horizon


@pytest.mark.parametrize("name", NAMES)
def test_tasks_come_from_the_seed_and_survive_json(name):
    family = get_family(name)
    tasks = family.sample_tasks(seed=5)
    assert json.loads(json.dumps(tasks.parameters)) == list(tasks.parameters)
    assert family.sample_tasks(seed=5) == tasks
    if family.fixed_tasks is None:
        assert family.sample_tasks(seed=6).parameters != tasks.parameters
        assert sorted(tasks.train + tasks.test) == list(range(family.n_train + family.n_test))
        assert (len(tasks.train), len(tasks.test)) == (family.n_train, family.n_test)
        assert tasks.train != tuple(range(family.n_train)), "the split must be a permutation, not an order"
    else:
        assert tasks.train == tasks.test == (0, 1)
        assert tasks.split_of(0) == "both"


def test_more_tasks_keep_the_first_ones():
    family = get_family("walker")
    assert family.sample_tasks(4, 1, seed=3).parameters == family.sample_tasks(9, 2, seed=3).parameters[:5]


def test_published_tasks_are_the_released_ones():
    velocities = get_family("cheetah-vel").sample_tasks(source="published")
    values = [task["target_velocity"] for task in velocities.parameters]
    assert np.allclose(values[:5], [0.786074, 0.476052, 0.834380, 1.377951, 0.963002], atol=1e-6)
    assert np.allclose(values[-5:], [0.7084, 1.2893, 1.1823, 1.5321, 0.3762], atol=5e-5)
    assert velocities.train == tuple(range(80))
    winds = [task["wind"] for task in get_family("wind").sample_tasks(source="published").parameters]
    expected = [(-0.023798, 0.033597), (-0.034132, 0.011024), (-0.022187, 0.006452)]
    assert np.allclose(winds[:3], expected, atol=1e-6)
    goals = [task["goal"] for task in get_family("point").sample_tasks(source="published").parameters]
    assert np.allclose(goals[1], (0.999497, 0.031728), atol=1e-6)
    directions = {
        name: get_family(name).sample_tasks(source="published").parameters for name in ("cheetah-dir", "ant-dir")
    }
    assert [task["direction"] for task in directions["cheetah-dir"]] == [-1.0, 1.0], "facts 1.4"
    assert [task["direction"] for task in directions["ant-dir"]] == [1.0, -1.0]
    with pytest.raises(UsageError, match="not recoverable; use --tasks-from seed"):
        get_family("walker").sample_tasks(source="published")


def test_sampled_tasks_lie_in_the_papers_ranges():
    goals = np.array([t["goal"] for t in get_family("point").sample_tasks().parameters])
    assert np.allclose(np.hypot(*goals.T), 1.0)
    assert (goals[:, 1] >= 0).all()
    winds = np.array([t["wind"] for t in get_family("wind").sample_tasks().parameters])
    assert np.abs(winds).max() <= 0.05
    for task in get_family("walker").sample_tasks(5, 5).parameters:
        assert 1.5**-3 <= np.min(task["body_mass"]) <= np.max(task["body_mass"]) <= 1.5**3
        assert 1.3**-3 <= np.min(task["dof_damping"]) <= np.max(task["dof_damping"]) <= 1.3**3
        assert np.shape(task["body_inertia"]) == (8, 3)
        assert np.shape(task["geom_friction"]) == (8, 3)


def test_unknown_family_names_the_nearest():
    with pytest.raises(UsageError, match="unknown task family 'waker'; did you mean 'walker'"):
        get_family("waker")
    with pytest.raises(UsageError, match="exactly 2 tasks"):
        get_family("ant-dir").sample_tasks(5, 5)


def test_half_way_round_the_ordered_list_is_a_far_task():
    family = get_family("point")
    tasks = family.sample_tasks(seed=0)
    order = family.ordered(tasks.test, [tasks.parameters[i] for i in tasks.test])
    angles = [math.atan2(*tasks.parameters[i]["goal"][::-1]) for i in order]
    assert angles == sorted(angles)
    assert sorted(order) == list(tasks.test)
    half = len(order) // 2
    gaps = [abs(angles[k] - angles[(k + half) % len(order)]) for k in range(len(order))]
    assert min(gaps) > math.pi / 6, "the wrong task's goal region must not overlap the right one's"


def episodes(x_velocity, lengths, terminated, sparse=None):
    velocities = np.asarray(x_velocity, float)
    infos = {"x_velocity": velocities} | ({} if sparse is None else {"sparse_reward": np.asarray(sparse, float)})
    shape = velocities.shape
    return Rollouts(np.zeros((shape[0], shape[1] + 1, 1)), np.zeros((*shape, 1)), velocities, infos,
                    np.asarray(lengths), np.asarray(terminated))  # fmt: skip


def test_absolute_expert_tests_by_hand():
    steady = episodes(np.full((2, 200), 1.4), [200, 200], [False, False])
    vel = get_family("cheetah-vel").passes_expert_test
    assert vel(steady, {"target_velocity": 1.65}).reached
    assert not vel(steady, {"target_velocity": 1.75}).reached
    direction = get_family("cheetah-dir").passes_expert_test
    assert direction(steady, {"direction": 1.0}).reached
    assert not direction(steady, {"direction": -1.0}).reached
    # the first 50 steps do not count for the target velocity
    late = np.full((1, 200), 2.0)
    late[:, :50] = 0.0
    assert vel(episodes(late, [200], [False]), {"target_velocity": 2.0}).reached
    walker = get_family("walker").passes_expert_test
    assert walker(steady, {}).reached
    # one of two episodes fell: speed is fine, but only half lasted
    fallen = np.full((2, 200), 1.4)
    fallen[1, 100:] = 0.0
    report = walker(episodes(fallen, [200, 100], [False, True]), {})
    assert not report.reached
    assert "mean speed 1.40 m/s and full horizon in 50%" in report.measured
    goal = {"goal": [1.0, 0.0]}
    best = optimal_return(SparsePointRobotEnv, goal, sparse=True)
    sparse = np.zeros((1, 20))
    sparse[0, 0] = 0.81 * best
    assert get_family("point").passes_expert_test(episodes(sparse, [20], [False], sparse), goal).reached
    sparse[0, 0] = 0.79 * best
    assert not get_family("point").passes_expert_test(episodes(sparse, [20], [False], sparse), goal).reached
