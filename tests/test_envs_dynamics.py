"""Hand-worked rewards, ends of episodes, exact replay, and batched stepping equal to single stepping."""

from dataclasses import replace

import gymnasium
import mujoco
import numpy as np
import pytest

from focal.envs import FAMILIES, get_family, make_batch, rollout
from focal.envs.batch import BatchedSingles
from focal.envs.locomotion import AntFwdBackEnv, HalfCheetahVelEnv, State, Walker2DParamsEnv
from focal.envs.point_robot import (
    PointRobotWindEnv,
    SparsePointRobotEnv,
    optimal_return,
    sparse_reward,
    zero_action_return,
)

NAMES = list(FAMILIES)


def make(name, task=None):
    return gymnasium.make(get_family(name).env_id, task=task, disable_env_checker=True)


def test_sparse_point_robot_by_hand():
    env = make("point", {"goal": [0.0, 1.0]})
    observation, _ = env.reset(seed=0)
    assert observation.tolist() == [0.0, 0.0]
    # half a step right, a full step up: (0.05, 0.1), distance sqrt(0.05^2 + 0.9^2)
    observation, reward, terminated, truncated, info = env.step(np.array([0.5, 1.0], np.float32))
    assert observation == pytest.approx([0.05, 0.1])
    assert reward == pytest.approx(-np.sqrt(0.0025 + 0.81))
    assert info["sparse_reward"] == 0.0
    assert not terminated
    assert not truncated
    for _ in range(8):
        observation, reward, *_, info = env.step(np.array([0.0, 1.0], np.float32))
    # now at (0.05, 0.9): inside the radius, so the sparse reward is 1 - distance
    assert info["sparse_reward"] == pytest.approx(1 - np.sqrt(0.0025 + 0.01))
    assert reward == pytest.approx(-np.sqrt(0.0025 + 0.01))


def test_sparse_reward_at_the_edge_of_the_goal():
    assert sparse_reward(np.array([0.0, 0.1, 0.2, 0.2000001, 1.0])).tolist() == pytest.approx([1.0, 0.9, 0.8, 0.0, 0.0])


def test_wind_by_hand():
    env = make("wind", {"wind": [0.05, -0.02]})
    env.reset(seed=0)
    observation, reward, *_, info = env.step(np.array([1.0, 0.0], np.float32))
    assert observation == pytest.approx([0.15, -0.02])
    assert reward == pytest.approx(-np.hypot(0.85, 0.02))
    assert "sparse_reward" not in info


def test_actions_outside_the_box_are_clipped():
    env = make("point", {"goal": [0.0, 1.0]})
    env.reset(seed=0)
    assert env.step(np.array([3.0, -7.0], np.float32))[0] == pytest.approx([0.1, -0.1])


def test_optimal_returns_by_hand():
    # 9 full steps and a half one: sparse rewards 0.85 (step 8) + 0.95 + 11 times 1 while it stays
    assert optimal_return(SparsePointRobotEnv, {"goal": [0.95, 0.0]}, sparse=True) == pytest.approx(12.8)
    dense = -sum(0.9 - 0.1 * k for k in range(9))
    assert optimal_return(SparsePointRobotEnv, {"goal": [1.0, 0.0]}, sparse=False) == pytest.approx(dense)
    # along the diagonal both axes move 0.1: sqrt(2) / 10 a step
    diagonal = optimal_return(SparsePointRobotEnv, {"goal": [0.5**0.5, 0.5**0.5]}, sparse=True)
    # 6 steps leave 0.151, the 7th 0.010, then 13 at the goal
    first, second = 1 - 6 * 0.02**0.5, 1 - 7 * 0.02**0.5
    assert diagonal == pytest.approx((1 - first) + (1 - second) + 13)
    # (0.35, 0.1): both axes at full speed, (0.1, 0.1) after one step; a straight line would still be at y = 0.03
    aside = optimal_return(SparsePointRobotEnv, {"goal": [0.35, 0.1]}, sparse=True)
    assert aside == pytest.approx(0.85 + 0.95 + 17)
    # 0.05 of tail wind: 0.15 a step; zero action drifts by itself
    tail = optimal_return(PointRobotWindEnv, {"wind": [0.05, 0.0]}, sparse=False)
    assert tail == pytest.approx(-sum(1 - 0.15 * k for k in range(1, 7)))
    assert zero_action_return(PointRobotWindEnv, {"wind": [0.0, 0.0]}) == -25.0


def cheetah_state(**values):
    arrays = {"qpos": np.zeros(9), "qvel": np.zeros(9), "torso": np.zeros(3)} | values
    return State(**arrays)


def test_locomotion_rewards_by_hand():
    action = np.array([1.0, -1.0, 0.5, 0.0, 0.0, 0.0])  # |a|^2 = 2.25
    velocity = np.float64(2.0)
    vel = HalfCheetahVelEnv.reward({"target_velocity": 1.5}, velocity, action, cheetah_state())
    assert vel == pytest.approx(-0.5 - 0.05 * 2.25)
    for direction in (1.0, -1.0):
        env = make("cheetah-dir").unwrapped
        assert env.reward({"direction": direction}, velocity, action, cheetah_state()) == pytest.approx(
            direction * 2.0 - 0.05 * 2.25
        )
    forces = np.zeros((14, 6))
    forces[3, 0], forces[5, 2] = 0.5, -20.0  # clipped to -1: 0.25 + 1
    ant_state = State(np.zeros(15), np.zeros(14), np.zeros(3), forces)
    ant = AntFwdBackEnv.reward({"direction": -1.0}, velocity, np.ones(8) * 0.5, ant_state)
    assert ant == pytest.approx(-2.0 - 0.5 * 2.0 - 0.0005 * 1.25 + 1.0)
    walker = Walker2DParamsEnv.reward({}, velocity, action, State(np.zeros(9), np.zeros(9), np.zeros(3)))
    assert walker == pytest.approx(2.0 + 1.0 - 0.001 * 2.25)


def test_health_rules_by_hand():
    def ant(z, bad=0.0):
        qpos = np.zeros(15)
        qpos[2], qpos[5] = z, bad
        return bool(AntFwdBackEnv.healthy(State(qpos, np.zeros(14), np.zeros(3))))

    assert [ant(z) for z in (0.19, 0.2, 0.6, 1.0, 1.01)] == [False, True, True, True, False]
    assert not ant(0.6, np.nan)

    def walker(height, angle):
        qpos = np.zeros(9)
        qpos[1:3] = height, angle
        return bool(Walker2DParamsEnv.healthy(State(qpos, np.zeros(9), np.zeros(3))))

    assert walker(1.25, 0.0)
    assert not walker(0.8, 0.0)
    assert not walker(2.0, 0.0)
    assert not walker(1.25, 1.0)
    assert not walker(1.25, -1.0)


def test_observation_columns():
    env = make("cheetah-vel")
    observation, _ = env.reset(seed=3)
    data = env.unwrapped.data
    expected = np.concatenate([data.qpos[1:], data.qvel, data.body("torso").xpos]).astype(np.float32)
    assert (observation == expected).all()
    assert get_family("cheetah-vel").absolute_x == 17
    assert observation[17] == np.float32(data.qpos[0])
    env = make("walker")
    env.reset(seed=3)
    env.unwrapped.data.qvel[4] = 25.0
    assert env.unwrapped.observe(env.unwrapped.read_state(env.unwrapped.data))[8 + 4] == 10.0


@pytest.mark.parametrize("name", NAMES)
def test_truncated_exactly_at_the_horizon(name):
    family = get_family(name)
    env = make(name)
    env.reset(seed=0)
    ends = []
    for _ in range(family.horizon):
        _, _, terminated, truncated, _ = env.step(np.zeros(family.act_dim, np.float32))
        ends.append((terminated, truncated))
        if terminated:
            break
    assert not any(terminated and truncated for terminated, truncated in ends)
    if name != "walker-2d-params":  # a limp walker falls; the others stand
        assert ends == [(False, False)] * (family.horizon - 1) + [(False, True)]


def test_a_walker_that_stands_is_truncated_at_the_horizon():
    env = make("walker").unwrapped
    env.reset(seed=0)
    env._steps = get_family("walker").horizon - 2
    ends = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]


@pytest.mark.parametrize("name", ["ant-dir", "walker", "cheetah-vel"])
def test_a_diverged_simulation_terminates_with_finite_numbers(name):
    """MuJoCo's automatic reset would put the robot back at its start and go on as if nothing had happened."""
    family = get_family(name)
    env = make(name).unwrapped
    env.reset(seed=0)
    env.data.qvel[3] = np.nan
    observation, reward, terminated, truncated, info = env.step(np.zeros(family.act_dim, np.float32))
    assert (terminated, truncated) == (True, False)
    batch = make_batch(family, [env.task], threads=1)
    batch.reset([0])
    batch._data[0].qvel[3] = np.nan
    result = batch.step(np.zeros((1, family.act_dim), np.float32))
    assert result.terminated.all()
    for values in (observation, reward, info["x_velocity"], result.observations, result.rewards):
        assert np.isfinite(values).all()
    assert (result.observations[0] == observation).all()


def test_a_fall_at_the_horizon_is_terminated_not_truncated():
    family = get_family("walker")
    env = make("walker").unwrapped
    env.reset(seed=0)
    env._steps = family.horizon - 1
    env.data.qpos[1] = 0.0  # on the floor
    *_, terminated, truncated, _ = env.step(np.zeros(6, np.float32))
    assert (terminated, truncated) == (True, False)
    batch = make_batch(family, [env.task], threads=1)
    batch.reset([0])
    batch._steps[:] = family.horizon - 1
    batch._data[0].qpos[1] = 0.0
    result = batch.step(np.zeros((1, 6), np.float32))
    assert result.terminated.all()
    assert not result.truncated.any()


@pytest.mark.parametrize("name", NAMES)
def test_batched_stepping_equals_gymnasium_bit_for_bit(name):
    family = get_family(name)
    tasks = family.sample_tasks(seed=1).parameters
    chosen = [tasks[i % len(tasks)] for i in range(5)]
    actions = np.random.default_rng(0).uniform(-1, 1, (family.horizon, 5, family.act_dim)).astype(np.float32)
    moves = iter(actions)
    batch = make_batch(family, chosen, threads=2)
    assert not isinstance(batch, BatchedSingles), "many times slower"
    recorded = rollout(batch, lambda observations: next(moves), seeds=range(10, 15))
    for m, task in enumerate(chosen):
        env = make(name, task)
        observation, _ = env.reset(seed=10 + m)
        assert (observation == recorded.observations[m, 0]).all()
        for t in range(recorded.lengths[m]):
            observation, reward, terminated, truncated, info = env.step(actions[t, m])
            assert (observation == recorded.observations[m, t + 1]).all()
            assert reward == recorded.rewards[m, t]
            assert all(info[key] == recorded.infos[key][m, t] for key in recorded.infos)
            assert (terminated or truncated) == (t + 1 == recorded.lengths[m])
        assert terminated == recorded.terminated[m]
        assert (recorded.rewards[m, recorded.lengths[m] :] == 0).all()
    batch.close()


class TurnedRobot(SparsePointRobotEnv):
    """Steps otherwise than the class it derives from."""

    def step(self, action):
        return super().step(action[::-1])


class Rider(HalfCheetahVelEnv):
    """Rewarded by a parameter that is a list."""

    default_task = {"targets": [0.5, 1.5]}  # noqa: RUF012

    @staticmethod
    def reward(task, velocity, action, after):
        return -abs(velocity - task["targets"][1])


@pytest.mark.parametrize(
    ("kind", "base", "tasks"),
    [
        (TurnedRobot, "point", [{"goal": [0.0, 1.0]}, {"goal": [1.0, 0.0]}]),
        (Rider, "cheetah-vel", [{"targets": [0.0, 1.0]}, {"targets": [0.0, 2.0]}]),
    ],
)
def test_what_a_batch_cannot_repeat_is_stepped_one_by_one(kind, base, tasks):
    family = replace(get_family(base), env_id=f"test/{kind.__name__}-v0", horizon=20)
    gymnasium.register(family.env_id, entry_point=kind)
    try:
        actions = np.random.default_rng(0).uniform(-1, 1, (20, 2, family.act_dim)).astype(np.float32)
        moves = iter(actions)
        batch = make_batch(family, tasks)
        recorded = rollout(batch, lambda observations: next(moves), seeds=[3, 4])
        batch.close()
        for m, task in enumerate(tasks):
            env = gymnasium.make(family.env_id, task=task, disable_env_checker=True)
            env.reset(seed=3 + m)
            assert [env.step(action)[1] for action in actions[:, m]] == recorded.rewards[m].tolist()
    finally:
        gymnasium.registry.pop(family.env_id)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_batch_in_which_no_episode_is_left_moves_nothing(name):
    family = get_family(name)
    batch = make_batch(family, family.sample_tasks(seed=1).parameters[:2], threads=2)
    before = batch.reset([0, 1])
    batch.active[:] = False
    result = batch.step(np.ones((2, family.act_dim), np.float32))
    batch.close()
    assert (result.observations == before).all()
    assert not result.rewards.any()
    assert not (result.terminated | result.truncated).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_second_episode_does_not_remember_the_first(name):
    family = get_family(name)
    tasks = family.sample_tasks(seed=1).parameters[:2]
    rng = np.random.default_rng(0)
    batch = make_batch(family, tasks, threads=1)
    fixed = rng.uniform(-1, 1, (family.horizon, 2, family.act_dim)).astype(np.float32)

    def play():
        moves = iter(fixed)
        return rollout(batch, lambda observations: next(moves), seeds=[7, 8])

    first = play()
    rollout(batch, lambda observations: rng.uniform(-1, 1, (2, family.act_dim)), seeds=[1, 2])
    again = play()
    assert (first.observations == again.observations).all()
    assert (first.rewards == again.rewards).all()


def test_walker_model_is_the_base_times_the_factors():
    task = get_family("walker").sample_tasks(3, 1, seed=2).parameters[0]
    scaled, base = make("walker", task).unwrapped.model, make("walker").unwrapped.model
    for name, factors in task.items():
        assert np.array_equal(getattr(scaled, name), getattr(base, name) * np.asarray(factors)), name
    assert base.opt.timestep == 0.004
    assert make("walker").unwrapped.dt == pytest.approx(0.016)
    right_and_left_foot = base.geom_friction[[4, 7], 0]
    assert sorted(right_and_left_foot) == [0.9, 1.9]


def test_walker_derived_constants_are_those_of_a_recompiled_model():
    """Scaling mass and inertia of a body alike keeps every inertia valid, so MuJoCo's compiler can check us."""
    factors = np.random.default_rng(0).uniform(0.4, 2.5, 8)
    task = Walker2DParamsEnv.default_task | {
        "body_mass": factors.tolist(),
        "body_inertia": np.repeat(factors[:, None], 3, axis=1).tolist(),
    }
    env = make("walker", task).unwrapped
    spec = mujoco.MjSpec.from_file(env.fullpath)
    spec.option.timestep = 0.004
    # density scales a capsule's mass and inertia by the same factor
    for body, factor in zip(spec.bodies, factors, strict=True):
        for geom in body.geoms:
            geom.density *= factor
    compiled = spec.compile()
    assert compiled.body_mass == pytest.approx(env.model.body_mass)
    for name in ("body_inertia", "body_invweight0", "dof_invweight0", "body_subtreemass", "dof_M0"):
        assert getattr(env.model, name) == pytest.approx(getattr(compiled, name), rel=1e-9), name
    assert env.model.stat.meaninertia == pytest.approx(compiled.stat.meaninertia, rel=1e-9)
    untouched = make("walker").unwrapped.model
    assert not np.allclose(untouched.body_invweight0, env.model.body_invweight0)
