"""The row rule worked by hand, and what `Episodes` refuses."""

from dataclasses import replace

import numpy as np
import pytest

from focal.datasets import End, Episodes, Quality
from focal.errors import FocalError


@pytest.fixture
def two_episodes() -> Episodes:
    """A: 3 steps, terminated, observations 0 to 3. B: 2 steps, truncated, observations 10 to 12."""
    return Episodes(
        observations=np.array([[0], [1], [2], [3], [10], [11], [12]], "f4"),
        actions=np.array([[0], [1], [2], [10], [11]], "f4"),
        rewards=np.array([0.5, 1.5, 2.5, 10.5, 11.5], "f4"),
        infos={"sparse_reward": np.array([0, 0, 1, 0, 1], "f4")},
        lengths=np.array([3, 2], "i4"),
        ends=np.array([End.TERMINATED, End.TRUNCATED], "u1"),
        returns=np.array([4.5, 22.0]),
        qualities=np.array([Quality.RANDOM, Quality.EXPERT], "u1"),
        sac_steps=np.array([0, 1000], "i8"),
        seeds=np.array([7, 8], "i8"),
        heldout=np.array([0, 1], "u1"),
    )


def test_transitions_follow_the_picture(two_episodes):
    steps = two_episodes.transitions()
    assert steps.rows.tolist() == [0, 1, 2, 4, 5]
    assert steps.observations[steps.rows, 0].tolist() == [0, 1, 2, 10, 11]
    assert steps.observations[steps.rows + 1, 0].tolist() == [1, 2, 3, 11, 12]
    assert steps.actions[:, 0].tolist() == [0, 1, 2, 10, 11]
    assert steps.terminated.tolist() == [False, False, True, False, False]
    assert steps.next_action_valid.tolist() == [True, True, False, True, False]
    assert steps.rows.dtype == np.int64
    assert steps.observations is two_episodes.observations, "the observations must be shared, not copied"


def test_a_cut_episode_neither_terminates_nor_has_a_next_action(two_episodes):
    steps = replace(two_episodes, ends=np.array([End.CUT, End.CUT], "u1")).transitions()
    assert not steps.terminated.any()
    assert steps.next_action_valid.tolist() == [True, True, False, True, False]


def test_select_keeps_each_episodes_own_rows(two_episodes):
    second = two_episodes.select(np.array([False, True]))
    second.validate()
    assert second.observations[:, 0].tolist() == [10, 11, 12]
    assert second.rewards.tolist() == [10.5, 11.5]
    assert second.infos["sparse_reward"].tolist() == [0, 1]
    assert (second.num_episodes, second.num_steps, second.seeds.tolist()) == (1, 2, [8])
    assert second.transitions().rows.tolist() == [0, 1]
    assert two_episodes.select(np.array([True, True])) is two_episodes


def test_concatenate_undoes_select(two_episodes):
    parts = [two_episodes.select(np.array(mask)) for mask in ([True, False], [False, True])]
    joined = Episodes.concatenate(parts)
    for name in ("observations", "actions", "rewards", "lengths", "ends", "returns", "seeds", "heldout"):
        assert np.array_equal(getattr(joined, name), getattr(two_episodes, name)), name


def test_concatenate_refuses_other_dimensions(two_episodes):
    wider = replace(two_episodes, actions=np.zeros((5, 2), "f4"))
    with pytest.raises(FocalError, match=r"action width is \(2,\), expected \(1,\)"):
        Episodes.concatenate([two_episodes, wider])
    with pytest.raises(FocalError, match="list of infos"):
        Episodes.concatenate([two_episodes, replace(two_episodes, infos={})])
    with pytest.raises(FocalError, match="no episodes"):
        Episodes.concatenate([])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("observations", np.zeros((5, 1), "f4"), "observations has 5 rows, expected 7"),
        ("observations", np.zeros((7, 1)), "observations has float64"),
        ("actions", np.zeros((6, 1), "f4"), "actions has 6 rows, expected 5"),
        ("actions", np.zeros(5, "f4"), "expected float32 of rank 2"),
        ("actions", np.full((5, 1), np.nan, "f4"), "actions has a value that is not finite"),
        ("infos", {"sparse_reward": np.zeros(4, "f4")}, "infos/sparse_reward has 4 rows"),
        ("lengths", np.array([3, 1], "i4"), "lengths has 4 steps, expected 5"),
        ("lengths", np.array([5, 0], "i4"), "lengths has 0 steps in an episode"),
        ("lengths", np.array([3, 2]), "lengths has int64"),
        ("ends", np.array([0, 1], "u1"), "ends has 0, expected 1 or 2 or 3"),
        ("qualities", np.array([0, 4], "u1"), "qualities has 4"),
        ("heldout", np.array([0, 2], "u1"), "heldout has 2"),
        ("returns", np.array([1.0, np.inf]), "returns has a value that is not finite"),
        ("returns", np.array([1.0]), "returns has float64"),
        ("sac_steps", np.array([-1, 0]), "sac_steps has -1"),
    ],
)
def test_validate_names_what_is_inconsistent(two_episodes, field, value, message):
    two_episodes.validate()
    with pytest.raises(FocalError, match=message.replace("(", r"\(")):
        replace(two_episodes, **{field: value}).validate()
