"""Replay: next observations, next actions, masks and offsets on hand-made episodes; one transform for all uses."""

import dataclasses

import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.trainer.replay import TaskReplay, TrainingData, sample_joint_batch, sample_meta_batch, training_transform
from focal.trainer.transform import ObservationTransform, fit_transform

from .trainer_toys import TINY, shifted, two_episodes, walk_data, with_settings

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_transitions_of_two_short_episodes():
    replay = TaskReplay([two_episodes()], RAW, TINY)
    batch = replay.batch_at(torch.tensor([[0, 1, 2]]))
    assert batch.observations.tolist() == [[[10, 1], [11, -4], [20, 3]]]
    assert batch.next_observations.tolist() == [[[11, -4], [12, 2], [21, 1]]]
    assert batch.rewards.tolist() == [[1, 2, 3]]
    assert batch.terminated.tolist() == [[False, False, True]]
    assert batch.next_action_valid.tolist() == [[True, False, False]]
    assert batch.next_actions[0, 0].item() == pytest.approx(0.2)


def test_a_second_task_starts_where_the_first_ends():
    replay = TaskReplay([two_episodes(), shifted(two_episodes(), 100)], RAW, TINY)
    batch = replay.batch_at(replay.first[:, None] + torch.arange(3))
    assert torch.equal(batch.observations[1], batch.observations[0] + 100)
    assert torch.equal(batch.next_observations[1], batch.next_observations[0] + 100)
    assert batch.rewards[1].tolist() == [101, 102, 103]
    assert torch.equal(batch.next_action_valid[1], batch.next_action_valid[0])
    assert batch.next_actions[1, 0].item() == pytest.approx(100.2)


def test_samples_stay_in_their_task_and_reach_every_transition():
    replay = TaskReplay([two_episodes(), shifted(two_episodes(), 100)], RAW, TINY)
    batch = replay.sample_batch(torch.tensor([1, 0, 1]), 200, generator())
    assert [sorted(set(row)) for row in batch.rewards.tolist()] == [[101, 102, 103], [1, 2, 3], [101, 102, 103]]
    counts = torch.bincount(replay.sample_batch(torch.tensor([0]), 30_000, generator()).rewards[0].long())[1:]
    assert (counts / 30_000 - 1 / 3).abs().max() < 0.02


def test_context_rows_and_both_rewards():
    dense = TaskReplay([two_episodes()], RAW, TINY).context_at(torch.tensor([[1]]))
    assert dense[0, 0].tolist() == pytest.approx([11, -4, 0.2, 2])
    settings = with_settings(context_reward="sparse", next_observation_in_context=True)
    sparse = TaskReplay([two_episodes()], RAW, settings)
    assert sparse.context_at(torch.tensor([[1]]))[0, 0].tolist() == pytest.approx([11, -4, 0.2, 0.5, 12, 2])
    assert sparse.batch_at(torch.tensor([[1]])).rewards.item() == 2  # control learns from the dense reward


def test_missing_sparse_reward_says_what_to_do():
    task = dataclasses.replace(two_episodes(), infos={"x_velocity": np.zeros(3, np.float32)})
    with pytest.raises(FocalError, match=r"sparse_reward.*x_velocity.*--set context_reward=dense"):
        TaskReplay([task], RAW, with_settings(context_reward="sparse"))


def test_transform_is_fitted_on_all_tasks_and_applied_everywhere():
    tasks = [two_episodes(), shifted(two_episodes(), -30)]
    data = TrainingData("toy", (0, 1), tasks, 2, 1, absolute_x=0, content_hash="x")
    transform = training_transform(data, TINY)
    assert transform.scale == (21.0, 34.0)  # |21| in the first task, |-4 - 30| in the second
    settings = with_settings(next_observation_in_context=True)
    replay = TaskReplay(tasks, transform, settings)
    steps = torch.tensor([[0, 1, 2]])
    batch, context = replay.batch_at(steps), replay.context_at(steps)
    expected = torch.tensor([[10.0, 1.0], [11.0, -4.0], [20.0, 3.0]]) / torch.tensor([21.0, 34.0])
    assert torch.equal(batch.observations[0], expected)
    assert torch.equal(context[0, :, :2], expected)
    assert torch.equal(context[0, :, 4:], batch.next_observations[0])
    assert torch.equal(transform(torch.tensor([10.0, 1.0])), expected[0])


def test_hide_x_drops_one_column_everywhere():
    data = TrainingData("toy", (0,), [two_episodes()], 2, 1, absolute_x=0, content_hash="x")
    transform = training_transform(data, with_settings(hide_x=True))
    assert (transform.kept, transform.scale, transform.dim) == ((1,), (4.0,), 1)
    replay = TaskReplay(data.tasks, transform, with_settings(hide_x=True))
    assert replay.batch_at(torch.tensor([[1]])).observations.tolist() == [[[-1.0]]]
    assert replay.context_at(torch.tensor([[1]])).shape == (1, 1, 3)
    with pytest.raises(UsageError, match="hide_x=false"):
        training_transform(dataclasses.replace(data, absolute_x=None), with_settings(hide_x=True))


def test_constant_zero_columns_are_not_blown_up_and_none_keeps_numbers():
    rows = np.array([[0.0, 2.0], [0.0, -3.0]], np.float32)
    assert fit_transform([rows], "absmax", False, None).scale == (1.0, 3.0)
    assert fit_transform([rows], "none", False, None).scale == (1.0, 1.0)


def test_root_mean_square_is_over_the_rows_of_all_tasks():
    tasks = [np.array([[0.0, 1.0]], np.float32), np.array([[0.0, -1.0], [0.0, 5.0]], np.float32)]
    assert fit_transform(tasks, "rms", False, None).scale == (1.0, 3.0)  # sqrt((1 + 1 + 25) / 3)


def test_transform_survives_json_exactly():
    transform = fit_transform([np.array([[1 / 3, 0.1]], np.float32)], "absmax", False, None)
    assert ObservationTransform.from_json(transform.to_json()) == transform
    with pytest.raises(FocalError, match="keeps columns"):
        ObservationTransform.from_json({"raw_dim": 2, "kept": [1, 0], "scale": [1, 1]})
    with pytest.raises(FocalError, match="wrong scales"):
        ObservationTransform.from_json({"raw_dim": 2, "kept": [0, 1], "scale": [1, 0]})


def test_meta_batches_hold_different_tasks_and_never_more_than_there_are():
    replay = TaskReplay(walk_data(tasks=4).tasks, RAW, TINY)
    seen = set()
    for seed in range(20):
        tasks = replay.sample_tasks(3, generator(seed)).tolist()
        assert len(set(tasks)) == 3
        seen |= set(tasks)
    assert seen == {0, 1, 2, 3}
    assert sorted(replay.sample_tasks(16, generator()).tolist()) == [0, 1, 2, 3]


def test_meta_batch_holds_what_each_kind_of_step_needs():
    replay = TaskReplay(walk_data(tasks=4).tasks, RAW, TINY)
    settings = with_settings(regularisation__kind="policy", regularisation__discriminator_steps=3)
    encoder = sample_meta_batch(replay, settings, generator(), encoder=True, control=False)
    assert encoder.contexts.shape == (2, 3, 16, 5)
    assert encoder.transitions is None
    assert not torch.equal(encoder.contexts[0], encoder.contexts[1])
    control = sample_meta_batch(replay, settings, generator(), encoder=False, control=True)
    assert control.contexts.shape == (1, 3, 16, 5)
    assert control.transitions is not None
    assert control.transitions.observations.shape == (3, 8, 2)
    assert len(control.discriminator) == 2
    assert not sample_meta_batch(replay, TINY, generator(), encoder=True, control=True).discriminator


def test_everything_drawn_for_a_task_comes_from_that_task():
    data = TrainingData("toy", (0, 1), [two_episodes(), shifted(two_episodes(), 100)], 2, 1, None, "x")
    settings = with_settings(context_size=3, regularisation__kind="policy", regularisation__discriminator_steps=3)
    replay = TaskReplay(data.tasks, RAW, settings)
    of_focal = sample_meta_batch(replay, settings, generator(3), encoder=True, control=True)
    of_rivals = sample_joint_batch(replay, settings, generator(3), 2)
    assert (len(of_focal.contexts), len(of_rivals.contexts)) == (2, 1)
    for batch in (of_focal, of_rivals):
        assert batch.transitions is not None
        assert len(batch.discriminator) == 2
        drawn = [one.rewards for one in (batch.transitions, *batch.discriminator)]
        for rewards in (*batch.contexts[..., 3], *drawn):  # those of task 1 are above 100
            assert torch.equal(rewards > 50, (batch.tasks == 1).unsqueeze(1).expand_as(rewards))
        assert not torch.equal(drawn[0], drawn[1])


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(FocalError, match="expected at least one"):
        TrainingData("toy", (), [], 2, 1, None, "x")
    with pytest.raises(FocalError, match=r"task 5 has .*\(2, 1\), expected \(3, 1\)"):
        TrainingData("toy", (5,), [two_episodes()], 3, 1, None, "x")
    nothing = {name: getattr(two_episodes(), name)[:0] for name in ("rows", "actions", "rewards", "terminated")}
    replay = TaskReplay([two_episodes()], RAW, TINY)
    with pytest.raises(FocalError, match=r"contexts of 4 transitions.*holds only 3; .*--set context_size=3"):
        replay.sample_context(torch.tensor([0]), 4, generator())
    with pytest.raises(FocalError, match=r"observations have 2 columns, this run was trained on 3"):
        TaskReplay([two_episodes()], ObservationTransform(3, (0, 1, 2), (1.0, 1.0, 1.0)), TINY)
    with pytest.raises(FocalError, match="no transition"):
        TaskReplay([dataclasses.replace(two_episodes(), **nothing)], RAW, TINY)
