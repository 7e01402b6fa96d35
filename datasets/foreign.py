"""What every foreign format is read into, and the questions none of them answers alike: where an episode ends and why.

source                          SourceTask  names and metadata only, so that tasks can be matched with parameters
+ FamilyFacts, ImportTask       said by the caller, which knows the environments
= ForeignTask                   Episodes, and what is not known filled in with words: see `Notes`
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import FocalError
from .episodes import LARGEST_ACTION, Array, End, Episodes
from .quality import QualityRule
from .records import Split, TaskRecord
from .tasks import Labels

UNKNOWN_SEED = -1
"""The reset seed of an episode whose source does not say."""

ADVICE = "get the data again from where they were published"

TIME_LIMITS = "episodes whose time limit the source recorded as terminal, restored as truncated"
IMPOSSIBLE = "terminations kept before the time limit, though environments of this family never terminate"
ROUNDED = "arrays whose numbers were rounded to float32"
RESTATED = "episodes whose return was stated otherwise than their rewards add up to, replaced by that sum"


@dataclass(frozen=True)
class FamilyFacts:
    """What the environments know about a family; said by the caller, since this package knows no environment."""

    name: str
    env_id: str
    horizon: int
    """Time limit in steps, H."""
    observation_dim: int
    action_dim: int
    absolute_x: int | None
    """Observation column that holds the absolute x, or None."""
    terminates: bool
    """Whether an episode can end before the time limit."""
    infos: tuple[str, ...] = ()
    """Names of the quantities its environment reports with every step."""
    sparse_reward: Callable[[Mapping[str, Any], Array, Array], Array] | None = None
    """(params, observations after the steps (T, obs_dim), dense rewards (T,)) to sparse rewards (T,), or None."""


@dataclass(frozen=True)
class Exported:
    """What this project's own export says about a task, so that reading it back loses nothing."""

    collection: Mapping[str, Any]
    """Header, content hash and lineage of the collection."""
    record: TaskRecord
    rule: QualityRule
    heldout_seeds: tuple[int, ...]
    labels: Labels
    infos: tuple[str, ...]


@dataclass(frozen=True)
class SourceTask:
    """A task found in a source; its data were not read."""

    name: str
    """Its folder, file or data set below the source."""
    goal: tuple[float, ...] = ()
    """Numbers of the goal in a UNICORN folder's name."""
    index: int | None = None
    """Number of the task where the source counts them."""
    exported: Exported | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ImportTask:
    """A task to import."""

    source: SourceTask
    params: dict[str, Any]
    split: Split


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """Give errors about somebody else's files another next step than those about our own, which generate them again."""
    try:
        yield
    except FocalError as error:
        found, _, step = str(error).rpartition("; ")
        if step.startswith(("unpack the bundle again", "collect the data again")):
            raise type(error)(f"{found}; {advice}") from error
        raise


class Notes:
    """Facts worth knowing about imported data, counted over all tasks."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, fact: str, count: int = 1) -> None:
        """Count a fact; nothing is said of what never happened."""
        if count:
            self._counts[fact] += count

    def sentences(self) -> tuple[str, ...]:
        """Return the facts with their counts, in the order they were first met."""
        return tuple(f"{fact}: {count:,}" for fact, count in self._counts.items())


def connected(where: str, observations: Array, following: Array, lengths: Array) -> Array:
    """Join observations (T, obs_dim) and next observations (T, obs_dim) into rows (T+E, obs_dim), in float32.

    Raises `FocalError` where the next observation of a step is not the observation of the following one: such data
    are no episodes.
    """
    observations, following = observations.astype("<f4"), following.astype("<f4")
    last = np.cumsum(lengths) - 1
    inside = np.ones(len(observations), bool)
    inside[last] = False
    broken = np.flatnonzero(inside[:-1] & (following[:-1] != observations[1:]).any(axis=1))
    if len(broken):
        raise FocalError(
            f"{where}: step {broken[0]} arrives elsewhere than step {broken[0] + 1} of the same episode begins; "
            "expected whole episodes in the order they were collected"
        )
    rows = np.arange(len(observations)) + np.repeat(np.arange(len(lengths)), lengths)
    joined = np.empty((len(observations) + len(lengths), observations.shape[1]), "<f4")
    joined[rows], joined[rows[last] + 1] = observations, following[last]
    return joined


def lengths_of(ends: Array) -> Array:
    """Return the lengths (E,) i4 of episodes whose last steps are True in `ends` (T,); the last row always ends one."""
    if not len(ends):
        return np.zeros(0, "<i4")
    last = np.flatnonzero(np.append(ends[:-1], True))
    return np.diff(last, prepend=-1).astype("<i4")


def restored_ends(lengths: Array, terminated: Array, limited: Array | None, facts: FamilyFacts, notes: Notes) -> Array:
    """Return why episodes ended, (E,) u1, from the source's flags at their last steps, (E,) bool each.

    `limited` says that the time limit came, None where the source has no such flag. A termination exactly at the time
    limit is taken for the time limit itself where the family cannot terminate, or where the source never marks a time
    limit on its own: then it did not tell the two apart, and a Bellman target would stop where it must not. An episode
    without any flag was cut, unless it is as long as the time limit. Raises `FocalError` where the family cannot
    terminate and every episode does, after the same number of steps: that was another time limit.
    """
    at_limit = lengths == facts.horizon
    marked = np.zeros(len(lengths), bool) if limited is None else limited
    restored = terminated & at_limit & (not facts.terminates or not (marked & ~terminated).any())
    notes.add(TIME_LIMITS, int(restored.sum()))
    impossible = terminated & ~at_limit & (not facts.terminates)
    if len(lengths) > 1 and impossible.all() and (lengths == lengths[0]).all():
        raise FocalError(
            f"every episode terminates after {lengths[0]} steps, expected none to, as {facts.name} ends by its time "
            f"limit only; if that was the data's time limit, say so: --horizon {lengths[0]}"
        )
    notes.add(IMPOSSIBLE, int(impossible.sum()))
    ends = np.full(len(lengths), End.CUT, np.uint8)
    ends[marked | at_limit] = End.TRUNCATED
    ends[terminated & ~restored] = End.TERMINATED
    return ends


def refuse_longer(where: str, lengths: Array, facts: FamilyFacts) -> None:
    """Raise `FocalError` for episodes (E,) longer than the time limit."""
    if len(lengths) and lengths.max() > facts.horizon:
        raise FocalError(
            f"{where}: an episode of {lengths.max()} steps, expected at most {facts.horizon}, the time limit of "
            f"{facts.name}; if the data were collected with another one, say so: --horizon {lengths.max()}"
        )


def make_episodes(
    where: str,
    observations: Array,
    actions: Array,
    rewards: Array,
    infos: Mapping[str, Array],
    lengths: Array,
    ends: Array,
    facts: FamilyFacts,
    notes: Notes,
    **table: Array,
) -> Episodes:
    """Check foreign arrays against their family and return them as episodes; arrays as in `Episodes`, any precision.

    `table` holds the (E,) fields that the source knows. Raises `FocalError` for episodes that cannot be this family's.
    """
    refuse_longer(where, lengths, facts)
    if len(actions) and not (largest := float(np.abs(actions.astype("<f4")).max())) <= LARGEST_ACTION:
        raise FocalError(
            f"{where}: actions of up to {largest:g}, expected -1 to 1 as in every family here; "
            "scale them before importing"
        )
    for values in (observations, actions, rewards, *infos.values()):
        notes.add(ROUNDED, int((values.astype("<f4") != values).any()))
    count, first = len(lengths), np.cumsum(lengths) - lengths
    known = {
        "returns": np.add.reduceat(rewards.astype("<f8"), first) if count else np.zeros(0),  # before any rounding
        "qualities": np.zeros(count, np.uint8),
        "sac_steps": np.zeros(count, "<i8"),
        "seeds": np.full(count, UNKNOWN_SEED, "<i8"),
        "heldout": np.zeros(count, np.uint8),
        **table,
    }
    with np.errstate(over="ignore"):  # what becomes infinite is refused by validate
        episodes = Episodes(
            observations=observations.astype("<f4"),
            actions=actions.astype("<f4"),
            rewards=rewards.astype("<f4"),
            infos={name: values.astype("<f4") for name, values in infos.items()},
            lengths=lengths.astype("<i4"),
            ends=ends.astype(np.uint8),
            **known,
        )
    if not count:
        raise FocalError(f"{where}: no episodes, expected at least one")
    episodes.validate(where)
    if (wrong := episodes.misstated).any():
        notes.add(RESTATED, int(wrong.sum()))
        episodes = replace(episodes, returns=np.where(wrong, episodes.reward_sums, episodes.returns))
    return episodes


def with_sparse_reward(
    infos: Mapping[str, Array], params: Mapping[str, Any], following: Array, rewards: Array, facts: FamilyFacts
) -> dict[str, Array]:
    """Add the sparse reward to `infos` where the family has one and the source has not. Arrays (T, ...)."""
    if facts.sparse_reward is None or "sparse_reward" in infos:
        return dict(infos)
    return {**infos, "sparse_reward": facts.sparse_reward(params, following, rewards)}
