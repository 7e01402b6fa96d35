"""What all methods share: settings for every family and scale, run folders, exact resume, agents from disk."""

import dataclasses
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.errors import DivergedError
from focal.settings import SCALES, from_dict, to_dict
from focal.trainer.agent import Agent
from focal.trainer.checkpoint import list_checkpoints
from focal.trainer.loop import train
from focal.trainer.mbml_first_stage import first_stage, is_trained, teachers_folder
from focal.trainer.methods import METHODS, saved_settings, train_settings
from focal.trainer.replay import TaskReplay
from focal.trainer.runs import RunSource, describe_run, load_agent, load_untrained_agent, read_run
from focal.trainer.settings import hidden_widths

from .test_trainer_loop import Interrupt, assert_same_run, final_state, stop_at
from .trainer_toys import evaluate_toy, tiny_method, walk_data

FAMILIES = [
    "sparse-point-robot", "point-robot-wind", "half-cheetah-vel", "half-cheetah-fwd-back", "ant-fwd-back",
    "walker-2d-params",
]  # fmt: skip
RIVALS = [algo for algo in METHODS if algo != "focal"]
OBSERVATIONS, EMBEDDINGS = np.full((2, 3, 2), 0.1), np.full((2, 3), 0.2)
CONTEXT = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)


def act(agent: Agent) -> np.ndarray:
    return agent.act(OBSERVATIONS, EMBEDDINGS)


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_method_has_settings_for_every_family_and_scale(algo: str, family: str, scale: str):
    settings = train_settings(family, scale, algo)
    settings.check()
    assert settings.algo == algo
    assert from_dict(METHODS[algo].settings, to_dict(settings)) == settings
    assert saved_settings(json.loads(json.dumps(to_dict(settings)))) == settings
    focal = train_settings(family, scale)
    shared = ("discount", "latent_dim", "context_reward", "next_observation_in_context", "log_every", "eval_every")
    assert [getattr(settings, name) for name in shared] == [getattr(focal, name) for name in shared]


def test_laptop_networks_are_3_x_256_in_every_rival():
    for algo in set(METHODS) - {"focal"}:  # FOCAL's laptop results were measured with smaller ones
        for family in FAMILIES:
            # the reward ensemble's single layer of 128 is smaller by its description
            assert set(hidden_widths(train_settings(family, "laptop", algo))) - {(128,)} == {(256, 256, 256)}, algo


def test_paper_sizes_are_the_descriptions():
    bcq, mbml = (train_settings("half-cheetah-vel", "paper", algo) for algo in ("contextual-bcq", "mbml"))
    assert (bcq.context_size, bcq.batch_size, bcq.steps, bcq.encoder_hidden) == (128, 128, 100_000, (200,) * 3)
    assert (len(bcq.bcq.critic_hidden), len(bcq.bcq.vae_hidden), len(bcq.bcq.perturbation_hidden)) == (9, 7, 8)
    assert (bcq.bcq.candidates, bcq.bcq.min_weight, bcq.bcq.perturbation_limit) == (10, 0.75, 0.05)
    assert bcq.bcq.perturbation_learning_rate == mbml.teachers.bcq.perturbation_learning_rate == 3e-4
    assert (mbml.context_size, mbml.triplet_margin, mbml.encoder.kl_weight) == (64, 2.0, 0.1)
    assert mbml.teachers.bcq.vae_hidden == (750, 750)
    assert mbml.teachers.rewards == dataclasses.replace(mbml.teachers.rewards, members=20, hidden=(128,), steps=4000)
    assert (mbml.relabel.reward_std, mbml.relabel.next_observation_std) == (0.05, 0.2)
    weights = {
        algo: {train_settings(family, scale, algo).encoder.kl_weight for family in FAMILIES for scale in SCALES}
        for algo in RIVALS
    }
    # of two weights the first is the point robots', and at laptop scale MBML's everywhere
    assert weights == {"batch-pearl": {1.0, 0.1}, "contextual-bcq": {0.0}, "mbml": {1e-3, 0.1}}
    assert {train_settings(family, "laptop", "mbml").encoder.kl_weight for family in FAMILIES} == {1e-3}
    varying = {family for family in FAMILIES if train_settings(family, "paper", "mbml").transitions_vary}
    assert varying == {"point-robot-wind", "walker-2d-params"}


def test_unknown_methods_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'batch-pearl'"):
        train_settings("half-cheetah-vel", "laptop", "pearl")
    with pytest.raises(UsageError, match="unknown method"):
        saved_settings({"steps": 3})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method that was never interrupted."""
    runs = tmp_path_factory.mktemp("runs")
    for algo in METHODS:
        train(runs / algo, walk_data(), tiny_method(algo), 0, evaluate_toy)
    return {algo: runs / algo for algo in METHODS}


@pytest.mark.parametrize("algo", RIVALS)
def test_an_interrupted_run_ends_as_if_it_never_was(algo: str, whole: dict[str, Path], tmp_path: Path):
    run = tmp_path / "run"
    for number, stop in enumerate((7, 23)):
        with pytest.raises(Interrupt):
            train(run, walk_data(), tiny_method(algo), 0, evaluate_toy, number > 0, stop_at(stop))
    train(run, walk_data(), tiny_method(algo), 0, evaluate_toy, resume=True)
    assert_same_run(run, whole[algo])


@pytest.mark.parametrize("algo", RIVALS)
def test_agents_are_rebuilt_from_the_folder_alone(algo: str, whole: dict[str, Path]):
    trained = train(whole[algo], walk_data(), tiny_method(algo), 0, evaluate_toy, resume=True)  # finished: as it is
    loaded, untrained = load_agent(whole[algo], 0), load_untrained_agent(whole[algo], 0)
    assert np.array_equal(act(loaded), act(trained))
    assert np.array_equal(loaded.embed(CONTEXT), trained.embed(CONTEXT))
    assert not np.allclose(act(untrained), act(trained))
    assert not np.allclose(untrained.embed(CONTEXT), trained.embed(CONTEXT))
    assert read_run(whole[algo]).settings == tiny_method(algo)


@pytest.mark.parametrize("algo", RIVALS)
def test_untrained_agents_are_what_training_starts_from(algo: str, tmp_path: Path):
    still = dict.fromkeys(("encoder_learning_rate", "critic_learning_rate", "actor_learning_rate"), 1e-30)
    still |= {"bcq__perturbation_learning_rate": 1e-30} if algo == "contextual-bcq" else {}
    agent = train(tmp_path / "run", walk_data(), tiny_method(algo, steps=1, **still), 5)
    untrained = load_untrained_agent(tmp_path / "run", 5)
    assert np.allclose(act(untrained), act(agent), atol=1e-6)
    assert np.allclose(untrained.embed(CONTEXT), agent.embed(CONTEXT), atol=1e-6)


@pytest.mark.parametrize("algo", METHODS)
def test_agents_have_no_state(algo: str, whole: dict[str, Path]):
    agent = load_agent(whole[algo], 0)
    before, embedded = act(agent), agent.embed(CONTEXT)
    agent.act(OBSERVATIONS + 5, EMBEDDINGS - 5)
    agent.embed(CONTEXT * 2)
    assert np.array_equal(act(agent), before)
    assert np.array_equal(agent.embed(CONTEXT), embedded)
    assert np.array_equal(agent.embed(CONTEXT[:, ::-1].copy()).round(4), embedded.round(4))  # nor do contexts an order


def test_a_run_folder_refuses_another_method(whole: dict[str, Path]):
    with pytest.raises(
        FocalError, match=r"algo=contextual-bcq, this command asks for batch-pearl.*use its own \(--algo context"
    ):
        train(whole["contextual-bcq"], walk_data(), tiny_method("batch-pearl"), 0, resume=True)


@pytest.mark.parametrize("algo", RIVALS)
def test_damaged_checkpoints_name_the_way_out(algo: str, whole: dict[str, Path], tmp_path: Path):
    with pytest.raises(Interrupt):
        train(tmp_path / "run", walk_data(), tiny_method(algo), 0, progress=stop_at(25))
    weights = list_checkpoints(tmp_path / "run" / "seed_0" / "checkpoints")[-1] / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FocalError, match=r"state\.safetensors differs.*continue from step 10: rm -r"):
        train(tmp_path / "run", walk_data(), tiny_method(algo), 0, resume=True)


@pytest.mark.parametrize("algo", RIVALS)
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(algo: str, tmp_path: Path):
    settings = tiny_method(algo, value_limit=1e-9)
    if algo == "mbml":  # whose first stage has values too
        settings = tiny_method(algo, critic_learning_rate=1e30)
    with pytest.raises(FocalError, match="train under another --name"):
        train(tmp_path / "run", walk_data(), settings, 0)


# MBML's first stage


def stage(runs: Path, settings=None, progress=None, data=None, source=None):
    data, settings = data or walk_data(), settings or tiny_method("mbml")
    run = describe_run(data, settings, source or RunSource())
    folder = teachers_folder(runs, run, data)
    return folder, lambda: first_stage(runs, run, data, TaskReplay(data.tasks, run.transform, settings), progress)


def test_the_first_stage_is_trained_once_and_shared_by_all_seeds(tmp_path: Path):
    train(tmp_path / "run", walk_data(), tiny_method("mbml"), 0)
    (folder,) = (tmp_path / "teachers").iterdir()
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in (".lock", "teachers.json")
    }
    train(tmp_path / "run", walk_data(), tiny_method("mbml"), 1)
    train(tmp_path / "other", walk_data(), tiny_method("mbml", steps=4, latent_dim=2, relabel__reward_std=0.5), 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list((tmp_path / "teachers").iterdir()) == [folder]
    identity = json.loads((folder / "teachers.json").read_text())
    assert identity["content_hash"] == "c0ffee"
    assert identity["settings"]["teachers"]["steps"] == 30
    assert "latent_dim" not in identity["settings"]


def test_other_data_or_settings_have_a_first_stage_of_their_own(tmp_path: Path):
    here, _ = stage(tmp_path)
    others = [
        stage(tmp_path, tiny_method("mbml", teachers__steps=31)),
        stage(tmp_path, tiny_method("mbml", discount=0.5)),
        stage(tmp_path, tiny_method("mbml", context_reward="sparse")),
        stage(tmp_path, tiny_method("mbml", tau=0.5)),
        stage(tmp_path, tiny_method("mbml", transitions_vary=True, next_observation_in_context=True)),
        stage(tmp_path, tiny_method("mbml", hide_x=True), data=dataclasses.replace(walk_data(), absolute_x=0)),
        stage(tmp_path, data=dataclasses.replace(walk_data(), content_hash="beef")),
        stage(tmp_path, data=walk_data(episodes=39)),
        stage(tmp_path, source=RunSource(quality="expert")),
    ]
    folders = {here, *(folder for folder, _ in others)}
    assert len(folders) == 1 + len(others)
    # what the second stage alone uses does not decide it, nor does where the collection lies
    for same in (
        tiny_method("mbml", latent_dim=2, triplet_margin=1.0, relabel__reward_std=1.0, critic_learning_rate=1e-5),
        tiny_method("mbml", precision="bf16"),
    ):
        assert stage(tmp_path, same, source=RunSource(collection_path="/elsewhere", seeds=(7,)))[0] == here


def test_an_interrupted_first_stage_ends_as_if_it_never_was(tmp_path: Path):
    whole, make = stage(tmp_path / "whole")
    make()
    folder, _ = stage(tmp_path / "cut")
    for stop in (7, 13, 29):
        with pytest.raises(Interrupt):
            stage(tmp_path / "cut", progress=stop_at(stop))[1]()
        assert not is_trained(folder, 30)
    stage(tmp_path / "cut")[1]()
    for name in ("predictions.safetensors", "checkpoints/step_000000030/state.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("teachers__learning_rate", "--set teachers.learning_rate=1e+29"),
        ("teachers__rewards__learning_rate", "--set teachers.rewards.learning_rate=1e+29"),
        ("teachers__transitions__learning_rate", "--set teachers.transitions.learning_rate=1e+29"),
    ],
)
def test_a_first_stage_that_diverges_names_the_learning_rate_that_did_it(name: str, remedy: str, tmp_path: Path):
    vary = {"transitions_vary": True, "next_observation_in_context": True}
    _, make = stage(tmp_path, tiny_method("mbml", **vary, **{name: 1e30}))
    found = rf"the first stage of MBML: .* under another --name with {re.escape(remedy)}$"
    with pytest.raises(DivergedError, match=found):
        make()
    smaller = remedy.removeprefix("--set ").partition("=")[0].replace(".", "__")
    folder, make = stage(tmp_path, tiny_method("mbml", **vary, **{smaller: 1e-3}))  # what it says, and more of it
    make()
    assert is_trained(folder, 30)


def test_a_first_stage_beyond_its_bound_names_both_ways_out(tmp_path: Path):
    _, make = stage(tmp_path, tiny_method("mbml", value_limit=1e-9))
    with pytest.raises(DivergedError, match=r"with --set teachers\.learning_rate=\S+, or --set value_limit=NUMBER$"):
        make()


def test_acceptance_is_judged_in_raw_units(tmp_path: Path):
    """Observations are scaled here, so that members disagree by more in raw units than in scaled ones."""
    data = walk_data()
    wide = [dataclasses.replace(task, observations=task.observations * np.float32([1, 50])) for task in data.tasks]
    settings = tiny_method("mbml", transitions_vary=True, next_observation_in_context=True)
    data = dataclasses.replace(data, tasks=wide)
    run = describe_run(data, settings, RunSource())
    replay = TaskReplay(data.tasks, run.transform, settings)
    teachers, found = first_stage(tmp_path, run, data, replay)
    pool, scale = replay.batch_at(found.steps), torch.tensor(run.transform.scale)
    assert scale[1] > 10
    spread = teachers.transitions.predict(1, pool.observations[2], pool.actions[2])[1]
    assert torch.allclose(found.next_observation_std[1, 2], (spread * scale).mean(dim=-1), rtol=1e-4)


def test_damaged_predictions_name_the_way_out_which_works(tmp_path: Path):
    folder, make = stage(tmp_path)
    _, predictions = make()
    path = folder / "predictions.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(FocalError, match=r"predictions\.safetensors differs.*rm '.*'/predictions\.\* and"):
        make()
    for name in ("predictions.safetensors", "predictions.json"):  # do what it says
        (folder / name).unlink()
    _, again = make()
    assert path.read_bytes() == content
    assert again.reward.equal(predictions.reward)


def test_a_full_disk_in_the_first_stage_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if "predictions" in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    folder, make = stage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(FocalError, match="disk full"):
            make()
    assert is_trained(folder, 30)
    make()
    assert (folder / "predictions.json").exists()


def _train_one(runs: Path, seed: int) -> None:
    train(runs / "run", walk_data(), tiny_method("mbml"), seed, source=RunSource(seeds=(0, 1)))


def test_seeds_side_by_side_wait_for_one_first_stage(whole: dict[str, Path], tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_train_one, args=(tmp_path, seed)) for seed in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len(list((tmp_path / "teachers").iterdir())) == 1
    assert final_state(tmp_path / "run") == final_state(whole["mbml"])
