"""The context encoders q(z | c) of the paper's section 4.1: permutation-invariant, deterministic or probabilistic.

Both map contexts (..., N, context_dim) to task embeddings (..., L): `forward` to those that meta-testing acts on,
`infer` to those that training learns from, with their KL terms. The order and the number of transitions do not change
what an embedding means.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .networks import MLP

_SMALLEST_VARIANCE = 1e-7  # of one transition's Gaussian (reference-facts 5.1)


class DeterministicEncoder(nn.Module):
    """z = mean over the context's transitions of tanh(MLP(transition)), so z lies in (-1, 1)^L.

    tanh before the mean as in the released code (reference-facts 3.1).
    """

    def __init__(
        self, context_dim: int, hidden: Sequence[int], latent_dim: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.network = MLP(context_dim, hidden, latent_dim, generator)
        self.latent_dim = latent_dim

    def forward(self, context: Tensor) -> Tensor:
        """Map context (..., N, context_dim) to task embeddings (..., L)."""
        return torch.tanh(self.network(context)).mean(dim=-2)

    def infer(self, context: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the embeddings (..., L) that training uses, here `forward`'s, and their KL terms (...,), here 0."""
        embeddings = self(context)
        return embeddings, embeddings.new_zeros(embeddings.shape[:-1])

    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the embeddings (count, L) of tasks of which nothing is known: 0, as in the released code."""
        return torch.zeros(count, self.latent_dim, device=generator.device)


class ProbabilisticEncoder(nn.Module):
    """q(z | c) = product over the context's transitions of N(mean, variance), each from tanh(MLP) and softplus(MLP).

    The posterior of PEARL (arXiv 1903.08254, section 4.1). `bounded` means go through tanh as the deterministic
    embeddings do, so that both variants live in the same space; Contextual BCQ and MBML leave them unbounded.
    Departure: the released code puts tanh on the variance's output too, which confines each variance to [0.31, 1.31]
    (reference-facts 5.1).
    """

    def __init__(
        self,
        context_dim: int,
        hidden: Sequence[int],
        latent_dim: int,
        prior_std: float,
        generator: torch.Generator | None = None,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        self.network = MLP(context_dim, hidden, 2 * latent_dim, generator)
        self.latent_dim, self.prior_std, self.bounded = latent_dim, prior_std, bounded

    def factors(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of every transition's Gaussian, each (..., N, L)."""
        mean, spread = self.network(context).chunk(2, dim=-1)
        return torch.tanh(mean) if self.bounded else mean, softplus(spread)

    def posterior(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of z, each (..., L), for context (..., N, context_dim)."""
        return product_of_gaussians(*self.factors(context))

    def forward(self, context: Tensor) -> Tensor:
        """Map context (..., N, context_dim) to the posterior's means (..., L), in (-1, 1)^L where `bounded`."""
        return self.posterior(context)[0]

    def infer(self, context: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return reparameterised samples (..., L) of the posterior and its KL from N(0, prior_std^2), (...,)."""
        mean, variance = self.posterior(context)
        return sample_gaussian(mean, variance, generator), gaussian_kl(mean, variance, self.prior_std)

    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the embeddings (count, L) of tasks of which nothing is known."""
        return self.prior_std * torch.randn(count, self.latent_dim, generator=generator, device=generator.device)


def sample_gaussian(mean: Tensor, variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a reparameterised sample of N(mean, variance), shaped like both."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + variance.sqrt() * noise


def product_of_gaussians(means: Tensor, variances: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and variance, each (..., L), of the normalised product of N Gaussians (..., N, L).

    1 / variance = sum of 1 / variances, mean = variance * sum of means / variances, over the N where the bool `mask`
    (..., N) is True. Over none of them it is N(0, 1e7), which has no meaning but finite gradients.
    """
    precisions = 1.0 / variances.clamp_min(_SMALLEST_VARIANCE)
    if mask is not None:
        precisions = precisions * mask.unsqueeze(-1)
    variance = 1.0 / precisions.sum(dim=-2).clamp_min(_SMALLEST_VARIANCE)
    return variance * (means * precisions).sum(dim=-2), variance


def gaussian_kl(mean: Tensor, variance: Tensor, prior_std: float) -> Tensor:
    """Return KL(N(mean, variance) || N(0, prior_std^2)), summed over the L dimensions of (..., L), (...,)."""
    ratio = variance / prior_std**2
    return 0.5 * (ratio + (mean / prior_std).square() - 1.0 - ratio.log()).sum(dim=-1)


def build_context(
    observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor | None = None
) -> Tensor:
    """Join transitions into context rows [observation, action, reward(, next observation)].

    `observations` (..., obs_dim) after the run's `ObservationTransform`, `actions` (..., act_dim), `rewards` (...,)
    unscaled, `next_observations` like `observations` or None. Returns (..., context_dim).
    """
    parts = [observations, actions, rewards.unsqueeze(-1)]
    return torch.cat(parts if next_observations is None else [*parts, next_observations], dim=-1)


def context_width(observation_dim: int, action_dim: int, next_observation: bool) -> int:
    """Return the width of the rows that `build_context` makes."""
    return observation_dim + action_dim + 1 + (observation_dim if next_observation else 0)
