"""The commands of the README on all six families at smoke scale, with real SAC, and what their data must satisfy."""

import json

import gymnasium
import numpy as np
import pytest
from click.testing import CliRunner

from focal.cli import main
from focal.datasets import open_collection
from focal.envs import FAMILIES, get_family


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def assert_replays_exactly(collection, episodes_per_task=6):
    """Reset to the stored seed, step the stored actions: stored observations and rewards, bit for bit in float32."""
    for entry in collection.tasks:
        env = gymnasium.make(entry.record.env_id, disable_env_checker=True, **entry.record.env_settings)
        episodes = collection.load(entry.index)
        actions = np.split(episodes.actions, np.cumsum(episodes.lengths)[:-1])
        rewards = np.split(episodes.rewards, np.cumsum(episodes.lengths)[:-1])
        observations = np.split(episodes.observations, np.cumsum(episodes.lengths + 1)[:-1])
        for e in np.linspace(0, episodes.num_episodes - 1, episodes_per_task).astype(int):
            observation, _ = env.reset(seed=int(episodes.seeds[e]))
            assert (observation == observations[e][0]).all()
            for t, action in enumerate(actions[e]):
                observation, reward, terminated, truncated, _ = env.step(action)
                assert (observation == observations[e][t + 1]).all(), (entry.index, e, t)
                assert np.float32(reward) == rewards[e][t]
            assert terminated == (episodes.ends[e] == 1)
            assert truncated == (episodes.ends[e] == 2)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_generate_train_test(name, tmp_path):
    family = get_family(name)
    folders = ["--stores", tmp_path / "stores", "--runs", tmp_path / "runs"]
    cli("data", "generate", "--env", family.alias, "--scale", "smoke", *folders[:2])
    path = tmp_path / "stores" / name
    collection = open_collection(path)
    assert_replays_exactly(collection)
    assert "good" in cli("data", "verify", path)
    assert family.name in cli("data", "show", path)
    listed = json.loads(cli("data", "list", *folders[:2], "--json"))
    assert [row["family"] for row in listed] == [name]

    cli("train", "--data", "mixed", "--scale", "smoke", *folders)
    result = json.loads(cli("test", *folders[2:], "--episodes", 2, "--json"))
    seed = result["seeds"]["0"]
    assert seed["tasks"] != []
    assert seed["heldout_context_only"] == (family.fixed_tasks is not None)
    for condition in ("right context", "wrong context", "untrained", "zero action", "expert"):
        returns = np.array(seed["conditions"][condition]["returns"])
        assert returns.shape == (len(seed["tasks"]), 2)
        assert np.isfinite(returns).all()
    (run,) = (tmp_path / "runs").iterdir()
    assert {picture.name for picture in (run / "figures").iterdir()} == {
        f"{name}.{form}" for name in ("return_curve", "embeddings", "data_by_quality") for form in ("png", "svg")
    }
    (saved,) = (run / "tests").iterdir()
    assert json.loads(saved.read_text())["summary"].keys() == result["summary"].keys()
    if family.fixed_tasks is None:
        trained = set(json.loads((run / "settings.json").read_text())["collection"]["task_indices"])
        assert not trained & set(seed["tasks"]), "a test task was trained on"
