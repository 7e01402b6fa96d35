"""Task families and their Gymnasium environments. Importing this package registers the `focal/...` ids."""

from .batch import BatchedEnvs, EnvironmentFailure, Policy, Rollouts, make_batch, rollout
from .families import FAMILIES, get_family
from .tasks import ExpertReport, Split, TaskFamily, TaskParameters, TaskSet, stream

__all__ = [
    "FAMILIES",
    "BatchedEnvs",
    "EnvironmentFailure",
    "ExpertReport",
    "Policy",
    "Rollouts",
    "Split",
    "TaskFamily",
    "TaskParameters",
    "TaskSet",
    "get_family",
    "make_batch",
    "rollout",
    "stream",
]
