"""Runs: exact resume after a kill, logs, evaluation, refusals, and rebuilding the agent from its folder."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.errors import DivergedError
from focal.trainer.agent import Agent
from focal.trainer.checkpoint import list_checkpoints
from focal.trainer.diagnostics import embedding_metrics
from focal.trainer.focal import Focal
from focal.trainer.journal import WALL_CLOCK, read_rows
from focal.trainer.loop import RunSource, load_agent, train
from focal.trainer.replay import TaskReplay
from focal.trainer.runs import load_untrained_agent, read_run
from focal.trainer.training import SMALLER_STEPS, only_process

from .trainer_toys import (
    TINY,
    VARIANTS,
    evaluate_toy,
    goal_at,
    resume_settings,
    tiny_method,
    variant,
    walk_data,
    walk_task,
    with_settings,
)


class Interrupt(Exception):
    """Stands in for a kill inside one process."""


def stop_at(step: int):
    def progress(now: int, total: int, metrics: object) -> None:
        if now == step:
            raise Interrupt

    return progress


def rows(run: Path, name: str = "metrics", seed: int = 0) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)}
        for row in read_rows(run / f"seed_{seed}" / f"{name}.jsonl")
    ]


def final_state(run: Path, seed: int = 0) -> bytes:
    return (list_checkpoints(run / f"seed_{seed}" / "checkpoints")[-1] / "state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(run, walk_data(), resume_settings(), 0, evaluate=evaluate_toy)
    return run


def assert_same_run(run: Path, whole: Path) -> None:
    assert final_state(run) == final_state(whole)
    assert rows(run) == rows(whole)
    for name in ("evaluation", "embeddings"):
        assert rows(run, name) == rows(whole, name)


def test_logs_hold_every_phase_on_time(whole: Path):
    metrics = rows(whole)
    assert [row["step"] for row in metrics] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 42]
    assert [row["phase"] for row in metrics[:4]] == ["encoder", "encoder", "encoder", "control"]
    assert {"encoder/loss", "embedding/esr", "embedding/rms"} <= set(metrics[0])
    trained = [{name.split("/")[0] for name in row} & {"encoder", "critic"} for row in metrics[2:4]]
    assert trained == [{"encoder"}, {"critic"}], "the encoder's last step is the 12th"
    assert {"critic/loss", "actor/loss", "regularisation/alpha", "discriminator/slope"} <= set(metrics[-1])
    assert {"critic/value_std", "critic/next_value_std", "regularisation/divergence"} <= set(metrics[-1])
    drift = (metrics[-1]["critic/value"] - metrics[-2]["critic/value"]) / 2 * 1000  # the last rows are 2 steps apart
    assert metrics[-1]["critic/value_drift"] == pytest.approx(drift)
    embeddings = rows(whole, "embeddings")
    assert [row["step"] for row in embeddings] == [15, 30, 42]
    assert embeddings[-1]["tasks"] == [0, 1, 2, 3]
    spread = embedding_metrics(torch.tensor(embeddings[-1]["embeddings"]))
    assert spread == pytest.approx({name: metrics[-1][name] for name in spread}, abs=1e-4)
    assert [row["step"] for row in rows(whole, "evaluation")] == [15, 30, 42]
    times = [row["time/seconds"] for row in read_rows(whole / "seed_0" / "metrics.jsonl")]
    assert times == sorted(times)
    assert any((whole / "seed_0" / "tensorboard").iterdir())
    assert [path.name for path in list_checkpoints(whole / "seed_0" / "checkpoints")] == [
        "step_000000040",
        "step_000000042",
    ]


@pytest.mark.parametrize("stops", [(3,), (11, 12), (17, 39), (41,)])
def test_an_interrupted_run_ends_as_if_it_never_was(whole: Path, tmp_path: Path, stops: tuple[int, ...]):
    run = tmp_path / "run"
    for number, stop in enumerate(stops):
        with pytest.raises(Interrupt):
            train(run, walk_data(), resume_settings(), 0, evaluate_toy, resume=number > 0, progress=stop_at(stop))
    train(run, walk_data(), resume_settings(), 0, evaluate_toy, resume=True)
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_bit_identical(name: str, tmp_path: Path):
    settings = dataclasses.replace(variant(name), steps=9, log_every=3, checkpoint_every=4, eval_every=5)
    data = dataclasses.replace(walk_data(), absolute_x=0)
    train(tmp_path / "whole", data, settings, 0)
    for number, stop in enumerate((7, 9)):  # from the second checkpoint on, a decaying encoder is on its way
        with pytest.raises(Interrupt):
            train(tmp_path / "run", data, settings, 0, resume=number > 0, progress=stop_at(stop))
    train(tmp_path / "run", data, settings, 0, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert read_run(tmp_path / "run").settings == settings
    load_agent(tmp_path / "run", 0).act(np.zeros((1, 1, 2)), np.zeros((1, 3)))


def test_the_clock_goes_on_after_a_resume(tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(Interrupt):
        train(run, walk_data(), TINY, 0, progress=stop_at(21))
    path = run / "seed_0" / "metrics.jsonl"
    path.write_text("".join(json.dumps(row | {"time/seconds": 1000.0 + row["step"]}) + "\n" for row in read_rows(path)))
    train(run, walk_data(), TINY, 0, resume=True)
    times = [row["time/seconds"] for row in read_rows(path)]
    assert len(times) == 8
    assert all(time > 1000 for time in times)


@pytest.mark.slow
def test_a_killed_process_resumes_bit_identical(whole: Path, tmp_path: Path):
    code = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from trainer_toys import evaluate_toy, resume_settings, walk_data\n"
        "from focal.trainer.loop import train\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "stop = int(sys.argv[2])\n"
        "die = lambda now, total, metrics: os.kill(os.getpid(), signal.SIGKILL) if now == stop else None\n"
        "train(Path(sys.argv[1]), walk_data(), resume_settings(), 0, evaluate_toy, resume=True, progress=die)\n"
    )
    run, threads = tmp_path / "run", str(torch.get_num_threads())
    for stop in (5, 13, 27, 41, -1):
        done = subprocess.run([sys.executable, "-c", code, str(run), str(stop), threads], timeout=300)
        assert done.returncode == (0 if stop < 0 else -signal.SIGKILL)
    assert_same_run(run, whole)


def test_a_finished_run_resumes_to_itself(whole: Path):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    agent = train(whole, walk_data(), resume_settings(), 0, evaluate_toy, resume=True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    observations, embeddings = np.ones((1, 2, 2)), np.ones((1, 3))
    assert np.array_equal(agent.act(observations, embeddings), load_agent(whole, 0).act(observations, embeddings))


def test_logging_more_often_changes_nothing(whole: Path, tmp_path: Path):
    settings = dataclasses.replace(resume_settings(), log_every=1, eval_every=5, checkpoint_every=42)
    train(tmp_path / "run", walk_data(), settings, 0)
    assert final_state(tmp_path / "run") == final_state(whole)


def test_agent_is_rebuilt_from_the_folder_alone(tmp_path: Path):
    run = tmp_path / "run"
    settings = with_settings(hide_x=True, observation_scale="none")
    data = dataclasses.replace(walk_data(), absolute_x=0)
    agent = train(run, data, settings, 3)
    loaded = load_agent(run, 3)
    observations, embeddings = np.random.default_rng(0).normal(size=(2, 5, 2)), np.zeros((2, 3))
    assert np.array_equal(loaded.act(observations, embeddings), agent.act(observations, embeddings))
    context = np.random.default_rng(1).normal(size=(2, 9, 4)).astype(np.float32)
    assert np.array_equal(loaded.embed(context), agent.embed(context))
    assert loaded.settings == settings
    assert loaded.transform.kept == (1,)
    untrained = load_untrained_agent(run, 3)
    assert not np.allclose(untrained.embed(context), agent.embed(context))
    assert np.abs(untrained.act(observations, embeddings)).max() < 0.05


def test_untrained_agent_is_the_one_training_started_from(tmp_path: Path):
    seen: list[Agent] = []
    train(tmp_path / "run", walk_data(), with_settings(steps=1, actor_learning_rate=1e-30), 5,
          evaluate=lambda agent, step: seen.append(agent) or {})  # fmt: skip
    untrained = load_untrained_agent(tmp_path / "run", 5)
    for ours, theirs in zip(untrained.policy.parameters(), seen[0].policy.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_settings_json_records_the_run(tmp_path: Path):
    source = RunSource("toy-collection", "/data/toy", "mixed", (4, 5), {"commit": "abc"})
    train(tmp_path / "run", walk_data(), TINY, 4, source=source)
    run = read_run(tmp_path / "run")
    assert run.settings == TINY
    assert run.source == source
    assert (run.family, run.content_hash, run.task_indices) == ("toy-walk", "c0ffee", (0, 1, 2, 3))
    values = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert values["settings"]["distance"]["power"] == -2
    assert values["collection"]["content_hash"] == "c0ffee"
    train(tmp_path / "run", walk_data(), TINY, 6, source=dataclasses.replace(source, seeds=(6,)))
    assert read_run(tmp_path / "run").source.seeds == (4, 5, 6)
    assert final_state(tmp_path / "run", 4) != final_state(tmp_path / "run", 6)


def test_a_run_folder_refuses_another_run(whole: Path):
    with pytest.raises(UsageError, match=r"already trained to step 42 of 42; .*--resume"):
        train(whole, walk_data(), resume_settings(), 0)
    changed = dataclasses.replace(resume_settings(), tau=0.5)
    with pytest.raises(
        FocalError,
        match=r"has tau=0\.005, this command asks for 0\.5; use its own \(--set tau=0\.005\), another --name, or "
        "another folder: --runs OTHER",
    ):
        train(whole, walk_data(), changed, 0, resume=True)
    changed = dataclasses.replace(resume_settings(), encoder_hidden=(9, 9), tau=0.5)
    widths = ",".join(map(str, resume_settings().encoder_hidden))
    with pytest.raises(FocalError, match=rf"and 1 more; use its own \(--set encoder_hidden={widths}\)"):
        train(whole, walk_data(), changed, 0, resume=True)
    rule = dataclasses.replace(resume_settings().regularisation, kind="none", alpha=3.0)
    changed = dataclasses.replace(resume_settings(), regularisation=rule)
    with pytest.raises(
        FocalError,
        match=r"it has regularisation\.kind=",
    ):
        train(whole, walk_data(), changed, 0, resume=True)
    with pytest.raises(FocalError, match=r"content_hash=c0ffee"):
        train(whole, dataclasses.replace(walk_data(), content_hash="beef"), resume_settings(), 0, resume=True)


def test_one_process_trains_a_seed(tmp_path: Path):
    run = tmp_path / "run"
    train(run, walk_data(), TINY, 0)
    with only_process(run / "seed_0"), pytest.raises(FocalError, match="another process"):
        train(run, walk_data(), TINY, 0, resume=True)


def test_nan_stops_with_its_name_and_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps, update = iter(range(1, 100)), Focal.update

    def poisoned(self: Focal, *arguments: object) -> dict:
        metrics = update(self, *arguments)
        return metrics | ({"critic/loss": torch.tensor(float("nan"))} if next(steps) == 17 else {})

    monkeypatch.setattr(Focal, "update", poisoned)
    with pytest.raises(FocalError, match=r"critic/loss became nan at step 17; .*step_000000010.*--set critic"):
        train(tmp_path / "run", walk_data(), TINY, 0)
    load_agent(tmp_path / "run", 0)
    assert rows(tmp_path / "run")[-1]["step"] == 16


def test_diverging_values_stop_with_the_bound_and_keep_the_last_good_checkpoint(tmp_path: Path):
    settings = with_settings(value_limit=6, reward_scale=20, critic_learning_rate=0.01, tau=0.5, checkpoint_every=5)
    message = (
        r"values diverge: critic/value_largest is [\d.]+ at step \d+, above the bound 6; the last good checkpoint "
    )
    remedy = f"with --set regularisation.kind=value-penalty, {SMALLER_STEPS}, or --set value_limit=NUMBER$"
    with pytest.raises(FocalError, match=message + rf"is .*step_0000\d+; .*{remedy}"):
        train(tmp_path / "run", walk_data(), settings, 0)
    load_agent(tmp_path / "run", 0)
    logged = rows(tmp_path / "run")
    assert 0 < logged[-1]["critic/value_largest"] <= 6
    assert logged[-1]["step"] < 30


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (variant("value penalty"), f"with another --set regularisation.alpha=NUMBER, {SMALLER_STEPS}, or --set value_"),
        (variant("policy"), f"with --set regularisation.kind=value-penalty, {SMALLER_STEPS}, or --set value_"),
        (tiny_method("contextual-bcq"), f"--name with {SMALLER_STEPS}, or --set value_"),
    ],
)
def test_the_remedy_for_diverging_values_is_one_that_the_run_has_not_got(settings, remedy: str, tmp_path: Path):
    with pytest.raises(DivergedError, match=remedy):
        train(tmp_path / "run", walk_data(), dataclasses.replace(settings, value_limit=1e-9), 0)


def test_by_default_values_may_be_100_times_what_the_largest_reward_makes_possible(tmp_path: Path):
    settings = with_settings(critic_learning_rate=1e3)
    with pytest.raises(FocalError, match="values diverge"):
        train(tmp_path / "run", walk_data(), settings, 0)
    largest = max(abs(task.rewards).max() for task in walk_data().tasks)  # every reward is negative
    stop = json.loads((tmp_path / "run" / "seed_0" / "diverged.json").read_text())
    assert stop["bound"] == pytest.approx(100 * (largest + 1) / (1 - 0.99))
    assert (stop["metric"], stop["value"] > stop["bound"]) == ("critic/value_largest", True)


def test_a_seed_that_is_trained_again_is_not_called_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update = Focal.update
    poison = {"critic/loss": torch.tensor(float("inf"))}
    with monkeypatch.context() as patch:
        patch.setattr(Focal, "update", lambda self, *arguments: update(self, *arguments) | poison)
        with pytest.raises(FocalError, match="critic/loss became inf at step 1"):
            train(tmp_path / "run", walk_data(), TINY, 0)
    path = tmp_path / "run" / "seed_0" / "diverged.json"
    assert json.loads(path.read_text())["value"] is None
    train(tmp_path / "run", walk_data(), TINY, 0, resume=True)
    assert not path.exists()


def test_the_meta_test_waits_for_the_control_networks(tmp_path: Path):
    settings = dataclasses.replace(resume_settings(), eval_every=6)  # the encoder's steps are 12
    train(tmp_path / "run", walk_data(), settings, 0, evaluate_toy)
    assert [row["step"] for row in rows(tmp_path / "run", "evaluation")] == [18, 24, 30, 36, 42]
    assert [row["step"] for row in rows(tmp_path / "run", "embeddings")] == [6, 12, 18, 24, 30, 36, 42]


def test_tensorboard_shows_a_step_that_was_taken_twice_once(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for number, stop in enumerate((9, 21, -1)):  # before the first checkpoint, and after the second
        with pytest.raises(Interrupt) if stop > 0 else contextlib.nullcontext():
            train(tmp_path / "run", walk_data(), TINY, 0, resume=number > 0, progress=stop_at(stop))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "seed_0" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("critic/loss")] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_context_larger_than_the_store_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(FocalError, match=r"contexts of 161 transitions.*holds only 160; .*--set context_size=160"):
        train(tmp_path / "run", walk_data(episodes=40), with_settings(context_size=161), 0)
    assert not (tmp_path / "run").exists()


def test_dimensions_that_do_not_fit_the_run_are_refused(whole: Path):
    agent = load_agent(whole, 0)
    with pytest.raises(FocalError, match="observations have 3 columns, this run was trained on 2"):
        agent.act(np.zeros((1, 1, 3)), np.zeros((1, 3)))
    with pytest.raises(FocalError, match=r"rows have 7 columns, .* takes 5 \(observation, action, reward\)"):
        agent.embed(np.zeros((1, 4, 7)))
    wider = dataclasses.replace(walk_task(goal_at(0), 10, 0), observations=np.zeros((50, 3), np.float32))
    with pytest.raises(FocalError, match="observations have 3 columns"):
        TaskReplay([wider], agent.transform, agent.settings)


def test_a_run_of_an_earlier_version_takes_todays_defaults_for_what_it_lacks(tmp_path: Path):
    agent = train(tmp_path / "run", walk_data(), TINY, 0)
    path = tmp_path / "run" / "settings.json"
    values = json.loads(path.read_text())
    added = {"encoder", "released", "encoder_after", "encoder_half_life", "gradients", "task_replacement",
             "context_draws", "precision", "value_limit"}  # fmt: skip
    values["settings"] = {name: value for name, value in values["settings"].items() if name not in added}
    values["settings"]["distance"]["beta"] = 1.0  # it was always a number
    path.write_text(json.dumps(values))
    run = read_run(tmp_path / "run")
    assert dataclasses.replace(run.settings, distance=TINY.distance) == TINY
    observations, embeddings = np.ones((1, 2, 2)), np.ones((1, 3))
    loaded = load_agent(tmp_path / "run", 0)
    assert np.array_equal(loaded.act(observations, embeddings), agent.act(observations, embeddings))


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update = Focal.update

    def poisoned(self: Focal, *arguments: object) -> dict:
        metrics = update(self, *arguments)
        self.control.critic.first.body[0].bias.data[0] = float("nan")  # after the metrics of the step were fine
        return metrics

    monkeypatch.setattr(Focal, "update", poisoned)
    with pytest.raises(FocalError, match="critic weights became nan at step 1; there was no checkpoint yet"):
        train(tmp_path / "run", walk_data(), with_settings(checkpoint_every=1), 0)
    assert list_checkpoints(tmp_path / "run" / "seed_0" / "checkpoints") == []


def test_damaged_last_checkpoint_names_the_file_and_the_way_out(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(Interrupt):
        train(run, walk_data(), resume_settings(), 0, evaluate_toy, progress=stop_at(25))
    last = list_checkpoints(run / "seed_0" / "checkpoints")[-1]
    weights = last / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FocalError, match=rf"{weights} .*continue from step 10: rm -r '{last}' and .*--resume"):
        train(run, walk_data(), resume_settings(), 0, evaluate_toy, resume=True)
    with pytest.raises(FocalError, match=r"state\.safetensors"):
        load_agent(run, 0)
    for path in last.iterdir():  # do what it says
        path.unlink()
    last.rmdir()
    train(run, walk_data(), resume_settings(), 0, evaluate_toy, resume=True)
    assert_same_run(run, whole)


def test_missing_and_damaged_run_folders_say_so(tmp_path: Path, whole: Path):
    with pytest.raises(FocalError, match=r"is no run's folder \(it has no settings\.json\)"):
        load_agent(tmp_path, 0)
    with pytest.raises(FocalError, match=r"no checkpoint of seed 9 \(folders: seed_0\)"):
        load_agent(whole, 9)
    values = json.loads((whole / "settings.json").read_text())
    for changes, message in (
        ({"format": "focal-run/0"}, "focal-run/0"),
        ({"settings": values["settings"] | {"batch_sise": 1}}, "batch_sise"),
        ({"settings": {name: x for name, x in values["settings"].items() if name != "tau"}}, "lacks 'tau'"),
        ({"collection": 3}, "damaged"),
    ):
        (tmp_path / "settings.json").write_text(json.dumps(values | changes))
        with pytest.raises(FocalError, match=message):
            read_run(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, replace = tmp_path / "run", os.replace

    def full(source: Path, target: Path) -> None:
        if "step_000000020" in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FocalError, match="space"):
        train(run, walk_data(), resume_settings(), 0)
    assert [path.name for path in (run / "seed_0" / "checkpoints").iterdir()] == ["step_000000010"]
    load_agent(run, 0)


def test_evaluations_that_are_not_finite_are_null(tmp_path: Path):
    found = {"x": float("nan"), "every": [[1.5, float("inf")]]}
    train(tmp_path / "run", walk_data(), with_settings(steps=2), 0, evaluate=lambda agent, step: found)
    assert rows(tmp_path / "run", "evaluation") == [{"step": 2, "x": None, "every": [[1.5, None]]}]
