"""Every variant as a setting: who gets which gradient, what each departure of the released code does, precision."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from focal import UsageError
from focal.settings import override
from focal.trainer.agent import augment
from focal.trainer.control import actor_loss, critic_loss, critic_targets
from focal.trainer.focal import Focal, encoder_loss
from focal.trainer.networks import StateActionNet
from focal.trainer.replay import MetaBatch, TaskReplay, sample_meta_batch
from focal.trainer.settings import FocalSettings
from focal.trainer.transform import ObservationTransform

from .test_trainer_focal import certain_policy, constant_critic, generator, linear, targets_of
from .trainer_toys import TINY, VARIANTS, two_episodes, variant, walk_data, with_settings

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))
STEPS = {"encoder": True, "control": True}


def trained(settings: FocalSettings, steps: int = 1, **phase: bool) -> tuple[Focal, MetaBatch, dict[str, Tensor]]:
    """A method after `steps` updates, its last batch and metrics; batches and draws depend on the settings alone."""
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    focal, batches, draws = Focal(settings, RAW, 2, generator()), generator(1), generator(2)
    for _ in range(steps):
        batch = sample_meta_batch(replay, settings, batches, **(phase or STEPS))
        metrics = focal.update(batch, draws)
    return focal, batch, metrics


def gradients(focal: Focal, name: str = "encoder") -> list[Tensor]:
    """What the last update left on a network: the gradient it stepped with."""
    return [parameter.grad for parameter in focal.networks[name].parameters()]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_every_network_without_nan(name: str):
    settings = variant(name)
    if settings.hide_x:
        settings = override(settings, {"hide_x": False})  # the transform's business, not the update's
    focal, _, metrics = trained(settings, steps=5)
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
    for network in ("encoder", "policy", "critic"):
        assert any(gradient.abs().sum() > 0 for gradient in gradients(focal, network)), network
    assert {"encoder", "critic", "actor"} <= {key.split("/")[0] for key in metrics if key.endswith("gradient_norm")}


# Gradients


def bellman_gradients(settings: FocalSettings) -> list[Tensor]:
    """The gradient of the first critic loss in the encoder's weights, through one graph from context to loss."""
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    focal = Focal(settings, RAW, 2, generator())
    batch = sample_meta_batch(replay, settings, generator(1), **STEPS)
    data, encoder, draws = batch.transitions, focal.agent.encoder, generator(2)
    embeddings = encoder.infer(batch.contexts.flatten(0, 1), draws)[0][: len(batch.tasks)]  # control sees the first
    states, next_states = (augment(rows, embeddings) for rows in (data.observations, data.next_observations))
    targets, _ = critic_targets(
        focal.agent.policy, focal.control.target_critic, None, data, states, next_states, settings, focal.control.alpha,
        torch.tensor(1.0), draws,
    )  # fmt: skip
    loss, _ = critic_loss(focal.control.critic, states, data.actions, targets)
    return list(torch.autograd.grad(loss, list(encoder.parameters())))


@pytest.mark.parametrize("kind", ["deterministic", "probabilistic"])
def test_coupled_gradients_are_those_of_the_critics_loss_and_of_nothing_else(kind: str):
    """Through the sample of the posterior that control saw, where there is one."""
    settings = with_settings(gradients="coupled", distance__weight=0, encoder__kind=kind, encoder__kl_weight=0)
    focal, *_ = trained(settings)
    for found, expected in zip(gradients(focal), bellman_gradients(settings), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_coupled_adds_the_critics_gradient_to_the_encoders_own():
    settings = with_settings(gradients="coupled")
    coupled, *_ = trained(settings)
    decoupled, *_ = trained(TINY)
    bellman = bellman_gradients(settings)
    for found, own, other in zip(gradients(coupled), gradients(decoupled), bellman, strict=True):
        assert torch.allclose(found, own + other, rtol=1e-3, atol=1e-8)
    assert sum(other.abs().sum() for other in bellman) > 0


def test_coupled_changes_nothing_but_the_encoder_in_one_step():
    coupled, *_ = trained(with_settings(gradients="coupled"))
    decoupled, *_ = trained(TINY)
    for name in ("policy", "critic"):
        assert all(map(torch.equal, coupled.networks[name].parameters(), decoupled.networks[name].parameters()))


def test_d1_discards_the_bellman_gradient():
    """As in the released code: called coupled, trained decoupled; and with no other loss the encoder never moves."""
    d1, *_ = trained(variant("D1"), steps=3)
    decoupled, *_ = trained(TINY, steps=3)
    assert all(map(torch.equal, d1.agent.encoder.parameters(), decoupled.agent.encoder.parameters()))
    settings = with_settings(gradients="coupled", distance__weight=0, released__discard_bellman=True)
    still, *_ = trained(settings, steps=5)
    untrained = Focal(settings, RAW, 2, generator())
    assert all(map(torch.equal, still.agent.encoder.parameters(), untrained.agent.encoder.parameters()))


def test_the_probabilistic_encoder_learns_from_each_of_its_losses():
    names = {"metric": (10, 0), "kl": (0, 0.1), "both": (10, 0.1)}
    found = {}
    for name, (weight, kl_weight) in names.items():
        settings = with_settings(encoder__kind="probabilistic", distance__weight=weight, encoder__kl_weight=kl_weight)
        focal, *_ = trained(settings, encoder=True, control=False)
        found[name] = gradients(focal)
    for metric, kl, both in zip(*found.values(), strict=True):
        assert torch.allclose(metric + kl, both, rtol=1e-3, atol=1e-4)
        assert metric.abs().sum() > 0
        assert kl.abs().sum() > 0


def test_encoder_loss_sums_the_kl_over_tasks_and_averages_it_over_draws():
    settings = with_settings(encoder__kind="probabilistic", encoder__kl_weight=0.5, distance__weight=0)
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0])  # two tasks, two draws
    loss, metrics = encoder_loss(torch.rand(4, 3), kl, torch.tensor([0, 1, 0, 1]), settings)
    assert loss.item() == pytest.approx(0.5 * (1 + 2 + 3 + 4) / 2)
    assert metrics["encoder/kl"].item() == 2.5


def test_gradient_norms_are_of_the_whole_gradient():
    focal, _, metrics = trained(variant("value penalty"))
    for network, name in (("encoder", "encoder"), ("critic", "critic"), ("policy", "actor")):
        flat = torch.cat([gradient.flatten() for gradient in gradients(focal, network)])
        assert metrics[f"{name}/gradient_norm"].item() == pytest.approx(flat.norm().item(), rel=1e-5)


# Departures of the released code


def test_d3_takes_the_divergence_at_s_with_the_action_logged_there_and_no_mask():
    settings = with_settings(
        discount=0.9, reward_scale=1, regularisation__kind="value-penalty", regularisation__divergence="wasserstein",
        released__penalty_at_state=True,
    )  # fmt: skip
    # divergence at s: c(0.5) - c(0) = 0.5, weight 4: 7 - 2 = 5, also where the episode was cut; none after termination
    assert targets_of(settings, alpha=4.0) == pytest.approx([1 + 0.9 * 5, 2 + 0.9 * 5, 3.0])


@pytest.mark.parametrize("d4", [False, True])
def test_d4_gives_the_actor_no_gradient_of_the_divergence(d4: bool):
    critic, discriminator, policy = constant_critic(0, 0), StateActionNet(1, 1, ()), certain_policy(0.5493061)
    linear(critic.first, [0, 2], 0.0)
    linear(critic.second, [0, 2], 4.0)
    linear(discriminator, [0, 1], 0.0)
    settings = with_settings(
        regularisation__kind="policy", regularisation__divergence="wasserstein", policy_penalty=0,
        released__no_actor_divergence=d4,
    )  # fmt: skip
    loss, _ = actor_loss(
        policy, critic, discriminator, torch.zeros(1, 3, 1), torch.full((1, 3, 1), -0.1), settings, torch.tensor(3.0),
        torch.tensor(0.0), generator(),
    )  # fmt: skip
    assert loss.item() == pytest.approx(-1 + 3 * 0.6, rel=1e-5)  # the divergence is in the loss either way
    (slope,) = torch.autograd.grad(loss, policy.mean.bias)
    # d(-2 a + 3 a)/da, without D4; da/dmean = 1 - 0.5^2
    assert slope.item() == pytest.approx((-2 if d4 else 1) * 0.75, rel=1e-5)


def test_d6_makes_every_last_step_a_termination():
    right, released = (TaskReplay([two_episodes()], RAW, with_settings(released__limits_terminate=d6)) for d6 in (0, 1))
    assert right.terminated.tolist() == [False, False, True]
    assert released.terminated.tolist() == [False, True, True]  # the truncated second step, too
    assert released.next_action_valid.tolist() == right.next_action_valid.tolist()


def test_d7_leaves_the_observation_of_a_reset_unscaled():
    transform = ObservationTransform(2, (0, 1), (10.0, 100.0))
    right, released = (Focal(with_settings(released__raw_reset=d7), transform, 2, generator()) for d7 in (0, 1))
    observations, embeddings = np.array([[[5.0, 50.0]]]), np.zeros((1, 3))
    scaled = observations / [10.0, 100.0]
    for focal in (right, released):
        assert np.array_equal(
            focal.agent.act(observations, embeddings), right.agent.act(observations, embeddings, at_reset=True)
        )
    assert not np.array_equal(
        released.agent.act(observations, embeddings, at_reset=True), right.agent.act(observations, embeddings)
    )
    plain = Focal(TINY, RAW, 2, generator()).agent  # the same weights, a transform that does nothing
    assert np.array_equal(
        released.agent.act(observations, embeddings, at_reset=True), plain.act(observations, embeddings)
    )
    assert np.array_equal(released.agent.act(observations, embeddings), plain.act(scaled, embeddings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"released.discard_bellman": True}, "--set gradients=coupled"),
        ({"released.penalise_output": True}, "--set regularisation.kind=policy"),
        ({"released.penalty_at_state": True, "regularisation.kind": "policy"}, "kind=value-penalty"),
        ({"released.no_actor_divergence": True}, "--set regularisation.kind=value-penalty"),
        ({"released.raw_reset": True, "observation_scale": "none"}, "--set observation_scale=absmax"),
        ({"gradients": "coupled", "schedule": "encoder-first", "encoder_steps": 5}, "--set encoder_after=decaying"),
        ({"distance.weight": 0}, "leaves the encoder without a loss"),
        ({"context_draws": 1}, "no task is drawn twice; --set task_replacement=true"),
        ({"distance.form": "released", "distance.beta": 2}, r"has no effect here; --set distance\.form=paper"),
        ({"regularisation.divergence": "wasserstein"}, "has no effect here; --set regularisation.kind=policy"),
        ({"entropy.enabled": False, "entropy.learnt": True}, "no effect here; --set entropy.enabled=true"),
        ({"context_draws": 3}, "expected 1 or 2"),
        ({"value_limit": 0}, "value_limit=0"),
        ({"encoder.prior_std": 0}, r"encoder\.prior_std=0"),
    ],
)
def test_a_variant_that_would_change_nothing_or_cannot_be_is_refused(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        override(TINY, changes).check()


def test_one_context_per_task_is_enough_where_no_two_are_compared():
    settings = with_settings(context_draws=1, encoder__kind="probabilistic", distance__weight=0)
    settings.check()


# Contexts and schedule


def test_one_draw_has_positive_pairs_only_for_tasks_drawn_twice():
    settings = variant("one draw, tasks with replacement")
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    seen, draws = set(), generator(1)
    for _ in range(20):
        batch = sample_meta_batch(replay, settings, draws, **STEPS)
        assert batch.contexts.shape[:2] == (1, 3)
        assert batch.trains_encoder
        repeated = len(set(batch.tasks.tolist())) < 3
        metrics = Focal(settings, RAW, 2, generator()).update(batch, generator(2))
        assert (metrics["encoder/positive"] > 0) == repeated
        seen.add(repeated)
    assert seen == {False, True}


def test_tasks_with_replacement_may_outnumber_those_there_are():
    settings = with_settings(meta_batch=9, task_replacement=True)
    batch = sample_meta_batch(TaskReplay(walk_data().tasks, RAW, settings), settings, generator(), **STEPS)
    assert len(batch.tasks) == 9


def test_encoder_first_then_frozen_or_decaying():
    frozen, decaying = variant("encoder first, frozen"), variant("encoder first, decaying")
    assert [frozen.encoder_rate(step) for step in (0, 4, 5, 6)] == [1, 1, 0, 0]
    assert [decaying.encoder_rate(step) for step in (0, 4, 5, 7, 9, 10**6)] == [1, 1, 1, 0.5, 0.25, 0]
    assert [frozen.trains_control(step) for step in (0, 4, 5)] == [False, False, True]
    assert TINY.encoder_rate(10**6) == 1


def test_a_decaying_rate_scales_the_encoders_step():
    moves = []
    for rate in (1.0, 0.25):
        replay, focal = TaskReplay(walk_data().tasks, RAW, TINY), Focal(TINY, RAW, 2, generator())
        before = [parameter.clone() for parameter in focal.agent.encoder.parameters()]
        focal.update(sample_meta_batch(replay, TINY, generator(1), **STEPS), generator(2), rate)
        moves.append(
            torch.cat([(p - b).flatten() for p, b in zip(focal.agent.encoder.parameters(), before, strict=True)])
        )
    assert torch.allclose(0.25 * moves[0], moves[1], atol=1e-7)


def test_control_sees_the_posterior_spread_where_the_encoder_is_frozen():
    """The embedding that control learns from is a sample, as it is in joint training; acting takes the mean."""
    settings = with_settings(encoder__kind="probabilistic", schedule="encoder-first", encoder_steps=5)
    focal, batch, _ = trained(settings, encoder=False, control=True)
    first, _ = focal.agent.encoder.infer(batch.contexts[0], generator(7))
    second, _ = focal.agent.encoder.infer(batch.contexts[0], generator(8))
    assert not torch.equal(first, second)
    assert torch.equal(focal.agent.embed(batch.contexts[0]), focal.agent.embed(batch.contexts[0]))


# Precision


def test_bf16_keeps_weights_optimisers_and_losses_in_fp32():
    focal, _, metrics = trained(variant("bf16"), steps=3)
    for network in focal.networks.values():
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    for optimiser in focal.optimisers.values():
        for state in optimiser.state.values():
            assert all(value.dtype == torch.float32 for value in state.values())
    assert all(value.dtype == torch.float32 for value in metrics.values())


def test_bf16_gradients_point_where_fp32_gradients_do():
    settings = with_settings(regularisation__kind="value-penalty", control_hidden="64,64", encoder_hidden="64,64")
    found = {}
    for precision in ("fp32", "bf16"):
        focal, *_ = trained(dataclasses.replace(settings, precision=precision), steps=3)
        found[precision] = focal
    for name in ("encoder", "policy", "critic", "discriminator"):
        exact, rounded = (
            torch.cat([gradient.flatten() for gradient in gradients(focal, name)]) for focal in found.values()
        )
        assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98, name
        assert not torch.equal(exact, rounded), name  # it did take bf16 products


def test_acting_is_in_fp32_whatever_the_precision_of_training():
    focal, *_ = trained(variant("bf16"))
    exact = Focal(TINY, RAW, 2, generator(5))
    exact.agent.policy.load_state_dict(focal.agent.policy.state_dict())
    observations, embeddings = np.random.default_rng(0).normal(size=(2, 5, 2)), np.zeros((2, 3))
    assert np.array_equal(focal.agent.act(observations, embeddings), exact.agent.act(observations, embeddings))
