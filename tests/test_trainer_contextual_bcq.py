"""Contextual BCQ: what reaches the encoder, what each step moves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from focal.settings import override
from focal.trainer.agent import augment
from focal.trainer.bcq import bcq_targets, decoding_noise, perturbation_loss, twin_error, vae_loss
from focal.trainer.contextual_bcq import ContextualBcq
from focal.trainer.mbml import MbmlSettings
from focal.trainer.mbml_teachers import Teachers
from focal.trainer.methods import train_settings
from focal.trainer.replay import TaskReplay, sample_joint_batch
from focal.trainer.transform import ObservationTransform

from .trainer_toys import scatter, tiny_method, walk_data

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))
SETTINGS = tiny_method("contextual-bcq")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(**changes):
    settings = tiny_method("contextual-bcq", **changes)
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    return ContextualBcq(settings, RAW, 2, generator()), sample_joint_batch(replay, settings, generator(1))


def snapshot(method: ContextualBcq) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in network.parameters()] for name, network in method.networks.items()}


def moved(before: dict[str, list[Tensor]], method: ContextualBcq) -> set[str]:
    after = snapshot(method)
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


def test_a_step_moves_every_network():
    method, batch = prepared()
    before = snapshot(method)
    metrics = method.update(batch, generator(2))
    assert moved(before, method) == set(before)
    assert all(bool(torch.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize(
    ("name", "owned"),
    [
        ("encoder", {"encoder"}),
        ("vae", {"action_encoder", "decoder"}),
        ("critic", {"critic", "target_critic"}),
        ("perturbation", {"perturbation", "target_perturbation"}),
    ],
)
def test_each_optimiser_moves_only_its_own_networks(name: str, owned: set[str], monkeypatch: pytest.MonkeyPatch):
    method, batch = prepared()
    for other, optimiser in method.optimisers.items():
        if other != name:
            monkeypatch.setattr(optimiser, "step", lambda: None)
    before = snapshot(method)
    method.update(batch, generator(2))
    assert moved(before, method) == owned


def gradients(*networks: nn.Module) -> list[Tensor]:
    return [parameter.grad for network in networks for parameter in network.parameters()]


def test_every_gradient_is_that_of_its_loss_through_one_graph(monkeypatch: pytest.MonkeyPatch):
    """No network moves, targets differ from what they follow, and the random numbers are drawn again in their order."""
    method, batch = prepared(encoder__kl_weight=0.3)
    for optimiser in method.optimisers.values():
        monkeypatch.setattr(optimiser, "step", lambda: None)
    scatter(method.target_critic, method.target_perturbation)
    targets_before = copy.deepcopy([method.target_critic, method.target_perturbation])
    method.update(batch, generator(2))

    draw, data, agent = generator(2), batch.transitions, method.agent
    embeddings, kl = agent.encoder.infer(batch.contexts[0], draw)
    states, fixed = (augment(data.observations, z) for z in (embeddings, embeddings.detach()))
    noise = torch.randn((3, 8, 4), generator=draw)
    generative = vae_loss(method.action_encoder, agent.decoder, states, data.actions, noise)[0].mean()
    noise = decoding_noise((3, 8, SETTINGS.bcq.candidates, 4), draw)
    next_states = augment(data.next_observations, embeddings.detach())
    target_critic, target_perturbation = targets_before
    targets = bcq_targets(
        agent.decoder, target_perturbation, target_critic, data, next_states, noise, SETTINGS.discount,
        SETTINGS.bcq.min_weight,
    )  # fmt: skip
    critic = twin_error(method.critic(states, data.actions), targets).mean()
    decoded = agent.decoder(fixed, decoding_noise((3, 8, 4), draw)).detach()
    acting = perturbation_loss(method.critic.first, agent.perturbation, fixed, decoded).mean()
    expected = [
        (generative + critic + 0.3 * kl.sum(), [agent.encoder]),
        (generative, [method.action_encoder, agent.decoder]),
        (critic, [method.critic]),
        (acting, [agent.perturbation]),
    ]
    for loss, networks in expected:
        parameters = [parameter for network in networks for parameter in network.parameters()]
        for ours, theirs in zip(
            gradients(*networks), torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
        ):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("algo", ["contextual-bcq", "mbml"])
def test_the_perturbation_learns_at_its_own_rate(algo: str):
    """At the critic's rate of the point robots, 1e-3, it was at an end of its tanh after 20 steps, and stayed there."""
    settings = override(train_settings("sparse-point-robot", "laptop", algo), {"critic_learning_rate": 2e-3})
    if isinstance(settings, MbmlSettings):
        sizes = 1, 2, 2
        learner = Teachers(settings.teachers, settings.discount, settings.tau, False, *sizes, generator())
        rule, others = settings.teachers.bcq, settings.teachers.learning_rate
    else:
        learner = ContextualBcq(settings, RAW, 2, generator())
        rule, others = settings.bcq, settings.critic_learning_rate
    rates = {name: optimiser.param_groups[0]["lr"] for name, optimiser in learner.optimisers.items()}
    assert rates["perturbation"] == rule.perturbation_learning_rate == 3e-4
    assert rates["critic"] == others > 3e-4


def test_targets_follow_by_a_share_of_tau():
    method, batch = prepared(tau=0.3)
    pairs = {"critic": method.target_critic, "perturbation": method.target_perturbation}
    scatter(*pairs.values())
    before = copy.deepcopy(pairs)
    method.update(batch, generator(2))
    for name, target in pairs.items():
        for new, old, source in zip(
            target.parameters(), before[name].parameters(), method.networks[name].parameters(), strict=True
        ):
            assert torch.allclose(new, 0.7 * old + 0.3 * source, atol=1e-6), name


def test_there_is_no_kl_term_unless_asked_for():
    assert SETTINGS.encoder.kl_weight == 0


def test_means_of_the_posterior_are_not_bounded():
    method, batch = prepared()
    with torch.no_grad():
        for parameter in method.agent.encoder.parameters():
            parameter.mul_(30)
    assert method.agent.embed(batch.contexts[0]).abs().max() > 1
