"""What the networks see of an observation: chosen columns, scaled. One object for training, context and acting."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FocalError, UsageError

_SMALLEST_SCALE = 1e-6  # a column that is constantly 0 in the data is left alone, not blown up


@dataclass(frozen=True)
class ObservationTransform:
    """Keeps the columns `kept` of a raw observation and divides them by `scale`.

    Reset and step observations go through it alike (the released code scales only those of step: reference-facts D7).
    """

    raw_dim: int  # columns of the observations it accepts
    kept: tuple[int, ...]  # columns kept, ascending
    scale: tuple[float, ...]  # one positive divisor per kept column, exact float32 values

    @property
    def dim(self) -> int:
        """Number of columns it returns."""
        return len(self.kept)

    def __call__(self, observations: Tensor) -> Tensor:
        """Map raw observations (..., raw_dim) to float32 (..., dim)."""
        observations = self.select(observations)
        return observations / torch.tensor(self.scale, dtype=torch.float32, device=observations.device)

    def select(self, observations: Tensor) -> Tensor:
        """Map raw observations (..., raw_dim) to float32 (..., dim), columns chosen but not scaled.

        Raises `FocalError` for observations of another width.
        """
        if observations.shape[-1] != self.raw_dim:
            raise FocalError(
                f"observations have {observations.shape[-1]} columns, this run was trained on {self.raw_dim}; use the "
                "collection it was trained on, or train on this one: focal-cli train --collection PATH --data mixed"
            )
        observations = observations.to(torch.float32)
        return observations if self.dim == self.raw_dim else observations[..., list(self.kept)]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives back exactly this transform."""
        return {"raw_dim": self.raw_dim, "kept": list(self.kept), "scale": list(self.scale)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "ObservationTransform":
        """Rebuild a saved transform. Raises `FocalError` when its values make no sense."""
        try:
            kept = tuple(int(column) for column in values["kept"])
            transform = ObservationTransform(int(values["raw_dim"]), kept, tuple(float(x) for x in values["scale"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FocalError(f"saved observation transform is damaged ({error!r}); train the run again") from None
        ascending = all(a < b for a, b in itertools.pairwise(kept))
        if not (kept and ascending and kept[0] >= 0 and kept[-1] < transform.raw_dim):
            raise FocalError(f"saved observation transform keeps columns {kept} of {transform.raw_dim}; train again")
        if len(transform.scale) != len(kept) or not all(0.0 < x < float("inf") for x in transform.scale):
            raise FocalError("saved observation transform has wrong scales; train the run again")
        return transform


def fit_transform(
    observations: Sequence[np.ndarray], observation_scale: str, hide_x: bool, absolute_x: int | None
) -> ObservationTransform:
    """Fit the transform on the training tasks' raw `observations`, each (rows, obs_dim).

    "absmax" divides each column by its largest absolute value over all tasks, as released; "rms" by its root mean
    square, which one hard landing does not decide; "none" by 1. `hide_x` drops the column `absolute_x`: half-cheetah
    observations hold the absolute x, whose sign gives the direction away.
    """
    if hide_x and absolute_x is None:
        raise UsageError("hide_x is on, but this family's observations hold no absolute x; --set hide_x=false")
    raw_dim = observations[0].shape[1]
    kept = tuple(column for column in range(raw_dim) if not (hide_x and column == absolute_x))
    size = np.ones(raw_dim)
    if observation_scale == "absmax":
        size = np.max([np.maximum(rows.max(axis=0), -rows.min(axis=0)) for rows in observations], axis=0)
    elif observation_scale == "rms":
        squares = np.sum([np.square(rows, dtype=np.float64).sum(axis=0) for rows in observations], axis=0)
        size = np.sqrt(squares / sum(len(rows) for rows in observations))
    scale = np.where(size > _SMALLEST_SCALE, size, 1.0).astype(np.float32)
    return ObservationTransform(raw_dim, kept, tuple(scale[list(kept)].tolist()))
