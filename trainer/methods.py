"""The methods that `focal-cli train --algo` knows, and their settings for every task family and scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, did_you_mean
from ..settings import Scale, field_names, from_dict, known_scale, override, to_dict
from . import batch_pearl, contextual_bcq, mbml
from .agent import Agent, new_policy_agent
from .focal import Focal
from .learner import Learner
from .settings import FocalSettings, TrainSettings, family_table


@dataclass(frozen=True)
class Method:
    """One file of the trainer, as the rest of the package sees it."""

    settings: type[TrainSettings]
    learner: Callable[..., Learner]  # (settings, transform, act_dim, generator[, first stage], device)
    new_agent: Callable[..., Agent]  # (settings, transform, act_dim, generator, device) -> untrained
    scales: Mapping[Scale, Mapping[str, Any]] = field(
        default_factory=dict
    )  # what it sets otherwise than FOCAL, by scale
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # and by family


METHODS: dict[str, Method] = {
    "focal": Method(FocalSettings, Focal, new_policy_agent),
    "batch-pearl": Method(batch_pearl.BatchPearlSettings, batch_pearl.BatchPearl, new_policy_agent, batch_pearl.SCALES),
    "contextual-bcq": Method(
        contextual_bcq.ContextualBcqSettings,
        contextual_bcq.ContextualBcq,
        contextual_bcq.new_bcq_agent,
        contextual_bcq.SCALES,
    ),
    "mbml": Method(mbml.MbmlSettings, mbml.Mbml, mbml.new_mbml_agent, mbml.SCALES, mbml.FAMILIES),
}


# Settings that FOCAL's runs did not always have; a file without one is of a version that did what is the default today.
_ADDED = (
    "encoder", "released", "encoder_after", "encoder_half_life", "gradients", "task_replacement", "context_draws",
    "precision", "value_limit",
)  # fmt: skip
_ADDED_TO_FOCAL = {name: value for name, value in to_dict(FocalSettings()).items() if name in _ADDED}


def train_settings(family: str, scale: Scale | str, algo: str = "focal") -> TrainSettings:
    """Return the settings of a method for a task family at a scale ("smoke", "laptop" or "paper").

    Every method takes from FOCAL's table what it has a field for, and then its own. Raises `UsageError` naming the
    nearest known method, family or scale.
    """
    method = find_method(algo)
    scale = known_scale(scale)
    known = set(field_names(method.settings))
    shared = {name: value for name, value in family_table(family, scale).items() if name in known}
    own = {**method.scales.get(scale, {}), **method.families.get(family, {})}
    return override(method.settings(), {**shared, **own})


def find_method(algo: str) -> Method:
    """Return the method called `algo`. Raises `UsageError` naming the nearest."""
    if algo not in METHODS:
        raise UsageError(f"unknown method '{algo}'; {did_you_mean(algo, METHODS)}")
    return METHODS[algo]


def saved_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Rebuild saved settings, of the method that their `algo` names. Raises `UsageError` when they do not fit it."""
    algo = values.get("algo")
    method = find_method(algo if isinstance(algo, str) else "")
    added = _ADDED_TO_FOCAL if algo == "focal" else {}
    return from_dict(method.settings, {**added, **values})
