"""The SAC agent of stage one: stopped and continued bit for bit, and its actor as the project's own network."""

import numpy as np
import pytest
import torch

from focal.datagen.agent import SacAgent
from focal.datagen.settings import SacSettings
from focal.envs import get_family

SETTINGS = SacSettings(total_steps=90, hidden_sizes=(16, 16), batch_size=16, learning_starts=20)
TASK = {"goal": [0.6, 0.8]}


def new_agent():
    return SacAgent(get_family("point"), TASK, SETTINGS, lambda chunk: 1000 + chunk)


def state(agent):
    replay = agent._replay()
    names = ("observations", "actions", "rewards")
    rows = {name: torch.from_numpy(getattr(replay, name)[: agent.steps].copy()) for name in names}
    return agent._tensors() | rows


def test_a_restored_agent_continues_bit_for_bit(tmp_path):
    straight = new_agent()
    for _ in range(3):
        straight.train_chunk(30, lambda steps: None)
    first = new_agent()
    first.save(tmp_path)
    first.train_chunk(30, lambda steps: None)
    first.save(tmp_path)
    first.train_chunk(30, lambda steps: None)  # killed here: this chunk was never saved
    second = new_agent()
    assert second.restore(tmp_path)
    assert (second.chunk, second.steps) == (1, 30)
    for _ in range(2):
        second.train_chunk(30, lambda steps: None)
        second.save(tmp_path)
    third = new_agent()
    assert third.restore(tmp_path)
    assert straight.model._n_updates == second.model._n_updates == third.model._n_updates == 70
    for agent in (second, third):
        found, expected = state(agent), state(straight)
        assert sorted(found) == sorted(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert any(name.startswith("adam.temperature") for name in expected)


def test_nothing_to_restore(tmp_path):
    assert not new_agent().restore(tmp_path)


def test_progress_adds_up():
    steps = []
    agent = new_agent()
    agent.train_chunk(70, steps.append)
    agent.train_chunk(20, steps.append)
    assert sum(steps) == agent.steps == 90


def test_the_exported_policy_is_the_sb3_actor():
    agent = new_agent()
    agent.train_chunk(60, lambda steps: None)
    observations = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    expected, _ = agent.model.predict(observations, deterministic=True)
    with torch.no_grad():
        found = agent.policy().mode(torch.from_numpy(observations)).numpy()
    assert found == pytest.approx(expected, abs=1e-6)
    inputs = torch.from_numpy(observations)
    mean, log_std, _ = agent.model.actor.get_action_dist_params(inputs)
    ours = agent.policy()(inputs)
    assert torch.allclose(ours[0], mean)
    assert torch.allclose(ours[1], log_std)


def test_time_limits_are_bootstrapped_in_the_replay():
    agent = new_agent()
    agent.train_chunk(60, lambda steps: None)
    replay = agent._replay()
    # horizon 20: steps 20, 40 and 60 end an episode, all of them by the time limit
    assert np.flatnonzero(replay.dones[:60, 0]).tolist() == [19, 39, 59]
    assert np.flatnonzero(replay.timeouts[:60, 0]).tolist() == [19, 39, 59]
