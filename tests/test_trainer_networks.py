"""Networks: log-probabilities against torch.distributions, initial weights, the encoder's symmetry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from focal.trainer.encoder import DeterministicEncoder, build_context, context_width
from focal.trainer.networks import MLP, StateActionNet, TanhGaussianPolicy, TwinCritic, sample_tanh_gaussian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_log_prob_agrees_with_torch_distributions():
    mean = torch.randn(64, 3, dtype=torch.float64, generator=generator())
    log_std = torch.randn(64, 3, dtype=torch.float64, generator=generator(1)) * 0.5 - 1
    actions, log_prob = sample_tanh_gaussian(mean, log_std, generator(2))
    gaussian = Independent(Normal(mean, log_std.exp()), 1)
    expected = TransformedDistribution(gaussian, TanhTransform()).log_prob(actions)
    assert torch.allclose(log_prob, expected, atol=1e-6)


def test_log_prob_stays_exact_where_tanh_saturates():
    # u = 12 exactly (no noise to speak of): log(1 - tanh(12)^2) = 2 (log 2 - 12) to 1e-10; float32 tanh(12) is 1
    _, log_prob = sample_tanh_gaussian(torch.full((1, 1), 12.0), torch.full((1, 1), -20.0), generator())
    noise = torch.randn(1, 1, generator=generator()).item()
    gaussian = -0.5 * noise**2 + 20.0 - 0.9189385
    assert log_prob.item() == pytest.approx(gaussian - 2 * (0.6931472 - 12.0), rel=1e-5)


def test_policy_reparameterises_and_its_mode_is_tanh_of_the_mean():
    policy = TanhGaussianPolicy(5, (16, 16), 2, generator=generator())
    inputs = torch.randn(4, 7, 5, generator=generator(1))
    actions, log_prob = policy.sample(inputs, generator(2))
    assert actions.shape == (4, 7, 2)
    assert log_prob.shape == (4, 7)
    assert actions.abs().max() <= 1
    gradients = torch.autograd.grad(actions.sum() + log_prob.sum(), list(policy.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert torch.equal(policy.mode(inputs), torch.tanh(policy(inputs)[0]))
    assert torch.equal(policy.sample(inputs, generator(2))[0], actions)


def test_log_std_is_bounded():
    policy = TanhGaussianPolicy(1, (4,), 1, log_std_min=-3.0, log_std_max=0.5, generator=generator())
    with torch.no_grad():
        policy.log_std.bias.fill_(100.0)
        assert policy(torch.zeros(1, 1))[1].item() == 0.5
        policy.log_std.bias.fill_(-100.0)
        assert policy(torch.zeros(1, 1))[1].item() == -3.0


def test_state_names_are_the_ones_files_hold():
    policy = TanhGaussianPolicy(3, (8, 8), 2)
    names = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]
    assert list(policy.state_dict()) == [*names, "mean.weight", "mean.bias", "log_std.weight", "log_std.bias"]


def test_weights_come_from_the_generator_and_leave_global_state_alone():
    before = torch.get_rng_state()
    first, second = (MLP(3, (8,), 2, generator(5)).state_dict() for _ in range(2))
    policy = TanhGaussianPolicy(3, (8,), 2)
    policy.sample(torch.zeros(1, 3), generator())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["body.0.weight"].abs().max() <= 3**-0.5
    assert not torch.equal(first["body.0.weight"], MLP(3, (8,), 2, generator(6)).state_dict()["body.0.weight"])


def test_twins_differ_and_are_stacked():
    critic = TwinCritic(3, 2, (16,), generator())
    states, actions = torch.randn(4, 7, 3), torch.randn(4, 7, 2)
    values = critic(states, actions)
    assert values.shape == (2, 4, 7)
    assert not torch.allclose(values[0], values[1])
    assert torch.equal(values[0], critic.first(states, actions))
    assert StateActionNet(3, 2, (16,))(states[0, 0], actions[0, 0]).shape == ()


def plain(body: torch.nn.Sequential, inputs: torch.Tensor) -> torch.Tensor:
    for layer in body:
        inputs = inputs @ layer.weight.T + layer.bias if isinstance(layer, torch.nn.Linear) else inputs.clamp_min(0)
    return inputs


@settings(deadline=None, max_examples=30)
@given(
    hidden=st.lists(st.sampled_from([1, 7, 16, 20, 32]), max_size=3),
    inputs=st.integers(1, 20), outputs=st.integers(1, 18), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_filling_widths_up_to_cache_lines_changes_no_value_and_no_gradient(hidden, inputs, outputs, seed):
    network = MLP(inputs, hidden, outputs, generator(seed)).double()
    rows = torch.randn(3, 2, inputs, dtype=torch.float64, generator=generator(seed), requires_grad=True)
    ours, expected = network(rows), plain(network.body, rows)
    assert ours.shape == (3, 2, outputs)
    assert torch.allclose(ours, expected, atol=1e-12)
    weights = [rows, *network.parameters()]
    for found, wanted in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (ours, expected)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    features = TanhGaussianPolicy(inputs, hidden, 2, generator=generator(seed)).double()
    mean, _ = features(rows)
    assert torch.allclose(mean, plain(features.body, rows) @ features.mean.weight.T + features.mean.bias, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(hidden=st.lists(st.sampled_from([1, 7, 16, 32]), max_size=3), seed=st.integers(0, 2**31))
def test_action_gradient_and_its_gradient_are_autograds(hidden, seed):
    network = StateActionNet(3, 2, hidden, generator(seed)).double()
    states = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator(seed))
    actions = torch.randn(4, 5, 2, dtype=torch.float64, generator=generator(seed + 1), requires_grad=True)
    (expected,) = torch.autograd.grad(plain(network.body, torch.cat([states, actions], -1)).sum(), actions,
                                      create_graph=True)  # fmt: skip
    found = network.action_gradient(states, actions.detach())
    assert found.shape == actions.shape
    assert torch.allclose(found, expected, atol=1e-12)
    weights = [weight for name, weight in network.named_parameters() if name.endswith("weight")]
    second = (torch.autograd.grad(y.square().sum(), weights, allow_unused=True) for y in (found, expected))
    for ours, autograds in zip(*second, strict=True):
        assert torch.allclose(ours, autograds, atol=1e-12)


def test_encoder_ignores_the_order_and_repetition_of_transitions():
    encoder = DeterministicEncoder(4, (32, 32), 5, generator())
    context = torch.randn(3, 20, 4, generator=generator(1))
    embeddings = encoder(context)
    assert embeddings.shape == (3, 5)
    assert embeddings.abs().max() < 1
    shuffled = context[:, torch.randperm(20, generator=generator(2))]
    assert torch.allclose(encoder(shuffled), embeddings, atol=1e-6)
    assert torch.allclose(encoder(torch.cat([context, context], dim=1)), embeddings, atol=1e-6)


def test_encoder_is_tanh_of_each_transition_then_mean():
    encoder = DeterministicEncoder(1, (), 1)
    with torch.no_grad():
        encoder.network.body[0].weight.fill_(1.0)
        encoder.network.body[0].bias.zero_()
    context = torch.tensor([[[0.5], [-2.0]]])
    # (tanh 0.5 + tanh -2) / 2 = (0.4621172 - 0.9640276) / 2
    assert encoder(context).item() == pytest.approx(-0.2509552, abs=1e-6)


def test_context_rows_have_one_order():
    row = build_context(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([4.0]), torch.tensor([[5.0, 6.0]])
    )
    assert row.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert context_width(2, 1, next_observation=True) == 6
    assert context_width(2, 1, next_observation=False) == 4
