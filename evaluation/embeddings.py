"""How well task embeddings tell the tasks apart: the paper's ESR and RMS, and nearest-centroid task accuracy.

ESR, the effective separation rate (paper section 5.2.1): the share of pairs of different tasks whose SQUARED distance
exceeds 2L/3, its expectation for two independent points uniform in (-1, 1)^L. RMS: the mean over the L dimensions of
the standard deviation across tasks, times sqrt(2K / (K - 1)), so that uniform points give sqrt(2/3). Both are of the
tasks' mean embeddings; trainer/diagnostics.py computes them.
"""

import numpy as np
import torch

from ..trainer.diagnostics import embedding_metrics


def spread(embeddings: np.ndarray) -> dict[str, float]:
    """Return `esr`, `rms` and `dimensions` of the tasks' mean embeddings, for `embeddings` (K, E, L).

    Empty for a single task.
    """
    means = torch.from_numpy(np.asarray(embeddings, np.float64).mean(axis=1))
    return {name.removeprefix("embedding/"): value for name, value in embedding_metrics(means).items()}


def nearest_centroid_accuracy(embeddings: np.ndarray, centroids: np.ndarray) -> float:
    """Return the share of `embeddings` (K, E, L) whose nearest of the `centroids` (K, L) is their own task's.

    Chance is 1 / K. A centroid that several tasks share counts for none of them: what cannot be told apart is wrong.
    """
    distances = np.linalg.norm(embeddings[:, :, None, :] - centroids[None, None], axis=-1)  # (K, E, K)
    own = np.arange(len(centroids))
    others = np.where(np.eye(len(centroids), dtype=bool)[:, None, :], np.inf, distances).min(axis=-1)  # (K, E)
    return float((distances[own, :, own] < others).mean())
