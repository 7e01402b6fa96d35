"""Many episodes stepped together: a thread pool for MuJoCo, plain NumPy for the point robots.

Trajectories are exactly those of the Gymnasium environments (tested bit for bit), so policies can be evaluated
hundreds of episodes at a time without a second definition of any task.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import seeding

from .locomotion import LocomotionEnv, State, Walker2DParamsEnv, finite
from .point_robot import PointRobotEnv, distance, move
from .tasks import TaskFamily, TaskParameters

Policy = Callable[[np.ndarray], np.ndarray]
"""Observations (M, obs_dim) float32 to actions (M, act_dim) float32 in [-1, 1]."""


@dataclass(frozen=True)
class StepResult:
    """One step of M episodes; rows of episodes that had already ended hold their last observation and zeros."""

    observations: np.ndarray  # (M, obs_dim) f4
    rewards: np.ndarray  # (M,) f8
    terminated: np.ndarray  # (M,) bool
    truncated: np.ndarray  # (M,) bool
    infos: dict[str, np.ndarray]  # each (M,) f8


@dataclass(frozen=True)
class Rollouts:
    """M finished episodes, padded with zeros to the horizon H."""

    observations: np.ndarray  # (M, H + 1, obs_dim) f4
    actions: np.ndarray  # (M, H, act_dim) f4
    rewards: np.ndarray  # (M, H) f8
    infos: dict[str, np.ndarray]  # each (M, H) f8
    lengths: np.ndarray  # (M,) i4
    terminated: np.ndarray  # (M,) bool; the others were truncated at the horizon

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted dense returns (M,) f8."""
        return self.rewards.sum(axis=1)

    @property
    def sparse_returns(self) -> np.ndarray | None:
        """Undiscounted sparse returns (M,) f8, or None where the family has no sparse reward."""
        return self.infos["sparse_reward"].sum(axis=1) if "sparse_reward" in self.infos else None


class EnvironmentFailure(Exception):
    """An environment raised instead of stepping; which task it had, and what it said."""

    def __init__(self, task: TaskParameters, error: Exception):
        super().__init__(task, error)
        self.task, self.error = task, error

    def __str__(self) -> str:
        return f"the environment raised {type(self.error).__name__}: {' '.join(str(self.error).split())}"


class BatchedEnvs:
    """M episodes of one family, each with its own task. `step` leaves episodes that have ended alone.

    An environment that raises spoils no other: its error is kept in `errors` by position, and it stays inactive until
    it is started again. `observations` (M, obs_dim) are the current ones.
    """

    def __init__(self, family: TaskFamily, tasks: Sequence[TaskParameters]):
        self.family, self.tasks = family, list(tasks)
        self.active = np.zeros(len(tasks), bool)
        self.errors: dict[int, Exception] = {}
        self._steps = np.zeros(len(tasks), np.int64)
        self.observations = np.zeros((len(tasks), family.obs_dim), np.float32)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Start M new episodes, each with its own reset seed, and return their first observations (M, obs_dim)."""
        assert len(seeds) == len(self.tasks)
        return self.restart(np.arange(len(self.tasks)), seeds)

    def restart(self, slots: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """Start new episodes at the positions `slots` only; return all current observations (M, obs_dim)."""
        for slot in slots:
            self.errors.pop(int(slot), None)
        self.observations = self.observations.copy()
        self.observations[slots] = self._reset(slots, seeds)
        self._steps[slots] = 0
        self.active[slots] = [int(slot) not in self.errors for slot in slots]
        return self.observations

    def step(self, actions: np.ndarray) -> StepResult:
        """Apply actions (M, act_dim)."""
        live = np.flatnonzero(self.active)
        observations, rewards = self.observations.copy(), np.zeros(len(self.tasks))
        terminated = np.zeros(len(self.tasks), bool)
        observations[live], rewards[live], terminated[live], infos = self._step(live, actions[live])
        self._steps[live] += 1
        truncated = self.active & ~terminated & (self._steps >= self.family.horizon)
        spread = {}
        for name, values in infos.items():
            spread[name] = np.zeros(len(self.tasks))
            spread[name][live] = values
        self.active &= ~(terminated | truncated)
        self.active[list(self.errors)] = False
        self.observations = observations
        return StepResult(observations, rewards, terminated, truncated, spread)

    def close(self) -> None:
        """Release threads and renderers."""

    def _reset(self, slots: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def _step(
        self, live: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        raise NotImplementedError


class BatchedPointRobots(BatchedEnvs):
    """Vectorised point robots."""

    def __init__(self, family: TaskFamily, tasks: Sequence[TaskParameters]):
        super().__init__(family, tasks)
        self._class = env_class(family)
        pairs = [self._class.goal_and_wind(task) for task in tasks]
        self._goals = np.array([goal for goal, _ in pairs], np.float64)
        self._winds = np.array([wind for _, wind in pairs], np.float64)
        self._positions = np.zeros((len(tasks), 2))

    def _reset(self, slots: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        self._positions[slots] = 0.0
        return self._positions[slots].astype(np.float32)

    def _step(
        self, live: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        positions = move(self._positions[live], actions, self._winds[live])
        self._positions[live] = positions
        gap = distance(positions, self._goals[live])
        return positions.astype(np.float32), -gap, np.zeros(len(live), bool), self._class.infos(gap)


class BatchedLocomotion(BatchedEnvs):
    """MuJoCo episodes: one model per distinct dynamics, one MjData per episode, `mj_step` in a thread pool."""

    def __init__(self, family: TaskFamily, tasks: Sequence[TaskParameters], threads: int | None = None):
        super().__init__(family, tasks)
        # tasks that differ only in reward share one compiled model
        own_model = family.varies == "transitions"
        makers: dict[str, LocomotionEnv] = {}
        for task in tasks:
            key = repr(task) if own_model else ""
            if key not in makers:
                makers[key] = cast(LocomotionEnv, gymnasium.make(family.env_id, task=task).unwrapped)
        self._envs = [makers[repr(task) if own_model else ""] for task in tasks]
        self._makers = list(makers.values())
        self._data = [mujoco.MjData(env.model) for env in self._envs]
        self._class = env_class(family)
        # Views into the simulators' memory, made once, and where they are copied to: asking a simulator for its arrays
        # at every step costs as much as the policy. The copying is left to the threads that step.
        torso, count = self._envs[0].torso_id, 4 if self._class.needs_contact_forces else 3
        views = [(data.qpos, data.qvel, data.xpos[torso], data.cfrc_ext)[:count] for data in self._data]
        arrays = [np.zeros((len(tasks), *view.shape)) for view in views[0]]
        self._state = State(*arrays)
        self._copies = [
            [(array[i], view) for array, view in zip(arrays, views[i], strict=True)] for i in range(len(tasks))
        ]
        self._controls = [data.ctrl for data in self._data]
        self._x = np.zeros(len(tasks))  # where each was before the step
        numbers = [name for name, value in tasks[0].items() if isinstance(value, int | float)]
        self._parameters = {name: np.array([task[name] for task in tasks]) for name in numbers}
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def close(self) -> None:
        """Release threads and renderers."""
        if self._pool is not None:
            self._pool.shutdown()
        for env in self._makers:
            env.close()

    def _reset(self, slots: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        for slot, seed in zip(slots.tolist(), seeds, strict=True):
            env, data = self._envs[slot], self._data[slot]
            try:
                rng, _ = seeding.np_random(int(seed))
                mujoco.mj_resetData(env.model, data)
                data.qpos[:], data.qvel[:] = env.draw_start(rng)
                mujoco.mj_forward(env.model, data)
            except Exception as error:
                self.errors[slot] = error
            _copy(self._copies[slot])
        state = self._state.at(slots)
        self._x[slots] = self._class.x_position(state)
        return finite(self._class.observe(state))

    def _step(
        self, live: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        actions = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        if self._pool is None or len(live) == 0:
            self._advance(live, actions)
        else:
            size = -(-len(live) // self._threads)
            shares = [slice(start, start + size) for start in range(0, len(live), size)]
            list(self._pool.map(lambda share: self._advance(live[share], actions[share]), shares))
        after = self._state if len(live) == len(self.tasks) else self._state.at(live)
        x = self._class.x_position(after)
        velocity = finite((x - self._x[live]) / self._envs[0].dt)
        self._x[live] = x
        task = {name: values[live] for name, values in self._parameters.items()}
        rewards = finite(self._class.reward(task, velocity, actions, after))
        return finite(self._class.observe(after)), rewards, ~self._class.healthy(after), {"x_velocity": velocity}

    def _advance(self, indices: np.ndarray, actions: np.ndarray) -> None:
        for index, action in zip(indices.tolist(), actions, strict=True):
            env, data = self._envs[index], self._data[index]
            self._controls[index][:] = action
            try:
                mujoco.mj_step(env.model, data, nstep=env.frame_skip)
                if self._class.needs_contact_forces:
                    mujoco.mj_rnePostConstraint(env.model, data)
            except Exception as error:
                self.errors[index] = error
            _copy(self._copies[index])


def _copy(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    for to, what in pairs:
        to[:] = what


class BatchedSingles(BatchedEnvs):
    """Environments of any other kind, stepped one after the other: slower, and nothing need be written for them."""

    def __init__(self, family: TaskFamily, tasks: Sequence[TaskParameters]):
        super().__init__(family, tasks)
        self._envs = [gymnasium.make(family.env_id, task=task, disable_env_checker=True).unwrapped for task in tasks]

    def close(self) -> None:
        """Release what the environments hold."""
        for env in self._envs:
            env.close()

    def _reset(self, slots: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        observations = np.zeros((len(slots), self.family.obs_dim), np.float32)
        for row, (slot, seed) in enumerate(zip(slots.tolist(), seeds, strict=True)):
            try:
                observations[row] = self._envs[slot].reset(seed=int(seed))[0]
            except Exception as error:
                self.errors[slot] = error
        return observations

    def _step(
        self, live: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        observations, rewards = self.observations[live], np.zeros(len(live))
        terminated = np.zeros(len(live), bool)
        infos: dict[str, np.ndarray] = {}
        for row, (slot, action) in enumerate(zip(live.tolist(), actions, strict=True)):
            try:
                observations[row], rewards[row], terminated[row], _, info = self._envs[slot].step(action)
                numbers = {name: _number(name, value) for name, value in info.items()}
            except Exception as error:
                self.errors[slot] = error
                continue
            for name, value in numbers.items():
                infos.setdefault(name, np.zeros(len(live)))[row] = value
        return observations, rewards, terminated, infos


def _number(name: str, value: Any) -> float:
    """An entry of a step's `info` as it is recorded. Raises `TypeError` for what is not one number."""
    if np.ndim(value) or np.asarray(value).dtype.kind not in "biuf":
        raise TypeError(f"info['{name}'] is {str(value)[:60]!r}, expected one number a step; leave it out of info")
    return float(value)


def env_class(family: TaskFamily) -> Any:
    """Return the environment class registered for a family."""
    entry = gymnasium.spec(family.env_id).entry_point
    assert callable(entry)
    return entry


def make_batch(family: TaskFamily, tasks: Sequence[TaskParameters], threads: int | None = None) -> BatchedEnvs:
    """Return M environments stepped together. `threads` defaults to the cores this process may use."""
    kind = env_class(family)
    if _steps_as(kind, PointRobotEnv):
        return BatchedPointRobots(family, tasks)
    # a reward cannot tell the items of a list from the episodes of a batch; the walkers' does not look at theirs
    plain = all(isinstance(value, int | float) for value in tasks[0].values())
    if _steps_as(kind, LocomotionEnv) and (plain or kind.reward is Walker2DParamsEnv.reward):
        return BatchedLocomotion(family, tasks, threads)
    return BatchedSingles(family, tasks)


_STEPPING = (
    "reset", "step", "reset_model", "read_state", "set_state", "do_simulation", "_step_mujoco_simulation",
)  # fmt: skip


def _steps_as(kind: Any, base: type) -> bool:
    """Whether `kind` derives from `base` and resets and steps as it does, which is what a batch repeats."""
    return issubclass(kind, base) and all(getattr(kind, name, None) is getattr(base, name, None) for name in _STEPPING)


def rollout(envs: BatchedEnvs, policy: Policy, seeds: Sequence[int]) -> Rollouts:
    """Roll one episode out in every environment of the batch. The float32 action recorded is the one stepped.

    Raises `EnvironmentFailure` when an environment did.
    """
    m, horizon = len(envs.tasks), envs.family.horizon
    observations = np.zeros((m, horizon + 1, envs.family.obs_dim), np.float32)
    actions = np.zeros((m, horizon, envs.family.act_dim), np.float32)
    rewards, lengths = np.zeros((m, horizon)), np.zeros(m, np.int32)
    infos: dict[str, np.ndarray] = {}
    terminated = np.zeros(m, bool)
    observations[:, 0] = current = envs.reset(seeds)
    _raise_first(envs)
    for t in range(horizon):
        live = envs.active.copy()
        chosen = np.clip(np.asarray(policy(current), np.float32), -1.0, 1.0)
        result = envs.step(chosen)
        _raise_first(envs)
        current = result.observations
        observations[live, t + 1], actions[live, t], rewards[:, t] = current[live], chosen[live], result.rewards
        for name, values in result.infos.items():
            infos.setdefault(name, np.zeros((m, horizon)))[:, t] = values
        terminated |= result.terminated
        lengths += live
        if not envs.active.any():
            break
    return Rollouts(observations, actions, rewards, infos, lengths, terminated)


def _raise_first(envs: BatchedEnvs) -> None:
    for slot, error in envs.errors.items():
        raise EnvironmentFailure(envs.tasks[slot], error) from error
