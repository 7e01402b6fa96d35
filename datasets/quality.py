"""Which level a checkpoint's episodes have, and which of them are kept from training.

A checkpoint's score places its policy between the two references of its task:

    score = (mean return of its episodes - random) / (expert - random)

    score   ... 0 ........ 0.1 ........ 0.35 ... 0.5 ... 0.65 ........ 0.9 ... 1 ...
    label   random until the      medium: the one checkpoint          expert: all
            first score above     nearest 0.5 in this window          from here on
            (the first checkpoint itself: up to 0.35)

All returns here are of stochastic rollouts of the dense reward (design.md section 5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UsageError
from .episodes import Array, Episodes, Quality


@dataclass(frozen=True)
class QualityRule:
    """Where the levels are cut; stored with every task, and `focal-cli data relabel` re-cuts with another rule."""

    random_below: float = 0.1
    """Checkpoints before the first score above this are `random`;"""
    first_random_below: float = 0.35
    """the first checkpoint, though, up to this score, if it is the larger. That is the untrained policy, whose true
    score is 0, but which chance (20 episodes on either side) places above 0.1 in a tenth of the point robots' tasks."""
    medium_target: float = 0.5
    """The checkpoint whose score is nearest to this is `medium`,"""
    medium_low: float = 0.35
    """if its score is at least this"""
    medium_high: float = 0.65
    """and at most this."""
    expert_from: float = 0.9
    """Every checkpoint with at least this score is `expert`, if the task's expert passed its absolute test."""
    heldout_fraction: float = 0.1
    """Share of every checkpoint's episodes that never reaches training; at least one where there are two."""

    def __post_init__(self) -> None:
        cuts = (self.random_below, self.medium_low, self.medium_target, self.medium_high, self.expert_from)
        ordered = self.random_below < self.medium_low <= self.medium_target <= self.medium_high < self.expert_from
        if not all(map(math.isfinite, cuts)) or not ordered:
            raise UsageError(
                f"quality thresholds are {cuts}, expected random_below < medium_low <= medium_target <= medium_high "
                "< expert_from; --set the one that breaks the order otherwise"
            )
        if not -math.inf < self.first_random_below < self.expert_from:
            raise UsageError(
                f"first_random_below={self.first_random_below}, expected a number below expert_from="
                f"{self.expert_from}, for example 0.35"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise UsageError(
                f"heldout_fraction={self.heldout_fraction}, expected at least 0 and below 1, for example 0.1"
            )


def checkpoint_scores(returns: Array, sac_steps: Array, random: float, expert: float) -> tuple[Array, Array]:
    """Return the checkpoints' steps (C,) i8 in ascending order and their scores (C,) f8.

    `returns` and `sac_steps` are per episode (E,). Where the expert is no better than random the scores mean nothing
    and are NaN.
    """
    steps, checkpoint = np.unique(sac_steps, return_inverse=True)
    means = np.bincount(checkpoint, weights=returns) / np.bincount(checkpoint)
    if not expert > random:
        return steps, np.full(len(steps), np.nan)
    return steps, (means - random) / (expert - random)


def label_checkpoints(scores: Array, rule: QualityRule, reached_expert: bool) -> Array:
    """Return the `Quality` (C,) u1 of checkpoints in training order, given their scores (C,); see the module docstring.

    A later dip below `random_below` is not random data again: the policy has learnt something by then. NaN scores
    (an expert no better than random) leave only the first, untrained checkpoint a label.
    """
    labels = np.full(len(scores), Quality.NONE, np.uint8)
    if np.isnan(scores).any():
        labels[:1] = Quality.RANDOM
        return labels
    cuts = np.full(len(scores), rule.random_below)
    cuts[:1] = max(rule.random_below, rule.first_random_below)
    above = np.flatnonzero(scores > cuts)
    labels[: above[0] if len(above) else len(scores)] = Quality.RANDOM
    window = np.flatnonzero((labels == Quality.NONE) & (scores >= rule.medium_low) & (scores <= rule.medium_high))
    if len(window):
        labels[window[np.argmin(np.abs(scores[window] - rule.medium_target))]] = Quality.MEDIUM
    if reached_expert:
        labels[scores >= rule.expert_from] = Quality.EXPERT
    return labels


def draw_heldout(sac_steps: Array, fraction: float, seeds: Sequence[int]) -> Array:
    """Draw the held-out episodes (E,) u1: `fraction` of every checkpoint's, at least one of two, never all.

    The draw depends on `seeds` (the collection's and the task's index), the checkpoint and the number of its episodes
    only. It ranks words of a SeedSequence, whose values NumPy guarantees, unlike a Generator's, so `verify` can
    repeat it anywhere.
    """
    heldout = np.zeros(len(sac_steps), np.uint8)
    if not len(sac_steps):
        return heldout
    order = np.argsort(sac_steps, kind="stable")  # checkpoint by checkpoint, in each as they come
    steps, starts = np.unique(sac_steps[order], return_index=True)
    for step, episodes in zip(steps, np.split(order, starts[1:]), strict=True):
        if fraction == 0 or len(episodes) < 2:
            continue
        count = min(max(1, round(fraction * len(episodes))), len(episodes) - 1)
        words = np.random.SeedSequence([*seeds, int(step)]).generate_state(len(episodes), np.uint64)
        heldout[episodes[np.argsort(words, kind="stable")[:count]]] = 1
    return heldout


def label_episodes(
    episodes: Episodes, rule: QualityRule, random: float, expert: float, reached_expert: bool, seeds: Sequence[int]
) -> Episodes:
    """Return `episodes` with `qualities` and `heldout` set anew from their returns, the references and the seeds."""
    steps, scores = checkpoint_scores(episodes.returns, episodes.sac_steps, random, expert)
    labels = label_checkpoints(scores, rule, reached_expert)
    return replace(
        episodes,
        qualities=labels[np.searchsorted(steps, episodes.sac_steps)],
        heldout=draw_heldout(episodes.sac_steps, rule.heldout_fraction, seeds),
    )
