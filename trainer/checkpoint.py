"""Checkpoints that continue bit for bit: networks, targets, Adam moments, scalars, random states, step.

    checkpoints/step_000002000/state.safetensors   network/critic/first.body.0.weight, optimiser/critic/0/exp_avg,
                                                   scalar/alpha, generator/training, ...
    checkpoints/step_000002000/state.json          {"format", "step", "device", "sha256"}

A folder is written under a temporary name, synced and renamed; the last and the one before are kept. No pickle.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import FocalError
from ..files import sync, write_json
from .files import read_json, sha256, write_bytes
from .learner import Trainable
from .policies import load_exactly, read_tensors

FORMAT = "focal-checkpoint/1"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam remembers of a parameter


def save_checkpoint(folder: Path, step: int, learner: Trainable, generators: Mapping[str, torch.Generator]) -> Path:
    """Write the whole state of training after `step` into `folder`; returns the checkpoint's path.

    Removes all but it and the newest one before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    final = folder / f"step_{step:09d}"
    temporary = folder / f".tmp-{final.name}"
    temporary.mkdir()
    content = safetensors.torch.save(_collect(learner, generators))
    try:
        write_bytes(temporary / "state.safetensors", content)
        write_json(
            temporary / "state.json",
            {"format": FORMAT, "step": step, "device": _device(learner), "sha256": sha256(content)},
        )
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(folder)
    for old in list_checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first; none where it does not exist."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{9,}", path.name))


def load_checkpoint(path: Path, learner: Trainable, generators: Mapping[str, torch.Generator]) -> int:
    """Put the state saved at `path` into `learner` and `generators`; returns its step.

    Raises `FocalError` naming the damaged file and the command to continue with, and then changes nothing that matters:
    the caller stops.
    """
    description, tensors = _read(path)
    remedy, where = _remedy(path), str(path / "state.safetensors")
    device = _device(learner)
    if description["device"] != device:
        raise FocalError(
            f"{path} was saved on {description['device']}, this is {device}, and random states do not carry over; "
            f"continue where there is one, with --device {description['device']}"
        )
    for name, network in learner.networks.items():
        load_exactly(network, _take(tensors, f"network/{name}/"), f"{where} {name}", remedy)
    for name, optimiser in learner.optimisers.items():
        _load_adam(optimiser, _take(tensors, f"optimiser/{name}/"), f"{where} {name}", remedy)
    scalars, states = _take(tensors, "scalar/"), _take(tensors, "generator/")
    if tensors or set(scalars) != set(learner.scalars) or set(states) != set(generators):
        raise FocalError(f"{where} does not hold the state of these settings; {remedy}")
    for name, scalar in learner.scalars.items():
        scalar.data.copy_(scalars[name])
    for name, generator in generators.items():
        generator.set_state(states[name])
    return int(description["step"])


def load_networks(path: Path, networks: Mapping[str, torch.nn.Module]) -> int:
    """Load only the named networks of a checkpoint, for acting; returns its step. Raises `FocalError` when damaged."""
    description, tensors = _read(path)
    for name, network in networks.items():
        where = f"{path / 'state.safetensors'} {name}"
        load_exactly(network, _take(tensors, f"network/{name}/"), where, _remedy(path))
    return int(description["step"])


def _device(learner: Trainable) -> str:
    return next(next(iter(learner.networks.values())).parameters()).device.type


def _collect(learner: Trainable, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, network in learner.networks.items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    for name, optimiser in learner.optimisers.items():
        for index, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{name}/{index}/{key}": moments[key] for key in _MOMENTS}
    tensors |= {f"scalar/{name}": scalar for name, scalar in learner.scalars.items()}
    tensors |= {f"generator/{name}": generator.get_state() for name, generator in generators.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = _remedy(path)
    description = read_json(path / "state.json", remedy)
    if description.get("format") != FORMAT:
        found = description.get("format")
        raise FocalError(f"{path / 'state.json'} has format {found!r}, expected {FORMAT!r}; {remedy}")
    if set(description) != {"format", "step", "device", "sha256"} or type(description["step"]) is not int:
        raise FocalError(f"{path / 'state.json'} lacks a field or has one too many; {remedy}")
    weights = path / "state.safetensors"
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise FocalError(f"{weights} cannot be read ({error.strerror}); {remedy}") from None
    if sha256(content) != description["sha256"]:
        raise FocalError(f"{weights} differs from its sha256 in state.json: cut or altered; {remedy}")
    return description, read_tensors(content, weights, remedy)


def _remedy(path: Path) -> str:
    earlier = [other for other in list_checkpoints(path.parent) if other < path]
    outcome = f"continue from step {int(earlier[-1].name[5:])}" if earlier else "start this seed again"
    return f"to {outcome}: rm -r '{path}' and focal-cli train ... --resume"


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove and return the tensors under `prefix`, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _load_adam(optimiser: torch.optim.Adam, tensors: dict[str, Tensor], where: str, remedy: str) -> None:
    """Restore Adam's moments; an optimiser that had not stepped has none."""
    parameters = optimiser.param_groups[0]["params"]
    expected = {
        f"{index}/{key}": (torch.Size([]) if key == "step" else parameter.shape)
        for index, parameter in enumerate(parameters)
        for key in _MOMENTS
    }
    if tensors and {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise FocalError(f"{where}: the optimiser's moments do not fit these settings; {remedy}")
    state = {index: {key: tensors[f"{index}/{key}"] for key in _MOMENTS} for index in range(len(parameters)) if tensors}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
