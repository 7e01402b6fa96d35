"""Trained policies in users' hands: `focal.load_policy`, and ONNX files that compute the same."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import focal
from focal import FocalError
from focal.cli import main
from focal.trainer.exporting import export_policy
from focal.trainer.files import sha256
from focal.trainer.loop import load_agent, train
from focal.trainer.replay import TaskReplay
from focal.trainer.runs import read_run

from .trainer_toys import two_episodes, walk_data, with_settings

EXPORTED = {"encoder.onnx", "policy.onnx", "weights.safetensors", "policy.json"}
CHANGES = {
    "steps": 5,
    "next_observation_in_context": True,
    "context_reward": "sparse",
    "encoder__kind": "probabilistic",
}


def walks():
    """Walks whose observations are not already as `observation_scale` would have them."""
    data = walk_data()
    for task in data.tasks:
        task.observations[:] *= (3, 5)
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    for seed in (3, 4):
        train(folder, walks(), with_settings(**CHANGES), seed)
    assert read_run(folder).transform.scale == pytest.approx((3, 5), rel=0.2)
    return folder


def arrays_of(task) -> dict[str, np.ndarray]:
    """A task's transitions as a user's own loop would gather them."""
    return {
        "observations": task.observations[task.rows],
        "actions": task.actions,
        "rewards": task.infos["sparse_reward"],
        "next_observations": task.observations[task.rows + 1],
    }


def context_and_states() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A context and observations, as float32, which is what ONNX graphs take."""
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays_of(walks().tasks[2]).items()}
    return arrays, np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


def test_a_loaded_policy_infers_and_acts_as_meta_testing_does(run: Path):
    task, policy, agent = walks().tasks[1], focal.load_policy(run), load_agent(run, 3)
    assert (policy.seed, focal.load_policy(run, 4).seed) == (3, 4)
    replay = TaskReplay([task], agent.transform, agent.settings)
    expected = agent.embed(replay.context_at(torch.arange(len(task.rows))[None]))[0].numpy()
    embedding = policy.embed(task)
    assert embedding.shape == (3,)
    assert np.allclose(embedding, expected, atol=1e-6)
    assert np.array_equal(policy.embed(arrays_of(task)), embedding)
    assert np.allclose(policy.embed({k: x[::-1].copy() for k, x in arrays_of(task).items()}), embedding, atol=1e-6)
    observations = np.random.default_rng(0).normal(size=(5, 2))
    actions = policy.act(observations, embedding)
    assert np.array_equal(actions, agent.act(observations[None], embedding[None])[0])
    assert np.allclose(policy.act(observations[0], embedding), actions[0], atol=1e-6)
    assert policy.act(observations[0], embedding).shape == (2,)
    draws = [policy.act(observations, embedding, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("next_observations"), "lacks 'next_observations'"),
        (lambda arrays: arrays.update(actions=arrays["actions"][:, :1]), r"'actions' .* expected \(160, 2\)"),
        (lambda arrays: arrays.update(observations=arrays["observations"][:-1]), r"'observations' .* \(159, 2\)"),
        (lambda arrays: arrays.update({name: x[:0] for name, x in arrays.items()}), "at least one transition"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(run: Path, change, message: str):
    arrays = arrays_of(walks().tasks[0])
    change(arrays)
    with pytest.raises(FocalError, match=message):
        focal.load_policy(run).embed(arrays)
    dense = dataclasses.replace(two_episodes(), infos={})
    with pytest.raises(FocalError, match="lacks 'rewards'"):
        focal.load_policy(run).embed(dense)


def test_observations_and_embeddings_that_do_not_fit_are_refused(run: Path):
    policy = focal.load_policy(run)
    with pytest.raises(FocalError, match="observations have 3 columns"):
        policy.act(np.zeros(3), np.zeros(3))
    for embedding in (np.zeros(2), np.zeros((1, 3))):
        with pytest.raises(FocalError, match=r"the embedding has shape .*, this run's are \(3,\)"):
            policy.act(np.zeros(2), embedding)


def test_a_missing_seed_names_the_command(run: Path, tmp_path: Path):
    with pytest.raises(FocalError, match="no checkpoint of seed 9"):
        focal.load_policy(run, 9)
    with pytest.raises(FocalError, match=r"is no run's folder \(it has no settings\.json\)"):
        focal.load_policy(tmp_path)


def test_an_exported_policy_computes_the_same_in_onnxruntime(run: Path, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    policy = focal.load_policy(run, 4)
    files = {path.name: path for path in export_policy(policy, tmp_path / "out")}
    assert set(files) == EXPORTED
    graphs = (files[name].read_bytes() for name in ("encoder.onnx", "policy.onnx"))
    encoder, actor = map(onnxruntime.InferenceSession, graphs)
    arrays, observations = context_and_states()
    (embedding,) = encoder.run(None, arrays)
    assert np.allclose(embedding, policy.embed(arrays), atol=1e-5)
    (actions,) = actor.run(None, {"observations": observations, "embedding": embedding})
    assert np.allclose(actions, policy.act(observations, embedding), atol=1e-5)
    described = json.loads(files["policy.json"].read_text())
    assert described["seed"] == 4
    assert described["run"]["settings"]["encoder"]["kind"] == "probabilistic"
    for name, digest in described["sha256"].items():
        assert sha256(files[name].read_bytes()) == digest
    weights = safetensors.torch.load_file(files["weights.safetensors"])
    for owner, network in policy.agent.networks.items():
        for name, tensor in network.state_dict().items():
            assert torch.equal(weights[f"{owner}/{name}"], tensor)


def test_the_graphs_of_a_deterministic_encoder_hide_x_as_the_run_does(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = with_settings(steps=5, hide_x=True, observation_scale="rms")
    train(tmp_path / "run", dataclasses.replace(walks(), absolute_x=0), settings, 0)
    policy = focal.load_policy(tmp_path / "run")
    assert policy.agent.transform.kept == (1,)
    files = export_policy(policy, tmp_path / "out")
    encoder, actor = (onnxruntime.InferenceSession(file.read_bytes()) for file in files[:2])
    arrays, observations = context_and_states()
    arrays = {name: arrays[name] for name in ("observations", "actions", "rewards")}
    elsewhere = np.array([100, 0], np.float32)  # another x
    for moved in (0, elsewhere):
        (embedding,) = encoder.run(None, arrays | {"observations": arrays["observations"] + moved})
        assert np.allclose(embedding, policy.embed(arrays), atol=1e-5)
        (actions,) = actor.run(None, {"observations": observations + moved, "embedding": embedding})
        assert np.allclose(actions, policy.act(observations, embedding), atol=1e-5)


def test_the_command_exports_a_runs_first_seed_into_it(run: Path):
    pytest.importorskip("onnxruntime")
    result = CliRunner().invoke(main, ["export-policy", str(run)])
    assert result.exit_code == 0, result.output
    folder = run / "export" / "seed_3"
    assert {path.name for path in folder.iterdir()} == EXPORTED
    assert {line.removeprefix("saved ") for line in result.stdout.split("\n") if line} == {
        str(folder / name) for name in EXPORTED
    }
    described = json.loads((folder / "policy.json").read_text())
    assert (described["format"], described["seed"], set(described["sha256"])) == (
        "focal-export/1", 3, EXPORTED - {"policy.json"},
    )  # fmt: skip


def test_a_run_that_acts_otherwise_at_a_reset_is_told_of_it_and_not_exported(tmp_path: Path):
    train(tmp_path / "run", walks(), with_settings(steps=2, released__raw_reset=True), 0)
    policy, observation, embedding = focal.load_policy(tmp_path / "run"), np.array([3.0, 5.0]), np.full(3, 0.5)
    expected = policy.agent.act(observation[None, None], embedding[None], at_reset=True)[0, 0]
    assert np.array_equal(policy.act(observation, embedding, at_reset=True), expected)
    assert not np.array_equal(policy.act(observation, embedding), expected)
    with pytest.raises(FocalError, match=r"released\.raw_reset=true.* cannot know of resets; use focal\.load_policy"):
        export_policy(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_disagrees_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    original = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *a: [x + 0.01 for x in original(*a)])
    with pytest.raises(FocalError, match=r"something else from encoder\.onnx"):
        export_policy(focal.load_policy(run), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
