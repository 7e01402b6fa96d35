"""The two point robots: a point mass in the plane that moves by its action.

Source: FOCAL appendix D; constants of the released code in the class docstrings.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from .tasks import TaskParameters

STEP_LENGTH = 0.1  # metres per step at action 1, per axis
GOAL_RADIUS = 0.2  # metres


def distance(position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Euclidean distance over the last axis. Written out, so that one robot and a batch give the same bits."""
    x, y = (position - goal)[..., 0], (position - goal)[..., 1]
    return np.sqrt(x * x + y * y)


def sparse_reward(gap: np.ndarray) -> np.ndarray:
    """Reward of the sparse task: 1 - distance inside the goal radius, else 0 (FOCAL appendix D)."""
    return np.where(gap <= GOAL_RADIUS, 1.0 - gap, 0.0)


class PointRobotEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shared by both families. Observation: position (2,) float32; action: Box(-1, 1, (2,)), times 0.1 m a step.

    Starts at the origin; no walls; never terminates; truncated at `horizon`. Positions are float64 inside.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention
    horizon: int
    default_task: TaskParameters
    has_sparse_reward = False

    def __init__(self, task: TaskParameters | None = None):
        self.task = dict(self.default_task if task is None else task)
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._goal, self._wind = (np.asarray(v, np.float64) for v in self.goal_and_wind(self.task))
        self._position = np.zeros(2)
        self._steps = 0

    @staticmethod
    def goal_and_wind(task: TaskParameters) -> tuple[list[float], list[float]]:
        """Return the goal (2,) in metres and the drift (2,) in metres per step."""
        raise NotImplementedError

    @classmethod
    def infos(cls, gap: np.ndarray) -> dict[str, Any]:
        """Extra quantities recorded with every transition, from the distance to the goal after the move."""
        return {"sparse_reward": sparse_reward(gap)} if cls.has_sparse_reward else {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return to the origin. The seed changes nothing: the start is the same in every episode."""
        super().reset(seed=seed)
        self._position, self._steps = np.zeros(2), 0
        return self._position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move, then reward with the negative distance to the goal after the move."""
        self._position = move(self._position, action, self._wind)
        self._steps += 1
        gap = distance(self._position, self._goal)
        infos = {name: float(value) for name, value in self.infos(gap).items()}
        return self._position.astype(np.float32), -float(gap), False, self._steps >= self.horizon, infos


def move(position: np.ndarray, action: np.ndarray, wind: np.ndarray) -> np.ndarray:
    """s' = s + 0.1 a + w, actions clipped to [-1, 1]. Shapes (..., 2), metres."""
    return position + STEP_LENGTH * np.clip(np.asarray(action, np.float64), -1.0, 1.0) + wind


class SparsePointRobotEnv(PointRobotEnv):
    """Reach a goal on the upper unit half circle; reward -distance, and the sparse reward in info["sparse_reward"].

    The paper says "unit circle" and sparse reward 1 - distance inside the radius; all published data use the upper
    half circle, and the released code rescales the sparse reward to [0, 1]. Here: half circle, and the paper's reward.
    Horizon 20 (the released config's path length; its environment's own limit of 200 was never reached).
    """

    horizon = 20
    default_task = {"goal": [0.0, 1.0]}  # noqa: RUF012
    has_sparse_reward = True

    @staticmethod
    def goal_and_wind(task: TaskParameters) -> tuple[list[float], list[float]]:
        """Return the task's goal and no wind."""
        return task["goal"], [0.0, 0.0]


class PointRobotWindEnv(PointRobotEnv):
    """Reach (1, 0) against a constant drift that differs per task; reward -distance. Horizon 25.

    The paper calls it a variant of Sparse-Point-Robot; the released code gives it a dense reward and one goal, so
    tasks differ in transitions only. Here as in the code.
    """

    horizon = 25
    default_task = {"wind": [0.0, 0.0]}  # noqa: RUF012

    @staticmethod
    def goal_and_wind(task: TaskParameters) -> tuple[list[float], list[float]]:
        """Return the fixed goal and the task's drift."""
        return [1.0, 0.0], task["wind"]


def optimal_action(position: np.ndarray, goal: np.ndarray, wind: np.ndarray) -> np.ndarray:
    """Action (..., 2) that comes as near to the goal as one step can, each axis by itself.

    Actions are a box, so what k steps reach is one too, and this is at its nearest point to the goal after every k: no
    policy earns more, sparse or dense. For winds up to a step's length, 0.1 m an axis, as all drawn ones are: in a
    stronger one nobody can stay.
    """
    return np.clip((goal - position - wind) / STEP_LENGTH, -1.0, 1.0)


def optimal_return(env_class: type[PointRobotEnv], task: TaskParameters, sparse: bool) -> float:
    """Largest undiscounted return, sparse or dense."""
    goal, wind = (np.asarray(v, np.float64) for v in env_class.goal_and_wind(task))
    position, total = np.zeros(2), 0.0
    for _ in range(env_class.horizon):
        position = move(position, optimal_action(position, goal, wind), wind)
        gap = distance(position, goal)
        total += float(sparse_reward(gap)) if sparse else -float(gap)
    return total


def zero_action_return(env_class: type[PointRobotEnv], task: TaskParameters) -> float:
    """Undiscounted dense return of doing nothing (the wind still blows)."""
    goal, wind = (np.asarray(v, np.float64) for v in env_class.goal_and_wind(task))
    steps = np.arange(1, env_class.horizon + 1)[:, None]
    return -float(distance(steps * wind, goal).sum())
