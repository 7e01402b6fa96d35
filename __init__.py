"""FOCAL: the toolkit for offline meta-reinforcement learning."""

from .errors import FocalError, UsageError

__version__ = "0.1.0"

__all__ = ["FocalError", "UsageError", "__version__"]
