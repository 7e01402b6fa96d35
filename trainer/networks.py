"""Networks shared by both stages: multilayer perceptrons, the tanh-Gaussian policy, twin action values.

Inputs are `(..., inputs)`; any leading axes. Every network is initialised from a generator (without one, from a fresh
generator of fixed seed), so that torch's global random state is neither used nor moved. Outputs have the type of the
inputs, whatever autocast makes of the products in between.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu, softplus

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_ALIGNMENT = 16  # numbers in a cache line


class MLP(nn.Module):
    """ReLU layers of the widths `hidden`, then a linear one. State names are `body.0.weight`, `body.0.bias`, ...

    Weights and biases are uniform in +-1/sqrt(fan_in), those of the last layer in +-`last_bound` where one is given
    (the released code takes the OUTPUT width for fan-in, a slip: reference-facts D15).
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generator: torch.Generator | None = None,
        last_bound: float | None = None,
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator()
        layers, width = _hidden_layers(inputs, hidden, generator)
        self.body = nn.Sequential(*layers, _linear(width, outputs, generator, last_bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return _by_rows(self.body, inputs).to(inputs.dtype)


class TanhGaussianPolicy(nn.Module):
    """A Gaussian squashed into (-1, 1) by tanh, with its mean and log standard deviation from two linear heads.

    FOCAL's policy takes the observation joined to the task embedding, a behaviour policy of stage one the observation
    alone. A stable-baselines3 SAC actor converts by name: `latent_pi` -> `body`, `mu` -> `mean`, `log_std` ->
    `log_std`, bounds [-20, 2]. FOCAL's released bounds are [-20, 0] (reference-facts 3.1).
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        action_dim: int,
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator()
        layers, width = _hidden_layers(inputs, hidden, generator)
        self.body = nn.Sequential(*layers)
        self.mean = _linear(width, action_dim, generator, 1e-3)
        self.log_std = _linear(width, action_dim, generator, 1e-3)
        self.architecture: dict[str, Any] = {
            "inputs": inputs,
            "hidden": list(hidden),
            "action_dim": action_dim,
            "log_std_min": float(log_std_min),
            "log_std_max": float(log_std_max),
        }

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log standard deviation of the Gaussian before tanh, each (..., action_dim)."""
        features = _by_rows(self.body, inputs)
        bounds = self.architecture["log_std_min"], self.architecture["log_std_max"]
        return self.mean(features).to(inputs.dtype), self.log_std(features).to(inputs.dtype).clamp(*bounds)

    def sample(self, inputs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return reparameterised actions (..., action_dim) and their log-probabilities (...,)."""
        mean, log_std = self(inputs)
        return sample_tanh_gaussian(mean, log_std, generator)

    def mode(self, inputs: Tensor) -> Tensor:
        """Return the deterministic actions tanh(mean), (..., action_dim)."""
        return torch.tanh(self.mean(_by_rows(self.body, inputs)).to(inputs.dtype))


def sample_tanh_gaussian(
    mean: Tensor, log_std: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return actions (..., action_dim) = tanh(u), u ~ N(mean, exp(log_std)^2), and their log-probabilities (...,).

    log p(a) = sum over dimensions of log N(u) - log(1 - tanh(u)^2), the last computed as 2 (log 2 - u - softplus(-2u)),
    exact where the released log(1 - a^2 + 1e-6) saturates.
    """
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    unsquashed = mean + log_std.exp() * noise
    squash = 2.0 * (_LOG_2 - unsquashed - softplus(-2.0 * unsquashed))
    log_prob = (-0.5 * noise.square() - log_std - _HALF_LOG_2PI - squash).sum(-1)
    return torch.tanh(unsquashed), log_prob


class StateActionNet(MLP):
    """A scalar for a state and an action: an action value, or the discriminator of a divergence.

    `state_dim` counts the state as the network sees it, observation and task embedding joined.
    """

    def __init__(
        self, state_dim: int, action_dim: int, hidden: Sequence[int], generator: torch.Generator | None = None
    ) -> None:
        super().__init__(state_dim + action_dim, hidden, 1, generator, last_bound=3e-3)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Map (..., state_dim) and (..., action_dim) to (...,)."""
        return _by_rows(self.body, torch.cat([states, actions], dim=-1)).squeeze(-1).to(states.dtype)

    def action_gradient(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the gradient of the scalar in the action, (..., action_dim), differentiable in the weights.

        The chain rule, written out: autograd's double backward gives the same, but sends the second derivative of ReLU,
        which is 0, through the whole network once more.
        """
        inputs = torch.cat([states, actions], dim=-1)
        maps, active = _affine_maps(self.body), []
        with torch.no_grad():  # a small change of the weights switches no unit on or off
            rows = _rows(inputs, maps)
            for weight, bias in maps[:-1]:
                rows = relu(linear(rows, weight, bias), inplace=True)
                active.append(rows.sign())
        gradient = rows.new_ones(len(rows), 1) @ maps[-1][0][:1]  # (rows, last hidden width)
        for (weight, _), mask in zip(reversed(maps[:-1]), reversed(active), strict=True):
            gradient = (gradient * mask) @ weight
        return gradient[:, states.shape[-1] : inputs.shape[-1]].reshape(actions.shape).to(inputs.dtype)


class TwinCritic(nn.Module):
    """Two action values from independent initial weights; targets and policies use the smaller one."""

    def __init__(
        self, state_dim: int, action_dim: int, hidden: Sequence[int], generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator()
        self.first = StateActionNet(state_dim, action_dim, hidden, generator)
        self.second = StateActionNet(state_dim, action_dim, hidden, generator)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Map (..., state_dim) and (..., action_dim) to both values, (2, ...)."""
        return torch.stack([self.first(states, actions), self.second(states, actions)])


def _by_rows(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """Apply `layers`, linear ones with ReLU between them and perhaps at the end, to (..., inputs) as rows of a matrix.

    A linear layer on more axes returns a view, on which an in-place ReLU costs autograd two copies per layer.
    """
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linears:
        return inputs
    maps = _affine_maps(layers)
    rows = _rows(inputs, maps)
    for number, (weight, bias) in enumerate(maps):
        rows = linear(rows, weight, bias)
        if 2 * number + 1 < len(layers):  # a ReLU follows; a linear layer keeps its input, not its output
            rows = relu(rows, inplace=True)
    width = linears[-1].out_features
    return rows[:, :width].reshape(*inputs.shape[:-1], width)


def _affine_maps(layers: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each linear layer, filled up with zeros where a hidden width is no multiple of 16.

    The additional units are always 0 and get no gradient; products of whole cache lines are up to twice as fast
    (docs/benchmarks.md).
    """
    maps: list[tuple[Tensor, Tensor]] = [(x.weight, x.bias) for x in layers if isinstance(x, nn.Linear)]
    if all(weight.shape[1] % _ALIGNMENT == 0 for weight, _ in maps[1:]):
        return maps
    return [
        (
            pad(weight, (0, -weight.shape[1] % _ALIGNMENT, 0, -len(bias) % _ALIGNMENT)),
            pad(bias, (0, -len(bias) % _ALIGNMENT)),
        )
        for weight, bias in maps
    ]


def _rows(inputs: Tensor, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (..., inputs) as a matrix as wide as the first of `maps` takes."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    missing = maps[0][0].shape[1] - rows.shape[1]
    return pad(rows, (0, missing)) if missing else rows


def _hidden_layers(inputs: int, hidden: Sequence[int], generator: torch.Generator) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_linear(inputs, width, generator), nn.ReLU(inplace=True)]  # a Linear keeps its input, not its output
        inputs = width
    return layers, inputs


def _linear(inputs: int, outputs: int, generator: torch.Generator, bound: float | None = None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # the usual constructor draws from the global generator
    bound = 1.0 / math.sqrt(inputs) if bound is None else bound
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
