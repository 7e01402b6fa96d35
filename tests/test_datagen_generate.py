"""Stage one end to end on the point robot, with real SAC at a tiny size."""

import dataclasses
import re
import shutil
import sys

import numpy as np
import pytest

from focal import FocalError, UsageError, commands
from focal.datagen import GenerateRequest, generate, generate_settings
from focal.datagen.generate import _content
from focal.datagen.worker import best_checkpoint, run_task
from focal.datasets import begin_collection, is_committed, open_collection, verify_collection
from focal.envs import get_family
from focal.settings import override, to_dict

from .in_process import Killed, run_here, until_it_survives

TINY = override(
    generate_settings("sparse-point-robot", "smoke"),
    {"engine": "sb3", "n_train": 2, "n_test": 1, "checkpoints": 3, "sac.total_steps": 70, "sac.learning_starts": 30,
     "sac.batch_size": 8, "sac.hidden_sizes": "8,8"},
)  # fmt: skip


def request(path, **changes):
    return GenerateRequest("sparse-point-robot", path, dataclasses.replace(TINY, **changes), "smoke", seed=4, workers=1)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return generate(request(tmp_path_factory.mktemp("stores") / "point"))


def test_every_checkpoint_is_rolled_out_and_every_return_kept(collection):
    assert [entry.split for entry in collection.tasks].count("train") == 2
    for entry in collection.tasks:
        episodes = collection.load(entry.index)
        steps, counts = np.unique(episodes.sac_steps, return_counts=True)
        assert steps.tolist() == [0, 23, 46, 70], "the untrained policy, then even steps up to the last"
        assert counts.tolist() == [3, 3, 3, 3]
        sac_steps, returns = collection.load_evaluation(entry.index)
        assert sac_steps.tolist() == [0, 23, 46, 70]
        assert np.sort(returns.ravel()).tolist() == np.sort(episodes.returns).tolist()
        assert entry.record.behaviour == {"algorithm": "SAC", "engine": "sb3", **to_dict(TINY.sac)}


def test_rewards_follow_from_the_stored_positions(collection):
    for entry in collection.tasks:
        data = collection.load(entry.index).transitions()
        gap = np.linalg.norm(data.observations[data.rows + 1].astype(float) - entry.record.params["goal"], axis=1)
        assert data.rewards == pytest.approx(-gap, abs=1e-6)
        inside = gap < 0.2 - 1e-6
        assert data.infos["sparse_reward"][inside] == pytest.approx(1 - gap[inside], abs=1e-6)
        assert (data.infos["sparse_reward"][gap > 0.2 + 1e-6] == 0).all()


def test_all_episodes_have_their_own_seeds(collection):
    seeds = [seed for entry in collection.tasks for seed in collection.load(entry.index).seeds.tolist()]
    assert len(set(seeds)) == len(seeds) == 36


def test_the_same_seed_gives_the_same_content_and_a_second_call_does_nothing(collection, tmp_path):
    again = generate(request(tmp_path / "again"))
    assert again.content_hash == collection.content_hash
    before = (collection.path / "dataset.json").stat().st_mtime_ns
    assert generate(request(collection.path)).content_hash == collection.content_hash
    assert (collection.path / "dataset.json").stat().st_mtime_ns == before


def test_other_settings_never_mix_into_a_collection(collection, tmp_path):
    was = collection.settings["fresh_episodes"]
    with pytest.raises(FocalError, match=f"fresh_episodes is {was} there and 4 here; choose another folder"):
        generate(request(collection.path, fresh_episodes=4))
    other = dataclasses.replace(request(collection.path), seed=collection.header.seed + 1)
    with pytest.raises(FocalError, match=f"seed is {collection.header.seed} there and {other.seed} here"):
        generate(other)


def test_a_collection_of_before_the_untrained_policy_had_a_cut_of_its_own(collection, tmp_path):
    rule = {name: value for name, value in collection.settings["quality"].items() if name != "first_random_below"}
    old = dataclasses.replace(collection.header, settings={**collection.settings, "quality": rule})
    as_then = {**collection.settings, "quality": {**rule, "first_random_below": rule["random_below"]}}
    assert _content(old) == _content(dataclasses.replace(old, settings=as_then)) != _content(collection.header)
    begin_collection(tmp_path / "x", old)
    begin_collection(tmp_path / "x", dataclasses.replace(old, settings=as_then))
    with pytest.raises(FocalError, match=r"quality\.first_random_below is 0\.1 there and 0\.35 here"):
        begin_collection(tmp_path / "x", collection.header)
    command = commands.generate_command(dataclasses.replace(collection, header=old))
    assert "--set quality.first_random_below=0.1" in command
    assert "first_random_below" not in commands.generate_command(collection)


def test_the_behaviour_policies_are_kept_and_reproduce_their_episodes(collection):
    from focal.datagen.worker import ROLLOUT_STREAM, TaskJob, as_policy, to_episodes
    from focal.envs import make_batch, rollout
    from focal.trainer.policies import load_policy_file

    entry = collection.tasks[1]
    job = TaskJob(collection.path, "sparse-point-robot", 1, entry.split, entry.record.params, TINY, 4, {})
    policy, meta = load_policy_file(job.policy_path(46))
    assert meta["sac_step"] == 46
    noise, *seeds = job.seed_of(ROLLOUT_STREAM, 2, 4)
    envs = make_batch(get_family("point"), [entry.record.params] * 3, threads=1)
    episodes = to_episodes(rollout(envs, as_policy(policy, False, noise), seeds), seeds, 46)
    stored = collection.load(1)
    stored = stored.select(stored.sac_steps == 46)
    assert (stored.observations == episodes.observations).all()
    assert (stored.actions == episodes.actions).all()
    assert stored.seeds.tolist() == seeds


def test_killed_after_any_write_it_continues_to_the_same_content(collection, tmp_path, monkeypatch):
    """Die at every single rename in turn, in one process, then run again: no episode lost, doubled or changed."""

    stage_one = sys.modules["focal.datagen.generate"]  # the name of the module is also that of its function

    monkeypatch.setattr(stage_one, "run_jobs", run_here)
    wanted = request(tmp_path / "point")

    def nothing_half_written_opens():
        assert not is_committed(wanted.path) or verify_collection(wanted.path)

    # every run gets a few renames further, and dies at different ones
    died = until_it_survives(monkeypatch, lambda: generate(wanted), [1, 3, 2], nothing_half_written_opens)
    assert died > 15
    assert open_collection(wanted.path).content_hash == collection.content_hash
    assert verify_collection(wanted.path).episodes == 36


def test_one_failing_task_spoils_no_other(tmp_path, monkeypatch):
    stage_one = sys.modules["focal.datagen.generate"]  # the name of the module is also that of its function

    def in_process(work, jobs, workers, on_report, how_to_continue):
        failures = {}
        for key, job in jobs.items():
            try:
                if key == 1:
                    raise ArithmeticError("the simulation blew up")
                work(job, on_report)
            except ArithmeticError as error:
                failures[key] = error
        return failures

    monkeypatch.setattr(stage_one, "run_jobs", in_process)
    with pytest.raises(FocalError, match=r"1 of 3 tasks failed, first task 1: ArithmeticError.*run the same command"):
        generate(request(tmp_path / "point"))
    monkeypatch.undo()
    assert verify_collection(generate(request(tmp_path / "point")).path).episodes == 36


def test_a_task_held_by_another_process_is_refused(tmp_path):
    import fcntl

    from focal.datagen import worker
    from focal.datagen.worker import TaskJob

    family = get_family("point")
    task = family.sample_tasks(2, 1, seed=4).parameters[0]
    job = TaskJob(tmp_path, family.name, 0, "train", task, TINY, 4, {})
    path = tmp_path / "staging" / "locks" / "task_0000"
    path.parent.mkdir(parents=True)
    with open(path, "w") as file, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(file, fcntl.LOCK_EX)
        patch.setattr(worker, "LOCK_PATIENCE", 0.3)
        with pytest.raises(FocalError, match="being generated by another process; wait for it"):
            run_task(job, lambda *values: None)


def test_best_checkpoint_is_the_one_with_the_highest_mean(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from focal.datagen import worker

    returns = {0: [-20.0, -21.0], 30: [-5.0, -9.0], 60: [-6.0, -7.0]}
    monkeypatch.setattr(worker, "list_segments", lambda *args: list(returns))
    monkeypatch.setattr(worker, "read_segment", lambda c, i, step: SimpleNamespace(returns=np.array(returns[step])))
    assert best_checkpoint(SimpleNamespace(collection=tmp_path, index=0)) == 60


def test_a_damaged_learner_file_says_what_to_delete_and_loses_no_episode(collection, tmp_path, monkeypatch):
    wanted = request(tmp_path / "point")
    stage_one = sys.modules["focal.datagen.generate"]
    real = stage_one.run_jobs

    def cut_short(work, jobs, workers, on_report, how_to_continue):
        from focal.datagen import worker

        saved = []

        def report(task, what, amount):
            if len(saved) > 2:
                raise Killed
            saved.append(what)

        with pytest.raises(Killed):
            worker.run_task(jobs[0], report)
        return {0: FocalError("killed")}

    monkeypatch.setattr(stage_one, "run_jobs", cut_short)
    with pytest.raises(FocalError, match="killed"):
        generate(wanted)
    monkeypatch.setattr(stage_one, "run_jobs", real)
    folder = wanted.path / "staging" / "learners" / "task_0000"
    learner = folder / "learner.safetensors"
    learner.write_bytes(learner.read_bytes()[:1000])
    with pytest.raises(FocalError, match=rf"damaged .*type rm -r {folder}, then run the same command again"):
        generate(wanted)
    shutil.rmtree(folder)
    assert generate(wanted).content_hash == collection.content_hash


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"episodes_per_checkpoint": 0}, "episodes_per_checkpoint=0, expected at least 1"),
        ({"fresh_episodes": 1}, "fresh_episodes=1, expected at least 2"),
        ({"sac.update_every": 3}, "sac.update_every=3, expected a divisor of the 23 steps between checkpoints"),
        ({"sac.learning_rate": "nan"}, "sac.learning_rate='nan', expected a finite number"),
        ({"checkpoints": 71}, "checkpoints=71, expected at most sac.total_steps=70"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        generate(dataclasses.replace(request(tmp_path / "x"), settings=override(TINY, changes)))
    assert not (tmp_path / "x").exists()


def test_the_command_that_finishes_a_collection_is_printed_whole(tmp_path):
    from focal.datasets import begin_collection
    from focal.datasets.opening import generate_command

    header = dataclasses.replace(open_header(tmp_path), authors=("Ada Lovelace",))
    begin_collection(tmp_path / "x", header)
    command = generate_command(tmp_path / "x")
    for part in ("--env sparse-point-robot", "--seed 4", "--author 'Ada Lovelace'", "--set sac.hidden_sizes=8,8",
                 "--set n_train=2", "--set quality.expert_from=0.9"):  # fmt: skip
        assert part in command


def open_header(path):
    stage_one = sys.modules["focal.datagen.generate"]
    tasks = get_family("point").sample_tasks(2, 1, seed=4)
    return stage_one._header(request(path / "x"), tasks)
