"""Policy files: round trip, and refusal of everything that is not exactly one."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from focal import FocalError
from focal.trainer.networks import TanhGaussianPolicy
from focal.trainer.policies import load_policy_file, save_policy


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    policy = TanhGaussianPolicy(3, (8, 6), 2, -20.0, 2.0, torch.Generator().manual_seed(0))
    save_policy(tmp_path / "step_000050000", policy, {"sac_step": 50_000, "task": 7})
    return tmp_path / "step_000050000"


def test_round_trip_gives_the_same_actions_and_meta(stem: Path):
    original = TanhGaussianPolicy(3, (8, 6), 2, -20.0, 2.0, torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 3)
    for path in (stem, stem.with_suffix(".safetensors"), stem.with_suffix(".json")):
        policy, meta = load_policy_file(path)
        assert torch.equal(policy.mode(inputs), original.mode(inputs))
        draws = [p.sample(inputs, torch.Generator().manual_seed(1))[0] for p in (policy, original)]
        assert torch.equal(*draws)
        assert meta == {"sac_step": 50_000, "task": 7}
    assert sorted(path.name for path in stem.parent.iterdir()) == [stem.name + ".json", stem.name + ".safetensors"]


def test_same_policy_gives_the_same_bytes(stem: Path, tmp_path: Path):
    policy, meta = load_policy_file(stem)
    save_policy(tmp_path / "again", policy, meta)
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / (stem.name + suffix)).read_bytes()


def test_a_dot_in_the_name_is_not_a_suffix(tmp_path: Path):
    save_policy(tmp_path / "v1.0", TanhGaussianPolicy(1, (2,), 1), {})
    load_policy_file(tmp_path / "v1.0")
    assert (tmp_path / "v1.0.safetensors").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("keep", [0, 40, -1])
def test_cut_files_are_refused_by_name(stem: Path, suffix: str, keep: int):
    path = stem.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[: keep or None] if keep else b"")
    if suffix == ".json" and keep == -1:
        load_policy_file(stem)  # only the final newline is gone
        return
    with pytest.raises(FocalError, match=stem.name + suffix):
        load_policy_file(stem)


def test_missing_files_are_refused_by_name(stem: Path):
    stem.with_suffix(".safetensors").unlink()
    with pytest.raises(FocalError, match=r"step_000050000\.safetensors is missing"):
        load_policy_file(stem)
    stem.with_suffix(".json").unlink()
    with pytest.raises(FocalError, match=r"step_000050000\.json is missing"):
        load_policy_file(stem)


def edited(stem: Path, **changes: object) -> None:
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "focal-policy/2"}, "focal-policy/2"),
        ({"class": "os.system"}, "unknown field 'class'"),
        ({"architecture": {"inputs": 3}}, "lacks 'action_dim'"),
        ({"sha256": "0" * 64}, "sha256"),
    ],
)
def test_other_formats_and_unknown_fields_are_refused(stem: Path, changes: dict, message: str):
    edited(stem, **changes)
    with pytest.raises(FocalError, match=message):
        load_policy_file(stem)


def test_a_key_twice_is_refused(stem: Path):
    path = stem.with_suffix(".json")
    path.write_text(path.read_text().replace("{", '{"format": "focal-policy/1",', 1))
    with pytest.raises(FocalError, match="is damaged \\(the key 'format' is there twice\\)"):
        load_policy_file(stem)


@pytest.mark.parametrize(
    "change",
    [{"hidden": [10**9]}, {"hidden": "8,6"}, {"inputs": True}, {"inputs": 4}, {"log_std_max": -30.0}, {"act": "relu"}],
)
def test_architectures_that_do_not_fit_are_refused(stem: Path, change: dict):
    architecture = json.loads(stem.with_suffix(".json").read_text())["architecture"]
    edited(stem, architecture=architecture | change)
    with pytest.raises(FocalError, match="step_000050000"):
        load_policy_file(stem)


def test_weights_that_the_architecture_does_not_ask_for_are_refused(stem: Path):
    policy, _ = load_policy_file(stem)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for broken, message in (
        (state | {"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({name: tensor for name, tensor in state.items() if name != "mean.bias"}, "lacks 'mean.bias'"),
        (state | {"mean.bias": torch.zeros(2, dtype=torch.float64)}, "mean.bias"),
        (state | {"mean.bias": torch.full((2,), torch.nan)}, "NaN"),
    ):
        content = safetensors.torch.save(broken)
        stem.with_suffix(".safetensors").write_bytes(content)
        edited(stem, sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(FocalError, match=message):
            load_policy_file(stem)


def test_layers_that_the_file_cannot_hold_are_refused_before_memory_is_asked_for(stem: Path):
    architecture = json.loads(stem.with_suffix(".json").read_text())["architecture"]
    edited(stem, architecture=architecture | {"hidden": [65_536] * 30})
    asked = 4 * ((architecture["inputs"] + 1) * 65_536 + 29 * 65_537 * 65_536 + 2 * 65_537 * architecture["action_dim"])
    with pytest.raises(FocalError, match=f"safetensors has [0-9]+ bytes, expected {asked} and more for its layers"):
        load_policy_file(stem)
