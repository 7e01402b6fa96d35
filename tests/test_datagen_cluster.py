"""Stage one on a Ray cluster: two real nodes on the loopback, one of which dies half-way."""

import dataclasses
import sys

import numpy as np
import pytest

from focal import FocalError
from focal.datagen import GenerateRequest, Progress, generate, generate_settings
from focal.datagen.cluster import _is_seen_whole, _Watch
from focal.datagen.learner import save_learner
from focal.datagen.worker import TaskJob
from focal.datasets import verify_collection
from focal.envs import get_family
from focal.settings import override

TINY = override(
    generate_settings("sparse-point-robot", "smoke"),
    {"engine": "fleet", "fleet.size": 2, "n_train": 5, "n_test": 1, "checkpoints": 6, "sac.total_steps": 420,
     "sac.learning_starts": 30, "sac.batch_size": 32, "sac.hidden_sizes": "32,32"},
)  # fmt: skip
# long enough that the first node is still at its first fleet when the second one has started its process
LONGER = override(TINY, {"checkpoints": 20, "sac.total_steps": 6_000})


def request(path, settings=TINY, **changes):
    settings = dataclasses.replace(settings, **changes)
    return GenerateRequest("point", path, settings, "smoke", seed=4, workers=1, device="cpu")


class Killer(Progress):
    """Kills a node when two fleets are between two checkpoints: one on each node, since a node has one core."""

    def __init__(self, kill):
        self.kill, self.killed_at = kill, None
        self.steps, self.sealed = {}, []

    def update(self, task, what, value):
        if what == "sealed":
            self.sealed.append(task)
        if what == "steps":
            self.steps[task] = self.steps.get(task, 0) + value
        busy = {task // 2 for task, steps in self.steps.items() if 0 < steps < LONGER.sac.total_steps}
        if self.killed_at is None and len(busy) == 2:
            self.killed_at = dict(self.steps)
            self.kill()


@pytest.mark.slow
def test_a_node_that_dies_half_way_costs_nothing(tmp_path, two_nodes):
    nodes, second = two_nodes
    one_machine = generate(request(tmp_path / "one", LONGER))
    killer = Killer(lambda: nodes.remove_node(second, allow_graceful=False))
    wanted = dataclasses.replace(request(tmp_path / "two", LONGER), ray=nodes.address)
    made = generate(wanted, killer)
    assert killer.killed_at is not None, "the node must have died while both were at work"
    assert sorted(killer.sealed) == list(range(6))
    assert verify_collection(made.path).episodes == 6 * 21 * 3
    assert made.content_hash == one_machine.content_hash
    for entry in one_machine.tasks:
        expected, found = one_machine.load(entry.index), made.load(entry.index)
        for field in dataclasses.fields(expected):
            value = getattr(expected, field.name)
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, getattr(found, field.name)), (entry.index, field.name)
        assert made.tasks[entry.index].content == entry.content


def test_a_learner_that_cannot_be_read_ends_no_watch(tmp_path):
    """It may be half deleted, when its task has just been sealed on another machine."""
    family = get_family("point")
    parameters = family.sample_tasks(seed=4).parameters
    tasks = [TaskJob(tmp_path, family.name, index, "train", parameters[index], TINY, 4, {}) for index in (0, 1)]
    tasks[0].learner_folder.mkdir(parents=True)
    (tasks[0].learner_folder / "learner.safetensors").write_bytes(b"cut")
    reports = []
    watch = _Watch(tasks, lambda *values: reports.append(values))
    for failures in (1, 1, 2):
        save_learner(tasks[1].learner_folder, {}, {"failures": ["its actions were not finite"] * failures})
        watch.look()
    assert reports == [(1, "retried", "its actions were not finite")]


def test_a_task_is_not_committed_before_this_machine_lists_all_its_policies(tmp_path):
    """A network file system may go on showing an old list of names for a minute."""
    made = generate(request(tmp_path / "point", n_train=1, checkpoints=2))
    family = get_family("point")
    task = TaskJob(made.path, family.name, 0, "train", {}, dataclasses.replace(TINY, checkpoints=2), 4, {})
    assert _is_seen_whole(task)
    last = task.policy_path(420).with_suffix(".json")
    last.rename(tmp_path / "not seen yet")
    assert not _is_seen_whole(task)


def test_an_address_where_nothing_answers(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(FocalError, match=r"no Ray cluster at '127.0.0.1:9' .*; start one with `ray start --head`"):
        generate(dataclasses.replace(request(tmp_path / "x"), ray="127.0.0.1:9"))


def test_without_ray_everything_else_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(
        FocalError,
        match=r"--ray needs Ray; install it in the checkout: pip install -c constraints.txt -e '.\[cluster\]'",
    ):
        generate(dataclasses.replace(request(tmp_path / "x"), ray="auto"))
    tiny = {"n_train": 1, "n_test": 1, "checkpoints": 1, "sac": dataclasses.replace(TINY.sac, total_steps=40)}
    assert verify_collection(generate(request(tmp_path / "y", **tiny)).path).episodes == 2 * 2 * 3
