"""Families and methods of your own, added from your own script: it then IS focal-cli, with them in it.

    python my_family.py data generate --env my-family --scale smoke
    python my_method.py train --data mixed --algo my-method

docs/extending.md walks through an example of each. Add them at the top level of the script: worker processes import it
again. Stores and runs stay plain data; whoever opens them needs the script too.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium

from . import cluster
from .datagen import settings as stage_one
from .envs import FAMILIES, TaskFamily
from .errors import UsageError, did_you_mean
from .settings import field_names
from .trainer import settings as stage_two
from .trainer.methods import METHODS, Method


def add_family(
    family: TaskFamily,
    env_class: Any,
    generate: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> None:
    """Add a task family with its Gymnasium environment, which takes the task as `env_class(task=...)`.

    `generate` holds what stage one does otherwise than its defaults, by nested names (`{"sac": {"total_steps": 9}}`),
    `train` what FOCAL does, as dotted ones (`{"latent_dim": 5}`); both at every scale, under what makes smoke short.
    MBML relabels next observations, too, where the family's transitions vary and its contexts hold them. Raises
    `UsageError` when name, alias or environment id are taken, or when no method has a setting that `train` names;
    methods of your own are added first.
    """
    train = {"discount": family.discount, **(train or {})}
    known = {name for method in METHODS.values() for name in field_names(method.settings)}
    for name in train:
        if name not in known:
            raise UsageError(f"train names '{name}', which no method has; {did_you_mean(name, known)}")
    for other in FAMILIES.values():
        taken = {other.name, other.alias, other.env_id} & {family.name, family.alias, family.env_id}
        if taken:
            raise UsageError(f"{sorted(taken)[0]} is a family already; choose another name")
    _remember_script()
    FAMILIES[family.name] = family
    gymnasium.register(family.env_id, entry_point=env_class)
    generate = dict(generate or {})
    sac = {"discount": family.discount, **generate.pop("sac", {})}
    stage_one.add_family(family.name, {"n_train": family.n_train, "n_test": family.n_test, "sac": sac, **generate})
    if family.varies == "transitions" and train.get("next_observation_in_context"):
        train = {"transitions_vary": True, **train}  # MBML's
    stage_two.add_family(family.name, train)


def add_method(name: str, method: Method) -> None:
    """Add a method that `focal-cli train --algo NAME` trains. Raises `UsageError` when the name is taken."""
    if name in METHODS:
        raise UsageError(f"{name} is a method already; choose another name")
    _remember_script()
    METHODS[name] = method


def _remember_script() -> None:
    """Tell the nodes of a Ray cluster which script to run; worker processes here import it by themselves."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    cluster.SCRIPT = Path(file).resolve() if file else None
