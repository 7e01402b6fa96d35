"""Policies as files: `NAME.safetensors` with the weights and `NAME.json` with the architecture. Nothing is unpickled.

    step_000050000.safetensors   body.0.weight, body.0.bias, ..., mean.weight, mean.bias, log_std.weight, log_std.bias
    step_000050000.json          {"format": "focal-policy/1", "architecture": {...}, "sha256": ..., "meta": {...}}

The JSON file is written last and holds the digest of the weights: a pair cut in between does not load.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import FocalError
from ..files import write_json
from .files import JSON_LIMIT, one_line, parse_json, read_bytes, sha256, write_bytes
from .networks import TanhGaussianPolicy

FORMAT = "focal-policy/1"
_WIDTH_LIMIT = 65_536  # refuses a hostile architecture before memory is asked for
_DEPTH_LIMIT = 32
_WEIGHTS_LIMIT = 512 * 2**20
_REMEDY = "copy the policy again from its source, or regenerate the collection"


def save_policy(path_without_suffix: Path, policy: TanhGaussianPolicy, meta: Mapping[str, Any]) -> None:
    """Write `policy` and the JSON values `meta` (what it was trained on, its step, ...) atomically."""
    weights, description = policy_files(path_without_suffix)
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in policy.state_dict().items()})
    write_bytes(weights, content)
    entry = {"format": FORMAT, "architecture": policy.architecture, "sha256": sha256(content), "meta": dict(meta)}
    write_json(description, entry)


def load_policy_file(path: Path) -> tuple[TanhGaussianPolicy, dict[str, Any]]:
    """Read a policy from its path, with or without suffix; see `load_policy`. A missing file is a `FocalError`."""
    weights, _ = policy_files(path)
    stem = str(weights).removesuffix(".safetensors")
    return load_policy(lambda suffix, limit: read_bytes(Path(stem + suffix), limit, _REMEDY), stem)


def load_policy(read: Callable[[str, int], bytes], where: str) -> tuple[TanhGaussianPolicy, dict[str, Any]]:
    """Decode a policy whose two files `read(suffix, limit)` gives. Returns it, on the CPU, with its `meta`.

    `where` is what messages call it, without suffix. Raises `FocalError` when a file is cut or altered, of another
    format version, has unknown fields, or weights that the architecture does not ask for.
    """
    description, weights = f"{where}.json", f"{where}.safetensors"
    entry = parse_json(read(".json", JSON_LIMIT), description, _REMEDY)
    if entry.get("format") != FORMAT:
        raise FocalError(f"{description} has format {entry.get('format')!r}, expected {FORMAT!r}; {_REMEDY}")
    _expect_keys(entry, {"format", "architecture", "sha256", "meta"}, description)
    architecture = _check_architecture(entry["architecture"], description)
    content = read(".safetensors", _WEIGHTS_LIMIT)
    if (asked := _parameter_bytes(architecture)) > len(content):  # before memory is asked for
        raise FocalError(f"{weights} has {len(content)} bytes, expected {asked} and more for its layers; {_REMEDY}")
    policy = TanhGaussianPolicy(**architecture)
    if sha256(content) != entry["sha256"]:
        name = description.rpartition("/")[2]
        raise FocalError(f"{weights} differs from the sha256 in {name}: cut or altered; {_REMEDY}")
    load_exactly(policy, read_tensors(content, weights, _REMEDY), weights, _REMEDY)
    return policy, entry["meta"]


def policy_files(path: Path) -> tuple[Path, Path]:
    """Return the paths of the weights and of the description for a path with or without suffix."""
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(stem + ".safetensors"), path.with_name(stem + ".json")


def read_tensors(content: bytes, path: object, remedy: str) -> dict[str, Tensor]:
    """Decode the bytes of a safetensors file. Raises `FocalError` naming `path` when they are no such file."""
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise FocalError(f"{path} is damaged ({one_line(error)}); {remedy}") from None


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Copy `tensors` into `network`. Raises `FocalError` unless names, shapes and dtypes are exactly the network's."""
    expected = network.state_dict()
    if odd := sorted(set(expected) ^ set(tensors)):
        verb = "lacks" if odd[0] in expected else "has an unknown tensor"
        raise FocalError(f"{where} {verb} '{odd[0]}'; {remedy}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise FocalError(f"{where}: '{name}' is {found}, expected {tuple(wanted.shape)} {wanted.dtype}; {remedy}")
        if not bool(torch.isfinite(tensor).all()):
            raise FocalError(f"{where}: '{name}' holds NaN or infinity; {remedy}")
    network.load_state_dict(tensors)


def _expect_keys(values: Mapping[str, Any], expected: set[str], path: str) -> None:
    if odd := sorted(set(values) ^ expected):
        verb = "lacks" if odd[0] in expected else "has an unknown field"
        raise FocalError(f"{path} {verb} '{odd[0]}'; {_REMEDY}")


def _parameter_bytes(architecture: Mapping[str, Any]) -> int:
    widths = [architecture["inputs"], *architecture["hidden"]]
    body = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    return 4 * (body + 2 * (widths[-1] + 1) * architecture["action_dim"])


def _check_architecture(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise FocalError(f"{path}: 'architecture' is not a JSON object; {_REMEDY}")
    _expect_keys(values, {"inputs", "hidden", "action_dim", "log_std_min", "log_std_max"}, path)
    hidden = values["hidden"]
    widths = [values["inputs"], values["action_dim"], *(hidden if isinstance(hidden, list) else [None])]
    if len(widths) > _DEPTH_LIMIT or not all(type(width) is int and 0 < width <= _WIDTH_LIMIT for width in widths):
        raise FocalError(f"{path}: layer widths {widths} are not integers from 1 to {_WIDTH_LIMIT}; {_REMEDY}")
    bounds = [values["log_std_min"], values["log_std_max"]]
    if not all(type(bound) in (int, float) and math.isfinite(bound) for bound in bounds) or bounds[0] > bounds[1]:
        raise FocalError(f"{path}: log_std bounds {bounds} are not two ordered numbers; {_REMEDY}")
    return values
