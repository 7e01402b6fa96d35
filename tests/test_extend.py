"""Adding a family and a method from outside: what is refused, and that the examples keep their contracts."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from focal import UsageError, cluster, extend
from focal.datagen import generate_settings
from focal.envs import FAMILIES, EnvironmentFailure, get_family, make_batch, rollout
from focal.settings import SCALES
from focal.trainer import settings as stage_two
from focal.trainer.methods import METHODS, train_settings

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(scope="module")
def examples():
    """Both examples loaded as a script's module is, and taken away again."""
    before = dict(FAMILIES), dict(METHODS)
    loaded = {}
    for path in sorted(EXAMPLES.glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loaded[path.stem] = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[path.stem])
    yield loaded
    for table, kept in zip((FAMILIES, METHODS), before, strict=True):
        table.clear()
        table.update(kept)
    gymnasium.registry.pop("mine/RotatedRobot-v0")
    cluster.SCRIPT = None


def test_examples_are_short(examples):
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"rotated_robot.py", "context_clone.py"}
    assert all(len(path.read_text().splitlines()) < 100 for path in EXAMPLES.glob("*.py"))


def test_a_family_is_found_drawn_and_has_settings_at_every_scale(examples):
    family = get_family("rotated")
    assert len(family.sample_tasks(seed=3).parameters) == 25
    assert generate_settings(family.name, "laptop").sac.total_steps == 3_000
    assert generate_settings(family.name, "smoke").sac.total_steps == 300
    assert generate_settings(family.name, "laptop").sac.discount == 0.9, "the family's, for both stages"
    assert train_settings(family.name, "laptop").latent_dim == 5
    assert train_settings(family.name, "laptop").discount == 0.9
    assert train_settings(family.name, "smoke", "context-clone").steps == 60


def test_mbml_relabels_next_observations_where_transitions_vary(examples):
    for scale in SCALES:
        assert train_settings("rotated-point-robot", scale, "mbml").transitions_vary
        assert not hasattr(train_settings("rotated-point-robot", scale), "transitions_vary")


def test_a_setting_that_no_method_has_is_refused(examples):
    family = replace(FAMILIES["rotated-point-robot"], name="other", alias="other", env_id="Other-v0")
    with pytest.raises(UsageError, match=r"'latent_dimm'.*did you mean 'latent_dim'"):
        extend.add_family(family, object, train={"latent_dimm": 7})
    assert "other" not in FAMILIES


def test_stage_one_takes_the_discount_it_is_given(examples, monkeypatch):
    given = {}
    monkeypatch.setattr(extend.stage_one, "add_family", lambda name, changes: given.update(changes))
    monkeypatch.setattr(extend.stage_two, "add_family", lambda name, changes: None)
    monkeypatch.setattr(extend.gymnasium, "register", lambda *args, **kwargs: None)
    mine = replace(get_family("rotated"), name="a", alias="b", env_id="mine/C-v0")
    extend.add_family(mine, object, generate={"sac": {"discount": 0.5, "total_steps": 9}, "n_test": 2})
    assert given == {"n_train": 20, "n_test": 2, "sac": {"discount": 0.5, "total_steps": 9}}


def test_its_batch_gives_the_single_environments_episodes(examples):
    family, rng = get_family("rotated"), np.random.default_rng(0)
    tasks = family.sample_tasks(seed=1).parameters[:3]
    actions = rng.uniform(-1, 1, (family.horizon, 3, 2)).astype(np.float32)
    steps = iter(actions)
    envs = make_batch(family, tasks)
    rollouts = rollout(envs, lambda observations: next(steps), [5, 6, 7])
    envs.close()
    assert rollouts.lengths.tolist() == [20, 20, 20]
    assert not rollouts.terminated.any()
    for m, task in enumerate(tasks):
        env = gymnasium.make(family.env_id, task=task, disable_env_checker=True)
        observation, _ = env.reset(seed=5 + m)
        assert (rollouts.observations[m, 0] == observation).all()
        for t in range(family.horizon):
            observation, reward, _, truncated, _ = env.step(actions[t, m])
            assert (rollouts.observations[m, t + 1] == observation).all()
            assert rollouts.rewards[m, t] == reward
        assert truncated


def test_its_expert_test_knows_the_straight_line(examples):
    family = get_family("rotated")
    task = {"angle": 1.0}
    envs = make_batch(family, [task])
    turn = np.array([[np.cos(-1.0), -np.sin(-1.0)], [np.sin(-1.0), np.cos(-1.0)]])

    def straight(observations):
        way = np.clip((np.array([1.0, 0.0]) - observations[0]) / 0.1, -1, 1)
        return (turn @ way)[None].astype(np.float32)

    assert family.passes_expert_test(rollout(envs, straight, [0]), task).reached
    idle = family.passes_expert_test(rollout(envs, lambda obs: np.zeros((1, 2), np.float32), [0]), task)
    assert not idle.reached
    assert idle.measured.startswith("0.00 of the way")


@pytest.mark.parametrize(
    ("value", "found"), [("1.5", "'1.5'"), (None, "'None'"), (np.zeros(2), r"'\[0\. 0\.\]'")], ids=str
)
def test_info_is_one_number_a_step(examples, monkeypatch, value, found):
    family = get_family("rotated")
    step = examples["rotated_robot"].RotatedRobotEnv.step
    given = {"speed": np.float32(1.5), "hit": True, "strange": value}
    monkeypatch.setattr(examples["rotated_robot"].RotatedRobotEnv, "step", lambda *args: (*step(*args)[:4], given))
    envs = make_batch(family, [{"angle": 0.0}])

    def idle(observations):
        return np.zeros((1, 2), np.float32)

    with pytest.raises(
        EnvironmentFailure, match=rf"info\['strange'\] is {found}, expected one number a step; leave it out"
    ):
        rollout(envs, idle, [0])
    del given["strange"]
    infos = rollout(make_batch(family, [{"angle": 0.0}]), idle, [0]).infos
    assert {name: set(values.ravel()) for name, values in infos.items()} == {"speed": {1.5}, "hit": {1.0}}


def test_nodes_of_a_cluster_run_the_script_that_added_a_family(tmp_path):
    """In a process that imported nothing of it, as Ray's are; twice, since they do one job after the other."""
    script = EXAMPLES / "rotated_robot.py"
    program = f"""
import sys
from pathlib import Path
from focal import cluster
from focal.envs import get_family
place = cluster._Place({{}}, cluster.__version__, Path({str(script)!r}))
place.import_script()
place.import_script()
print(get_family("rotated").name)
cluster._Place({{}}, cluster.__version__).import_script()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.split() == ["rotated-point-robot"]
    asked = f"import runpy, sys; sys.argv = ['x', 'envs']; runpy.run_path({str(script)!r}, run_name='kept')"
    asked += "; from focal import cluster; print(cluster.SCRIPT)"
    (tmp_path / "mine.py").write_text(asked.replace("; ", "\n"))
    found = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.split() == [str(tmp_path / "mine.py")]


def test_names_cannot_be_taken_twice(examples):
    family = get_family("point")
    with pytest.raises(UsageError, match=r"is a family already; choose another name"):
        extend.add_family(family, object)
    with pytest.raises(UsageError, match=r"focal is a method already; choose another name"):
        extend.add_method("focal", METHODS["focal"])
    assert FAMILIES["sparse-point-robot"] is family
    assert stage_two.family_table("sparse-point-robot", "paper")["discount"] == 0.9
