"""MBML: relabelling, triplet loss on masked posteriors and distillation by hand; the first stage batched over tasks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from focal import UsageError
from focal.datasets import Transitions
from focal.trainer.bcq import bcq_targets, decoding_noise, perturbation_loss, twin_error, vae_loss
from focal.trainer.encoder import product_of_gaussians
from focal.trainer.mbml import (
    Mbml,
    MbmlBatch,
    RelabelSettings,
    accept_relabelled,
    choose_accepted,
    context_posterior,
    kl_between,
    pair_posteriors,
    triplet_loss,
)
from focal.trainer.mbml_teachers import PredictionEnsemble, Predictions, Teachers
from focal.trainer.replay import TaskReplay
from focal.trainer.stacked import StackedMLP, of_tasks
from focal.trainer.transform import ObservationTransform

from .trainer_toys import goal_at, scatter, tiny_method, walk_data

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(means: object, variances: object) -> tuple[Tensor, Tensor]:
    return torch.tensor(means, dtype=torch.float32), torch.tensor(variances, dtype=torch.float32)


# Stacked networks


def test_stacked_networks_are_the_networks_one_by_one():
    net = StackedMLP(2, 3, 4, (8, 8), 5, generator())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator(1))
    inputs = torch.randn(6, 7, 2, 4, generator=generator(2))
    outputs = net(inputs)
    assert outputs.shape == (6, 7, 2, 5)
    for k in range(6):
        rows = inputs[k]
        for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            rows = rows @ weight[k] + bias[k]
            rows = rows.clamp_min(0) if layer < 2 else rows
        assert torch.allclose(outputs[k], rows, atol=1e-4)


def test_many_rows_without_gradient_give_the_same_outputs():
    net = StackedMLP(2, 3, 4, (8, 8), 5, generator())
    scatter(net)
    inputs = torch.randn(6, 100, 3, 4, generator=generator(2))
    with torch.no_grad():  # one network after the other
        outputs = net(inputs)
    assert torch.allclose(outputs, net(inputs), atol=1e-5)


def test_all_tasks_start_alike_and_copies_do_not():
    net = StackedMLP(2, 3, 4, (8,), 1, generator())
    outputs = net(torch.ones(6, 1, 4)).flatten().reshape(2, 3)
    assert torch.equal(outputs[:, :1].expand(2, 3), outputs)
    assert outputs[0, 0] != outputs[1, 0]
    assert net.weights[0].abs().max() <= 0.5  # 1/sqrt(4)


def test_of_tasks_takes_the_weights_of_the_tasks_asked_for():
    net = StackedMLP(1, 3, 2, (), 1, generator())
    with torch.no_grad():
        net.weights[0][:] = torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1)
        net.biases[0].zero_()
    assert of_tasks(net, torch.tensor([2, 0]), torch.ones(2, 1, 2)).flatten().tolist() == [200.0, 2.0]


def test_ensemble_mean_and_disagreement_by_hand():
    ensemble = PredictionEnsemble(3, 2, 1, 1, (), 1, generator())  # 3 members, 2 tasks
    with torch.no_grad():
        ensemble.body.weights[0].zero_()
        ensemble.body.biases[0][:] = torch.tensor([1.0, 5.0, 2.0, 5.0, 6.0, 5.0]).reshape(6, 1, 1)  # member by member
    states, actions = torch.zeros(4, 1), torch.zeros(4, 1)
    mean, spread = ensemble.predict(0, states, actions)
    assert mean.flatten().tolist() == pytest.approx([3.0] * 4)
    assert spread.flatten().tolist() == pytest.approx([math.sqrt((4 + 1 + 9) / 3)] * 4)
    mean, spread = ensemble.predict(1, states, actions)
    assert (mean.unique().item(), spread.unique().item()) == (5.0, 0.0)


# Relabelling and posteriors


def test_relabelled_transitions_are_accepted_where_the_members_agree():
    rule = RelabelSettings(reward_std=0.1, next_observation_std=0.2)
    rewards, following = torch.tensor([0.05, 0.1, 0.05, 0.5]), torch.tensor([0.3, 0.1, 0.19, 0.1])
    assert accept_relabelled(rewards, None, rule).tolist() == [True, False, True, False]
    assert accept_relabelled(rewards, following, rule).tolist() == [False, False, True, False]


def test_masked_product_of_gaussians():
    means, variances = gaussian([[1.0], [9.0], [4.0]], [[1.0], [0.1], [0.5]])
    mean, variance = product_of_gaussians(means, variances, torch.tensor([True, False, True]))
    # precisions 1 and 2: variance 1/3, mean (1 * 1 + 4 * 2) / 3
    assert (mean.item(), variance.item()) == pytest.approx((3.0, 1 / 3))
    unmasked = product_of_gaussians(means[[0, 2]], variances[[0, 2]])
    assert (mean.item(), variance.item()) == pytest.approx((unmasked[0].item(), unmasked[1].item()))
    mean, variance = product_of_gaussians(means, variances, torch.zeros(3, dtype=torch.bool))
    assert (mean.item(), variance.item()) == pytest.approx((0.0, 1e7))


def test_kl_between_gaussians_by_hand():
    first, second = gaussian([1.0, 0.0], [0.5, 1.0]), gaussian([0.0, 0.0], [2.0, 1.0])
    expected = 0.5 * (0.25 + 1 / 2 - 1 - math.log(0.25))
    assert kl_between(first, second).item() == pytest.approx(expected)
    assert kl_between(first, first).item() == pytest.approx(0.0, abs=1e-6)


def test_triplet_loss_averages_the_valid_pairs_above_the_margin():
    unit = [[1.0]] * 3
    anchor = gaussian([[0.0], [0.0], [0.0]], unit)
    positive = gaussian([[1.0], [0.0], [0.0]], unit)
    negative = gaussian([[2.0], [3.0], [0.0]], unit)
    # KL of unit Gaussians is half the squared distance: 0.5 - 2 + 2 = 0.5; 0 - 4.5 + 2 < 0; 0 - 0 + 2 but not valid
    loss, share = triplet_loss(anchor, positive, negative, torch.tensor([True, True, False]), 2.0)
    assert loss.item() == pytest.approx((0.5 + 0.0) / 2)
    assert share.item() == pytest.approx(2 / 3)
    assert triplet_loss(anchor, positive, negative, torch.zeros(3, dtype=torch.bool), 2.0)[0].item() == 0.0


def test_pairs_without_an_accepted_transition_give_no_gradient_and_no_nan():
    means = torch.zeros(2, 2, 4, 3, requires_grad=True)
    accepted = torch.zeros(2, 2, 4, dtype=torch.bool)
    own, relabelled = (means[0], torch.ones(2, 4, 3)), (means, torch.ones(2, 2, 4, 3))
    posteriors = pair_posteriors(own, relabelled, own, accepted)
    loss, _ = triplet_loss(*posteriors, accepted.any(dim=-1), 2.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, means)[0].abs().sum() == 0


def test_pair_posteriors_take_the_right_transitions():
    """L = 1, all variances 1: a posterior's mean is the mean of what it is made of, its variance 1 / how many."""
    own = (torch.tensor([[1.0, 2.0], [10.0, 20.0]]).unsqueeze(-1), torch.ones(2, 2, 1))
    foreign = (torch.tensor([[0.1, 0.2], [0.3, 0.4]]).unsqueeze(-1), torch.ones(2, 2, 1))
    relabelled = (torch.arange(8.0).reshape(2, 2, 2, 1), torch.ones(2, 2, 2, 1))
    accepted = torch.tensor([[[False, False], [False, True]], [[True, True], [False, False]]])
    anchor, positive, negative = pair_posteriors(own, relabelled, foreign, accepted)
    assert anchor[0][0, 1].item() == pytest.approx(3.0)  # [0, 1, 1]: task 1's second transition as task 0 sees it
    assert positive[0][0, 1].item() == pytest.approx(1.0)  # one of task 0's own
    assert negative[0][0, 1].item() == pytest.approx(0.4)  # that transition as logged
    assert anchor[0][1, 0].item() == pytest.approx(4.5)
    assert positive[0][1, 0].item() == pytest.approx(15.0)
    assert negative[0][1, 0].item() == pytest.approx(0.15)
    assert [part[1][0, 1].item() for part in (anchor, positive, negative)] == pytest.approx([1.0] * 3)
    assert [part[1][1, 0].item() for part in (anchor, positive, negative)] == pytest.approx([0.5] * 3)


def test_accepted_transitions_are_drawn_without_replacement():
    accepted = torch.tensor([[True, False, True, True, True], [False, False, True, False, False]])
    seen: set[int] = set()
    for seed in range(20):
        chosen, valid = choose_accepted(accepted, 3, generator(seed))
        assert valid.tolist() == [[True] * 3, [True, False, False]]
        assert len(set(chosen[0].tolist())) == 3
        assert chosen[1, 0] == 2
        seen |= set(chosen[0].tolist())
    assert seen == {0, 2, 3, 4}


def test_the_context_is_own_and_accepted_relabelled_transitions():
    own = (torch.full((2, 2, 1), 1.0), torch.ones(2, 2, 1))
    relabelled = (torch.full((2, 2, 2, 1), 7.0), torch.ones(2, 2, 2, 1))
    accepted = torch.zeros(2, 2, 2, dtype=torch.bool)
    accepted[0, 1, 0] = True
    mean, variance = context_posterior(own, relabelled, accepted, generator())
    assert mean.flatten().tolist() == pytest.approx([(1 + 1 + 7) / 3, 1.0])
    assert variance.flatten().tolist() == pytest.approx([1 / 3, 1 / 2])


# First stage


def new_teachers(settings, tasks: int) -> Teachers:
    return Teachers(
        settings.teachers, settings.discount, settings.tau, settings.transitions_vary, tasks, 2, 2, generator()
    )


VARYING = {"transitions_vary": True, "next_observation_in_context": True}


@pytest.mark.parametrize("changes", [{}, VARYING], ids=["rewards vary", "transitions vary"])
def test_the_first_stage_of_many_tasks_is_that_of_each_task_alone(changes: dict):
    settings, tasks = tiny_method("mbml", **changes), walk_data(tasks=4).tasks
    together, draw = new_teachers(settings, 4), generator(1)
    replay = TaskReplay(tasks, RAW, settings)
    for step in range(together.total_steps):
        together.train_step(replay, step, draw)
    alone, draw = new_teachers(settings, 1), generator(1)
    replay = TaskReplay(tasks[2:3], RAW, settings)
    for step in range(alone.total_steps):
        alone.train_step(replay, step, draw)
    for name, network in together.networks.items():
        for ours, theirs in zip(network.parameters(), alone.networks[name].parameters(), strict=True):
            mine = ours.unflatten(0, (-1, 4))[:, 2]  # copies first, then tasks
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=2e-5), name
    first = next(together.decoder.parameters())
    assert not torch.allclose(first[1], first[2])  # the tasks did learn different things


def frozen(optimisers, monkeypatch: pytest.MonkeyPatch) -> None:
    for optimiser in optimisers.values():
        monkeypatch.setattr(optimiser, "step", lambda: None)


def assert_gradients(loss: Tensor, *networks: nn.Module) -> None:
    """What the last backward pass left on the networks is the gradient of `loss`."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for parameter, expected in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-7)


def test_every_gradient_of_the_first_stage_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch):
    """No network moves, targets differ from what they follow, and the random numbers are drawn again in their order."""
    settings = tiny_method("mbml", **VARYING)
    teachers, replay = new_teachers(settings, 4), TaskReplay(walk_data().tasks, RAW, settings)
    frozen(teachers.optimisers, monkeypatch)
    scatter(*teachers.networks.values())
    target_critic, target_perturbation = copy.deepcopy([teachers.target_critic, teachers.target_perturbation])
    batch = teachers.sample(replay, 0, generator(1))
    monkeypatch.setattr("focal.trainer.mbml_teachers._ROWS_AT_ONCE", 3 * settings.teachers.rewards.batch_size)
    teachers.update(batch, generator(2))

    data, draw, rule = batch.bcq, generator(2), settings.teachers.bcq
    states, size = data.observations, settings.teachers.batch_size
    noise = torch.randn((1, size, 4), generator=draw)
    generative = vae_loss(teachers.action_encoder, teachers.decoder, states, data.actions, noise)[0].sum()
    assert_gradients(generative, teachers.action_encoder, teachers.decoder)
    targets = bcq_targets(
        teachers.decoder, target_perturbation, target_critic, data, data.next_observations,
        decoding_noise((1, size, rule.candidates, 4), draw), settings.discount, rule.min_weight,
    )  # fmt: skip
    assert_gradients(twin_error(teachers.critic(states, data.actions), targets).sum(), teachers.critic)
    decoded = teachers.decoder(states, decoding_noise((1, size, 4), draw).expand(4, -1, -1)).detach()
    acting = perturbation_loss(teachers.critic.first, teachers.perturbation, states, decoded).sum()
    assert_gradients(acting, teachers.perturbation)

    # by the update in parts of 3 networks, here of all at once
    for ensemble, examples in ((teachers.rewards, batch.rewards), (teachers.transitions, batch.transitions)):
        assert not torch.equal(examples.inputs[:4], examples.inputs[4:8])  # every member sees draws of its own
        errors = (ensemble(examples.inputs) - examples.targets).square().mean(dim=(1, 2))
        assert_gradients(errors.sum(), ensemble)


def test_targets_of_the_first_stage_follow_by_a_share_of_tau():
    settings = tiny_method("mbml", tau=0.3)
    teachers, replay = new_teachers(settings, 4), TaskReplay(walk_data().tasks, RAW, settings)
    pairs = {"critic": teachers.target_critic, "perturbation": teachers.target_perturbation}
    scatter(*pairs.values())
    before = copy.deepcopy(pairs)
    teachers.train_step(replay, 0, generator(1))
    for name, target in pairs.items():
        for new, old, source in zip(
            target.parameters(), before[name].parameters(), teachers.networks[name].parameters(), strict=True
        ):
            assert torch.allclose(new, 0.7 * old + 0.3 * source, atol=1e-6), name


def test_the_first_stage_learns_and_its_ensembles_finish_in_their_own_time():
    settings = tiny_method("mbml", teachers__steps=400, teachers__rewards__steps=300, teachers__learning_rate=3e-3)
    teachers, draw = new_teachers(settings, 4), generator(1)
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    rows = [teachers.train_step(replay, step, draw) for step in range(teachers.total_steps)]
    assert len(rows) == 400
    assert "rewards/loss" in rows[299]
    assert "rewards/loss" not in rows[300]
    assert rows[299]["rewards/loss"] < 0.3 * rows[0]["rewards/loss"]
    assert rows[-1]["vae/error"] < 0.5 * rows[0]["vae/error"]
    assert all(bool(torch.isfinite(value)) for row in rows for value in row.values())


def test_a_transition_ensemble_exists_only_where_transitions_vary():
    assert "transitions" not in new_teachers(tiny_method("mbml"), 2).networks
    assert "transitions" in new_teachers(tiny_method("mbml", **VARYING), 2).networks
    with pytest.raises(UsageError, match="--set next_observation_in_context=true"):
        tiny_method("mbml", transitions_vary=True)
    with pytest.raises(UsageError, match=r"--set encoder\.kind=probabilistic"):
        tiny_method("mbml", encoder__kind="deterministic")


def test_pool_predictions_are_those_of_each_task_for_each_other():
    settings, data = tiny_method("mbml", **VARYING), walk_data(tasks=3)
    replay, teachers = TaskReplay(data.tasks, RAW, settings), new_teachers(settings, 3)
    for step in range(5):
        teachers.train_step(replay, step, generator(step))
    found = teachers.predict_pool(replay, torch.tensor([1.0, 10.0]), generator(3))
    pool = replay.batch_at(found.steps)
    assert found.reward.shape == (3, 3, 20)
    assert found.next_observation.shape == (3, 3, 20, 2)
    for i, j in ((0, 2), (2, 1)):
        mean, spread = teachers.rewards.predict(i, pool.observations[j], pool.actions[j])
        assert torch.allclose(found.reward[i, j], mean.squeeze(-1), atol=1e-6)
        assert torch.allclose(found.reward_std[i, j], spread.squeeze(-1), atol=1e-6)
        mean, spread = teachers.transitions.predict(i, pool.observations[j], pool.actions[j])
        assert torch.allclose(found.next_observation[i, j], mean, atol=1e-6)
        raw = (spread * torch.tensor([1.0, 10.0])).mean(dim=-1)  # in raw units, mean over dimensions
        assert torch.allclose(found.next_observation_std[i, j], raw, atol=1e-6)


def test_the_reward_ensemble_learns_the_contexts_reward():
    """Where the context holds the sparse reward, relabelled transitions must hold it too."""
    settings = tiny_method("mbml", context_reward="sparse")
    replay, teachers = TaskReplay(walk_data().tasks, RAW, settings), new_teachers(settings, 4)
    sparse = teachers.sample(replay, 0, generator()).rewards
    dense = teachers.sample(TaskReplay(walk_data().tasks, RAW, tiny_method("mbml")), 0, generator()).rewards
    assert torch.equal(sparse.inputs, dense.inputs)
    assert torch.allclose(sparse.targets, (1 + dense.targets).clamp_min(0), atol=1e-6)
    assert not torch.equal(sparse.targets, dense.targets)


# Second stage


def prepared(**changes: object) -> tuple[Mbml, TaskReplay]:
    settings = tiny_method("mbml", **changes)
    replay = TaskReplay(walk_data().tasks, RAW, settings)
    teachers = new_teachers(settings, 4)
    draw = generator(1)
    for step in range(3):
        teachers.train_step(replay, step, draw)
    predictions = teachers.predict_pool(replay, torch.ones(2), generator(2))
    return Mbml(settings, RAW, 2, generator(), teachers, predictions), replay


def test_batches_relabel_what_the_ensembles_are_sure_of():
    method, replay = prepared(**VARYING, relabel__reward_std=0.05)
    batch: MbmlBatch = method.sample(replay, generator(5))
    tasks, size = len(batch.tasks), method.settings.context_size
    assert batch.own.shape == batch.foreign.shape == (tasks, size, 7)
    assert batch.relabelled.shape == (tasks, tasks, size, 7)
    kept = [0, 1, 2, 3]  # observation and action
    assert torch.equal(batch.relabelled[..., kept], batch.foreign[None, ..., kept].expand(tasks, -1, -1, -1))
    assert not torch.diagonal(batch.accepted).any()
    for i in range(tasks):
        for j in range(tasks):
            rows = batch.foreign[j]
            ensemble = method.teachers.rewards
            mean, spread = ensemble.predict(int(batch.tasks[i]), rows[:, :2], rows[:, 2:4])
            assert torch.allclose(batch.relabelled[i, j, :, 4], mean.squeeze(-1), atol=1e-5)
            follow, follow_std = method.teachers.transitions.predict(int(batch.tasks[i]), rows[:, :2], rows[:, 2:4])
            assert torch.allclose(batch.relabelled[i, j, :, 5:], follow, atol=1e-5)
            sure = (spread.squeeze(-1) < 0.05) & (follow_std.mean(dim=-1) < 0.2)
            assert batch.accepted[i, j].tolist() == (sure & (i != j)).tolist()


def test_everything_drawn_for_a_task_comes_from_that_task():
    """The reward of a walk is minus the distance to the task's goal, so that next observations say what it must be."""
    method, replay = prepared(**VARYING)
    goals = torch.tensor(np.stack([goal_at(np.pi * k / 3) for k in range(4)]), dtype=torch.float32)
    for seed in range(5):
        batch: MbmlBatch = method.sample(replay, generator(seed))
        of_task = goals[batch.tasks].unsqueeze(1)  # (K, 1, 2)
        for rewards, following in (
            (batch.own[..., 4], batch.own[..., 5:]),
            (batch.foreign[..., 4], batch.foreign[..., 5:]),
            (batch.transitions.rewards, batch.transitions.next_observations),
        ):
            assert torch.allclose(rewards, -(following - of_task).norm(dim=-1), atol=1e-5)


def test_foreign_transitions_are_drawn_from_the_whole_pool():
    method, replay = prepared(teachers__pool=20)
    pool = replay.context_at(method.predictions.steps)  # (M, 20, context_dim)
    seen: list[set[int]] = [set() for _ in range(4)]
    for seed in range(20):
        batch: MbmlBatch = method.sample(replay, generator(seed))
        for task, rows in zip(batch.tasks.tolist(), batch.foreign, strict=True):
            found = (rows[:, None] == pool[task][None]).all(dim=-1)  # (N, 20)
            assert found.any(dim=1).all()
            seen[task] |= set(found.any(dim=0).nonzero().flatten().tolist())
    assert seen == [set(range(20))] * 4


def test_next_observations_stay_where_only_rewards_vary():
    method, replay = prepared(next_observation_in_context=True)
    batch: MbmlBatch = method.sample(replay, generator(5))
    tasks = len(batch.tasks)
    assert torch.equal(batch.relabelled[..., 5:], batch.foreign[None, ..., 5:].expand(tasks, -1, -1, -1))


def test_distillation_targets_are_the_teachers_outputs():
    method, replay = prepared()
    teachers, tasks = method.teachers, torch.tensor([3, 1])
    data = replay.sample_batch(tasks, 5, generator())
    noise = decoding_noise((2, 5, 4), generator(1))
    targets = teachers.distillation_targets(tasks, data.observations, data.actions, noise)
    every = replay.sample_batch(torch.arange(4), 5, generator())  # any states, to be overwritten where they count
    states, actions, wide = every.observations.clone(), every.actions.clone(), torch.zeros(4, 5, 4)
    states[tasks], actions[tasks], wide[tasks] = data.observations, data.actions, noise
    with torch.no_grad():
        decoded = teachers.decoder(states, wide)
        assert torch.allclose(targets.decoded, decoded[tasks], atol=1e-6)
        assert torch.allclose(targets.perturbed, teachers.perturbation(states, decoded)[tasks], atol=1e-6)
        assert torch.allclose(targets.values, teachers.critic(states, actions)[0][tasks], atol=1e-6)
    assert (targets.perturbed - targets.decoded).abs().max() <= 0.05 + 1e-6
    assert not targets.values.requires_grad


def snapshot(method: Mbml) -> dict[str, list[Tensor]]:
    networks = {**method.networks, **{f"teachers' {name}": net for name, net in method.teachers.networks.items()}}
    return {name: [p.detach().clone() for p in network.parameters()] for name, network in networks.items()}


def moved(before: dict[str, list[Tensor]], method: Mbml) -> set[str]:
    after = snapshot(method)
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


def test_a_step_moves_the_student_and_never_the_teachers():
    method, replay = prepared()
    before = snapshot(method)
    metrics = method.update(method.sample(replay, generator(5)), generator(6))
    assert moved(before, method) == {"encoder", "decoder", "perturbation", "critic"}
    assert all(bool(torch.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize("name", ["encoder", "decoder", "perturbation", "critic"])
def test_each_optimiser_moves_only_its_own_network(name: str, monkeypatch: pytest.MonkeyPatch):
    method, replay = prepared()
    for other, optimiser in method.optimisers.items():
        if other != name:
            monkeypatch.setattr(optimiser, "step", lambda: None)
    before = snapshot(method)
    method.update(method.sample(replay, generator(5)), generator(6))
    assert moved(before, method) == {name}


def test_triplet_kl_and_value_regression_reach_the_encoder_and_nothing_else_does():
    method, replay = prepared(encoder__prior_std=0.5)
    batch = method.sample(replay, generator(5))
    assert batch.accepted.any()
    method.update(batch, generator(6))
    found = [parameter.grad for parameter in method.agent.encoder.parameters()]

    fresh, _ = prepared(encoder__prior_std=0.5)
    encoder, settings, draw = fresh.agent.encoder, fresh.settings, generator(6)
    own, relabelled, foreign = (encoder.factors(rows) for rows in (batch.own, batch.relabelled, batch.foreign))
    posteriors = pair_posteriors(own, relabelled, foreign, batch.accepted)
    triplet, _ = triplet_loss(*posteriors, batch.accepted.any(dim=-1), settings.triplet_margin)
    mean, variance = context_posterior(own, relabelled, batch.accepted, draw)
    embeddings = mean + variance.sqrt() * torch.randn(mean.shape, generator=draw)
    noise = decoding_noise((*batch.transitions.rewards.shape, 4), draw)
    data = batch.transitions
    targets = fresh.teachers.distillation_targets(batch.tasks, data.observations, data.actions, noise)
    states = torch.cat([data.observations, embeddings.unsqueeze(1).expand(-1, 8, -1)], dim=-1)
    value_loss = (fresh.agent.critic(states, data.actions) - targets.values).square().mean()
    kl = 0.5 * (4 * (variance + mean.square()) - 1 - (4 * variance).log()).sum()  # prior variance 1/4
    terms = {"triplet": triplet, "kl": settings.encoder.kl_weight * kl, "value": value_loss}
    parameters = list(encoder.parameters())
    parts = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms.values()]
    assert all(any(gradient.abs().sum() > 0 for gradient in part) for part in parts)
    for ours, *theirs in zip(found, *parts, strict=True):
        assert torch.allclose(ours, sum(theirs), rtol=1e-3, atol=1e-6)


def test_the_student_imitates_what_the_teachers_say(monkeypatch: pytest.MonkeyPatch):
    method, replay = prepared()
    scatter(*method.teachers.networks.values())
    frozen(method.optimisers, monkeypatch)
    batch, agent = method.sample(replay, generator(5)), method.agent
    method.update(batch, generator(6))

    draw, data, encoder = generator(6), batch.transitions, agent.encoder
    mean, variance = context_posterior(
        encoder.factors(batch.own), encoder.factors(batch.relabelled), batch.accepted, draw
    )
    embeddings = mean + variance.sqrt() * torch.randn(mean.shape, generator=draw)
    states = torch.cat([data.observations, embeddings.unsqueeze(1).expand(-1, 8, -1)], dim=-1).detach()
    noise = decoding_noise((*data.rewards.shape, 4), draw)
    targets = method.teachers.distillation_targets(batch.tasks, data.observations, data.actions, noise)
    assert_gradients((agent.critic(states, data.actions) - targets.values).square().mean(), agent.critic)
    assert_gradients((agent.decoder(states, noise) - targets.decoded).square().mean(), agent.decoder)
    moved_actions = agent.perturbation(states, targets.decoded)
    assert_gradients((moved_actions - targets.perturbed).square().mean(), agent.perturbation)


def test_a_single_task_has_no_pairs_and_still_learns():
    settings = tiny_method("mbml")
    tasks: list[Transitions] = walk_data().tasks[:1]
    replay, teachers = TaskReplay(tasks, RAW, settings), new_teachers(settings, 1)
    predictions: Predictions = teachers.predict_pool(replay, torch.ones(2), generator())
    method = Mbml(settings, RAW, 2, generator(), teachers, predictions)
    metrics = method.train_step(replay, 0, generator())
    assert metrics["encoder/triplet"] == 0
    assert metrics["encoder/pairs"] == 0
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
