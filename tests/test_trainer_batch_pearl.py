"""Batch PEARL: the Bellman error really reaches the encoder, and nothing else but the KL does."""

import pytest
import torch
from torch import Tensor

from focal import UsageError
from focal.trainer.agent import augment
from focal.trainer.batch_pearl import BatchPearl
from focal.trainer.control import critic_loss, critic_targets
from focal.trainer.methods import train_settings
from focal.trainer.replay import MetaBatch, TaskReplay, sample_joint_batch
from focal.trainer.transform import ObservationTransform

from .trainer_toys import tiny_method, walk_data

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(further: int = 0, **changes: object):
    settings = tiny_method("batch-pearl", **changes)
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    return BatchPearl(settings, RAW, 2, generator()), sample_joint_batch(replay, settings, generator(1), further)


def encoder_gradients(method: BatchPearl) -> list[Tensor]:
    return [parameter.grad for parameter in method.agent.encoder.parameters()]


def snapshot(method: BatchPearl) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in network.parameters()] for name, network in method.networks.items()}


def test_a_step_moves_every_network():
    method, batch = prepared()
    before = snapshot(method)
    metrics = method.update(batch, generator(2))
    after = snapshot(method)
    assert set(before) == {"encoder", "policy", "critic", "target_critic"}
    assert all(not all(map(torch.equal, before[name], after[name])) for name in before)
    assert metrics["encoder/kl"] > 0


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_the_encoders_gradient_is_that_of_critic_loss_and_kl_through_one_graph(kl_weight: float):
    method, batch = prepared(encoder__kl_weight=kl_weight)
    settings, data, control = method.settings, batch.transitions, method.control
    draw = generator(2)
    embeddings, kl = method.agent.encoder.infer(batch.contexts[0], draw)
    states, next_states = (augment(rows, embeddings) for rows in (data.observations, data.next_observations))
    targets, _ = critic_targets(
        method.agent.policy, control.target_critic, None, data, states, next_states, settings, control.alpha,
        torch.tensor(1.0), draw,
    )  # fmt: skip
    loss = critic_loss(control.critic, states, data.actions, targets)[0] + kl_weight * kl.sum()
    expected = torch.autograd.grad(loss, list(method.agent.encoder.parameters()))
    method.update(batch, generator(2))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for ours, theirs in zip(encoder_gradients(method), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_without_the_bellman_error_only_the_kl_moves_the_encoder():
    """D1, the released code."""
    method, batch = prepared(released__discard_bellman=True, encoder__kl_weight=0.7)
    kl = method.agent.encoder.infer(batch.contexts[0], generator(2))[1]
    expected = torch.autograd.grad(0.7 * kl.sum(), list(method.agent.encoder.parameters()))
    method.update(batch, generator(2))
    for ours, theirs in zip(encoder_gradients(method), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", [{"encoder__kl_weight": 0.0}, {"encoder__kind": "deterministic"}])
def test_an_encoder_that_would_learn_from_nothing_is_refused(changes: dict):
    with pytest.raises(UsageError, match=r"--set encoder\.kind=probabilistic --set encoder\.kl_weight=0\.1"):
        tiny_method("batch-pearl", released__discard_bellman=True, **changes)


def test_the_stronger_variant_has_focals_regularisation():
    method, batch = prepared(1, regularisation__kind="value-penalty", regularisation__discriminator_steps=2)
    metrics = method.update(batch, generator(2))
    assert "discriminator" in method.networks
    assert {"regularisation/divergence", "discriminator/loss"} <= set(metrics)
    for family in ("half-cheetah-vel", "walker-2d-params"):
        plain, focal = train_settings(family, "paper", "batch-pearl"), train_settings(family, "paper")
        assert plain.regularisation.kind == "none"
        assert plain.regularisation.alpha == focal.regularisation.alpha
        assert plain.encoder.kind == "probabilistic"


@pytest.mark.parametrize(("kind", "steps", "fresh"), [("policy", 3, 2), ("policy", 1, 0), ("none", 3, 0)])
def test_every_further_discriminator_step_gets_a_batch_of_its_own(
    kind: str, steps: int, fresh: int, monkeypatch: pytest.MonkeyPatch
):
    method, _ = prepared(regularisation__kind=kind, regularisation__discriminator_steps=steps)
    seen: list[MetaBatch] = []
    update = method.update
    monkeypatch.setattr(method, "update", lambda batch, draw: seen.append(batch) or update(batch, draw))
    method.train_step(TaskReplay(walk_data().tasks, RAW, method.settings), 0, generator(1))
    batches = [seen[0].transitions, *seen[0].discriminator]
    assert len(batches) == 1 + fresh
    assert len({tuple(one.rewards.flatten().tolist()) for one in batches}) == 1 + fresh
