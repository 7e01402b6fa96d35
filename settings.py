"""Frozen settings: dotted overrides from the command line, and the JSON form saved beside every artefact.

A settings class is a frozen dataclass whose fields are bool, int, float, str, tuples of those, optional ones, or
another settings class. Defaults are stated once, in the class; tables per family hold only differences.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from .errors import UsageError, did_you_mean

S = TypeVar("S")
Scale = Literal["smoke", "laptop", "paper"]
SCALES: tuple[Scale, ...] = typing.get_args(Scale)


def known_scale(name: str) -> Scale:
    """Return the scale of that name. Raises `UsageError` for any other, naming the nearest."""
    for scale in SCALES:
        if scale == name:
            return scale
    raise UsageError(f"unknown scale '{name}'; {did_you_mean(name, SCALES)}")


def override(settings: S, changes: Mapping[str, Any]) -> S:
    """Return a copy of `settings` with dotted names replaced, e.g. `{"regularisation.alpha": "0.5"}`.

    Strings are converted to the field's declared type. Raises `UsageError` for an unknown name (naming the nearest)
    or a value of another type.
    """
    for name, value in changes.items():
        settings = _replace(settings, name.split("."), name, value)
    return settings


def parse_assignments(pairs: typing.Iterable[str]) -> dict[str, str]:
    """Turn the command line's `--set name=value` strings into a mapping. Raises `UsageError` without an `=`."""
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set got '{pair}', expected NAME=VALUE, for example --set batch_size=128")
        changes[name.strip()] = value.strip()
    return changes


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the settings as plain JSON values (tuples become lists)."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
    """Rebuild settings saved with `to_dict`. A missing or unknown name raises `UsageError`: never today's defaults."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise UsageError(f"saved {cls.__name__} has '{unknown[0]}', which this version does not know")
    if missing := sorted(names - set(values)):
        raise UsageError(f"saved {cls.__name__} lacks '{missing[0]}'")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(value, hints[name], name) for name, value in values.items()})


def field_names(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted name of a settings class or instance."""
    hints = typing.get_type_hints(cls if isinstance(cls, type) else type(cls))
    names = []
    for name, kind in hints.items():
        names += field_names(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings in JSON form by dotted name, each as `--set` takes it."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[prefix + name] = ",".join(map(str, value))
        else:
            flat[prefix + name] = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return flat


def _replace(settings: Any, path: list[str], full: str, value: Any) -> Any:
    hints = typing.get_type_hints(type(settings))
    head, *rest = path
    if head not in hints or (rest and not dataclasses.is_dataclass(hints[head])):
        known = field_names(settings)
        dotted = full[: len(full) - len(".".join(path))]
        raise UsageError(f"unknown setting '{full}'; {did_you_mean(full, [dotted + name for name in known])}")
    if rest:
        return dataclasses.replace(settings, **{head: _replace(getattr(settings, head), rest, full, value)})
    if dataclasses.is_dataclass(hints[head]):
        inner = ", ".join(field_names(hints[head], f"{full}."))
        raise UsageError(f"'{full}' is a group of settings; set one of: {inner}")
    return dataclasses.replace(settings, **{head: _convert(value, hints[head], full)})


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Convert a JSON value or a command-line string to the declared type, strictly."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in arguments):
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin is typing.Literal:
        if value not in arguments:
            raise UsageError(f"{name}={value!r}; {did_you_mean(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_convert(item, arguments[0], name) for item in items if item != "")
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value)  # type: ignore[arg-type]
    return _convert_scalar(value, kind, name)


def _convert_scalar(value: Any, kind: Any, name: str) -> Any:
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"{name}={value!r}, expected true or false")
        return text in ("true", "1", "yes")
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise UsageError(f"{name}={value!r}, expected {kind.__name__}")
    try:
        # int("1e5") fails, although people write it
        converted = int(float(value)) if kind is int and float(value).is_integer() else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name}={value!r}, expected {kind.__name__}") from None
    if kind is float and not math.isfinite(converted):
        raise UsageError(f"{name}={value!r}, expected a finite number")
    return converted
