"""The distance metric loss that trains the encoder (the paper's eq. 13)."""

from typing import Literal

import torch
from torch import Tensor

from .optimisers import Metrics

PAPER_BETAS = {-2: 1.0, -1: 2.0, 1: 8.0, 2: 16.0}  # by power (Table 5b): about equal terms at a distance of 0.5
_SMALLEST_SQUARE = 1e-12  # keeps the gradient of the root finite (and 0) for identical embeddings


def distance_metric_loss(
    embeddings: Tensor,
    labels: Tensor,
    power: int = -2,
    beta: float | None = None,
    epsilon: float = 0.1,
    form: Literal["paper", "released"] = "paper",
) -> tuple[Tensor, Metrics]:
    """Pull embeddings of one task together and push those of different tasks apart.

    `embeddings` (D, L) with their tasks `labels` (D,); all D (D - 1) / 2 pairs at once. With d2 the MEAN over the L
    dimensions of the squared difference and d = sqrt(d2), eq. 13 of the paper is

        same task: d2      different tasks: beta / (d^n + epsilon) for power = -n,   -beta d^n for power = n

    averaged over the pairs of each kind apart, then added. Without a `beta` it is the paper's for the power. "released"
    is the published code's form (reference-facts 3.4): sqrt(d2 + 1e-3) and 1 / (d2 + 0.1) whatever beta and epsilon
    say, each divided by its number of pairs + 1e-3.
    Departures: the paper writes the L2 norm, its code and its choice of beta mean it per dimension, as here; with
    "paper" there is no slack in the averages, so without pairs of a kind that term is exactly 0.
    """
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=embeddings.device)
    squared = (embeddings[first] - embeddings[second]).square().mean(dim=-1)  # (pairs,)
    same = labels[first] == labels[second]
    if form == "released":
        assert power == -2, "the released form knows only power -2 (TrainSettings.check)"
        attraction, repulsion = torch.sqrt(squared + 1e-3), 1.0 / (squared + 0.1)
        positives, negatives = same.sum() + 1e-3, (~same).sum() + 1e-3
    else:
        attraction, repulsion = squared, _repulsion(squared, power, beta, epsilon)
        positives, negatives = same.sum().clamp_min(1), (~same).sum().clamp_min(1)
    positive = (attraction * same).sum() / positives
    negative = (repulsion * ~same).sum() / negatives
    loss = positive + negative
    return loss, {
        "encoder/loss": loss.detach(),
        "encoder/positive": positive.detach(),
        "encoder/negative": negative.detach(),
    }


def _repulsion(squared: Tensor, power: int, beta: float | None, epsilon: float) -> Tensor:
    """The negative pairs' term for a mean square distance, (pairs,) -> (pairs,)."""
    assert power in PAPER_BETAS, "checked by DistanceSettings"
    beta = PAPER_BETAS[power] if beta is None else beta
    distance = squared if abs(power) == 2 else torch.sqrt(squared.clamp_min(_SMALLEST_SQUARE))
    return -beta * distance if power > 0 else beta / (distance + epsilon)
