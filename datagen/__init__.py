"""Stage one: a SAC agent per task, its checkpoints rolled out into stores."""

from .generate import GenerateRequest, Progress, generate
from .settings import GenerateSettings, SacSettings, generate_settings

__all__ = [
    "GenerateRequest",
    "GenerateSettings",
    "Progress",
    "SacSettings",
    "generate",
    "generate_settings",
]
