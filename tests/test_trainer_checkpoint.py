"""Checkpoints: everything that decides the next step comes back, and nothing else is accepted."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from focal import FocalError
from focal.trainer.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from focal.trainer.files import sha256
from focal.trainer.focal import Focal
from focal.trainer.replay import TaskReplay, sample_meta_batch
from focal.trainer.settings import FocalSettings
from focal.trainer.transform import ObservationTransform

from .trainer_toys import TINY, walk_data, with_settings

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))
FULL = with_settings(regularisation__kind="value-penalty", regularisation__adaptive=True, entropy__learnt=True)


def trained(settings: FocalSettings = FULL, steps: int = 3, seed: int = 0) -> tuple[Focal, dict[str, torch.Generator]]:
    focal = Focal(settings, RAW, 2, torch.Generator().manual_seed(seed))
    generators = {"training": torch.Generator().manual_seed(seed + 1)}
    advance(focal, generators, steps)
    return focal, generators


def advance(focal: Focal, generators: dict[str, torch.Generator], steps: int) -> dict[str, float]:
    replay, draw = TaskReplay(walk_data().tasks, RAW, focal.settings), generators["training"]
    metrics: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        metrics = focal.update(sample_meta_batch(replay, focal.settings, draw, True, True), draw)
    return {name: value.item() for name, value in metrics.items()}


def test_a_restored_focal_continues_as_the_saved_one(tmp_path: Path):
    focal, generators = trained()
    path = save_checkpoint(tmp_path, 3, focal, generators)
    other, others = trained(steps=1, seed=7)
    assert load_checkpoint(path, other, others) == 3
    assert advance(other, others, 3) == advance(focal, generators, 3)
    assert torch.equal(others["training"].get_state(), generators["training"].get_state())
    for name, network in focal.networks.items():
        assert all(map(torch.equal, network.parameters(), other.networks[name].parameters()))


def test_restored_agents_act_alike(tmp_path: Path):
    focal, generators = trained()
    path = save_checkpoint(tmp_path, 3, focal, generators)
    other, others = trained(steps=0, seed=7)
    observations, embeddings = torch.randn(2, 4, 2), torch.rand(2, 3)
    assert not torch.equal(other.agent.act(observations, embeddings), focal.agent.act(observations, embeddings))
    load_checkpoint(path, other, others)
    assert torch.equal(other.agent.act(observations, embeddings), focal.agent.act(observations, embeddings))


def test_optimisers_that_never_stepped_are_restored_as_such(tmp_path: Path):
    focal, generators = trained(steps=0)
    path = save_checkpoint(tmp_path, 0, focal, generators)
    other, others = trained(steps=2, seed=7)
    load_checkpoint(path, other, others)
    assert all(not optimiser.state_dict()["state"] for optimiser in other.optimisers.values())
    assert advance(other, others, 2) == advance(focal, generators, 2)


def test_the_last_and_the_one_before_are_kept(tmp_path: Path):
    focal, generators = trained(TINY, steps=1)
    (tmp_path / ".tmp-step_000000001").mkdir()
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, focal, generators)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000002", "step_000000030"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000002", "step_000000030"]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str):
    focal, generators = trained(TINY, steps=1)
    save_checkpoint(tmp_path, 1, focal, generators)
    path = save_checkpoint(tmp_path, 2, focal, generators)
    content = (path / name).read_bytes()
    half = len(content) // 2
    changed = {"cut": content[:half], "flipped": content[:half] + b"\x00\xff" + content[half + 2 :], "empty": b""}
    (path / name).unlink()
    if damage != "gone":
        (path / name).write_bytes(changed[damage])
    with pytest.raises(FocalError, match=rf"{path.name}/{name}.*continue from step 1: rm -r .*--resume") as caught:
        load_checkpoint(path, focal, generators)
    assert "\n" not in str(caught.value)


def test_other_settings_are_refused(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, *trained(TINY, steps=1))
    for settings in (with_settings(latent_dim=4), with_settings(control_hidden=(16,)), FULL):
        with pytest.raises(FocalError, match="start this seed again"):
            load_checkpoint(path, *trained(settings, steps=0))
    path = save_checkpoint(tmp_path, 2, *trained(FULL, steps=1))
    with pytest.raises(FocalError, match="does not hold the state of these settings"):
        load_checkpoint(path, *trained(TINY, steps=0))


def test_hostile_but_consistent_files_are_refused(tmp_path: Path):
    focal, generators = trained(TINY, steps=1)
    path = save_checkpoint(tmp_path, 1, focal, generators)
    tensors = safetensors.torch.load((path / "state.safetensors").read_bytes())
    description = json.loads((path / "state.json").read_text())
    step_of_adam = next(name for name in tensors if name.startswith("optimiser/critic") and name.endswith("/step"))
    for changed in (
        tensors | {"network/critic/first.body.0.bias": torch.full((16,), torch.nan)},
        tensors | {"optimiser/critic/0/exp_avg": torch.zeros(1)},
        {name: tensor for name, tensor in tensors.items() if name != step_of_adam},
        tensors | {"network/extra/weight": torch.zeros(1)},
        tensors | {"generator/other": torch.zeros(1)},
    ):
        content = safetensors.torch.save(changed)
        (path / "state.safetensors").write_bytes(content)
        (path / "state.json").write_text(json.dumps(description | {"sha256": sha256(content)}))
        with pytest.raises(FocalError, match=r"state\.safetensors"):
            load_checkpoint(path, focal, generators)
    (path / "state.json").write_text(json.dumps(description | {"format": "focal-checkpoint/9"}))
    with pytest.raises(FocalError, match="focal-checkpoint/9"):
        load_checkpoint(path, focal, generators)
    (path / "state.json").write_text(json.dumps(description | {"device": "cuda"}))
    (path / "state.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(FocalError, match="saved on cuda"):
        load_checkpoint(path, focal, generators)
