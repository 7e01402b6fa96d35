"""Training on a Ray cluster: two real nodes on the loopback, one of which dies half-way; and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from focal import FocalError, cluster
from focal.cli import main
from focal.comparison import CompareRequest, compare
from focal.experiment import TrainProgress, TrainRequest
from focal.files import locked

# long enough that both nodes are seen at work between two checkpoints of a seed each
STEPS, EVERY, ALGOS = 1500, 250, ("focal", "mbml")
LONGER = (
    "focal:encoder_steps=100", f"focal:steps={STEPS - 100}", f"mbml:steps={STEPS}", f"checkpoint_every={EVERY}",
    "mbml:teachers.steps=40", "mbml:teachers.rewards.steps=40",
)  # fmt: skip


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "stores"
    cli("data", "generate", "--env", "point", "--scale", "smoke", "--stores", path)
    return path


class Killer(TrainProgress):
    """Kills a node when two seeds are between two checkpoints: one on each node, since a node has one core."""

    def __init__(self, kill):
        self.kill, self.steps, self.begun = kill, {}, {}
        self.busy, self.later = None, {}  # seeds at the kill, and the steps that they reported afterwards

    def begin(self, folder, seeds, steps):
        self.begun[folder.name] = seeds

    def update(self, folder, seed, step, metrics):
        self.steps[folder.name, seed] = step
        if self.busy is not None:
            self.later.setdefault((folder.name, seed), []).append(step)
            return
        busy = {key for key, at in self.steps.items() if EVERY < at < STEPS - EVERY}
        if len(busy) == 2:
            self.busy = busy
            self.kill()


def compared(stores, runs, progress=None, ray=None):
    train = TrainRequest(
        stores / "sparse-point-robot", "mixed", None, (0, 1), LONGER, runs, workers=2, device="cpu", ray=ray
    )
    return compare(CompareRequest(train, ALGOS, stores, episodes=2), progress)


def networks(runs: Path) -> dict[str, bytes]:
    """The last state of all that was trained: every network, moment and random state."""
    found = sorted(runs.rglob("checkpoints/step_*/state.safetensors"))
    return {str(path.relative_to(runs)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_a_node_that_dies_half_way_changes_no_network(stores, tmp_path, two_nodes):
    nodes, second = two_nodes
    one_machine = compared(stores, tmp_path / "one")
    killer = Killer(lambda: nodes.remove_node(second, allow_graceful=False))
    found = compared(stores, tmp_path / "two", killer, nodes.address)
    assert killer.busy is not None, "the node must have died while both were at work"
    assert all(killer.steps[f"point-mixed-smoke-{algo}", seed] == STEPS for algo in ALGOS for seed in (0, 1))
    assert all(min(killer.later[key]) > EVERY for key in killer.busy), "a seed goes on at its last checkpoint"
    assert networks(tmp_path / "two") == networks(tmp_path / "one")
    assert len(networks(tmp_path / "two")) == 2 * (2 * 2) + 1  # two checkpoints of every seed, one of the first stage
    returns = [{row.algo: row.scores.tolist() for row in each.rows} for each in (one_machine, found)]
    assert returns[0] == returns[1]
    assert not list((tmp_path / "two").glob(".ray-*"))


def test_without_ray_the_error_names_the_extra_and_nothing_is_begun(stores, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    folders = ["--stores", stores, "--runs", tmp_path / "runs", "--ray", "auto"]
    install = "--ray needs Ray; install it in the checkout: pip install -c constraints.txt -e '.[cluster]'"
    assert install in cli("compare", "--data", "mixed", "--algos", "focal", *folders, code=1)
    assert install in cli("ablate", "--data", "mixed", "--rows", "base", "--seeds", 1, *folders, code=1)
    assert not list((tmp_path / "runs").iterdir())


def test_an_address_where_nothing_answers(stores, tmp_path):
    pytest.importorskip("ray")
    command = ["compare", "--data", "mixed", "--algos", "focal", "--stores", stores, "--runs", tmp_path / "runs"]
    line = cli(*command, "--ray", "127.0.0.1:9", code=1)
    assert "no Ray cluster at '127.0.0.1:9'" in line
    assert "start one with `ray start --head`" in line


def test_what_is_trained_needs_no_cluster(stores, tmp_path, monkeypatch):
    def run_here(work, jobs, workers, on_report, how_to_continue):
        for job in jobs.values():
            work(job, on_report)
        return {}

    monkeypatch.setattr("focal.experiment.run_jobs", run_here)
    command = ["compare", "--data", "mixed", "--algos", "focal", "--seeds", 1, "--episodes", 2, "--json"]
    command += ["--stores", stores, "--runs", tmp_path / "runs"]
    first = json.loads(cli(*command))
    monkeypatch.setitem(sys.modules, "ray", None)
    again = json.loads(cli(*command, "--ray", "auto"))
    assert again["methods"][0]["scores"] == first["methods"][0]["scores"]


def test_a_node_with_other_software_or_storage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.0)
    path = tmp_path / "runs" / "witness"
    path.parent.mkdir()
    path.write_text("here")
    place = cluster._Place({path: cluster._content_hash(path)}, cluster.__version__)
    place.refuse_unfit_node()
    path.write_text("elsewhere")
    for change in (lambda: None, path.unlink):
        change()
        with pytest.raises(
            cluster.UnfitNodeError, match=r"node \S+ does not see \S+/runs as this machine does; choose"
        ):
            place.refuse_unfit_node()
    with pytest.raises(cluster.UnfitNodeError, match=r"this command is focal 0\.0; install the same on all nodes"):
        cluster._Place({}, "0.0").refuse_unfit_node()


def test_a_lock_is_waited_for_as_long_as_patience_lasts(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, 0.0, "held"):
        for patience in (0.0, 0.3):
            with pytest.raises(FocalError, match="held"), locked(path, patience, "held"):
                pass
    with locked(path, 0.0, "held"):
        pass
