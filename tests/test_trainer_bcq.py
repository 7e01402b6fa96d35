"""Batch-constrained Q-learning worked by hand: the VAE's loss, candidates, targets, the choice among candidates."""

import math

import pytest
import torch
from torch import Tensor, nn

from focal.trainer.bcq import (
    ActionDecoder,
    ActionEncoder,
    BcqAgent,
    Perturbation,
    bcq_targets,
    best_candidate,
    candidate_actions,
    decoding_noise,
    min_max_value,
    perturbation_loss,
    plain,
    twin_error,
    vae_loss,
)
from focal.trainer.encoder import DeterministicEncoder
from focal.trainer.networks import StateActionNet, TwinCritic
from focal.trainer.replay import Batch
from focal.trainer.settings import TrainSettings
from focal.trainer.transform import ObservationTransform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def affine(layer: nn.Module, weight: list[list[float]], bias: list[float]) -> None:
    """Make an MLP without hidden layers compute weight x + bias."""
    with torch.no_grad():
        layer.body[0].weight[:] = torch.tensor(weight)
        layer.body[0].bias[:] = torch.tensor(bias)


def hand_made_vae(mean: float = 0.0, log_std: float = 0.0) -> tuple[ActionEncoder, ActionDecoder]:
    """State and action of width 1, noise of width 2: the encoder says (mean, 0) and (log_std, 0) whatever it sees; the
    decoder's action is tanh of the first noise."""
    encoder, decoder = ActionEncoder(plain(generator()), 1, 1, ()), ActionDecoder(plain(generator()), 1, 1, ())
    affine(encoder.body, [[0, 0]] * 4, [mean, 0, log_std, 0])
    affine(decoder.body, [[0, 1, 0]], [0])
    return encoder, decoder


def constant_perturbation(output: float, limit: float) -> Perturbation:
    """Adds limit tanh(output)."""
    perturbation = Perturbation(plain(generator()), 1, 1, (), limit)
    affine(perturbation.body, [[0, 0]], [output])
    return perturbation


def two_steps() -> Batch:
    """One task; the first step goes on, the second terminates."""
    zeros = torch.zeros(1, 2, 1)
    return Batch(
        zeros, zeros, torch.tensor([[1.0, 2.0]]), zeros, torch.tensor([[False, True]]), zeros,
        torch.tensor([[True, False]]),
    )  # fmt: skip


def test_vae_loss_by_hand():
    # mean (0.3, 0), log std (ln 0.5, 0), noise (0.4, 0): decoded tanh(0.3 + 0.5 * 0.4) = tanh(0.5), action 0.1
    encoder, decoder = hand_made_vae(0.3, math.log(0.5))
    states, actions = torch.zeros(1, 3, 1), torch.full((1, 3, 1), 0.1)
    loss, error, kl = vae_loss(encoder, decoder, states, actions, torch.tensor([[[0.4, 0.0]]]))
    expected_error = (math.tanh(0.5) - 0.1) ** 2
    # KL of N(0.3, 0.25) to N(0, 1), averaged with the 0 of the other dimension
    expected_kl = 0.5 * (0.3**2 + 0.25 - 1 - math.log(0.25)) / 2
    assert error.tolist() == pytest.approx([expected_error])
    assert kl.tolist() == pytest.approx([expected_kl])
    assert loss.tolist() == pytest.approx([expected_error + 0.5 * expected_kl])


def test_vae_loss_keeps_tasks_apart():
    encoder, decoder = hand_made_vae()
    actions = torch.tensor([0.2, -0.6]).reshape(2, 1, 1)
    loss, _, _ = vae_loss(encoder, decoder, torch.zeros(2, 1, 1), actions, torch.zeros(1, 1, 2))
    assert loss.tolist() == pytest.approx([0.04, 0.36])


def test_log_std_of_the_action_encoder_is_bounded():
    states, actions = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    for asked, given in ((-9.0, -4.0), (40.0, 15.0), (1.0, 1.0)):
        encoder, _ = hand_made_vae(log_std=asked)
        assert encoder(states, actions)[1][0, 0, 0].item() == given


def test_decoding_noise_is_clipped_to_half():
    noise = decoding_noise((1000, 2), generator())
    assert noise.abs().max() == 0.5
    assert 0.5 < (noise.abs() == 0.5).float().mean() < 0.7  # P(|N(0, 1)| > 0.5) = 0.62


def test_candidates_are_decoded_then_perturbed_and_stay_in_the_box():
    _, decoder = hand_made_vae()
    perturbation = constant_perturbation(100.0, 0.05)  # + 0.05
    noise = torch.tensor([[0.5, 0.0], [-0.5, 0.3], [9.0, 0.0]]).reshape(1, 1, 3, 2)
    candidates = candidate_actions(decoder, perturbation, torch.zeros(1, 2, 1), noise)  # (1, 2, 3, 1)
    expected = [math.tanh(0.5) + 0.05, math.tanh(-0.5) + 0.05, 1.0]
    assert candidates[0, 0, :, 0].tolist() == pytest.approx(expected)
    assert torch.equal(candidates[0, 0], candidates[0, 1])


def test_min_max_value():
    values = torch.tensor([[1.0, 8.0], [5.0, 4.0]])
    assert min_max_value(values, 0.75).tolist() == [0.75 * 1 + 0.25 * 5, 0.75 * 4 + 0.25 * 8]
    assert min_max_value(values, 1.0).tolist() == [1.0, 4.0]


def twins(states: Tensor, actions: Tensor) -> Tensor:
    """Q1 = 8 a, Q2 = 4 a: the first is the larger for positive actions, the smaller for negative ones."""
    return torch.stack([8 * actions[..., 0], 4 * actions[..., 0]])


def test_targets_take_the_best_candidate_and_stop_at_termination():
    _, decoder = hand_made_vae()
    still = constant_perturbation(0.0, 0.05)
    half = math.atanh(0.5)
    noise = torch.tensor([[half, 0.0], [-half, 0.0]]).reshape(1, 1, 2, 2)
    # candidates 0.5 and -0.5: min-max 0.75 * 2 + 0.25 * 4 = 2.5 and 0.75 * -4 + 0.25 * -2 = -3.5; the best is 2.5
    targets = bcq_targets(decoder, still, twins, two_steps(), torch.zeros(1, 2, 1), noise, 0.9, 0.75)
    assert targets.flatten().tolist() == pytest.approx([1 + 0.9 * 2.5, 2.0])


def test_targets_use_the_next_states_and_the_target_perturbation():
    _, decoder = hand_made_vae()

    def state_value(states: Tensor, actions: Tensor) -> Tensor:
        return torch.stack([states[..., 0] + actions[..., 0]] * 2)

    next_states = torch.tensor([[[10.0], [20.0]]])
    noise = torch.zeros(1, 1, 1, 2)
    targets = bcq_targets(
        decoder, constant_perturbation(100.0, 0.05), state_value, two_steps(), next_states, noise, 0.5, 0.75
    )
    assert targets.flatten().tolist() == pytest.approx([1 + 0.5 * 10.05, 2.0])


def test_twin_error_sums_twins_and_averages_transitions_per_task():
    values = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 2.0], [0.0, 1.0]]])  # (2, K, M)
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert twin_error(values, targets).tolist() == [(0 + 1) / 2 + (4 + 1) / 2, (0 + 0) / 2 + (0 + 1) / 2]


def test_perturbation_climbs_the_value_and_only_the_perturbation_learns():
    value = StateActionNet(1, 1, ())
    affine(value, [[0, 3]], [1])
    perturbation = constant_perturbation(0.0, 0.05)
    decoded = torch.tensor([[[0.2], [0.4]]])
    loss = perturbation_loss(value, perturbation, torch.zeros(1, 2, 1), decoded)
    assert loss.tolist() == pytest.approx([-(1 + 3 * 0.3)])
    gradient = torch.autograd.grad(loss.sum(), perturbation.body.body[0].bias)[0]
    assert gradient.item() == pytest.approx(-3 * 0.05)  # d tanh at 0 is 1: a larger output gives a larger value


def test_the_best_candidate_is_chosen_per_state():
    def value(states: Tensor, actions: Tensor) -> Tensor:
        return states[..., 0] * actions.sum(dim=-1)

    states = torch.tensor([[[1.0], [-1.0]]])
    candidates = torch.tensor([[0.1, 0.0], [0.3, 0.2], [-0.2, 0.1]]).expand(1, 2, 3, 2)
    assert best_candidate(value, states, candidates).tolist() == [
        [pytest.approx([0.3, 0.2]), pytest.approx([-0.2, 0.1])]
    ]


def bcq_agent() -> BcqAgent:
    """Its value is the action itself, so it takes the largest of two candidates tanh(n0 + n1 / 3)."""
    decoder = ActionDecoder(plain(generator()), 1, 1, ())
    affine(decoder.body, [[0, 1, 1 / 3]], [0])
    value = StateActionNet(1, 1, ())
    affine(value, [[0, 1]], [0])
    settings = TrainSettings(latent_dim=1)
    agent = BcqAgent(
        settings, ObservationTransform(1, (0,), (2.0,)), DeterministicEncoder(3, (), 1), decoder,
        constant_perturbation(0.0, 0.0), value, 2,
    )  # fmt: skip
    for network in (agent.decoder.body, agent.perturbation.body, agent.critic):  # states are wider by the embedding
        layer = network.body[0]
        weight = torch.cat([torch.zeros(layer.weight.shape[0], 1), layer.weight.data], dim=1)
        layer.weight = nn.Parameter(weight)
        layer.in_features += 1
    return agent


def test_acting_goes_by_the_first_of_twin_values():
    agent, states = bcq_agent(), torch.zeros(1, 1, 2)
    twin = TwinCritic(2, 1, ())
    affine(twin.first, [[0, 0, 1]], [0])
    affine(twin.second, [[0, 0, -1]], [0])  # wants the smallest action
    largest = agent.choose(states, None)
    agent.critic = twin
    assert torch.equal(agent.choose(states, None), largest)
    twin.first, twin.second = twin.second, twin.first
    assert agent.choose(states, None) < largest


def test_acting_takes_the_largest_value_of_fixed_candidates_and_samples_with_a_generator():
    agent, observations, embeddings = bcq_agent(), torch.zeros(2, 3, 1), torch.zeros(2, 1)
    actions = agent.act(observations, embeddings)
    assert actions.shape == (2, 3, 1)
    assert torch.equal(actions, agent.act(observations, embeddings))  # no state, no chance
    assert torch.equal(actions[:1, :1], agent.act(observations[:1, :1], embeddings[:1]))  # nor does the batch matter
    assert actions.unique().item() == pytest.approx(
        torch.tanh(agent.noise[..., 0] + agent.noise[..., 1] / 3).max().item()
    )
    first, second = (agent.act(observations, embeddings, False, generator(seed)) for seed in (1, 2))
    assert not torch.equal(first, second)
    assert len(first.unique()) > 1
    with pytest.raises(ValueError, match="Generator"):
        agent.act(observations, embeddings, deterministic=False)
