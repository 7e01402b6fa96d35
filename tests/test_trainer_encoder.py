"""Both encoders: symmetry for any context, and the posterior and its KL against values worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from focal.trainer.encoder import DeterministicEncoder, ProbabilisticEncoder, gaussian_kl, product_of_gaussians

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def encoders() -> list[DeterministicEncoder | ProbabilisticEncoder]:
    made = DeterministicEncoder(4, (16, 16), 3), ProbabilisticEncoder(4, (16, 16), 3, prior_std=1.0)
    return [encoder.double() for encoder in made]


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, tasks=st.integers(1, 4), size=st.integers(1, 40))
def test_the_order_of_transitions_is_immaterial(seed: int, tasks: int, size: int):
    context = draw(seed, tasks, size, 4)
    shuffled = context[:, torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    for encoder in encoders():
        assert torch.allclose(encoder(shuffled), encoder(context), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, size=st.integers(1, 20), times=st.integers(2, 5))
def test_an_embedding_means_the_same_for_every_context_size(seed: int, size: int, times: int):
    """The same evidence `times` over: the same embedding, and a posterior as much narrower."""
    context = draw(seed, 2, size, 4)
    repeated = context.repeat(1, times, 1)
    for encoder in encoders():
        assert torch.allclose(encoder(repeated), encoder(context), atol=1e-12)
    probabilistic = encoders()[1]
    assert torch.allclose(probabilistic.posterior(repeated)[1] * times, probabilistic.posterior(context)[1])


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, size=st.integers(1, 20), scale=st.floats(0.0, 1e3))
def test_embeddings_stay_in_the_unit_box(seed: int, size: int, scale: float):
    for encoder in encoders():
        assert encoder(scale * draw(seed, 3, size, 4)).abs().max() <= 1.0


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, size=st.integers(2, 20))
def test_the_deterministic_embedding_of_a_union_is_the_weighted_mean(seed: int, size: int):
    context = draw(seed, 1, size, 4)
    encoder = encoders()[0]
    parts = encoder(context[:, :1]) + (size - 1) * encoder(context[:, 1:])
    assert torch.allclose(encoder(context), parts / size, atol=1e-12)


def test_product_of_gaussians_by_hand():
    # N(1, 1/2) N(3, 1): precision 2 + 1 = 3, mean (2 * 1 + 1 * 3) / 3
    mean, variance = product_of_gaussians(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [1.0]]))
    assert variance.item() == pytest.approx(1 / 3)
    assert mean.item() == pytest.approx(5 / 3)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, size=st.integers(1, 5))
def test_product_of_gaussians_is_the_normalised_product_of_densities(seed: int, size: int):
    means, variances = draw(seed, size, 1), draw(seed + 1, size, 1).exp()
    mean, variance = product_of_gaussians(means, variances)
    points = torch.linspace(-2, 2, 5, dtype=torch.float64)
    product = Normal(means, variances.sqrt()).log_prob(points).sum(0)  # up to a constant
    posterior = Normal(mean, variance.sqrt()).log_prob(points)
    assert torch.allclose(product - product[0], posterior - posterior[0], atol=1e-8)


def test_a_vanishing_variance_stays_finite():
    mean, variance = product_of_gaussians(torch.tensor([[0.5], [-0.5]]), torch.tensor([[0.0], [1.0]]))
    assert mean.item() == pytest.approx(0.5, abs=1e-5)
    assert 0 < variance.item() < 1e-6


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, prior_std=st.floats(0.05, 3.0))
def test_kl_agrees_with_torch_distributions(seed: int, prior_std: float):
    mean, variance = draw(seed, 4, 3), draw(seed + 1, 4, 3).exp()
    posterior = Independent(Normal(mean, variance.sqrt()), 1)
    prior = Independent(Normal(torch.zeros_like(mean), prior_std * torch.ones_like(mean)), 1)
    assert torch.allclose(gaussian_kl(mean, variance, prior_std), kl_divergence(posterior, prior))


def test_posterior_of_a_linear_encoder_by_hand():
    encoder = ProbabilisticEncoder(1, (), 1, prior_std=1.0)
    with torch.no_grad():
        encoder.network.body[0].weight[:] = torch.tensor([[1.0], [0.0]])  # mean tanh(x), variance softplus(0.5413)
        encoder.network.body[0].bias[:] = torch.tensor([0.0, 0.5413249])  # softplus(0.5413249) = 1
    mean, variance = encoder.posterior(torch.tensor([[0.5], [-2.0]]))
    assert variance.item() == pytest.approx(0.5)
    assert mean.item() == pytest.approx((0.4621172 - 0.9640276) / 2, abs=1e-6)


def test_training_samples_the_posterior_and_gradient_reaches_both_heads():
    encoder = encoders()[1]
    context = draw(0, 2, 7, 4)
    mean, variance = encoder.posterior(context)
    generator = torch.Generator().manual_seed(3)
    samples = torch.stack([encoder.infer(context, generator)[0] for _ in range(2000)])
    assert torch.allclose(samples.mean(0), mean, atol=4 * (variance.max().sqrt() / 2000**0.5).item())
    assert torch.allclose(samples.var(0), variance, rtol=0.2)
    embeddings, kl = encoder.infer(context, generator)
    assert kl.shape == (2,)
    for loss in (embeddings.sum(), kl.sum()):
        weight = torch.autograd.grad(loss, encoder.network.body[-1].weight, retain_graph=True)[0]
        assert (weight.abs().sum(dim=1) > 0).all()  # the rows of means and of variances


def test_the_deterministic_encoder_has_no_kl():
    encoder = encoders()[0]
    context = draw(0, 2, 7, 4)
    embeddings, kl = encoder.infer(context)
    assert torch.equal(embeddings, encoder(context))
    assert kl.tolist() == [0, 0]
