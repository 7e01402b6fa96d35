"""Many small networks of one shape evaluated together, as batched matrix products: MBML's networks of one task each.

Initial weights are the same for every task, as are the random numbers that stage one draws, so that what a task learns
does not depend on which tasks learn beside it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

_ROWS_ALONE = 256  # of each network, from which a CPU is faster with one network after the other, by about a fifth


class StackedMLP(nn.Module):
    """`copies` x `tasks` MLPs with ReLU between layers; all tasks of a copy start from the same weights.

    Maps (copies * tasks, ..., inputs) to (copies * tasks, ..., outputs), copy by copy. Weights and biases are uniform
    in +-1/sqrt(fan_in), those of the last layer in +-`last_bound` where one is given, as in `networks.MLP`. State names
    are `weights.0` (copies * tasks, inputs, width), `biases.0` (copies * tasks, 1, width), ...
    """

    def __init__(
        self,
        copies: int,
        tasks: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generator: torch.Generator,
        last_bound: float | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for number, width in enumerate((*hidden, outputs)):
            last = number == len(hidden)
            bound = last_bound if last and last_bound is not None else 1.0 / math.sqrt(inputs)
            weight, bias = torch.empty(copies, inputs, width), torch.empty(copies, 1, width)
            for tensor, parameters in ((weight, self.weights), (bias, self.biases)):
                tensor.uniform_(-bound, bound, generator=generator)
                parameters.append(nn.Parameter(tensor.repeat_interleave(tasks, dim=0)))
            inputs = width

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (copies * tasks, ..., inputs) to (copies * tasks, ..., outputs)."""
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        layers = list(zip(self.weights, self.biases, strict=True))
        if torch.is_grad_enabled() or inputs.device.type != "cpu" or rows.shape[1] < _ROWS_ALONE:
            outputs = _through(layers, rows)
        else:  # network by network: each product finds in the cache what the one before it made
            networks = (slice(number, number + 1) for number in range(len(rows)))
            outputs = torch.cat([_through([(w[one], b[one]) for w, b in layers], rows[one]) for one in networks])
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1]).to(inputs.dtype)


class StackedStateActionNet(StackedMLP):
    """One action value per task."""

    def __init__(
        self, tasks: int, state_dim: int, action_dim: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__(1, tasks, state_dim + action_dim, hidden, 1, generator, last_bound=3e-3)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Map (K, ..., state_dim) and (K, ..., act_dim) to (K, ...)."""
        return super().forward(torch.cat([states, actions], dim=-1)).squeeze(-1)


class StackedTwinCritic(nn.Module):
    """Two action values per task, from different initial weights."""

    def __init__(
        self, tasks: int, state_dim: int, action_dim: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.first = StackedStateActionNet(tasks, state_dim, action_dim, hidden, generator)
        self.second = StackedStateActionNet(tasks, state_dim, action_dim, hidden, generator)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Map (K, ..., state_dim) and (K, ..., act_dim) to both values, (2, K, ...)."""
        return torch.stack([self.first(states, actions), self.second(states, actions)])


def stacked(tasks: int, generator: torch.Generator) -> Callable[[int, Sequence[int], int], nn.Module]:
    """Return a builder of one network per task, for the networks of bcq.py."""
    return lambda inputs, hidden, outputs: StackedMLP(1, tasks, inputs, hidden, outputs, generator)


def _through(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        rows = torch.baddbmm(bias, rows, weight)
        if number + 1 < len(layers):
            rows = relu(rows, inplace=True)  # a product keeps its factors, not its result
    return rows


def of_tasks(network: nn.Module, tasks: Tensor, *inputs: Tensor) -> Tensor:
    """Evaluate a stacked network with the weights of `tasks` (K,) alone, on `inputs` of K tasks."""
    weights = {name: parameter[tasks] for name, parameter in network.named_parameters()}
    return functional_call(network, weights, inputs)
