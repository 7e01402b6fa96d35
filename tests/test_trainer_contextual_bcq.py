"""Contextual BCQ: what reaches the encoder, what each step moves."""

import pytest
import torch
from torch import Tensor

from focal.trainer.agent import augment
from focal.trainer.bcq import bcq_targets, decoding_noise, twin_error, vae_loss
from focal.trainer.contextual_bcq import ContextualBcq
from focal.trainer.replay import TaskReplay, sample_joint_batch
from focal.trainer.transform import ObservationTransform

from .trainer_toys import tiny_method, walk_data

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


def test_the_encoders_gradient_is_that_of_vae_and_critic_loss_through_one_graph(monkeypatch: pytest.MonkeyPatch):
    """Every network but the encoder is stopped, and the random numbers are drawn again in the same order."""
    method, batch = prepared()
    for optimiser in method.optimisers.values():
        monkeypatch.setattr(optimiser, "step", lambda: None)
    method.update(batch, generator(2))
    found = [parameter.grad for parameter in method.agent.encoder.parameters()]

    draw, data, agent = generator(2), batch.transitions, method.agent
    embeddings, _ = agent.encoder.infer(batch.contexts[0], draw)
    states = augment(data.observations, embeddings)
    noise = torch.randn((3, 8, 4), generator=draw)
    loss = vae_loss(method.action_encoder, agent.decoder, states, data.actions, noise)[0].mean()
    noise = decoding_noise((3, 8, SETTINGS.bcq.candidates, 4), draw)
    next_states = augment(data.next_observations, embeddings.detach())
    targets = bcq_targets(
        agent.decoder, method.target_perturbation, method.target_critic, data, next_states, noise, SETTINGS.discount,
        SETTINGS.bcq.min_weight,
    )  # fmt: skip
    loss = loss + twin_error(method.critic(states, data.actions), targets).mean()
    expected = torch.autograd.grad(loss, list(agent.encoder.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_kl_term_is_off_and_can_be_put_on(monkeypatch: pytest.MonkeyPatch):
    assert SETTINGS.encoder.kl_weight == 0
    gradients = {}
    for weight in (0.0, 1.0):
        method, batch = prepared(encoder__kl_weight=weight)
        method.update(batch, generator(2))
        gradients[weight] = torch.cat([parameter.grad.flatten() for parameter in method.agent.encoder.parameters()])
    assert not torch.allclose(gradients[0.0], gradients[1.0])


def test_means_of_the_posterior_are_not_bounded():
    method, batch = prepared()
    with torch.no_grad():
        for parameter in method.agent.encoder.parameters():
            parameter.mul_(30)
    assert method.agent.embed(batch.contexts[0]).abs().max() > 1
