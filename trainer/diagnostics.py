"""What training says of itself: spread of the embeddings (the paper's Table 1; formulas in reference-facts 4.3), growth
and bound of the values."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import TrainSettings

_DRIFTING = ("critic/value", "critic/next_value")


def separation_matrix(embeddings: Tensor) -> Tensor:
    """Return the mean square difference per dimension of every two of `embeddings` (K, L), (K, K), from 0 to 4."""
    return (embeddings.unsqueeze(1) - embeddings).square().mean(dim=-1)


def effective_separation_rate(embeddings: Tensor) -> float:
    """Return the share of task pairs whose squared distance exceeds 2L/3, for `embeddings` (K, L) of K >= 2 tasks.

    2L/3 is the expected squared distance of two independent points uniform in (-1, 1)^L; the released plotting code
    compares the mean square per dimension with 2/3, which is the same.
    """
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1, device=embeddings.device)
    squared = separation_matrix(embeddings)[first, second]
    return (squared > 2.0 / 3.0).double().mean().item()


def root_mean_square_spread(embeddings: Tensor) -> float:
    """Return the RMS distance of `embeddings` (K, L), K >= 2, as the paper's code computes it.

    The mean over dimensions of the population standard deviation across tasks, times sqrt(2K / (K - 1)). Not exactly
    the root mean square distance of pairs, which would take the root of the mean variance.
    """
    tasks = len(embeddings)
    spread = embeddings.double().std(dim=0, correction=0).mean().item()
    return spread * (2.0 * tasks / (tasks - 1)) ** 0.5


def effective_dimensions(embeddings: Tensor) -> float:
    """Return how many directions `embeddings` (K, L), K >= 2, spread over, from 1 to L (0 where all are equal).

    The participation ratio (sum of variances)^2 / sum of squared variances along the principal directions. Neither ESR
    nor RMS shows when tasks that differ in two ways are laid out on a line, where unlike tasks meet.
    """
    centred = (embeddings - embeddings.mean(dim=0)).double()
    products = centred @ centred.T  # (K, K); its eigenvalues are the variances, up to a common factor
    return (products.trace().square() / products.square().sum().clamp_min(1e-30)).item()


def embedding_metrics(embeddings: Tensor) -> dict[str, float]:
    """Return `embedding/esr`, `/rms` and `/dimensions` of task embeddings (K, L); nothing for a single task."""
    if len(embeddings) < 2:
        return {}
    return {
        "embedding/esr": effective_separation_rate(embeddings),
        "embedding/rms": root_mean_square_spread(embeddings),
        "embedding/dimensions": effective_dimensions(embeddings),
    }


def value_bound(settings: TrainSettings, largest_reward: float) -> float:
    """Return the action value beyond which a run has diverged: `value_limit`, or 100 times what is possible.

    Possible is what the settings' `largest_step` says that the `largest_reward` (absolute, unscaled) can add at a step,
    at every step: / (1 - discount).
    """
    if settings.value_limit is not None:
        return settings.value_limit
    return 100.0 * settings.largest_step(largest_reward) / max(1.0 - settings.discount, 1e-3)


def value_drift(metrics: Mapping[str, float], step: int, before: Mapping[str, object]) -> dict[str, float]:
    """Return by how much the mean values grew from the log row `before` until `step`, per 1,000 steps."""
    since = before.get("step")
    return {
        f"{name}_drift": 1000.0 * (metrics[name] - earlier) / (step - since)
        for name in _DRIFTING
        if name in metrics and isinstance(since, int) and isinstance(earlier := before.get(name), float)
    }
