"""FOCAL: the toolkit for offline meta-reinforcement learning."""

import importlib
from typing import Any

from .errors import FocalError, UsageError

__version__ = "0.1.0"

__all__ = ["FocalError", "UsageError", "__version__", "load_policy"]


def load_policy(run: Any, seed: int | None = None, device: str = "cpu") -> Any:
    """Load a trained network of the run folder `run` as a `focal.trainer.inference.TrainedPolicy`.

    It infers a task, `z = policy.embed(transitions)`, and acts in it, `policy.act(observation, z)`. `seed` is by
    default the run's first. Raises `FocalError` naming what is missing or damaged, and the next command.
    """
    # by name: the root knows no stage, and half of the package does without torch
    return importlib.import_module(".trainer.inference", __name__).load_policy(run, seed, device)
