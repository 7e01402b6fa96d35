"""FOCAL's losses worked by hand, and which optimiser moves what."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from focal.trainer.agent import augment
from focal.trainer.control import actor_loss, critic_loss, critic_targets, entropy_weight_loss, updated_alpha
from focal.trainer.focal import Focal
from focal.trainer.networks import StateActionNet, TanhGaussianPolicy, TwinCritic
from focal.trainer.optimisers import polyak_update
from focal.trainer.replay import Batch, TaskReplay, sample_meta_batch
from focal.trainer.settings import FocalSettings, RegularisationSettings
from focal.trainer.transform import ObservationTransform

from .trainer_toys import TINY, walk_data, with_settings

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(network: nn.Module, weight: list[float], bias: float) -> None:
    """Make a StateActionNet without hidden layers compute weight . (state, action) + bias."""
    with torch.no_grad():
        network.body[0].weight[:] = torch.tensor([weight])
        network.body[0].bias.fill_(bias)


def constant_critic(first: float, second: float) -> TwinCritic:
    critic = TwinCritic(1, 1, ())
    linear(critic.first, [0, 0], first)
    linear(critic.second, [0, 0], second)
    return critic


def certain_policy(mean: float) -> TanhGaussianPolicy:
    """Acts tanh(mean) with no noise to speak of, in any state of dimension 1."""
    policy = TanhGaussianPolicy(1, (), 1)
    with torch.no_grad():
        policy.mean.weight.zero_()
        policy.mean.bias.fill_(mean)
        policy.log_std.weight.zero_()
        policy.log_std.bias.fill_(-20.0)
    return policy


def three_steps() -> Batch:
    """One task; the first step goes on, the second is truncated, the third terminates."""
    return Batch(
        observations=torch.zeros(1, 3, 1),
        actions=torch.zeros(1, 3, 1),
        rewards=torch.tensor([[1.0, 2.0, 3.0]]),
        next_observations=torch.zeros(1, 3, 1),
        terminated=torch.tensor([[False, False, True]]),
        next_actions=torch.tensor([[[0.25], [-0.9], [-0.9]]]),
        next_action_valid=torch.tensor([[True, False, False]]),
    )


def targets_of(settings: FocalSettings, alpha: float = 0.0, entropy_weight: float = 0.0) -> list[float]:
    discriminator = StateActionNet(1, 1, ())
    linear(discriminator, [0, 1], 0.0)  # c(s, a) = a
    targets, _ = critic_targets(
        certain_policy(0.5493061),  # acts tanh(0.5493061) = 0.5
        constant_critic(10.0, 7.0),
        discriminator if settings.regularisation.kind != "none" else None,
        three_steps(),
        torch.zeros(1, 3, 1),
        torch.zeros(1, 3, 1),
        settings,
        torch.tensor(alpha),
        torch.tensor(entropy_weight),
        generator(),
    )
    return targets[0].tolist()


def test_targets_bootstrap_through_truncation_and_stop_at_termination():
    settings = with_settings(discount=0.9, reward_scale=5)
    # 5 r + 0.9 * min(10, 7), without the value where terminated
    assert targets_of(settings) == pytest.approx([5 + 6.3, 10 + 6.3, 15.0])


def test_value_penalty_is_at_the_next_state_and_masked_where_the_episode_ends():
    settings = with_settings(
        discount=0.9, reward_scale=1, regularisation__kind="value-penalty", regularisation__divergence="wasserstein"
    )
    # divergence at s': c(0.5) - c(0.25) = 0.25, weight 4: 7 - 1 = 6 for the first step; no logged action for the others
    assert targets_of(settings, alpha=4.0) == pytest.approx([1 + 0.9 * 6, 2 + 0.9 * 7, 3.0])


def test_policy_regularisation_leaves_the_targets_alone():
    settings = with_settings(discount=0.9, reward_scale=1, regularisation__kind="policy")
    assert targets_of(settings, alpha=4.0) == pytest.approx([1 + 6.3, 2 + 6.3, 3.0])


def test_entropy_is_in_the_value_but_not_after_termination():
    settings = with_settings(discount=0.5, reward_scale=1)
    plain, soft = targets_of(settings), targets_of(settings, entropy_weight=0.1)
    # log pi is about +20 for a standard deviation of exp(-20), so the soft value is lower
    assert soft[0] < plain[0] - 0.5
    assert soft[0] - plain[0] == pytest.approx(0.5 * -0.1 * 20, rel=0.3)
    assert soft[2] == plain[2] == 3.0


def test_critic_loss_sums_the_twins_mean_squared_errors():
    # values 10 and 7; targets 8, 9, 10: ((2^2 + 1 + 0) + (1 + 2^2 + 3^2)) / 3
    targets = torch.tensor([[8.0, 9.0, 10.0]])
    loss, metrics = critic_loss(constant_critic(10.0, 7.0), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), targets)
    assert loss.item() == pytest.approx((5 + 14) / 3)
    assert metrics["critic/value"].item() == pytest.approx(8.5)


def test_actor_loss_by_hand():
    # Q1 = 2 a + 1, Q2 = 2 a + 4 at a = 0.5: min 2; c = a: divergence 0.5 - (-0.1) = 0.6 with weight 3; no entropy.
    critic, discriminator = constant_critic(0, 0), StateActionNet(1, 1, ())
    linear(critic.first, [0, 2], 1.0)
    linear(critic.second, [0, 2], 4.0)
    linear(discriminator, [0, 1], 0.0)
    settings = with_settings(
        regularisation__kind="policy", regularisation__divergence="wasserstein", policy_penalty=0.01
    )
    logged = torch.full((1, 3, 1), -0.1)
    loss, metrics = actor_loss(
        certain_policy(0.5493061), critic, discriminator, torch.zeros(1, 3, 1), logged, settings, torch.tensor(3.0),
        torch.tensor(0.0), generator(),
    )  # fmt: skip
    penalty = 0.01 * (0.5493061**2 + 20.0**2)
    assert loss.item() == pytest.approx(-2 + 3 * 0.6 + penalty, rel=1e-5)
    assert metrics["regularisation/divergence"].item() == pytest.approx(0.6, rel=1e-5)
    assert metrics["actor/value"].item() == pytest.approx(2.0, rel=1e-5)


def test_alpha_rises_above_the_target_falls_below_and_stays_in_bounds():
    rule = RegularisationSettings(alpha_learning_rate=0.1, target_divergence=0.05, alpha_min=0.5, alpha_max=100.0)
    alpha = torch.tensor(10.0)
    assert updated_alpha(alpha, torch.tensor(0.55), rule).item() == pytest.approx(10 * np.exp(0.05))
    assert updated_alpha(alpha, torch.tensor(-0.45), rule).item() == pytest.approx(10 * np.exp(-0.05))
    assert updated_alpha(alpha, torch.tensor(1e6), rule).item() == pytest.approx(10 * np.exp(0.1))  # no jumps
    assert updated_alpha(torch.tensor(99.0), torch.tensor(5.0), rule).item() == 100.0
    assert updated_alpha(torch.tensor(0.5), torch.tensor(-5.0), rule).item() == 0.5


def test_entropy_weight_rises_while_the_entropy_is_too_low():
    weight = torch.tensor(0.0, requires_grad=True)
    assert torch.autograd.grad(entropy_weight_loss(weight, torch.tensor(-3.0), -2.0), weight)[0] < 0
    assert torch.autograd.grad(entropy_weight_loss(weight, torch.tensor(-1.0), -2.0), weight)[0] > 0


def test_polyak_moves_a_share_of_the_way():
    target, source = constant_critic(0.0, 10.0), constant_critic(1.0, 20.0)
    polyak_update(target, source, 0.1)
    assert target.first.body[0].bias.item() == pytest.approx(0.1)
    assert target.second.body[0].bias.item() == pytest.approx(11.0)
    assert source.first.body[0].bias.item() == 1.0


EVERYTHING = with_settings(
    regularisation__kind="value-penalty",
    regularisation__adaptive=True,
    regularisation__discriminator_steps=2,
    entropy__learnt=True,
)


def snapshot(focal: Focal) -> dict[str, list[Tensor]]:
    state = {name: [p.detach().clone() for p in network.parameters()] for name, network in focal.networks.items()}
    return state | {name: [scalar.detach().clone()] for name, scalar in focal.scalars.items()}


def moved(before: dict[str, list[Tensor]], focal: Focal) -> set[str]:
    after = snapshot(focal)
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


def test_each_kind_of_step_moves_its_networks_and_no_other():
    replay = TaskReplay(walk_data().tasks, RAW, EVERYTHING)
    focal = Focal(EVERYTHING, RAW, 2, generator())
    control = {"policy", "critic", "target_critic", "discriminator", "alpha", "log_entropy_weight"}
    for encoder, acts, expected in (
        (True, False, {"encoder"}),
        (False, True, control),
        (True, True, control | {"encoder"}),
    ):
        before = snapshot(focal)
        focal.update(sample_meta_batch(replay, EVERYTHING, generator(1), encoder, acts), generator(2))
        assert moved(before, focal) == expected


@pytest.mark.parametrize("name", ["encoder", "policy", "critic", "discriminator", "entropy"])
def test_each_optimiser_moves_only_its_own_parameters(name: str, monkeypatch: pytest.MonkeyPatch):
    """All others are stopped; target_critic follows the critic and alpha has no optimiser."""
    replay = TaskReplay(walk_data().tasks, RAW, EVERYTHING)
    focal = Focal(EVERYTHING, RAW, 2, generator())
    for other, optimiser in focal.optimisers.items():
        if other != name:
            monkeypatch.setattr(optimiser, "step", lambda: None)
    before = snapshot(focal)
    focal.update(sample_meta_batch(replay, EVERYTHING, generator(1), True, True), generator(2))
    owned = {"critic": {"critic", "target_critic"}, "entropy": {"log_entropy_weight"}}.get(name, {name})
    assert moved(before, focal) - {"alpha"} == owned


def test_no_gradient_of_the_control_losses_reaches_the_encoder():
    """Decoupled: a joint step moves the encoder exactly as an encoder-only step does."""
    replay = TaskReplay(walk_data().tasks, RAW, EVERYTHING)
    joint, alone = (Focal(EVERYTHING, RAW, 2, generator()) for _ in range(2))
    batch = sample_meta_batch(replay, EVERYTHING, generator(1), True, True)
    joint.update(batch, generator(2))
    alone.update(type(batch)(batch.tasks, batch.contexts, None), generator(2))
    for ours, theirs in zip(joint.agent.encoder.parameters(), alone.agent.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_that_does_not_learn_keeps_no_gradient():
    replay = TaskReplay(walk_data().tasks, RAW, EVERYTHING)
    focal = Focal(EVERYTHING, RAW, 2, generator())
    focal.update(sample_meta_batch(replay, EVERYTHING, generator(1), False, True), generator(2))
    assert all(parameter.grad is None for parameter in focal.agent.encoder.parameters())
    assert all(parameter.grad is None for parameter in focal.control.target_critic.parameters())


def test_unregularised_settings_have_no_discriminator():
    """The released code trains it, and alpha, all the same (D22)."""
    focal = Focal(TINY, RAW, 2, generator())
    assert "discriminator" not in focal.networks
    assert "discriminator" not in focal.optimisers


def test_maximum_entropy_can_be_switched_off():
    replay = TaskReplay(walk_data().tasks, RAW, TINY)
    settings = with_settings(entropy__enabled=False)
    focal = Focal(settings, RAW, 2, generator())
    metrics = focal.update(sample_meta_batch(replay, settings, generator(1), True, True), generator(2))
    assert metrics["actor/entropy_weight"].item() == 0
    assert focal.control.log_entropy_weight.item() == 0  # log 1, not moved


def test_updates_follow_from_the_generators_alone():
    replay = TaskReplay(walk_data().tasks, RAW, EVERYTHING)
    runs = []
    for _ in range(2):
        torch.rand(3)  # global random state must not matter
        focal, draw = Focal(EVERYTHING, RAW, 2, generator()), generator(5)
        for _ in range(3):
            metrics = focal.update(sample_meta_batch(replay, EVERYTHING, draw, True, True), draw)
        runs.append((snapshot(focal), {name: value.item() for name, value in metrics.items()}))
    assert runs[0][1] == runs[1][1]
    assert all(
        torch.equal(a, b) for name in runs[0][0] for a, b in zip(runs[0][0][name], runs[1][0][name], strict=True)
    )


def test_act_takes_raw_observations_and_remembers_nothing():
    transform = ObservationTransform(3, (0, 2), (2.0, 4.0))
    agent = Focal(TINY, transform, 2, generator()).agent
    observations = np.random.default_rng(0).normal(size=(4, 6, 3))  # float64, as environments give them
    embeddings = np.random.default_rng(1).uniform(-1, 1, (4, 3)).astype(np.float32)
    actions = agent.act(observations, embeddings)
    assert isinstance(actions, np.ndarray)
    assert actions.shape == (4, 6, 2)
    assert actions.dtype == np.float32
    scaled = torch.tensor(observations[..., [0, 2]] / [2.0, 4.0], dtype=torch.float32)
    expected = agent.policy.mode(augment(scaled, torch.tensor(embeddings)))
    assert np.allclose(actions, expected.detach(), atol=1e-6)
    agent.embed(np.random.default_rng(2).normal(size=(4, 5, 5)))
    assert np.array_equal(agent.act(observations, embeddings), actions)
    # a matrix product of fewer rows may round otherwise
    assert np.allclose(agent.act(observations[1:2], embeddings[1:2]), actions[1:2], atol=1e-6)


def test_stochastic_actions_need_and_follow_a_generator():
    agent = Focal(TINY, RAW, 2, generator()).agent
    observations, embeddings = torch.zeros(2, 3, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="Generator"):
        agent.act(observations, embeddings, deterministic=False)
    draws = [agent.act(observations, embeddings, False, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_wasserstein_and_every_power_train_without_nan():
    replay = TaskReplay(walk_data().tasks, RAW, TINY)
    for power in (-2, -1, 1, 2):
        settings = with_settings(
            distance__power=power, regularisation__kind="policy", regularisation__divergence="wasserstein"
        )
        focal, draw = Focal(settings, RAW, 2, generator()), generator(1)
        for _ in range(5):
            metrics = focal.update(sample_meta_batch(replay, settings, draw, True, True), draw)
        assert all(torch.isfinite(value) for value in metrics.values())


def test_targets_start_as_the_critic_and_take_no_gradient():
    focal = Focal(TINY, RAW, 2, generator())
    assert all(not parameter.requires_grad for parameter in focal.control.target_critic.parameters())
    assert all(map(torch.equal, focal.control.critic.parameters(), focal.control.target_critic.parameters()))
