"""The absolute test a behaviour policy must pass to be called an expert (design section 5), per family.

Each takes the deterministic rollouts of the best checkpoint on fresh episodes, all of one task, and that task.
That it must also beat the untrained policy by five standard errors is checked where both returns are known.
"""

import numpy as np

from .batch import Rollouts
from .point_robot import PointRobotWindEnv, SparsePointRobotEnv, optimal_return, zero_action_return
from .tasks import ExpertReport, TaskParameters


def sparse_point_optimum(task: TaskParameters) -> float:
    """Largest sparse return: going to the goal as fast as the axes allow, and staying there."""
    return optimal_return(SparsePointRobotEnv, task, sparse=True)


def sparse_point_expert(rollouts: Rollouts, task: TaskParameters) -> ExpertReport:
    """Mean sparse return at least 0.8 of the optimum's."""
    assert rollouts.sparse_returns is not None
    share = float(rollouts.sparse_returns.mean()) / sparse_point_optimum(task)
    return ExpertReport(share >= 0.8, f"{share:.2f} of the optimum's sparse return, needs 0.80")


def wind_expert(rollouts: Rollouts, task: TaskParameters) -> ExpertReport:
    """At least 0.8 of the way from the zero-action return to the optimum (dense returns are negative)."""
    zero = zero_action_return(PointRobotWindEnv, task)
    best = optimal_return(PointRobotWindEnv, task, sparse=False)
    share = (float(rollouts.returns.mean()) - zero) / (best - zero)
    return ExpertReport(share >= 0.8, f"{share:.2f} of the way from zero action to the optimum, needs 0.80")


def velocity_expert(rollouts: Rollouts, task: TaskParameters) -> ExpertReport:
    """Mean |v - v*| at most 0.3 m/s over the last 150 steps."""
    error = float(np.abs(rollouts.infos["x_velocity"][:, -150:] - task["target_velocity"]).mean())
    return ExpertReport(error <= 0.3, f"mean |v - v*| {error:.2f} m/s over the last 150 steps, needs at most 0.30")


def direction_expert(rollouts: Rollouts, task: TaskParameters) -> ExpertReport:
    """Mean directed speed at least 1 m/s over the steps survived."""
    speed = task["direction"] * float(rollouts.infos["x_velocity"].sum() / rollouts.lengths.sum())
    return ExpertReport(speed >= 1.0, f"mean directed speed {speed:.2f} m/s, needs 1.00")


def walker_expert(rollouts: Rollouts, task: TaskParameters) -> ExpertReport:
    """Mean speed at least 0.5 m/s and the full horizon in at least 80% of the episodes."""
    speed = float(rollouts.infos["x_velocity"].sum() / rollouts.lengths.sum())
    full = float(1.0 - rollouts.terminated.mean())
    measured = f"mean speed {speed:.2f} m/s and full horizon in {full:.0%} of episodes, needs 0.50 and 80%"
    return ExpertReport(speed >= 0.5 and full >= 0.8, measured)
