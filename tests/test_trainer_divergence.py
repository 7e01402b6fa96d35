"""Dual divergences and the gradient penalty against values worked by hand."""

import math

import pytest
import torch

from focal.trainer.divergence import discriminator_loss, dual_divergence, gradient_penalty, policy_divergence
from focal.trainer.networks import StateActionNet


def linear_discriminator(weight: list[float], state_dim: int = 2) -> StateActionNet:
    """c(s, a) = weight . a: its slope in the action is |weight| everywhere."""
    network = StateActionNet(state_dim, len(weight), hidden=())
    with torch.no_grad():
        network.body[0].weight[:] = torch.tensor([[5.0] * state_dim + weight])  # the state's weight must not count
        network.body[0].bias.zero_()
    return network


def test_kl_estimate_at_score_zero():
    # g = log 2 = 0.693147: -0.693147 + log(0.693147) + 1 = -0.693147 - 0.366513 + 1
    assert dual_divergence("kl", torch.zeros(()), torch.zeros(())).item() == pytest.approx(-0.0597, abs=5e-5)


def test_kl_estimate_at_a_worked_point():
    # policy score 2: g = log(1 + e^2) = 2.126928, log g = 0.754679; logged score -1: g = log(1 + e^-1) = 0.313262
    estimate = dual_divergence("kl", torch.tensor(2.0), torch.tensor(-1.0)).item()
    assert estimate == pytest.approx(-0.313262 + 0.754679 + 1.0, abs=1e-5)


def test_wasserstein_estimate_is_the_difference_of_scores():
    assert dual_divergence("wasserstein", torch.tensor(2.0), torch.tensor(-1.0)).item() == 3.0


@pytest.mark.parametrize(("weight", "norm"), [([3.0, 4.0], 5.0), ([0.6, 0.0], 0.6)])
def test_slope_of_a_linear_discriminator_is_the_norm_of_its_weight(weight, norm):
    generator = torch.Generator().manual_seed(0)
    states, policy, logged = torch.randn(4, 8, 2), torch.rand(4, 8, 2), torch.rand(4, 8, 2)
    penalty, slope = gradient_penalty(linear_discriminator(weight), states, policy, logged, generator)
    assert slope.item() == pytest.approx(norm, rel=1e-5)
    assert penalty.item() == pytest.approx(max(norm - 1, 0) ** 2, abs=1e-5)


def test_the_penalty_is_a_gradient_and_trains_the_slope_down():
    """The released code penalises the output instead: a large constant score would be punished, a steep one not."""
    discriminator = linear_discriminator([3.0, 4.0])
    data = torch.zeros(1, 4, 2), torch.rand(1, 4, 2), torch.rand(1, 4, 2)
    penalty, _ = gradient_penalty(discriminator, *data, torch.Generator().manual_seed(0))
    penalty.backward()
    # d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w| = 8 * (0.6, 0.8); state weights and bias do not enter
    assert torch.allclose(discriminator.body[0].weight.grad, torch.tensor([[0.0, 0.0, 4.8, 6.4]]), atol=1e-4)
    with torch.no_grad():
        discriminator.body[0].weight.zero_()
        discriminator.body[0].bias.fill_(100.0)
    assert gradient_penalty(discriminator, *data)[0].item() == 0


def test_discriminator_loss_is_minus_the_estimate_plus_the_weighted_penalty():
    # Wasserstein, c = 3 a: scores 3 * 0.5 and 3 * (-0.5), estimate 3; slope 3, penalty (3 - 1)^2 = 4
    policy, logged = torch.full((2, 3, 1), 0.5), torch.full((2, 3, 1), -0.5)
    loss, metrics = discriminator_loss(
        linear_discriminator([3.0]), torch.zeros(2, 3, 2), policy, logged, "wasserstein", penalty_weight=5.0
    )
    assert loss.item() == pytest.approx(5 * 4 - 3, rel=1e-5)
    assert metrics["discriminator/slope"].item() == pytest.approx(3.0, rel=1e-5)


def test_divergence_reaches_the_policys_actions_only():
    policy, logged = torch.rand(2, 3, 1, requires_grad=True), torch.rand(2, 3, 1, requires_grad=True)
    policy_divergence(linear_discriminator([3.0]), "wasserstein", torch.zeros(2, 3, 2), policy, logged).sum().backward()
    assert torch.allclose(policy.grad, torch.full_like(policy, 3.0))
    assert logged.grad is None


def trained_estimate(kind: str, policy: tuple[float, float], logged: tuple[float, float], penalty: float) -> float:
    """Divergence of one 1-D Gaussian (mean, deviation) from another, by a trained discriminator on fresh samples."""
    draw, size, steps, rate = torch.Generator().manual_seed(1), 512, 500, 1e-2
    discriminator = StateActionNet(1, 1, (32, 32), draw)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=rate)

    def sample(gaussian: tuple[float, float], count: int) -> torch.Tensor:
        return gaussian[0] + gaussian[1] * torch.randn(1, count, 1, generator=draw)

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss, _ = discriminator_loss(
            discriminator, torch.zeros(1, size, 1), sample(policy, size), sample(logged, size), kind, penalty, draw
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    count = 200_000
    samples = sample(policy, count), sample(logged, count)
    with torch.no_grad():
        return policy_divergence(discriminator, kind, torch.zeros(1, count, 1), *samples).mean().item()


@pytest.mark.parametrize(
    ("policy", "logged"), [((0.3, 0.2), (0.1, 0.2)), ((0.0, 0.15), (0.1, 0.3)), ((0.1, 0.25), (0.0, 0.25))]
)
def test_dual_kl_reaches_the_closed_form_of_gaussians_without_penalty(policy, logged):
    (m, s), (n, t) = policy, logged
    expected = math.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
    assert trained_estimate("kl", policy, logged, penalty=0.0) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shift", [0.2, 0.5])
def test_dual_wasserstein_reaches_the_closed_form_of_shifted_gaussians(shift):
    """W1 of two Gaussians of one deviation is the distance of their means; the penalty stands in for slope <= 1."""
    assert trained_estimate("wasserstein", (shift, 0.1), (0.0, 0.1), penalty=50.0) == pytest.approx(shift, rel=0.05)


def test_d2_penalises_the_output_and_caps_the_kl_estimate():
    """Flat and large is punished, steep and small is not; at |c| = 1 the KL estimate is at most 0.96."""
    discriminator = linear_discriminator([0.0, 0.0])
    data = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    with torch.no_grad():
        discriminator.body[0].bias.fill_(3.0)
    penalty, slope = gradient_penalty(discriminator, *data, of_output=True)
    assert (penalty.item(), slope.item()) == pytest.approx(((3 - 1) ** 2, 3.0))
    steep = linear_discriminator([30.0, 40.0])  # slope 50, output 0 at action 0
    assert gradient_penalty(steep, *data, of_output=True)[0].item() == 0
    assert gradient_penalty(steep, *data)[0].item() == pytest.approx(49.0**2)
    assert dual_divergence("kl", torch.tensor(1.0), torch.tensor(-1.0)).item() == pytest.approx(0.96, abs=5e-3)
    loss, _ = discriminator_loss(discriminator, *data, "wasserstein", 5.0, penalise_output=True)
    assert loss.item() == pytest.approx(5 * 4.0)


@pytest.mark.parametrize("kind", ["kl", "wasserstein"])
def test_a_trained_discriminator_tells_policies_apart(kind):
    """The farther the policy's actions from the logged ones, the larger the divergence; for equal ones about 0."""
    found = []
    for shift in (0.0, 0.3, 0.9):
        draw = torch.Generator().manual_seed(1)
        discriminator = StateActionNet(1, 1, (32,), draw)
        optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
        states = torch.zeros(1, 256, 1)
        for _ in range(150):
            logged = 0.1 * torch.randn(1, 256, 1, generator=draw)
            policy = shift + 0.1 * torch.randn(1, 256, 1, generator=draw)
            loss, _ = discriminator_loss(discriminator, states, policy, logged, kind, 5.0, draw)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append(policy_divergence(discriminator, kind, states, policy, logged).mean().item())
    assert abs(found[0]) < 0.1
    assert found[0] + 0.05 < found[1] < found[2] - 0.1
    assert all(math.isfinite(value) for value in found)
