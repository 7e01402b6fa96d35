"""Episodes in memory, and the one rule that connects their rows.

Two episodes, A of 3 steps that was terminated, B of 2 steps that was cut off by the time limit:

    step  t              0    1    2    3    4                  T = 5 steps,  E = 2 episodes
    actions, rewards   [ A0   A1   A2   B0   B1 ]               one row per step
    observations       [ A0   A1   A2   A3   B0   B1   B2 ]     one row more per episode: where its last step arrived
    observation row      0    1    2    3    4    5    6
    rows[t]              0    1    2         4    5             row of step t = t + index of its episode
    next observation     1    2    3         5    6             always the next row
    terminated[t]        no   no   YES       no   no            only here may a Bellman target stop
    next_action_valid    yes  yes  no        yes  no            actions[t + 1] is the next logged action

Storing one extra row per episode instead of a second observation matrix nearly halves a store, and sampling still
needs no copy: s' is `observations[rows + 1]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import FocalError

Array = npt.NDArray[Any]


class End(IntEnum):
    """Why an episode stopped."""

    TERMINATED = 1
    """The task itself ended (a fall); there is no future to bootstrap from."""
    TRUNCATED = 2
    """The time limit came; the future goes on unseen."""
    CUT = 3
    """The collector stopped in the middle of an episode."""


class Quality(IntEnum):
    """The level of the policy that collected an episode."""

    NONE = 0
    RANDOM = 1
    MEDIUM = 2
    EXPERT = 3


QUALITIES = ("random", "medium", "expert", "mixed")
"""What a user may ask for; `mixed` is every episode, labelled or not."""

LARGEST_ACTION = 1 + 1e-5
"""Of any component, in any family: all have [-1, 1], and other software rounds."""

PER_EPISODE: dict[str, np.dtype[Any]] = {
    "lengths": np.dtype("<i4"),
    "ends": np.dtype("u1"),
    "returns": np.dtype("<f8"),
    "qualities": np.dtype("u1"),
    "sac_steps": np.dtype("<i8"),
    "seeds": np.dtype("<i8"),
    "heldout": np.dtype("u1"),
}
"""The (E,) fields of `Episodes` and their types."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """The steps of one task, ready for gathering by index; the module docstring draws the rule."""

    observations: Array  # (T+E, obs_dim) f4
    rows: Array  # (T,) i8; s = observations[rows], s' = observations[rows + 1]
    actions: Array  # (T, act_dim) f4
    rewards: Array  # (T,) f4
    infos: Mapping[str, Array]  # each (T,) f4
    terminated: Array  # (T,) bool; False where an episode was truncated or cut
    next_action_valid: Array  # (T,) bool; True where actions[t + 1] belongs to the same episode


@dataclass(frozen=True, eq=False)
class Episodes:
    """E whole episodes of one task, T steps in all: the content of a segment and of a sealed store."""

    observations: Array  # (T+E, obs_dim) f4
    actions: Array  # (T, act_dim) f4, exactly what was stepped
    rewards: Array  # (T,) f4, dense reward
    infos: Mapping[str, Array]  # each (T,) f4, for example sparse_reward
    lengths: Array  # (E,) i4, steps per episode
    ends: Array  # (E,) u1, see End
    returns: Array  # (E,) f8, undiscounted dense return, summed before rounding to float32
    qualities: Array  # (E,) u1, see Quality
    sac_steps: Array  # (E,) i8, training steps of the policy that collected it; 0 is untrained
    seeds: Array  # (E,) i8, reset seed
    heldout: Array  # (E,) u1, 1 keeps an episode from training

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.lengths)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.rewards)

    @property
    def reward_sums(self) -> Array:
        """(E,) f8, the sums of the stored rewards: the returns up to the rounding of rewards to float32."""
        return _sums(self.rewards, self.lengths)

    @property
    def misstated(self) -> Array:
        """(E,) bool, True where the return is not what the rewards add up to, even with their rounding to float32."""
        allowed = 1e-6 * (1 + _sums(np.abs(self.rewards), self.lengths))
        return cast(Array, np.abs(self.reward_sums - self.returns) > allowed)

    def validate(self, where: str = "episodes") -> None:
        """Check shapes, types, counts, finite values and enums. Raises `FocalError` naming `where` and the field."""
        self._validate_fields(where)
        total, count = self.num_steps, self.num_episodes
        if count and int(self.lengths.min()) < 1:
            raise _inconsistent(where, "lengths", f"{int(self.lengths.min())} steps in an episode", "at least 1")
        if int(self.lengths.sum(dtype=np.int64)) != total:
            raise _inconsistent(
                where, "lengths", f"{int(self.lengths.sum(dtype=np.int64))} steps", f"{total} as in rewards"
            )
        for name, values in self._steps().items():
            expected = total + count if name == "observations" else total
            if len(values) != expected:
                raise _inconsistent(where, name, f"{len(values)} rows", str(expected))
        for name, values in {**self._steps(), "returns": self.returns}.items():
            if not np.isfinite(values).all():
                raise _inconsistent(where, name, "a value that is not finite", "finite numbers")
        if count and int(self.sac_steps.min()) < 0:
            raise _inconsistent(where, "sac_steps", str(int(self.sac_steps.min())), "0 or more")
        for name, allowed in (("ends", tuple(End)), ("qualities", tuple(Quality)), ("heldout", (0, 1))):
            if unknown := set(np.unique(getattr(self, name)).tolist()) - {int(value) for value in allowed}:
                raise _inconsistent(where, name, str(min(unknown)), " or ".join(str(int(value)) for value in allowed))

    def _validate_fields(self, where: str) -> None:
        for name, values in self._steps().items():
            rank = 2 if name in ("observations", "actions") else 1
            if values.ndim != rank or values.dtype != np.dtype("<f4"):
                raise _inconsistent(where, name, f"{values.dtype} {values.shape}", f"float32 of rank {rank}")
        for name, dtype in PER_EPISODE.items():
            values = getattr(self, name)
            if values.shape != (self.num_episodes,) or values.dtype != dtype:
                raise _inconsistent(where, name, f"{values.dtype} {values.shape}", f"{dtype} {(self.num_episodes,)}")

    def _steps(self) -> dict[str, Array]:
        infos = {f"infos/{name}": values for name, values in self.infos.items()}
        return {"observations": self.observations, "actions": self.actions, "rewards": self.rewards, **infos}

    @staticmethod
    def concatenate(parts: Sequence["Episodes"]) -> "Episodes":
        """Join episodes of one task in the order given. Raises `FocalError` when dimensions or infos differ."""
        if not parts:
            raise FocalError(
                "no episodes to join, expected at least one part; collect data first: focal-cli data generate"
            )
        first = parts[0]
        for part in parts[1:]:
            for name, value in part._signature().items():
                if value != (expected := first._signature()[name]):
                    raise FocalError(
                        f"cannot join episodes: {name} is {value}, expected {expected} as in the first part"
                    )
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Episodes)
            if field.name != "infos"
        }
        infos = {name: np.concatenate([part.infos[name] for part in parts]) for name in first.infos}
        return Episodes(infos=infos, **joined)

    def _signature(self) -> dict[str, object]:
        return {
            "observation width": self.observations.shape[1:],
            "action width": self.actions.shape[1:],
            "the list of infos": sorted(self.infos),
        }

    def select(self, mask: Array) -> "Episodes":
        """Return the episodes where `mask` (E,) bool is True, in their order; no copy when it is all True."""
        if mask.all():
            return self
        steps = np.repeat(mask, self.lengths)
        return Episodes(
            observations=self.observations[np.repeat(mask, self.lengths + 1)],
            actions=self.actions[steps],
            rewards=self.rewards[steps],
            infos={name: values[steps] for name, values in self.infos.items()},
            **{name: getattr(self, name)[mask] for name in PER_EPISODE},
        )

    def transitions(self) -> Transitions:
        """Return the steps with their row numbers and flags; the large arrays are shared, not copied."""
        last = np.cumsum(self.lengths, dtype=np.int64) - 1  # (E,) last step of each episode
        terminated = np.zeros(self.num_steps, bool)
        terminated[last] = self.ends == End.TERMINATED
        next_action_valid = np.ones(self.num_steps, bool)
        next_action_valid[last] = False
        episode = np.repeat(np.arange(self.num_episodes, dtype=np.int64), self.lengths)  # (T,)
        return Transitions(
            observations=self.observations,
            rows=np.arange(self.num_steps, dtype=np.int64) + episode,
            actions=self.actions,
            rewards=self.rewards,
            infos=self.infos,
            terminated=terminated,
            next_action_valid=next_action_valid,
        )


def _sums(values: Array, lengths: Array) -> Array:
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.add.reduceat(values.astype(np.float64), first) if len(lengths) else np.zeros(0)


def _inconsistent(where: str, name: str, found: str, expected: str) -> FocalError:
    return FocalError(
        f"{where}: {name} has {found}, expected {expected}; collect the data again: focal-cli data generate"
    )
