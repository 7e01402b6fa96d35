"""Taking gradient steps: what every method does with its losses."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]  # by name "owner/what", each ()


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Return Adam on `parameters`."""
    # fused: one pass over the weights, 3 to 4 times faster than the loop on a CPU core
    return torch.optim.Adam(list(parameters), lr=learning_rate, fused=True)


def descend(optimiser: torch.optim.Adam, loss: Tensor, also: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Move the parameters of `optimiser` down `loss` (), and nothing else.

    Gradients are taken with respect to these parameters alone (and `also`), so none is computed for, or left on,
    another network: an actor step costs no gradient of the critic's weights. Returns the norm () of the parameters'
    gradient, and the gradient in `also`.
    """
    parameters = optimiser.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, parameters if also is None else [*parameters, also])
    norm = take_step(optimiser, gradients[: len(parameters)])
    return norm, None if also is None else gradients[-1]


def take_step(optimiser: torch.optim.Adam, gradients: Sequence[Tensor]) -> Tensor:
    """Move the parameters of `optimiser` by their `gradients`. Returns the norm () of all of these together."""
    for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))


def matrix_precision(precision: Literal["fp32", "bf16"], device: torch.device) -> torch.autocast:
    """Return the context in which a gradient step's matrix products have this precision."""
    # a cache would keep the casts of weights that have since stepped
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move the target network a share `tau` of the way to `source`, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
