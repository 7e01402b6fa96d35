"""Stage one's settings: SAC, the engine that runs it, and the rollouts, per family and scale.

Point robots need small networks and a large learning rate (64 x 64 and 1e-3 learn three times more in 3,000 steps
than the stock settings). The MuJoCo families run SB3's stock settings at `paper` scale, but for 1,000 random steps at
first instead of 100; at `laptop` scale 128 x 128 and 1e-3, which on half-cheetah-vel learnt as much in a step at a
third of the cost (one seed, docs/datasets.md).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..datasets import QualityRule
from ..errors import UsageError
from ..settings import known_scale

LOG_STD_BOUNDS = (-20.0, 2.0)  # of a behaviour policy's Gaussian, stable-baselines3's


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

    def __post_init__(self) -> None:
        for name in ("total_steps", "learning_rate", "batch_size", "tau", "update_every", "updates_each"):
            _require(getattr(self, name) > 0, f"sac.{name}", getattr(self, name), "a number above 0")
        _require(0 <= self.discount <= 1, "sac.discount", self.discount, "a number from 0 to 1")
        _require(self.learning_starts >= 0, "sac.learning_starts", self.learning_starts, "0 or more")
        _require(min(self.hidden_sizes, default=0) > 0, "sac.hidden_sizes", self.hidden_sizes, "widths such as 256,256")


@dataclass(frozen=True)
class FleetSettings:
    """How the fleet engine groups agents and multiplies. Same settings, same machine: same data, bit for bit."""

    size: int = 10  # agents trained together: tasks 0 to size - 1 are fleet 0, the next ones fleet 1, and so on
    precision: Literal["fp32", "bf16"] = "fp32"  # of products between hidden layers; parameters are always fp32

    def __post_init__(self) -> None:
        _require(self.size >= 1, "fleet.size", self.size, "at least 1")


@dataclass(frozen=True)
class GenerateSettings:
    """Everything that decides the content of a collection, beside its tasks and its seed."""

    sac: SacSettings = field(default_factory=SacSettings)
    engine: Literal["sb3", "fleet"] = "sb3"  # stable-baselines3, a process per task; or all agents of a fleet at once
    fleet: FleetSettings = field(default_factory=FleetSettings)  # read by engine=fleet only
    n_train: int = 2  # meta-training tasks
    n_test: int = 2  # meta-test tasks
    checkpoints: int = 15  # evenly spaced after the untrained policy, which is one more
    episodes_per_checkpoint: int = 20  # stochastic episodes rolled out into the data
    fresh_episodes: int = 20  # per reference: stochastic and deterministic, untrained and best policy
    quality: QualityRule = field(default_factory=QualityRule)

    def __post_init__(self) -> None:
        for name, least in (("n_train", 1), ("n_test", 1), ("checkpoints", 1), ("episodes_per_checkpoint", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        _require(self.fresh_episodes >= 2, "fresh_episodes", self.fresh_episodes, "at least 2, for a standard error")

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together (`--set` changes one at a time)."""
        steps = self.sac.total_steps
        most = f"at most sac.total_steps={steps}"
        _require(self.checkpoints <= steps, "checkpoints", self.checkpoints, most)
        spacing = {steps * (k + 1) // self.checkpoints - steps * k // self.checkpoints for k in range(self.checkpoints)}
        for gap in sorted(spacing):  # stable-baselines3 stops at whole updates only
            rule = f"a divisor of the {gap} steps between checkpoints"
            _require(gap % self.sac.update_every == 0, "sac.update_every", self.sac.update_every, rule)


def _require(holds: bool, name: str, found: Any, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name}={found}, expected {expected}")


_POINT = {
    "engine": "fleet",  # learns as the other does (docs/benchmarks.md), in a seventh of the time
    "sac": {"total_steps": 3_000, "hidden_sizes": (64, 64), "learning_rate": 1e-3, "discount": 0.9,
            "learning_starts": 200},
    "fleet": {"size": 25},
}  # fmt: skip

_MUJOCO_SAC = {"hidden_sizes": (128, 128), "learning_rate": 1e-3}
_STOCK_SAC = {"hidden_sizes": (256, 256), "learning_rate": 3e-4}

_FAMILIES: dict[str, dict[str, Any]] = {
    "sparse-point-robot": _POINT | {"n_train": 80, "n_test": 20},
    "point-robot-wind": _POINT | {"n_train": 40, "n_test": 10},
    "half-cheetah-vel": {"n_train": 16, "n_test": 4, "sac": _MUJOCO_SAC | {"total_steps": 75_000}},
    # fleets of one: a core each
    "half-cheetah-fwd-back": {"episodes_per_checkpoint": 40, "fleet": {"size": 1}, "sac": _MUJOCO_SAC},
    "ant-fwd-back": {"episodes_per_checkpoint": 40, "fleet": {"size": 1}, "sac": _MUJOCO_SAC},
    # fewer tasks of more steps: of 20 with 75,000 steps only 13 learnt to walk without falling (docs/datasets.md)
    "walker-2d-params": {"n_train": 9, "n_test": 3, "fleet": {"size": 6}, "sac": _MUJOCO_SAC},
}

_PAPER: dict[str, dict[str, Any]] = {
    # not 45: of one checkpoint's episodes nine tenths must fill FOCAL's context of 1,024
    "sparse-point-robot": {"sac": {"total_steps": 5_000}, "episodes_per_checkpoint": 60},
    "point-robot-wind": {"sac": {"total_steps": 5_000}, "episodes_per_checkpoint": 45},
    "half-cheetah-vel": {
        "n_train": 80,
        "n_test": 20,
        "sac": _STOCK_SAC | {"total_steps": 600_000},
        "episodes_per_checkpoint": 45,
    },
    "half-cheetah-fwd-back": {"sac": _STOCK_SAC | {"total_steps": 1_000_000}, "episodes_per_checkpoint": 45},
    "ant-fwd-back": {"sac": _STOCK_SAC | {"total_steps": 1_000_000}, "episodes_per_checkpoint": 45},
    "walker-2d-params": {
        "n_train": 40,
        "n_test": 10,
        "fleet": {"size": 10},
        "sac": _STOCK_SAC | {"total_steps": 1_000_000},
        "episodes_per_checkpoint": 45,
    },
}

# seconds, not learning: proves that the whole path runs
_SMOKE: dict[str, Any] = {"sac": {"total_steps": 300, "learning_starts": 100, "batch_size": 64},
                          "episodes_per_checkpoint": 3, "fresh_episodes": 3}  # fmt: skip
_SMOKE_TASKS = {"n_train": 4, "n_test": 2}


def add_family(family: str, changes: dict[str, Any]) -> None:
    """Add a family's differences from the defaults, the same at laptop and paper; see extend.py."""
    _FAMILIES[family], _PAPER[family] = changes, {}


def generate_settings(family: str, scale: str, fixed_tasks: bool = False) -> GenerateSettings:
    """Return the settings of a family at a scale. Raises `UsageError` for an unknown scale."""
    scale = known_scale(scale)
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
