"""The fleet engine end to end on the point robot: real SAC at a tiny size, kills, failures, memory."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.datagen import GenerateRequest, Progress, fleet_worker, generate, generate_settings, memory, worker
from focal.datagen.fleet import Fleet
from focal.datagen.learner import read_progress
from focal.datagen.memory import check_memory, fleet_memory
from focal.datasets import is_committed, open_collection, verify_collection
from focal.envs import EnvironmentFailure, get_family
from focal.settings import override, to_dict

from .in_process import Killed, run_here, until_it_survives

TINY = override(
    generate_settings("sparse-point-robot", "smoke"),
    {"engine": "fleet", "fleet.size": 3, "n_train": 4, "n_test": 1, "checkpoints": 3, "sac.total_steps": 70,
     "sac.learning_starts": 30, "sac.batch_size": 8, "sac.hidden_sizes": "8,8"},
)  # fmt: skip
EPISODES = 5 * 4 * 3

stage_one = sys.modules["focal.datagen.generate"]  # the name of the module is also that of its function


class Listener(Progress):
    """Remembers what was reported."""

    def __init__(self):
        self.steps, self.sealed, self.retried = {}, [], {}

    def update(self, task, what, value):
        if what == "steps":
            self.steps[task] = self.steps.get(task, 0) + value
        elif what == "sealed":
            self.sealed.append(task)
        else:
            assert task not in self.retried, "it is tried again once"
            self.retried[task] = value


def request(path, **changes):
    return GenerateRequest("point", path, override(TINY, changes), "smoke", seed=4, workers=1, device="cpu")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(stage_one, "run_jobs", run_here)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Made by worker processes."""
    listener = Listener()
    made = generate(request(tmp_path_factory.mktemp("stores") / "point"), listener)
    assert listener.steps == dict.fromkeys(range(5), 70)
    assert sorted(listener.sealed) == list(range(5))
    return made


def test_a_fleet_makes_the_collection_that_single_agents_make(collection):
    assert verify_collection(collection.path).episodes == EPISODES
    assert not (collection.path / "staging").exists()
    for entry in collection.tasks:
        episodes = collection.load(entry.index)
        steps, counts = np.unique(episodes.sac_steps, return_counts=True)
        assert steps.tolist() == [0, 23, 46, 70]
        assert counts.tolist() == [3, 3, 3, 3]
        assert entry.record.behaviour == {"algorithm": "SAC", "engine": "fleet", **to_dict(TINY.sac)}
        assert entry.record.provenance["fleet"]["number"] == entry.index // 3
        policies = collection.path / "policies" / f"task_{entry.index:04d}"
        assert len(list(policies.glob("step_*.safetensors"))) == 4
    assert collection.settings["fleet"] == {"size": 3, "precision": "fp32"}


def test_a_rerun_in_one_process_gives_the_same_content(collection, tmp_path, here):
    again = generate(request(tmp_path / "again"))
    assert again.content_hash == collection.content_hash


def test_other_fleets_are_other_settings(collection):
    with pytest.raises(FocalError, match="made with other settings"):
        generate(request(collection.path, **{"fleet.size": 2}))


def test_killed_after_any_write_it_continues_to_the_same_content(collection, tmp_path, monkeypatch, here):
    """Die at renames all over the run, then run again: no episode lost, doubled or changed."""
    wanted = request(tmp_path / "point")

    def nothing_half_written_opens():
        assert not is_committed(wanted.path) or verify_collection(wanted.path)

    died = until_it_survives(monkeypatch, lambda: generate(wanted), [1, 5, 3], nothing_half_written_opens)
    assert died > 20
    assert open_collection(wanted.path).content_hash == collection.content_hash
    assert verify_collection(wanted.path).episodes == EPISODES


def poison(monkeypatch, task_goal, chunks, attempts=(0,)):
    """Put a NaN into the actor of one task at the start of the given chunks of its training, in the given attempts."""
    real = Fleet.train_chunk

    def train_chunk(self, steps, on_steps):
        if self.chunk + 1 in chunks and len(self.failures) in attempts:
            for _, group in self.groups:
                for row, task in enumerate(group.envs.tasks):
                    if task == task_goal:
                        group.stack.actor.weights[0][row, 0, 0] = float("nan")
        real(self, steps, on_steps)

    monkeypatch.setattr(Fleet, "train_chunk", train_chunk)


def tasks_of(collection):
    return [entry.record.params for entry in collection.tasks]


def same_episodes(first, second, index):
    a, b = first.load(index), second.load(index)
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("observations", "actions", "rewards"))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_nan_in_one_agent_is_retried_and_listed_and_spoils_no_other(collection, tmp_path, monkeypatch, here, chunk):
    poison(monkeypatch, tasks_of(collection)[1], chunks=[chunk])
    listener = Listener()
    made = generate(request(tmp_path / "point"), listener)
    assert verify_collection(made.path).episodes == EPISODES
    assert list(listener.retried) == [1]
    assert "not finite" in listener.retried[1]
    assert listener.steps == dict.fromkeys(range(5), 70), "steps done twice count once"
    assert [same_episodes(made, collection, index) for index in range(5)] == [True, False, True, True, True]
    assert made.tasks[1].record.provenance["failures"] == [listener.retried[1]]
    before, after = collection.load(1), made.load(1)
    kept = before.sac_steps < (0, 1, 24, 47)[chunk]
    assert kept.any()
    assert np.array_equal(before.select(kept).rewards, after.select(after.sac_steps < (0, 1, 24, 47)[chunk]).rewards)
    assert generate(request(tmp_path / "again")).content_hash == made.content_hash, "the second attempt is seeded too"


def test_an_agent_that_fails_twice_is_listed_and_tried_again_by_the_next_command(
    collection, tmp_path, monkeypatch, here
):
    with monkeypatch.context() as patch:
        poison(patch, tasks_of(collection)[1], chunks=[2], attempts=(0, 1))
        with pytest.raises(FocalError, match=r"1 of 5 tasks failed, first task 1: .*not finite.* kept; run"):
            generate(request(tmp_path / "point"), Listener())
        stores = sorted(path.name for path in (tmp_path / "point" / "tasks").iterdir())
        assert stores == [f"task_{index:04d}.zarr" for index in (0, 2, 3, 4)]
    listener = Listener()
    made = generate(request(tmp_path / "point"), listener)
    assert len(made.tasks[1].record.provenance["failures"]) == 2
    assert listener.sealed == [1]
    assert [same_episodes(made, collection, index) for index in (0, 2, 3, 4)] == [True] * 4


def test_a_whole_fleet_that_fails_is_retried_one_by_one(collection, tmp_path, monkeypatch, here):
    for task in tasks_of(collection)[3:]:
        poison(monkeypatch, task, chunks=[1])
    listener = Listener()
    made = generate(request(tmp_path / "point"), listener)
    assert sorted(listener.retried) == [3, 4]
    assert verify_collection(made.path).episodes == EPISODES
    assert [same_episodes(made, collection, index) for index in range(3)] == [True] * 3


@pytest.mark.parametrize("step", [0, 46, 70])
def test_an_environment_that_fails_at_a_checkpoint(collection, tmp_path, monkeypatch, here, step):
    real, failed = fleet_worker.publish_checkpoint, []

    def failing(task, policy, checkpoint, envs):
        if task.index == 2 and task.checkpoint_step(checkpoint) == step and not failed:
            failed.append(step)
            raise EnvironmentFailure(task.parameters, ArithmeticError("the simulation blew up"))
        real(task, policy, checkpoint, envs)

    monkeypatch.setattr(fleet_worker, "publish_checkpoint", failing)
    listener = Listener()
    made = generate(request(tmp_path / "point"), listener)
    assert "ArithmeticError: the simulation blew up" in listener.retried[2]
    assert verify_collection(made.path).episodes == EPISODES
    assert [same_episodes(made, collection, index) for index in (0, 1, 3, 4)] == [True] * 4


def test_killed_between_a_failure_and_its_second_attempt(collection, tmp_path, monkeypatch, here):
    poison(monkeypatch, tasks_of(collection)[0], chunks=[2])
    expected = generate(request(tmp_path / "straight"))
    real = fleet_worker.single_out

    def killed(*args):
        real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fleet_worker, "single_out", killed)
        with pytest.raises(Killed):
            generate(request(tmp_path / "point"))
    assert generate(request(tmp_path / "point")).content_hash == expected.content_hash


def test_a_task_whose_references_cannot_be_measured_stays_open(collection, tmp_path, monkeypatch, here):
    with monkeypatch.context() as patch:
        real = fleet_worker.seal

        def failing(task, family, notes):
            if task.index == 4:
                raise EnvironmentFailure(task.parameters, ArithmeticError("no"))
            real(task, family, notes)

        patch.setattr(fleet_worker, "seal", failing)
        with pytest.raises(FocalError, match=r"1 of 5 tasks failed, first task 4: while its references were measured"):
            generate(request(tmp_path / "point"))
    patch_training = pytest.MonkeyPatch()
    patch_training.setattr(Fleet, "train_chunk", lambda *args: pytest.fail("it was trained already"))
    assert generate(request(tmp_path / "point")).content_hash == collection.content_hash
    patch_training.undo()


def killed_at_chunk_two(wanted, monkeypatch):
    real = Fleet.save

    def killed(self, folder, left=()):
        real(self, folder, left)
        if self.chunk == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "save", killed)
        with pytest.raises(Killed):
            generate(wanted)


def test_a_damaged_learner_says_what_to_delete_and_loses_no_episode(collection, tmp_path, monkeypatch, here):
    wanted = request(tmp_path / "point")
    killed_at_chunk_two(wanted, monkeypatch)
    folder = wanted.path / "staging" / "learners" / "fleet_0000"
    learner = folder / "learner.safetensors"
    assert read_progress(folder)["chunk"] == 2
    learner.write_bytes(learner.read_bytes()[:-500])
    with pytest.raises(FocalError, match=rf"damaged .*type rm -r {folder}, then run the same command again"):
        generate(wanted)
    shutil.rmtree(folder)
    assert generate(wanted).content_hash == collection.content_hash


def test_a_damaged_learner_of_a_task_that_left_its_fleet(collection, tmp_path, monkeypatch, here):
    """What the fleet went on computing in the slot that the task left is never taken for an agent."""
    poison(monkeypatch, tasks_of(collection)[1], chunks=[2])
    expected = generate(request(tmp_path / "straight"))
    wanted = request(tmp_path / "point")
    killed_at_chunk_two(wanted, monkeypatch)
    for name in ("task_0001", "fleet_0000"):
        folder = wanted.path / "staging" / "learners" / name
        if name == "task_0001":
            (folder / "learner.safetensors").write_bytes(b"cut")
        with pytest.raises(FocalError, match=rf"{folder} .*type rm -r {folder}, then run the same command again"):
            generate(wanted)
        shutil.rmtree(folder)
    assert generate(wanted).content_hash == expected.content_hash


@pytest.mark.parametrize("engine", ["fleet", "sb3"])
def test_segments_deleted_because_they_were_damaged_are_made_again(collection, tmp_path, monkeypatch, here, engine):
    wanted, where = request(tmp_path / "point", engine=engine), fleet_worker if engine == "fleet" else worker
    expected = collection if engine == "fleet" else generate(request(tmp_path / "straight", engine=engine))

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, "seal", killed)
        with pytest.raises(Killed):
            generate(wanted)
    for step in (23, 70):
        segment = wanted.path / "staging" / "task_0000" / f"ckpt_{step:09d}.npz"
        segment.write_bytes(segment.read_bytes()[:-100])
        with pytest.raises(FocalError, match=rf"{segment} is damaged .* delete it and run the same command again"):
            generate(wanted)
        segment.unlink()
    assert generate(wanted).content_hash == expected.content_hash


@pytest.mark.parametrize("name", ["policies", "staging/learners", "staging/task_0001", "tasks"])
def test_a_store_that_cannot_be_written_is_named(collection, tmp_path, monkeypatch, here, name):
    """A file is in the way of a folder (root may write anywhere, so permissions would prove nothing here)."""
    wanted, real = request(tmp_path / "point"), stage_one.begin_collection
    obstacle = wanted.path / name

    def begin(*arguments):
        real(*arguments)
        obstacle.write_text("in the way")

    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "begin_collection", begin)
        with pytest.raises(FocalError, match=rf"cannot write {obstacle}.*: .*; make the folder writable and run the"):
            generate(wanted)
    obstacle.unlink()
    assert generate(wanted).content_hash == collection.content_hash


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 420 * 2**20)
    wanted = request(tmp_path / "point", **{"sac.total_steps": 2_000_000})
    said = r"need .* GiB of memory, and 0.4 GiB are free; start anew with --workers 1 --set fleet.size=1"
    with pytest.raises(FocalError, match=said):
        generate(wanted)
    assert not wanted.path.exists()


def test_the_limit_of_an_outer_control_group_counts(tmp_path, monkeypatch):
    """As Slurm sets it: for a job, whose tasks have groups of their own without a limit."""
    task = tmp_path / "job_7" / "step_0" / "task_0"
    task.mkdir(parents=True)
    for group, limit, used in ((task.parents[1], 3 * 2**20, 2**20), (task.parent, "max", 2**20), (task, "max", 2**19)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 900\ninactive_file 1000\n")
    (tmp_path / "own").write_text("0::/job_7/step_0/task_0\n")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.free_memory("cpu") == 2 * 2**20 + 1000
    (task / "memory.max").write_text(f"{2**20}\n")
    assert memory.free_memory("cpu") == 2**19 + 1000


def test_the_advice_of_a_refusal_would_fit():
    family, settings = get_family("cheetah-vel"), generate_settings("half-cheetah-vel", "paper")
    one = fleet_memory(family, 10, settings)
    assert one.replay == 10 * 600_000 * 48 * 4
    gib = 2**30
    check_memory(family, [10] * 4, settings, 2, "cpu", free=4 * gib)
    with pytest.raises(FocalError, match=r"4 fleet\(s\) .* 10 agents with 1.1 GiB .*; use --workers 2$"):
        check_memory(family, [10] * 4, settings, 4, "cpu", free=4 * gib)
    with pytest.raises(FocalError, match=r"--workers 1 --set fleet.size=(\d+)$") as refused:
        check_memory(family, [100], settings, 1, "cpu", free=4 * gib)
    size = int(str(refused.value).rpartition("=")[2])
    check_memory(family, [size], settings, 1, "cpu", free=4 * gib)
    with pytest.raises(FocalError):
        check_memory(family, [size + 1], settings, 1, "cpu", free=4 * gib)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_covers_what_a_fleet_allocates(precision):
    family = get_family("cheetah-vel")
    settings = override(generate_settings(family.name, "laptop"), {"fleet.precision": precision})
    fleet = Fleet(family, family.sample_tasks().parameters[:6], settings.sac, [lambda c, a: c] * 6, precision=precision)
    seen, total = set(), 0

    def count(value):
        nonlocal total
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                count(item)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("focal.datagen"):
            for item in vars(value).values():
                count(item)

    count(fleet)
    copied = sum(tensor.nbytes for tensor in fleet.tensors().values())
    assert total + copied < fleet_memory(family, 6, settings).total < 1.5 * (total + copied)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fleet.size": 0}, "fleet.size=0, expected at least 1"),
        ({"fleet.precision": "fp8"}, "fleet.precision='fp8'; did you mean 'fp32'"),
        ({"engine": "fleets"}, "did you mean 'fleet'"),
    ],
)
def test_settings_out_of_range(changes, said):
    with pytest.raises(UsageError, match=said):
        override(TINY, changes)


def test_devices_that_are_not_there(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU here; use --device cpu"):
            generate(dataclasses.replace(request(tmp_path / "x"), device="cuda"))
    with pytest.raises(UsageError, match="--device cuda needs --engine fleet"):
        generate(dataclasses.replace(request(tmp_path / "x", engine="sb3"), device="cuda"))
    assert not (tmp_path / "x").exists()
