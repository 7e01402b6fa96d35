"""The stacked SAC update: values worked by hand, gradients against autograd, one update against stable-baselines3's."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from focal.datagen.agent import SacAgent
from focal.datagen.sac import (
    SacStack,
    bellman_targets,
    critic_gradient,
    policy_gradient,
    sample_actions,
    smaller_value_gradient,
    temperature_gradient,
)
from focal.datagen.settings import SacSettings
from focal.datagen.stacked import Adam, StackedMlp, Workspace
from focal.envs import get_family

DOUBLE = torch.empty(0, dtype=torch.float64)


def test_targets_by_hand():
    targets = bellman_targets(
        rewards=torch.tensor([[1.0, 1.0]]),
        terminated=torch.tensor([[0.0, 1.0]]),
        next_values=torch.tensor([[[5.0, 5.0], [3.0, 9.0]]]),
        next_log_probs=torch.tensor([[-2.0, 7.0]]),
        temperature=torch.tensor([[0.5]]),
        discount=0.9,
    )
    # 1 + 0.9 (min(5, 3) - 0.5 * -2) = 4.6; a terminated transition is worth its reward
    assert targets.tolist() == [[pytest.approx(4.6), 1.0]]


def test_critic_gradient_by_hand():
    # loss 1/2 (mean of (1 - 3)^2, (2 - 1)^2) + 1/2 (mean of (3 - 3)^2, (5 - 1)^2) = 1.25 + 4
    gradient = critic_gradient(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), torch.tensor([[3.0, 1.0]]))
    assert gradient.tolist() == [[[-1.0, 0.5], [0.0, 2.0]]]


def test_entropy_loss_by_hand():
    # two actions: target entropy -2; loss -log t * mean(-1 - 2, 3 - 2) = log t, so its slope in log t is 1
    assert temperature_gradient(torch.tensor([[-1.0, 3.0]]), -2.0).tolist() == [[1.0]]
    log_temperature = torch.tensor([[0.3]])
    Adam([log_temperature], [torch.tensor([[1.0]])], learning_rate=0.01).step()
    assert log_temperature.item() == pytest.approx(0.29, abs=1e-6), "Adam's first step is the learning rate"


def test_only_the_smaller_value_moves_the_policy():
    gradient = smaller_value_gradient(torch.tensor([[[1.0, 4.0], [2.0, 3.0]]]))
    assert gradient.tolist() == [[[-0.5, 0.0], [0.0, -0.5]]]


def test_log_probability_by_hand():
    # mean 0, log std log 2, noise 0.25: u = 0.5; density of u is N(0.25; 0, 1) / 2, that of a = tanh u over 1 - a^2
    sampled = sample_actions(torch.tensor([[[0.0], [math.log(2.0)]]]), torch.tensor([[[0.25]]]))
    action = math.tanh(0.5)
    expected = -0.5 * 0.25**2 - math.log(2.0) - 0.5 * math.log(2.0 * math.pi) - math.log(1.0 - action**2 + 1e-6)
    assert sampled.actions.item() == pytest.approx(action)
    assert sampled.log_probs.item() == pytest.approx(expected)


def test_polyak_step_by_hand():
    stack = SacStack(2, 1, 1, SacSettings(hidden_sizes=(3,), batch_size=2, tau=0.25, learning_rate=1e-12))
    stack.critic.parameters.fill_(1.0)
    stack.target.parameters.fill_(5.0)
    stack.update(torch.randn(1, 2, 7), torch.randn(1, 1, 4))
    assert stack.target.parameters == pytest.approx(torch.full_like(stack.target.parameters, 4.0))


def modules(network, inputs, hidden, outputs):
    """The networks of a stack as torch modules that autograd knows."""
    found = []
    for index in range(network.weights[0].shape[0]):
        layers = []
        weights, biases = network.network(index)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            linear = nn.Linear(1, 1).double()
            linear.weight = nn.Parameter((weight if layer == len(hidden) else weight.T).clone())
            linear.bias = nn.Parameter(bias.clone())
            layers += [linear, nn.ReLU()]
        found.append(nn.Sequential(*layers[:-1]))
    return found


@pytest.mark.parametrize("hidden", [(5,), (6, 4), (4, 7, 3)])
def test_gradients_are_autograds(hidden):
    networks, rows, inputs, outputs = 3, 8, 4, 2
    generator = torch.Generator().manual_seed(0)
    stacked = StackedMlp(networks, inputs, hidden, outputs, DOUBLE)
    for index in range(networks):
        stacked.initialise(index, generator)
    x = torch.randn(networks, rows, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(networks, outputs, 5, generator=generator, dtype=torch.float64)
    space = Workspace(networks, rows, hidden, DOUBLE, trained_rows=5)
    found = stacked.forward(x, space)
    assert torch.equal(found, stacked.forward(x)), "with and without a workspace"
    stacked.backward(x, weight, space)
    for index, module in enumerate(modules(stacked, inputs, hidden, outputs)):
        result = module(x[index])
        assert torch.allclose(found[index].T, result, atol=1e-12)
        (result[:5] * weight[index].T).sum().backward()
        gradients = stacked.named(stacked.gradients)
        for layer, linear in enumerate(module[::2]):
            expected = linear.weight.grad if layer == len(hidden) else linear.weight.grad.T
            assert torch.allclose(gradients[f"{layer}.weight"][index], expected, atol=1e-12)
            assert torch.allclose(gradients[f"{layer}.bias"][index].flatten(), linear.bias.grad, atol=1e-12)


def test_input_gradient_is_autograds():
    stacked, space = StackedMlp(2, 5, (6, 4), 1, DOUBLE), Workspace(2, 3, (6, 4), DOUBLE)
    for index in range(2):
        stacked.initialise(index, torch.Generator().manual_seed(index))
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    stacked.forward(x, space)
    found = stacked.input_gradient(torch.ones(2, 1, 3, dtype=torch.float64), space, first=2)
    for index, module in enumerate(modules(stacked, 5, (6, 4), 1)):
        inputs = x[index].clone().requires_grad_()
        module(inputs).sum().backward()
        assert torch.allclose(found[index], inputs.grad[:, 2:].T, atol=1e-12)


def test_policy_gradient_is_autograds_also_where_the_deviation_is_clamped():
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    outputs[0, 2:, :3] = 2.5  # above the upper bound of log std
    outputs[1, 2:, :3] = -21.0
    noise = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    value_slope = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    temperature = torch.rand(3, 1, dtype=torch.float64, generator=generator)
    found = policy_gradient(sample_actions(outputs, noise), value_slope, temperature)
    leaf = outputs.clone().requires_grad_()
    sampled = sample_actions(leaf, noise)
    (temperature * sampled.log_probs).mean(1).sum().add((value_slope * sampled.actions).sum()).backward()
    assert torch.allclose(found, leaf.grad, atol=1e-12)
    assert (found[:2, 2:, :3] == 0).all()


SETTINGS = SacSettings(total_steps=300, hidden_sizes=(32, 24), batch_size=64, learning_starts=50, learning_rate=1e-3)


@pytest.fixture(scope="module")
def trained():
    """A stable-baselines3 agent in the middle of its training, on a task with rewards, velocities and six actions."""
    family = get_family("cheetah-dir")
    agent = SacAgent(family, family.fixed_tasks[0], SETTINGS, lambda chunk: chunk)
    agent.train_chunk(200, lambda steps: None)
    return agent


def sb3_layers(model):
    """(stack's name, index within the agent, layers as (weight, bias)) of a stable-baselines3 model's networks."""
    actor = [(layer.weight, layer.bias) for layer in model.actor.latent_pi if isinstance(layer, nn.Linear)]
    heads = [torch.cat([getattr(model.actor.mu, n), getattr(model.actor.log_std, n)]) for n in ("weight", "bias")]
    yield "actor", 0, [*actor, heads]
    for name, critic in (("critic", model.critic), ("target", model.critic_target)):
        for index, net in enumerate((critic.qf0, critic.qf1)):
            yield name, index, [(layer.weight, layer.bias) for layer in net if isinstance(layer, nn.Linear)]


def pairs(stack, agent, model):
    """(the stack's tensor, stable-baselines3's) for all parameters of one agent."""
    with torch.no_grad():
        for name, index, layers in sb3_layers(model):
            network = getattr(stack, name)
            weights, biases = network.network(agent if name == "actor" else 2 * agent + index)
            for layer, (weight, bias) in enumerate(layers):
                yield weights[layer], weight if layer == len(layers) - 1 else weight.T
                yield biases[layer], bias
        yield stack.log_temperature[agent], model.log_ent_coef


def test_updates_are_those_of_stable_baselines3(trained):
    """Same weights, batches and noise, three gradient steps, in a stack of three: the same agent to float rounding."""
    model, agent, size = trained.model, 1, SETTINGS.batch_size
    stack = SacStack(20, 6, 3, SETTINGS)
    for mine, theirs in pairs(stack, agent, model):
        mine.copy_(theirs)
    for optimiser in trained._optimisers().values():
        optimiser.state.clear()
    replay = model.replay_buffer
    for step in range(3):
        torch.manual_seed(step)
        np.random.seed(step)  # noqa: NPY002 - it is what stable-baselines3 draws from
        rows = np.random.randint(0, replay.pos, size)  # noqa: NPY002
        noise = torch.cat([torch.randn(size, 6), torch.randn(size, 6)]).T  # the order in which SAC.train draws it
        torch.manual_seed(step)
        np.random.seed(step)  # noqa: NPY002
        model.train(1, size)
        ends = replay.dones[rows] * (1 - replay.timeouts[rows])
        parts = replay.observations[rows, 0], replay.actions[rows, 0], replay.next_observations[rows, 0]
        batch = torch.randn(3, size, 48)
        batch[agent] = torch.from_numpy(np.concatenate([*parts, replay.rewards[rows], ends], axis=1))
        before = {name: value.clone() for name, value in stack.tensors().items()}
        stack.update(batch, torch.stack([torch.randn(6, 2 * size), noise, torch.randn(6, 2 * size)]))
    moved = [not torch.equal(before[name], value) for name, value in stack.tensors().items()]
    assert all(moved)
    for mine, theirs in pairs(stack, agent, model):
        # Adam divides by the gradient's size: where that is near 0, rounding moves a weight by a share of its step
        assert torch.allclose(mine, theirs, atol=2e-5)
        assert (mine - theirs).abs().median() < 1e-7


def test_the_exported_policy_is_the_stacks_actor():
    stack = SacStack(3, 2, 4, SacSettings(hidden_sizes=(8, 5)))
    stack.initialise([torch.Generator().manual_seed(k) for k in range(4)])
    observations = torch.randn(4, 3)
    actions = stack.act(observations, torch.zeros(4, 2))
    for k in range(4):
        assert torch.allclose(stack.policy(k).mode(observations[k]), actions[k], atol=1e-6)
        assert torch.equal(stack.policy(k).body[0].weight, stack.actor.network(k)[0][0].T)


def test_networks_start_as_torchs_linear_layers_do():
    stack = SacStack(16, 4, 2, SacSettings(hidden_sizes=(100, 50)))
    stack.initialise([torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)])
    for network, inputs in ((stack.actor, 16), (stack.critic, 20)):
        for weight, bias, fan_in in zip(network.weights, network.biases, (inputs, 100, 50), strict=True):
            for tensor in (weight, bias):
                assert 0.7 / math.sqrt(fan_in) < tensor.abs().max() <= 1 / math.sqrt(fan_in)
    assert torch.equal(stack.target.parameters, stack.critic.parameters)
    assert not torch.equal(stack.actor.weights[0][0], stack.actor.weights[0][1])


def test_bf16_products_stay_near_fp32_and_the_parameters_are_fp32():
    settings = SacSettings(hidden_sizes=(64, 64, 64), batch_size=32)
    stacks = [SacStack(6, 2, 2, settings, low=low) for low in (False, True)]
    generator = torch.Generator().manual_seed(0)
    batch, noise = torch.randn(2, 32, 16, generator=generator), torch.randn(2, 2, 64, generator=generator)
    for stack in stacks:
        stack.initialise([torch.Generator().manual_seed(k) for k in range(2)])
        stack.update(batch, noise)
    full, low = stacks
    for network in ("actor", "critic"):
        expected, found = getattr(full, network).gradients, getattr(low, network).gradients
        assert found.dtype == getattr(low, network).parameters.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < 0.1 * expected.norm(), "0.07 at most, and 0.02 on average, of 300 batches"
    for network in (low.actor, low.critic, low.target):
        for copy, weight in zip(network._low[1:-1], network.weights[1:-1], strict=True):
            assert torch.equal(copy, weight.bfloat16()), "the copies follow every step"
