"""What a collection says about itself and its tasks: dataclasses, and their JSON form.

`to_json` gives plain JSON values whose floats survive bit for bit; `from_json` trusts nothing: every field is checked
and a `FocalError` names the one that is wrong.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from ..errors import FocalError, UsageError
from .episodes import Array
from .quality import QualityRule
from .storage import AGAIN, canonical_json, parse_json

Split = Literal["train", "test", "both"]
Floats = Sequence[float] | Array

MAX_TASKS = 100_000


@dataclass(frozen=True, kw_only=True)
class CollectionHeader:
    """What a collection is, fixed before its first episode; a rerun must bring the same header."""

    name: str
    family: str
    version: str = "1.0.0"
    licence: str = "CC-BY-4.0"
    """An SPDX identifier or expression."""
    authors: tuple[str, ...] = ()
    seed: int
    """Every draw of stage one comes from it."""
    tasks_from: str
    """`seed` or `published`: where the tasks' parameters come from."""
    scale: str
    """`smoke`, `laptop` or `paper`; training takes the same scale unless told otherwise."""
    settings: dict[str, Any]
    """The resolved settings of stage one, JSON values."""
    train: tuple[int, ...]
    """Indices of the training tasks;"""
    test: tuple[int, ...]
    """of the test tasks; an index in both is trained on and tested with its held-out episodes."""
    notes: tuple[str, ...] = ()
    """What a reader of imported or merged data must know, one sentence each; the card prints them."""

    def __post_init__(self) -> None:
        for name in ("authors", "train", "test", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, pattern in (("name", _NAME), ("family", _NAME), ("licence", _LICENCE), ("version", _VERSION)):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                raise UsageError(f"collection {name} is {value!r}, expected a match of {pattern}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed is {self.seed!r}, expected a whole number from 0, for example --seed 0")
        for author in self.authors:
            if not isinstance(author, str) or not author.strip() or not author.isprintable():
                raise UsageError(
                    f"author is {author!r}, expected a printable name, for example --author 'Ada Lovelace'"
                )
        for name, indices in (("train", self.train), ("test", self.test)):
            if len(set(indices)) != len(indices) or not all(_is_index(index) for index in indices):
                raise UsageError(f"{name} tasks are {str(indices)[:80]}, expected different whole numbers from 0")
        if not self.indices:
            raise UsageError("a collection without tasks, expected at least one; for example --tasks 10")

    @property
    def indices(self) -> tuple[int, ...]:
        """Every task's index, ascending."""
        return tuple(sorted({*self.train, *self.test}))

    def split_of(self, index: int) -> Split:
        """`train`, `test` or `both`."""
        if index in self.train:
            return "both" if index in self.test else "train"
        return "test"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; without notes there is no such field, as in collections written before there were any."""
        document = plain(self)
        if not self.notes:
            del document["notes"]
        return document

    @staticmethod
    def from_json(document: Mapping[str, Any], where: str) -> "CollectionHeader":
        """Rebuild a header from an untrusted file."""
        read = Reader(document, where)
        try:
            return CollectionHeader(
                name=read.text("name"),
                family=read.text("family"),
                seed=read.integer("seed"),
                tasks_from=read.text("tasks_from"),
                scale=read.text("scale"),
                settings=read.mapping("settings"),
                train=tuple(read.items("train", int)),
                test=tuple(read.items("test", int)),
                version=read.text("version"),
                licence=read.text("licence"),
                authors=tuple(read.items("authors", str)),
                notes=tuple(read.items("notes", str)) if "notes" in document else (),
            )
        except UsageError as error:
            raise FocalError(f"{where}: {error}; {AGAIN}") from error


@dataclass(frozen=True)
class References:
    """The two ends of the score's scale, estimated on fresh episodes; every list holds one float64 return each.

    Dense returns unless the name says sparse; the sparse lists are empty where the family has no sparse reward.
    Imported tasks may have no references at all: then no score exists.
    """

    random_returns: Floats = ()
    """20 stochastic episodes of the untrained policy,"""
    expert_returns: Floats = ()
    """and of the best checkpoint."""
    random_deterministic: Floats = ()
    expert_deterministic: Floats = ()
    random_sparse_deterministic: Floats = ()
    expert_sparse_deterministic: Floats = ()
    expert_sac_step: int = 0
    """Which checkpoint the expert is."""
    reached_expert: bool = False
    """Whether it passed the family's absolute test,"""
    expert_test: str = ""
    """which is described here, with what was measured."""

    def __post_init__(self) -> None:
        for name in _RETURNS:
            returns = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, returns)
            if not all(map(math.isfinite, returns)):
                raise FocalError(f"reference {name} is {str(returns)[:80]}, expected finite returns")
        object.__setattr__(self, "reached_expert", bool(self.reached_expert))  # a NumPy bool is no JSON value
        if bool(self.random_returns) != bool(self.expert_returns) or (self.reached_expert and not self.known):
            raise FocalError(
                f"references have {len(self.random_returns)} random and {len(self.expert_returns)} expert returns, "
                "expected at least one of each, or none where the expert was never tested"
            )

    @property
    def known(self) -> bool:
        """Whether there are any; without them no score exists."""
        return bool(self.random_returns)

    @property
    def random(self) -> float:
        """Mean stochastic dense return of the untrained policy: score 0. NaN where it is not known."""
        return float(np.mean(self.random_returns)) if self.known else math.nan

    @property
    def expert(self) -> float:
        """Mean stochastic dense return of the best checkpoint: score 1. NaN where it is not known."""
        return float(np.mean(self.expert_returns)) if self.known else math.nan

    @staticmethod
    def from_json(document: Mapping[str, Any], where: str) -> "References":
        """Rebuild references from an untrusted file."""
        read = Reader(document, where)
        returns = {name: read.items(name, float) for name in _RETURNS}
        step, reached = read.integer("expert_sac_step"), read.flag("reached_expert")
        test = read.text("expert_test")
        try:
            return References(**returns, expert_sac_step=step, reached_expert=reached, expert_test=test)
        except FocalError as error:
            raise FocalError(f"{where}: {error}; {AGAIN}") from error


@dataclass(frozen=True)
class TaskRecord:
    """Everything known about one task besides its episodes."""

    index: int
    family: str
    params: dict[str, Any]
    """Numbers or nested lists of numbers that rebuild the task exactly on any machine."""
    split: Split
    env_id: str
    """A name in this package's own registry, looked up there and never executed."""
    env_settings: dict[str, Any]
    horizon: int
    """H, the time limit in steps."""
    spaces: dict[str, Any]
    """Observation and action space as JSON."""
    absolute_x: int | None
    """Observation column that holds the absolute x, or None."""
    behaviour: dict[str, Any]
    """Settings of the SAC agent that collected the data."""
    references: References
    provenance: dict[str, Any] = field(default_factory=dict)
    """Software versions, hardware, commit."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, checked by reading them back. Raises `FocalError` for anything JSON cannot hold."""
        where = f"task {self.index}"
        try:
            document = plain(self)
            canonical_json(document)
        except (TypeError, ValueError) as error:
            raise FocalError(
                f"{where}: its record is not plain JSON ({error}), expected finite numbers and text"
            ) from error
        TaskRecord.from_json(document, where)
        return document

    @staticmethod
    def from_json(document: Mapping[str, Any], where: str) -> "TaskRecord":
        """Rebuild a record from an untrusted file."""
        read = Reader(document, where)
        split = read.text("split")
        if split not in ("train", "test", "both"):
            raise FocalError(f"{where}: split is {split!r}, expected train, test or both; {AGAIN}")
        params = read.mapping("params")
        if not _only_numbers(list(params.values())):
            raise FocalError(
                f"{where}: params is {str(params)[:80]!r}, expected numbers or lists of numbers only; {AGAIN}"
            )
        if not re.fullmatch(_ENV_ID, read.text("env_id")):
            raise FocalError(
                f"{where}: env_id is {read.text('env_id')[:80]!r}, expected a registered name such as "
                f"focal/HalfCheetahVel-v0; {AGAIN}"
            )
        return TaskRecord(
            index=read.integer("index"),
            family=read.text("family"),
            params=params,
            split=cast(Split, split),
            env_id=read.text("env_id"),
            env_settings=read.mapping("env_settings"),
            horizon=read.integer("horizon", low=1),
            spaces=read.mapping("spaces"),
            absolute_x=None if document.get("absolute_x", 0) is None else read.integer("absolute_x"),
            behaviour=read.mapping("behaviour"),
            references=References.from_json(read.mapping("references"), f"{where} references"),
            provenance=read.mapping("provenance"),
        )


class Reader:
    """Reads typed fields of an untrusted JSON object; what is missing or of another type raises `FocalError`."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._document = document
        self._where = where

    def text(self, name: str) -> str:
        """A string."""
        return cast(str, self._get(name, (str,), "text"))

    def integer(self, name: str, low: int = 0, high: int = 2**62) -> int:
        """A whole number within [low, high]."""
        value = self._get(name, (int,), "a whole number")
        if not low <= value <= high:
            raise self._wrong(name, value, f"{low} to {high}")
        return cast(int, value)

    def flag(self, name: str) -> bool:
        """True or false."""
        return cast(bool, self._get(name, (bool,), "true or false"))

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        return cast(dict[str, Any], self._get(name, (dict,), "an object"))

    def items(self, name: str, kind: type) -> list[Any]:
        """A list whose items are all of `kind`; whole numbers pass as floats."""
        values = self._get(name, (list,), "a list")
        kinds = (int, float) if kind is float else (kind,)
        for value in values:
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise self._wrong(name, value, f"a list of {kind.__name__}")
        return cast(list[Any], values)

    def _get(self, name: str, kinds: tuple[type, ...], expected: str) -> Any:
        if name not in self._document:
            raise FocalError(f"{self._where}: '{name}' is missing; {AGAIN}")
        value = self._document[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self._wrong(name, value, expected)
        return value

    def _wrong(self, name: str, value: object, expected: str) -> FocalError:
        return FocalError(f"{self._where}: '{name}' is {repr(value)[:80]}, expected {expected}; {AGAIN}")


def plain(settings: Any) -> dict[str, Any]:
    """Return a record or any settings dataclass as new JSON values: tuples become lists, floats stay exact."""
    return parse_json(canonical_json(dataclasses.asdict(settings)), type(settings).__name__)


def rule_from_json(document: Mapping[str, Any], where: str) -> QualityRule:
    """Rebuild the quality rule a task was labelled with."""
    names = [item.name for item in dataclasses.fields(QualityRule)]
    document = _whole_rule(document)
    if sorted(document) != sorted(names):
        raise FocalError(f"{where}: quality rule has {sorted(document)}, expected {sorted(names)}; {AGAIN}")
    read = Reader({"rule": [document[name] for name in names]}, where)
    try:
        return QualityRule(**dict(zip(names, map(float, read.items("rule", float)), strict=True)))
    except UsageError as error:
        raise FocalError(f"{where}: {error}; {AGAIN}") from error


def settings_in_effect(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header's settings with those that did not exist when it was written, as they were in effect."""
    rule = settings.get("quality")
    return {**settings, "quality": _whole_rule(rule)} if isinstance(rule, Mapping) else dict(settings)


def _whole_rule(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rules of before 2026-11-30 had no cut of its own for the first checkpoint."""
    return {"first_random_below": document["random_below"], **document} if "random_below" in document else document


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every dotted field in which two JSON objects differ, as `seed is 0 there and 1 here`."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} is {repr(before)[:60]} there and {repr(after)[:60]} here")
    return found


_RETURNS = (
    "random_returns",
    "expert_returns",
    "random_deterministic",
    "expert_deterministic",
    "random_sparse_deterministic",
    "expert_sparse_deterministic",
)
_ENV_ID = r"[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+-v[0-9]+"  # no colon: gymnasium.make would import the module before it
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_LICENCE = r"[A-Za-z0-9][A-Za-z0-9.+ ()-]{0,99}"
_VERSION = r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})"


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TASKS


def _only_numbers(values: list[Any]) -> bool:
    return all(
        _only_numbers(value)
        if isinstance(value, list)
        else isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
