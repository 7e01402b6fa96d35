"""Imports composed: what a source's tasks are, in terms of this project's families. Below `cli.py`, above all else.

`datasets` reads foreign files and knows no environment; which parameters a folder's name, an index or a user's file
stands for, and what the sparse reward is, is said here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import Episodes
from .datasets.foreign import FamilyFacts, ImportTask, SourceTask, advising
from .datasets.storage import read_json
from .envs import Rollouts, Split, TaskFamily, get_family, stream
from .envs.batch import env_class
from .envs.locomotion import LocomotionEnv
from .envs.point_robot import SparsePointRobotEnv, distance, sparse_reward
from .envs.tasks import SPLIT_STREAM
from .errors import UsageError, did_you_mean

REWARD_TOLERANCE = 2e-3
"""Metres; goals in folder names are rounded to 0.0005 per axis."""

Params = dict[str, Any]


def family_facts(env: str, horizon: int | None = None) -> FamilyFacts:
    """Describe a family to `datasets`; `horizon` where the data were collected with another time limit."""
    family = get_family(env)
    environment = env_class(family)
    locomotion = issubclass(environment, LocomotionEnv)
    # Ant and walker fall; the others only end early when the simulation diverges
    terminates = locomotion and environment.healthy is not LocomotionEnv.healthy
    return FamilyFacts(
        name=family.name,
        env_id=family.env_id,
        horizon=horizon or family.horizon,
        observation_dim=family.obs_dim,
        action_dim=family.act_dim,
        absolute_x=family.absolute_x,
        terminates=terminates,
        infos=("sparse_reward",) if family.sparse else ("x_velocity",) if locomotion else (),
        sparse_reward=(_sparse_reward if issubclass(environment, SparsePointRobotEnv) else _no_sparse_reward)
        if family.sparse
        else None,
    )


def plan_tasks(
    env: str, found: Sequence[SourceTask], tasks_file: Path | None = None, split: str | None = None, seed: int = 0
) -> tuple[ImportTask, ...]:
    """Give every task found its parameters and its split.

    Parameters come from `tasks_file` (JSON: `{"tasks": {NAME: {"params": {...}, "split": "train"}}}`), else from this
    project's own export, the goal in a UNICORN folder's name, or the index in the released task set (focal-iclr).
    `split` is TRAIN/TEST, two counts, by default in the family's proportion. Which task is which is drawn from `seed`,
    except where the released code took the first and the last of its numbered tasks. Raises `UsageError` when
    parameters cannot be known.
    """
    family = get_family(env)
    if found[0].exported is not None:
        if tasks_file is not None or split is not None:
            raise UsageError("the source is an export with tasks and split of its own; leave --tasks and --split out")
        return tuple(
            ImportTask(
                task, family.checked(task.exported.record.params, f"task {task.name}"), task.exported.record.split
            )
            for task in found
            if task.exported is not None
        )
    said = _read_tasks_file(tasks_file, found) if tasks_file is not None else {}
    if family.fixed_tasks is not None and split is not None:
        raise UsageError(f"{family.name} has two tasks, used for training and test alike; leave --split out")
    all_said = split is None and all("split" in said.get(task.name, {}) for task in found)
    splits: list[Split] = ["both"] * len(found) if all_said else _splits(family, found, split, seed)
    planned = []
    for task, drawn in zip(found, splits, strict=True):
        own = said.get(task.name, {})
        params = own["params"] if "params" in own else _known_params(family, task)
        planned.append(ImportTask(task, family.checked(params, f"task {task.name}"), own.get("split", drawn)))
    return tuple(planned)


def _splits(family: TaskFamily, found: Sequence[SourceTask], split: str | None, seed: int) -> list[Split]:
    count = len(found)
    if family.fixed_tasks is not None:
        return ["both"] * count
    if split is None:
        test = max(1, round(count * family.n_test / (family.n_train + family.n_test)))
        train = count - test
    else:
        left, _, right = split.partition("/")
        if not left.isdigit() or not right.isdigit():
            raise UsageError(f"--split got '{split}', expected TRAIN/TEST, for example --split 80/20")
        train, test = int(left), int(right)
    if train + test != count or not train or not test:
        raise UsageError(
            f"{train} training and {test} test tasks, expected at least one of each and {count} together, as there are "
            "in the source; give another --split TRAIN/TEST, or --tasks FILE with a split for each"
        )
    in_order = family.published_split_in_order and found[0].index is not None
    order = np.arange(count) if in_order else stream(seed, SPLIT_STREAM).permutation(count)
    tests = set(order[train:].tolist())
    return ["test" if position in tests else "train" for position in range(count)]


def _known_params(family: TaskFamily, task: SourceTask) -> Params:
    """Parameters that the source itself tells."""
    if task.goal:
        return _from_goal(family, task)
    if task.index is not None:
        if family.published is None:
            return _unknown(task, f"--tasks FILE, as the released tasks of {family.name} are not recoverable")
        released = family.published(family.n_train + family.n_test)
        return (
            dict(released[task.index]) if task.index < len(released) else _unknown(task, f"index below {len(released)}")
        )
    return _unknown(task, '--tasks FILE with {"tasks": {"' + task.name + '": {"params": ' + family.example + "}}}")


def _unknown(task: SourceTask, expected: str) -> Params:
    raise UsageError(f"the parameters of task {task.name} are not known, expected {expected}")


def _from_goal(family: TaskFamily, task: SourceTask) -> Params:
    """Parameters from the goal in the name of a UNICORN or CORRO folder."""
    goal = list(task.goal)
    by_family: dict[str, tuple[int, Callable[[], Params]]] = {
        "sparse-point-robot": (2, lambda: {"goal": goal}),
        "point-robot-wind": (2, lambda: {"wind": goal}),
        "half-cheetah-vel": (1, lambda: {"target_velocity": goal[0]}),
        "half-cheetah-fwd-back": (1, lambda: {"direction": goal[0]}),
        "ant-fwd-back": (1, lambda: {"direction": round(math.cos(goal[0]), 6)}),  # an angle there, 0 or pi
    }
    if family.name not in by_family:
        return _unknown(task, f"--tasks FILE, as folder names do not hold the tasks of {family.name}")
    count, params = by_family[family.name]
    if len(goal) != count:
        raise UsageError(f"{task.name} has {len(goal)} numbers in its goal, expected {count} for {family.name}")
    return params()


def _read_tasks_file(path: Path, found: Sequence[SourceTask]) -> dict[str, dict[str, Any]]:
    with advising('expected {"tasks": {NAME: {"params": {...}}}}; see docs/exchange.md'):
        said = read_json(path).get("tasks")
    names = [task.name for task in found]
    if not isinstance(said, dict) or not all(isinstance(entry, dict) for entry in said.values()):
        raise UsageError(f'{path} has no object "tasks" of objects, expected {{"tasks": {{"{names[0]}": {{...}}}}}}')
    for name, entry in said.items():
        if name not in names:
            raise UsageError(f"{path} describes '{name}', which is not in the source; {did_you_mean(name, names)}")
        if unknown := sorted(set(entry) - {"params", "split"}):
            raise UsageError(f"{path}: '{name}' has '{unknown[0]}'; {did_you_mean(unknown[0], ['params', 'split'])}")
        if entry.get("split", "both") not in ("train", "test", "both"):
            raise UsageError(f"{path}: '{name}' has split {entry['split']!r}, expected train, test or both")
    return said


def _sparse_reward(params: Mapping[str, Any], after: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Sparse rewards (T,) of the point robot from its dense ones, which must agree with where it arrived (T, 2)."""
    gap = distance(np.asarray(after, np.float64), np.asarray(params["goal"], np.float64))
    error = np.abs(rewards + gap)
    if not error.max() <= REWARD_TOLERANCE:
        step = int(error.argmax())
        raise UsageError(
            f"step {step} has reward {rewards[step]:.4g} at {gap[step]:.4g} m from the goal {params['goal']}, expected "
            "minus the distance; the data have other goals or another reward than sparse-point-robot"
        )
    return sparse_reward(-np.asarray(rewards, np.float64))


def _no_sparse_reward(params: Mapping[str, Any], after: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    raise UsageError(
        "the source has no infos/sparse_reward, expected one, as this family has a sparse reward of its own that "
        "cannot be told from the dense one; import a source that has it"
    )


def expert_test(env: str, horizon: int) -> Callable[..., tuple[bool, str]]:
    """Return the family's absolute expert test for imported episodes; speeds are recovered from the rewards."""
    family = get_family(env)

    def test(params: Params, random: Episodes, expert: Episodes, deterministic: Episodes | None) -> tuple[bool, str]:
        from .datagen import worker  # imports stable-baselines3

        rollouts = {
            worker.RANDOM_STOCHASTIC: _to_rollouts(family, params, random, horizon),
            worker.EXPERT_STOCHASTIC: _to_rollouts(family, params, expert, horizon),
            worker.EXPERT_DETERMINISTIC: _to_rollouts(family, params, deterministic or expert, horizon),
        }
        if min(random.num_episodes, expert.num_episodes) < 2:
            return False, "a single episode of a checkpoint is no test"
        reached, measured = worker.expert_test(family, params, rollouts)
        return reached, measured if deterministic else f"{measured}; on stochastic episodes, there are no others"

    return test


def _to_rollouts(family: TaskFamily, params: Params, episodes: Episodes, horizon: int) -> Rollouts:
    """Pad episodes with zeros to the time limit, as the environments return them."""
    steps = np.arange(horizon) < episodes.lengths[:, None]  # (E, H)
    count = episodes.num_episodes

    def padded(values: np.ndarray) -> np.ndarray:
        full = np.zeros((count, horizon, *values.shape[1:]), np.float64)
        full[steps] = values
        return full

    infos = {name: padded(values) for name, values in episodes.infos.items()}
    if issubclass(env_class(family), LocomotionEnv):
        infos.setdefault("x_velocity", padded(_velocity(family, params, episodes)))
    return Rollouts(
        observations=np.zeros((count, horizon + 1, family.obs_dim), np.float32),
        actions=padded(episodes.actions),
        rewards=padded(episodes.rewards),
        infos=infos,
        lengths=episodes.lengths,
        terminated=episodes.ends == 1,
    )


def _velocity(family: TaskFamily, params: Params, episodes: Episodes) -> np.ndarray:
    """Solve the family's reward for the speed along x, (T,) m/s.

    Half-Cheetah-Vel tells only |v - v*|, all its test needs; the ant's contact cost is taken for 0, as in the released
    code.
    """
    if family.name not in ("half-cheetah-vel", "half-cheetah-fwd-back", "ant-fwd-back", "walker-2d-params"):
        raise UsageError(f"{family.name}'s expert test needs info x_velocity, which the source has not, and its reward "
                         "is not known here to tell it; import without --label scores")  # fmt: skip
    effort, rewards = np.square(episodes.actions.astype(float)).sum(axis=1), episodes.rewards.astype(float)
    if family.name == "half-cheetah-vel":
        return params["target_velocity"] - (rewards + 0.05 * effort)
    if family.name == "half-cheetah-fwd-back":
        return (rewards + 0.05 * effort) / params["direction"]
    if family.name == "ant-fwd-back":
        return (rewards + 0.5 * effort - 1.0) / params["direction"]
    return rewards + 1e-3 * effort - 1.0
