"""The six task families, and their registration with Gymnasium."""

import math
from typing import Any

import gymnasium

from ..errors import UsageError, did_you_mean
from . import experts, tasks
from .locomotion import AntFwdBackEnv, HalfCheetahFwdBackEnv, HalfCheetahVelEnv, Walker2DParamsEnv
from .point_robot import PointRobotWindEnv, SparsePointRobotEnv
from .tasks import TaskFamily

BOTH_DIRECTIONS = ({"direction": 1.0}, {"direction": -1.0})

FAMILIES = {
    family.name: family
    for family in [
        TaskFamily(
            "sparse-point-robot", "point", "focal/SparsePointRobot-v0", "reward",
            "reach a goal on the upper unit half circle", 2, 2, 20, 80, 20, 0.9,
            draw=tasks.draw_goals, published=tasks.published_goals, sparse=True,
            order=lambda task: math.atan2(task["goal"][1], task["goal"][0]),
            passes_expert_test=experts.sparse_point_expert, optimum=experts.sparse_point_optimum,
        ),
        TaskFamily(
            "point-robot-wind", "wind", "focal/PointRobotWind-v0", "transitions",
            "reach (1, 0) against a constant drift", 2, 2, 25, 40, 10, 0.9,
            draw=tasks.draw_winds, published=tasks.published_winds,
            order=lambda task: math.atan2(task["wind"][1], task["wind"][0]),
            passes_expert_test=experts.wind_expert,
        ),
        TaskFamily(
            "half-cheetah-vel", "cheetah-vel", "focal/HalfCheetahVel-v0", "reward",
            "run at a target velocity", 20, 6, 200, 80, 20, 0.99,
            draw=tasks.draw_velocities, published=tasks.published_velocities, published_split_in_order=True,
            order=lambda task: task["target_velocity"], passes_expert_test=experts.velocity_expert, absolute_x=17,
        ),
        TaskFamily(
            "half-cheetah-fwd-back", "cheetah-dir", "focal/HalfCheetahFwdBack-v0", "reward",
            "run forward or backward", 20, 6, 200, 2, 2, 0.99,
            draw=lambda rng, n: list(BOTH_DIRECTIONS), fixed_tasks=BOTH_DIRECTIONS,
            published=lambda n: list(reversed(BOTH_DIRECTIONS)),  # there task 0 runs backward, Ant's forward
            order=lambda task: task["direction"], passes_expert_test=experts.direction_expert, absolute_x=17,
        ),
        TaskFamily(
            "ant-fwd-back", "ant-dir", "focal/AntFwdBack-v0", "reward",
            "run forward or backward", 27, 8, 200, 2, 2, 0.99,
            draw=lambda rng, n: list(BOTH_DIRECTIONS), fixed_tasks=BOTH_DIRECTIONS,
            published=lambda n: list(BOTH_DIRECTIONS),
            order=lambda task: task["direction"], passes_expert_test=experts.direction_expert,
        ),
        TaskFamily(
            "walker-2d-params", "walker", "focal/Walker2DParams-v0", "transitions",
            "walk with scaled masses, inertias, dampings and frictions", 17, 6, 200, 40, 10, 0.99,
            draw=tasks.draw_walkers, order=tasks.walker_order, passes_expert_test=experts.walker_expert,
        ),
    ]
}  # fmt: skip

_CLASSES: dict[str, Any] = {
    "focal/SparsePointRobot-v0": SparsePointRobotEnv,
    "focal/PointRobotWind-v0": PointRobotWindEnv,
    "focal/HalfCheetahVel-v0": HalfCheetahVelEnv,
    "focal/HalfCheetahFwdBack-v0": HalfCheetahFwdBackEnv,
    "focal/AntFwdBack-v0": AntFwdBackEnv,
    "focal/Walker2DParams-v0": Walker2DParamsEnv,
}

for _env_id, _class in _CLASSES.items():
    if _env_id not in gymnasium.registry:
        # no max_episode_steps: the environments truncate themselves, and never when they also terminate
        gymnasium.register(_env_id, entry_point=_class)


def get_family(name: str) -> TaskFamily:
    """Return a family by name or alias. Raises `UsageError` naming the nearest."""
    for family in FAMILIES.values():
        if name in (family.name, family.alias):
            return family
    known = [*FAMILIES, *(family.alias for family in FAMILIES.values())]
    raise UsageError(f"unknown task family '{name}'; {did_you_mean(name, known)} (all: focal-cli envs)")
