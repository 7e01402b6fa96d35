"""Stage one's settings: stable-baselines3 SAC and the rollouts, per family and scale.

Point robots need small networks and a large learning rate (64 x 64 and 1e-3 learn three times more in 3,000 steps
than the stock settings); the MuJoCo families run SB3's stock settings.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..datasets import QualityRule
from ..errors import UsageError, did_you_mean

SCALES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class SacSettings:
    """One behaviour agent (Haarnoja et al. 2018, as stable-baselines3 implements it)."""

    total_steps: int = 150_000  # environment steps of one agent
    hidden_sizes: tuple[int, ...] = (256, 256)  # actor and both critics
    learning_rate: float = 3e-4  # actor, critics and temperature (Adam)
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # gamma
    tau: float = 0.005  # Polyak step of the target critics
    learning_starts: int = 1_000  # steps with uniformly random actions before the first update
    update_every: int = 1  # environment steps between updates
    updates_each: int = 1  # gradient steps per update


@dataclass(frozen=True)
class GenerateSettings:
    """Everything that decides the content of a collection, beside its tasks and its seed."""

    sac: SacSettings = field(default_factory=SacSettings)
    n_train: int = 2  # meta-training tasks
    n_test: int = 2  # meta-test tasks
    checkpoints: int = 15  # evenly spaced after the untrained policy, which is one more
    episodes_per_checkpoint: int = 20  # stochastic episodes rolled out into the data
    fresh_episodes: int = 20  # per reference: stochastic and deterministic, untrained and best policy
    quality: QualityRule = field(default_factory=QualityRule)


_POINT = {
    "sac": {"total_steps": 3_000, "hidden_sizes": (64, 64), "learning_rate": 1e-3, "discount": 0.9,
            "learning_starts": 200},
}  # fmt: skip

_FAMILIES: dict[str, dict[str, Any]] = {
    "sparse-point-robot": _POINT | {"n_train": 80, "n_test": 20},
    "point-robot-wind": _POINT | {"n_train": 40, "n_test": 10},
    "half-cheetah-vel": {"n_train": 16, "n_test": 4, "sac": {"total_steps": 30_000}},
    "half-cheetah-fwd-back": {"episodes_per_checkpoint": 40},
    "ant-fwd-back": {"episodes_per_checkpoint": 40},
    "walker-2d-params": {"n_train": 16, "n_test": 4, "sac": {"total_steps": 30_000}},
}

_PAPER: dict[str, dict[str, Any]] = {
    "sparse-point-robot": {"sac": {"total_steps": 5_000}, "episodes_per_checkpoint": 45},
    "point-robot-wind": {"sac": {"total_steps": 5_000}, "episodes_per_checkpoint": 45},
    "half-cheetah-vel": {"n_train": 80, "n_test": 20, "sac": {"total_steps": 600_000}, "episodes_per_checkpoint": 45},
    "half-cheetah-fwd-back": {"sac": {"total_steps": 1_000_000}, "episodes_per_checkpoint": 45},
    "ant-fwd-back": {"sac": {"total_steps": 1_000_000}, "episodes_per_checkpoint": 45},
    "walker-2d-params": {"n_train": 40, "n_test": 10, "sac": {"total_steps": 1_000_000}, "episodes_per_checkpoint": 45},
}

# seconds, not learning: proves that the whole path runs
_SMOKE: dict[str, Any] = {"sac": {"total_steps": 300, "learning_starts": 100, "batch_size": 64},
                          "episodes_per_checkpoint": 3, "fresh_episodes": 3}  # fmt: skip
_SMOKE_TASKS = {"n_train": 4, "n_test": 2}


def generate_settings(family: str, scale: str, fixed_tasks: bool = False) -> GenerateSettings:
    """Return the settings of a family at a scale. Raises `UsageError` for an unknown scale."""
    if scale not in SCALES:
        raise UsageError(f"unknown scale '{scale}'; {did_you_mean(scale, SCALES)}")
    settings = _replace(GenerateSettings(), _FAMILIES[family])
    if scale == "smoke":
        return _replace(settings, _SMOKE if fixed_tasks else _SMOKE | _SMOKE_TASKS)
    return _replace(settings, _PAPER[family]) if scale == "paper" else settings


def _replace(settings: Any, changes: dict[str, Any]) -> Any:
    inner = {
        name: _replace(getattr(settings, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(settings, **inner)
