"""Synthetic tasks for the trainer's tests: a point that walks to a goal, and only the reward tells which."""

import dataclasses

import numpy as np
import torch
from torch import nn

from focal.datasets import Transitions
from focal.settings import field_names, override, to_dict
from focal.trainer.agent import Agent
from focal.trainer.methods import find_method
from focal.trainer.replay import TrainingData
from focal.trainer.settings import FocalSettings, TrainSettings

HORIZON, STEP = 4, 0.25

TINY = override(
    FocalSettings(),
    {
        "steps": 30, "latent_dim": 3, "meta_batch": 3, "context_size": 16, "batch_size": 8, "encoder_hidden": (16, 16),
        "control_hidden": (16, 16), "log_every": 4, "checkpoint_every": 10, "eval_every": 15, "reward_scale": 1.0,
    },
)  # fmt: skip


def reward_of(positions: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Dense reward at positions (..., 2)."""
    return -np.linalg.norm(positions - goal, axis=-1)


def goal_at(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def walk_task(goal: np.ndarray, episodes: int, seed: int) -> Transitions:
    """Transitions of random walks of HORIZON steps from the origin, each with a drift of its own, all truncated."""
    draw = np.random.default_rng(seed)
    drift = draw.uniform(-0.9, 0.9, (episodes, 1, 2))
    actions = np.clip(drift + draw.uniform(-0.6, 0.6, (episodes, HORIZON, 2)), -1, 1).astype(np.float32)
    observations = np.zeros((episodes, HORIZON + 1, 2), np.float32)
    observations[:, 1:] = np.cumsum(STEP * actions, axis=1)
    rewards = reward_of(observations[:, 1:], goal).astype(np.float32)
    rows = np.arange(episodes)[:, None] * (HORIZON + 1) + np.arange(HORIZON)
    valid = np.ones((episodes, HORIZON), bool)
    valid[:, -1] = False
    return Transitions(
        observations=observations.reshape(-1, 2),
        rows=rows.reshape(-1),
        actions=actions.reshape(-1, 2),
        rewards=rewards.reshape(-1),
        infos={"sparse_reward": np.maximum(0, 1 + rewards.reshape(-1))},
        terminated=np.zeros(episodes * HORIZON, bool),
        next_action_valid=valid.reshape(-1),
    )


def walk_data(tasks: int = 4, episodes: int = 40, seed: int = 0) -> TrainingData:
    """Goals evenly along the upper half of the unit circle."""
    goals = [goal_at(np.pi * k / (tasks - 1)) for k in range(tasks)]
    walks = [walk_task(goal, episodes, seed + k) for k, goal in enumerate(goals)]
    return TrainingData("toy-walk", tuple(range(tasks)), walks, 2, 2, None, "c0ffee")


def two_episodes() -> Transitions:
    """Episodes of 2 (truncated) and 1 (terminated) steps; every number tells where it belongs."""
    return Transitions(
        observations=np.array([[10, 1], [11, -4], [12, 2], [20, 3], [21, 1]], np.float32),
        rows=np.array([0, 1, 3]),
        actions=np.array([[0.1], [0.2], [0.3]], np.float32),
        rewards=np.array([1, 2, 3], np.float32),
        infos={"sparse_reward": np.array([0, 0.5, 1], np.float32)},
        terminated=np.array([False, False, True]),
        next_action_valid=np.array([True, False, False]),
    )


def with_settings(**changes: object) -> FocalSettings:
    """TINY with dotted names written with double underscores."""
    return override(TINY, {name.replace("__", "."): value for name, value in changes.items()})


def shifted(task: Transitions, by: float) -> Transitions:
    """The same transitions with `by` added to observations, actions and rewards."""
    moved = {name: getattr(task, name) + np.float32(by) for name in ("observations", "actions", "rewards")}
    return dataclasses.replace(task, **moved)


def resume_settings() -> FocalSettings:
    """Both phases, everything learnt, and intervals that do not divide one another."""
    return with_settings(
        schedule="encoder-first",
        encoder_steps=12,
        regularisation__kind="value-penalty",
        regularisation__adaptive=True,
        regularisation__discriminator_steps=2,
        entropy__learnt=True,
    )


_ENCODER_FIRST = {"schedule": "encoder-first", "encoder_steps": 5}
_VALUE_PENALTY = {"regularisation.kind": "value-penalty", "regularisation.discriminator_steps": 2}
_POLICY = {"regularisation.kind": "policy", "regularisation.discriminator_steps": 1}
# Every design choice of the paper and every departure of the released code, as differences from TINY.
VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "power -1": {"distance.power": -1},
    "power 1": {"distance.power": 1},
    "power 2": {"distance.power": 2},
    "released distance": {"distance.form": "released"},
    "one draw, tasks with replacement": {"context_draws": 1, "task_replacement": True},
    "probabilistic": {"encoder.kind": "probabilistic"},
    "probabilistic, unbounded": {"encoder.kind": "probabilistic", "encoder.bounded": False},
    "probabilistic without metric": {"encoder.kind": "probabilistic", "distance.weight": 0},
    "coupled": {"gradients": "coupled"},
    "coupled, value penalty": {"gradients": "coupled", **_VALUE_PENALTY},
    "coupled, policy": {"gradients": "coupled", **_POLICY},
    "coupled, probabilistic, no metric (Batch PEARL)": {
        "gradients": "coupled", "encoder.kind": "probabilistic", "distance.weight": 0,
    },
    "value penalty": _VALUE_PENALTY,
    "policy": _POLICY,
    "wasserstein": {**_VALUE_PENALTY, "regularisation.divergence": "wasserstein"},
    "adaptive alpha": {**_POLICY, "regularisation.adaptive": True},
    "no entropy": {"entropy.enabled": False},
    "learnt entropy weight": {"entropy.learnt": True},
    "next observation in context": {"next_observation_in_context": True},
    "sparse reward in context": {"context_reward": "sparse"},
    "encoder first, frozen": _ENCODER_FIRST,
    "encoder first, decaying": {**_ENCODER_FIRST, "encoder_after": "decaying", "encoder_half_life": 2},
    "bf16": {"precision": "bf16", **_VALUE_PENALTY},
    "unscaled": {"observation_scale": "none"},
    "scaled by rms": {"observation_scale": "rms"},
    "x hidden": {"hide_x": True},
    "D1": {"gradients": "coupled", "released.discard_bellman": True},
    "D2": {**_POLICY, "released.penalise_output": True},
    "D3": {**_VALUE_PENALTY, "released.penalty_at_state": True},
    "D4": {**_VALUE_PENALTY, "released.no_actor_divergence": True},
    "D6": {"released.limits_terminate": True},
    "D7": {"released.raw_reset": True},
}  # fmt: skip


def variant(name: str) -> FocalSettings:
    """TINY with the differences of `VARIANTS[name]`, checked."""
    settings = override(TINY, VARIANTS[name])
    settings.check()
    return settings


def evaluate_toy(agent: Agent, step: int) -> dict[str, float]:
    """A number that depends on every weight of the policy."""
    return {"test/action": float(agent.act(np.full((1, 3, 2), 0.1), np.full((1, 3), 0.2)).sum())}


def tiny_method(algo: str, **changes: object) -> TrainSettings:
    """Settings of any method as small as TINY, with dotted names written with double underscores."""
    settings = find_method(algo).settings()
    tiny = {
        **{name: value for name, value in to_dict(TINY).items() if not isinstance(value, dict)},
        **{f"bcq.{name}_hidden": (16, 16) for name in ("critic", "vae", "perturbation")},
        **{f"teachers.bcq.{name}_hidden": (16, 16) for name in ("critic", "vae", "perturbation")},
        **{f"student.{name}_hidden": (16, 16) for name in ("critic", "decoder", "perturbation")},
        **{f"teachers.{name}.hidden": (16,) for name in ("rewards", "transitions")},
        **{f"teachers.{name}.members": 3 for name in ("rewards", "transitions")},
        **{f"teachers.{name}.batch_size": 8 for name in ("rewards", "transitions")},
        "teachers.rewards.steps": 20, "teachers.transitions.steps": 24, "teachers.steps": 30,
        "teachers.batch_size": 8, "teachers.pool": 20, "teachers.bcq.candidates": 3, "bcq.candidates": 3,
        "relabel.reward_std": 0.3,
    }  # fmt: skip
    known = set(field_names(settings)) - {"algo"}
    settings = override(settings, {name: value for name, value in tiny.items() if name in known})
    settings = override(settings, {name.replace("__", "."): value for name, value in changes.items()})
    settings.check()
    return settings


def scatter(*networks: nn.Module) -> None:
    """Move every parameter by noise of its own, so that a network differs from its copies."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
