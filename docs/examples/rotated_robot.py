"""A task family of your own: a point whose steering is turned by an angle that differs from task to task.

python rotated_robot.py data generate --env rotated --scale laptop --tasks 20/5
python rotated_robot.py train --data mixed
python rotated_robot.py test
"""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from focal.cli import main
from focal.envs import ExpertReport, Rollouts, TaskFamily
from focal.extend import add_family

HORIZON, STEP, GOAL = 20, 0.1, np.array([1.0, 0.0])


class RotatedRobotEnv(gymnasium.Env):
    """Position (2,); action Box(-1, 1, (2,)) turned by the task's angle, times 0.1 m; reward minus the distance."""

    def __init__(self, task: dict[str, Any] | None = None) -> None:
        self.angle = float((task or {"angle": 0.0})["angle"])
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Start at the origin."""
        super().reset(seed=seed)
        self.position, self.steps = np.zeros(2), 0
        return self.position.astype(np.float32), {}

    def step(self, action):
        """Turn, move, measure. Ends by the time limit only, so never terminates."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        turned = np.array([[cosine, -sine], [sine, cosine]]) @ np.clip(np.asarray(action, float), -1.0, 1.0)
        self.position = self.position + STEP * turned
        self.steps += 1
        reward = -float(np.linalg.norm(self.position - GOAL))
        return self.position.astype(np.float32), reward, False, self.steps >= HORIZON, {}


def draw(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Angles up to a third of a turn to either side. Parameters are plain numbers, stored with the data."""
    return [{"angle": angle} for angle in rng.uniform(-2.0, 2.0, count).tolist()]


def is_expert(rollouts: Rollouts, task: dict[str, Any]) -> ExpertReport:
    """At least 0.8 of the way from standing still (-20) to the straight line (-4.5)."""
    share = (float(rollouts.returns.mean()) + 20.0) / 15.5
    return ExpertReport(share >= 0.8, f"{share:.2f} of the way from standing still to the straight line, needs 0.80")


# At the top level, because worker processes import this file again.
add_family(
    TaskFamily(
        name="rotated-point-robot",
        alias="rotated",
        env_id="mine/RotatedRobot-v0",
        varies="transitions",
        summary="reach (1, 0) with turned steering",
        obs_dim=2,
        act_dim=2,
        horizon=HORIZON,
        n_train=20,
        n_test=5,
        discount=0.9,
        draw=draw,
        order=lambda task: task["angle"],  # neighbours are similar tasks
        passes_expert_test=is_expert,
    ),
    RotatedRobotEnv,
    generate={"sac": {"total_steps": 3_000, "hidden_sizes": (64, 64), "learning_rate": 1e-3, "learning_starts": 200}},
    train={"latent_dim": 5, "reward_scale": 100.0, "steps": 8_000, "next_observation_in_context": True},
)

if __name__ == "__main__":
    main()
