"""A trained policy for programs without this package: ONNX graphs, weights, and what they take.

    OUT/encoder.onnx         observations (N, obs_dim), actions (N, act_dim), rewards (N,)[, next_observations] ->
                             embedding (L,)
    OUT/policy.onnx          observations (M, obs_dim), embedding (L,) -> actions (M, act_dim), the mode, in [-1, 1]
    OUT/weights.safetensors  encoder/network.body.0.weight, ..., policy/mean.bias
    OUT/policy.json          settings, observation transform, run, sha256 of the other files; written last

Both graphs take raw observations. There are two, so that a task is inferred once and acted in for many steps.
"""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import FocalError
from ..files import atomic_path, write_json
from .agent import PolicyAgent
from .encoder import build_context
from .files import sha256, write_bytes
from .inference import TrainedPolicy

FORMAT = "focal-export/1"
_TOLERANCE = 1e-4  # of outputs in [-1, 1], between torch and onnxruntime
_OPSET = 18


class _Encode(nn.Module):
    """From raw transitions to the embedding."""

    def __init__(self, agent: PolicyAgent) -> None:
        super().__init__()
        self.encoder, self.transform = agent.encoder, agent.transform

    def forward(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor | None = None
    ) -> Tensor:
        following = None if next_observations is None else self.transform(next_observations)
        return self.encoder(build_context(self.transform(observations), actions, rewards, following))


class _Act(nn.Module):
    """From raw observations and the embedding to the policy's mode."""

    def __init__(self, agent: PolicyAgent) -> None:
        super().__init__()
        self.policy, self.transform = agent.policy, agent.transform

    def forward(self, observations: Tensor, embedding: Tensor) -> Tensor:
        seen = self.transform(observations)
        return self.policy.mode(torch.cat([seen, embedding.expand(seen.shape[0], -1)], dim=-1))


def export_policy(policy: TrainedPolicy, out: Path) -> list[Path]:
    """Write a policy into the folder `out`; return the files. The graphs are run in onnxruntime and must agree.

    Raises `FocalError` for a method that does not act by one network, for a run that acts otherwise at a reset (D7),
    where the packages of the extra "export" are missing, or where onnxruntime computes something else (then policy.json
    is not written).
    """
    agent, run = policy.agent, policy.run
    if not isinstance(agent, PolicyAgent):
        raise FocalError(f"{run.settings.algo} picks actions among sampled ones, which no ONNX graph here does; "
                         "export a run of focal or batch-pearl, or use focal.load_policy(RUN)")  # fmt: skip
    if run.settings.raw_reset:
        raise FocalError("this run has released.raw_reset=true, and an ONNX graph cannot know of resets; use "
                         "focal.load_policy(RUN), whose `act` takes at_reset=True")  # fmt: skip
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FocalError(
            f"exporting needs {error.name}; in the checkout: pip install -c constraints.txt -e '.[export]'"
        ) from None
    # examples to trace with; a tensor each, because the tracer takes one tensor for one input
    observations = (7, run.obs_dim)
    context = {"observations": observations, "actions": (7, run.act_dim), "rewards": (7,)}
    if run.settings.next_observation_in_context:
        context["next_observations"] = observations
    state = {"observations": observations, "embedding": (run.settings.latent_dim,)}
    graphs = {"encoder.onnx": (_Encode(agent), context, "embedding"), "policy.onnx": (_Act(agent), state, "actions")}
    for name, (module, shapes, output) in graphs.items():
        inputs = {key: torch.zeros(shape) for key, shape in shapes.items()}
        with atomic_path(out / name) as temporary:
            _write_graph(module.eval(), inputs, output, temporary)
            _compare(module, inputs, temporary, name)
    tensors = {
        f"{owner}/{name}": tensor.cpu().contiguous()
        for owner, network in agent.networks.items()
        for name, tensor in network.state_dict().items()
    }
    write_bytes(out / "weights.safetensors", safetensors.torch.save(tensors))
    names = [*graphs, "weights.safetensors"]
    described: dict[str, Any] = {name: value for name, value in run.to_json().items() if name != "format"}
    digests = {name: sha256((out / name).read_bytes()) for name in names}
    write_json(out / "policy.json", {"format": FORMAT, "seed": policy.seed, "sha256": digests, "run": described})
    return [out / name for name in (*names, "policy.json")]


def _write_graph(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Trace by torch.export and write the graph in one file, rows dynamic."""
    rows = torch.export.Dim("rows")
    shapes = {name: None if name == "embedding" else {0: rows} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=shapes)
        graph = torch.onnx.export(program, opset_version=_OPSET, output_names=[output], verbose=False)
    assert graph is not None, "torch.onnx.export of an exported program returns the graph"
    graph.save(path, external_data=False)


def _compare(module: nn.Module, inputs: dict[str, Tensor], path: Path, name: str) -> None:
    """Raise `FocalError` unless onnxruntime computes what torch does, for two numbers of rows."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    for rows in (1, 33):
        shapes = {key: x.shape if key == "embedding" else (rows, *x.shape[1:]) for key, x in inputs.items()}
        arrays = {key: draw.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        (found,) = session.run(None, arrays)
        with torch.no_grad():
            expected = module(**{key: torch.from_numpy(array) for key, array in arrays.items()}).numpy()
        if found.shape != expected.shape or not np.allclose(found, expected, atol=_TOLERANCE):
            raise FocalError(f"onnxruntime computes something else from {name} than torch; install the versions "
                             "tested, in the checkout: pip install -c constraints.txt -e '.[export]'")  # fmt: skip
