"""Labels and the held-out draw: known answers worked by hand."""

import numpy as np
import pytest

from focal.datasets import Quality, QualityRule, checkpoint_scores, draw_heldout, label_checkpoints
from focal.errors import UsageError

NONE, RANDOM, MEDIUM, EXPERT = Quality.NONE, Quality.RANDOM, Quality.MEDIUM, Quality.EXPERT


@pytest.mark.parametrize(
    ("scores", "reached", "expected"),
    [
        # the ordinary course of learning
        ([0.0, 0.05, 0.3, 0.52, 0.8, 0.95, 1.0], True, [RANDOM, RANDOM, NONE, MEDIUM, NONE, EXPERT, EXPERT]),
        # a later dip below 0.1 is not random again
        ([0.0, 0.2, 0.05, 0.5, 0.02, 0.9], True, [RANDOM, NONE, NONE, MEDIUM, NONE, EXPERT]),
        # chance places the untrained policy above 0.1: random all the same, and so is what follows up to 0.1
        ([0.3, 0.05, 0.2, 0.05], True, [RANDOM, RANDOM, NONE, NONE]),
        # at 0.35 itself it is random too, and not medium
        ([0.35, 0.05, 0.2], True, [RANDOM, RANDOM, NONE]),
        # a first checkpoint that has learnt something, in data from elsewhere
        ([0.36, 0.05, 1.0], True, [MEDIUM, NONE, EXPERT]),
        # never learnt: every score stays low
        ([0.0, -0.2, 0.1, 0.09], False, [RANDOM] * 4),
        # the expert failed its absolute test: no expert data, medium stays
        ([0.0, 0.5, 0.95], False, [RANDOM, MEDIUM, NONE]),
        # jumps over the window: no medium
        ([0.0, 0.34, 0.66, 0.9], True, [RANDOM, NONE, NONE, EXPERT]),
        # both ends of the window belong to it; the nearest to 0.5 wins
        ([0.0, 0.35, 0.65], True, [RANDOM, MEDIUM, NONE]),
        ([0.0, 0.35, 0.6, 0.65], True, [RANDOM, NONE, MEDIUM, NONE]),
        # an expert that falls back below 0.9 is no expert there
        ([0.0, 0.92, 0.7, 0.91], True, [RANDOM, EXPERT, NONE, EXPERT]),
        # scores without a meaning (expert no better than random): only the untrained checkpoint is labelled
        ([np.nan, np.nan, np.nan], True, [RANDOM, NONE, NONE]),
    ],
)
def test_labels(scores, reached, expected):
    assert label_checkpoints(np.array(scores), QualityRule(), reached).tolist() == expected


def test_labels_obey_the_rule():
    rule = QualityRule(random_below=0.2, medium_low=0.5, medium_target=0.7, medium_high=0.8, expert_from=0.95)
    assert label_checkpoints(np.array([0.15, 0.5, 0.75, 0.9, 0.95]), rule, True).tolist() == [1, 0, 2, 0, 3]


def test_the_first_checkpoint_has_a_cut_of_its_own():
    scores = np.array([0.15, 0.05, 0.6])
    assert label_checkpoints(scores, QualityRule(first_random_below=0.1), True).tolist() == [0, 0, 2]
    assert label_checkpoints(scores, QualityRule(first_random_below=-1.0), True).tolist() == [0, 0, 2], "0.1 holds"
    wide = QualityRule(first_random_below=0.6)
    assert label_checkpoints(np.array([0.5, 0.05, 0.2]), wide, True).tolist() == [RANDOM, RANDOM, NONE]
    with pytest.raises(UsageError, match=r"first_random_below=0\.95, expected a number below expert_from=0\.9"):
        QualityRule(first_random_below=0.95)


def test_scores_are_means_per_checkpoint_whatever_the_order():
    returns, steps = np.array([-4.0, -10.0, -2.0, -10.0]), np.array([1000, 0, 1000, 0])
    found, scores = checkpoint_scores(returns, steps, random=-10, expert=-2)
    assert found.tolist() == [0, 1000]
    assert scores.tolist() == [0.0, 0.875]


def test_scores_mean_nothing_when_the_expert_is_no_better_than_random():
    assert np.isnan(checkpoint_scores(np.array([1.0]), np.array([0]), random=1, expert=1)[1]).all()


@pytest.mark.parametrize(("episodes", "expected"), [(1, 0), (2, 1), (5, 1), (10, 1), (20, 2), (50, 5)])
def test_heldout_share_of_every_checkpoint(episodes, expected):
    steps = np.repeat([0, 500, 1000], episodes)
    heldout = draw_heldout(steps, 0.1, (3, 7))
    assert heldout.reshape(3, episodes).sum(1).tolist() == [expected] * 3


def test_heldout_depends_on_the_seeds_only():
    steps = np.repeat([0, 500, 1000], 40)
    first = draw_heldout(steps, 0.1, (3, 7))
    assert np.array_equal(first, draw_heldout(steps, 0.1, (3, 7)))
    assert not np.array_equal(first, draw_heldout(steps, 0.1, (3, 8)))
    assert not np.array_equal(first, draw_heldout(steps, 0.1, (4, 7)))
    draws = first.reshape(3, 40)
    assert not np.array_equal(draws[0], draws[1]), "checkpoints must not share one draw"
    # known answer: the draw is part of the format, `verify` repeats it on any machine
    assert np.flatnonzero(draw_heldout(np.zeros(20, "i8"), 0.1, (0, 0))).tolist() == [4, 9]


def test_heldout_is_never_everything_and_may_be_nothing():
    assert draw_heldout(np.zeros(3, "i8"), 0.99, (0,)).sum() == 2
    assert draw_heldout(np.zeros(30, "i8"), 0.0, (0,)).sum() == 0
    assert draw_heldout(np.zeros(0, "i8"), 0.1, (0,)).tolist() == []


@pytest.mark.parametrize(
    "settings",
    [{"random_below": 0.4}, {"medium_high": 0.95}, {"medium_target": 0.7}, {"expert_from": float("nan")}],
)
def test_thresholds_must_be_ordered(settings):
    with pytest.raises(UsageError, match="expected random_below < medium_low"):
        QualityRule(**settings)


def test_heldout_fraction_must_leave_something():
    with pytest.raises(UsageError, match="heldout_fraction=1"):
        QualityRule(heldout_fraction=1.0)
