"""Networks shared by both stages: multilayer perceptrons, the tanh-Gaussian policy, twin action values.

Inputs are `(..., inputs)`; any leading axes. Every network is initialised from a generator (without one, from a fresh
generator of fixed seed), so that torch's global random state is neither used nor moved.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


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
        return _by_rows(self.body, inputs)


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
        return self.mean(features), self.log_std(features).clamp(*bounds)

    def sample(self, inputs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return reparameterised actions (..., action_dim) and their log-probabilities (...,)."""
        mean, log_std = self(inputs)
        return sample_tanh_gaussian(mean, log_std, generator)

    def mode(self, inputs: Tensor) -> Tensor:
        """Return the deterministic actions tanh(mean), (..., action_dim)."""
        return torch.tanh(self.mean(_by_rows(self.body, inputs)))


def sample_tanh_gaussian(
    mean: Tensor, log_std: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return actions (..., action_dim) = tanh(u), u ~ N(mean, exp(log_std)^2), and their log-probabilities (...,).

    log p(a) = sum over dimensions of log N(u) - log(1 - tanh(u)^2), the last computed as 2 (log 2 - u - softplus(-2u)),
    exact where the released log(1 - a^2 + 1e-6) saturates.
    """
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    unsquashed = mean + log_std.exp() * noise
    squash = 2.0 * (_LOG_2 - unsquashed - nn.functional.softplus(-2.0 * unsquashed))
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
        return _by_rows(self.body, torch.cat([states, actions], dim=-1)).squeeze(-1)


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


def _by_rows(layers: nn.Module, inputs: Tensor) -> Tensor:
    """Apply `layers` to (..., inputs) as a matrix of rows.

    A linear layer on more axes returns a view, on which an in-place ReLU costs autograd two copies per layer.
    """
    return layers(inputs.reshape(-1, inputs.shape[-1])).reshape(*inputs.shape[:-1], -1)


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
