"""One whole gradient step of FOCAL against the same step written out in plain autograd, and no setting without effect.

The losses are tested one by one elsewhere; here is how they are put together: which network sees what, in which order.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from focal import trainer as focal_trainer
from focal.settings import field_names, override
from focal.trainer.control import ActorCritic
from focal.trainer.focal import Focal
from focal.trainer.replay import Batch, MetaBatch, TaskReplay, sample_meta_batch, training_transform
from focal.trainer.settings import FocalSettings
from focal.trainer.transform import ObservationTransform

from .test_trainer_networks import plain
from .trainer_toys import TINY, scatter, walk_data, with_settings

RAW = ObservationTransform(2, (0, 1), (1.0, 1.0))

# No number is the default's, so that one that is not passed on shows.
ODD = with_settings(
    discount=0.7, reward_scale=3, tau=0.3, encoder_learning_rate=2e-3, critic_learning_rate=3e-3,
    actor_learning_rate=4e-3, policy_penalty=0.05, log_std_min=-0.1, log_std_max=0.05, entropy__weight=0.3,
    entropy__target=1.5, entropy__learning_rate=5e-3, distance__power=-1, distance__beta=1.7, distance__epsilon=0.3,
    distance__weight=2.5, regularisation__alpha=2, regularisation__gradient_penalty=1.5,
    regularisation__discriminator_steps=3, regularisation__discriminator_learning_rate=6e-3,
    regularisation__target_divergence=0.4, regularisation__alpha_learning_rate=0.2,
)  # fmt: skip
_GAUSSIAN = {"encoder.kind": "probabilistic", "encoder.kl_weight": 0.4, "encoder.prior_std": 0.6}
STEPS: dict[str, dict[str, object]] = {
    "unregularised": {},
    "value penalty": {"regularisation.kind": "value-penalty"},
    "policy": {"regularisation.kind": "policy", "regularisation.adaptive": True},
    "wasserstein": {"regularisation.kind": "value-penalty", "regularisation.divergence": "wasserstein"},
    "learnt entropy weight": {"entropy.learnt": True},
    "no entropy": {"entropy.enabled": False},
    "linear power": {"distance.power": 1},
    "released distance": {"distance.form": "released", "distance.power": -2, "distance.beta": None},
    "probabilistic": _GAUSSIAN,
    "coupled, probabilistic": {**_GAUSSIAN, "gradients": "coupled", "encoder.bounded": False},
    "coupled": {"gradients": "coupled"},
    "coupled, value penalty": {"gradients": "coupled", "regularisation.kind": "value-penalty"},
    "D1": {"gradients": "coupled", "released.discard_bellman": True},
    "D2": {"regularisation.kind": "value-penalty", "released.penalise_output": True},
    "D3": {"regularisation.kind": "value-penalty", "released.penalty_at_state": True},
    "D4": {"regularisation.kind": "policy", "released.no_actor_divergence": True},
}


def doubled(batch: Batch) -> Batch:
    """The same batch in float64, so that rounding hides nothing."""
    values = {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    return Batch(**{name: x.double() if x.is_floating_point() else x for name, x in values.items()})


def prepared(settings: FocalSettings) -> tuple[Focal, MetaBatch]:
    """A method in float64 whose target networks differ from its critics, and a batch with an ended episode in it."""
    tasks = walk_data().tasks
    for task in tasks:
        task.terminated[:] = ~task.next_action_valid & (torch.arange(len(task.rows)).numpy() % 8 < 4)
    focal = Focal(settings, RAW, 2, torch.Generator().manual_seed(0))
    scatter(*focal.networks.values())
    for name, network in focal.networks.items():
        network.double()
        for parameter in network.parameters() if name == "discriminator" else ():
            parameter.data *= 4  # slopes and outputs above 1, where the penalties act
    batch = sample_meta_batch(TaskReplay(tasks, RAW, settings), settings, torch.Generator().manual_seed(1), True, True)
    assert batch.transitions is not None
    assert 0 < batch.transitions.terminated.sum() < (~batch.transitions.next_action_valid).sum()
    fresh = tuple(doubled(one) for one in batch.discriminator)
    return focal, dataclasses.replace(
        batch, contexts=batch.contexts.double(), transitions=doubled(batch.transitions), discriminator=fresh
    )


class PlainStep:
    """The step as the docstrings describe it: autograd throughout, Adam unfused, one pair at a time."""

    def __init__(self, focal: Focal, draw: torch.Generator) -> None:
        self.settings, self.draw = focal.settings, draw
        self.networks = {name: copy.deepcopy(network) for name, network in focal.networks.items()}
        self.scalars = {name: scalar.detach().clone() for name, scalar in focal.scalars.items()}
        self.adams: dict[str, torch.optim.Adam] = {}

    def take(self, batch: MetaBatch) -> None:
        settings, rule, released = self.settings, self.settings.regularisation, self.settings.released
        data, (embeddings, kl) = batch.transitions, self.infer(batch.contexts)  # (draws, K, L), ()
        z, alpha = embeddings[0], self.scalars["alpha"].double()
        weight = self.scalars["log_entropy_weight"].double().exp() if settings.entropy.enabled else torch.tensor(0.0)
        if rule.kind != "none":
            for other in (*batch.discriminator, data):
                self.train_discriminator(join(other.observations, z.detach()), other.actions)

        states, following = join(data.observations, z), join(data.next_observations, z)
        with torch.no_grad():
            actions, log_prob = self.act(following)
            value = self.q("target_critic", following, actions) - weight * log_prob
            if rule.kind == "value-penalty" and released.penalty_at_state:
                value -= alpha * self.divergence(states, self.act(states)[0], data.actions)
            elif rule.kind == "value-penalty":
                value -= alpha * self.divergence(following, actions, data.next_actions) * data.next_action_valid
            target = settings.reward_scale * data.rewards + settings.discount * value * (~data.terminated).double()
        critic = self.networks["critic"]
        loss = sum((self.score(one, states, data.actions) - target).square().mean() for one in critic.children())
        own = self.metric_loss(embeddings.flatten(0, 1), batch.tasks.repeat(len(batch.contexts)).tolist())
        own = own + settings.encoder.kl_weight * kl
        if settings.gradients == "coupled" and not released.discard_bellman:
            own = own + loss
        self.descend("encoder", own, settings.encoder_learning_rate)
        self.descend("critic", loss, settings.critic_learning_rate)

        states, policy = states.detach(), self.networks["policy"]
        actions, log_prob = self.act(states)
        mean, log_std = policy(states)
        loss = weight * log_prob.mean() - self.q("critic", states, actions).mean()
        loss = loss + settings.policy_penalty * (mean.square().mean() + log_std.square().mean())
        if rule.kind != "none":
            divergence = self.divergence(states, actions, data.actions).mean()
            loss = loss + alpha * (0 if released.no_actor_divergence else divergence)
            if rule.adaptive:
                step = rule.alpha_learning_rate * min(max(divergence.item() - rule.target_divergence, -1), 1)
                self.scalars["alpha"] *= math.exp(step)
        self.descend("policy", loss, settings.actor_learning_rate)
        for ours, theirs in zip(self.networks["target_critic"].parameters(), critic.parameters(), strict=True):
            ours.data = (1 - settings.tau) * ours.data + settings.tau * theirs.data
        if settings.entropy.learnt:  # Adam's first step is by its rate, up to its epsilon
            rises = -log_prob.mean().item() < settings.entropy.target
            self.scalars["log_entropy_weight"] += settings.entropy.learning_rate * (1 if rises else -1)

    def infer(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        rule, outputs = self.settings.encoder, plain(self.networks["encoder"].network.body, contexts)
        if rule.kind == "deterministic":
            return torch.tanh(outputs).mean(dim=2), torch.tensor(0.0)
        means, variances = outputs[..., :3], softplus(outputs[..., 3:])  # of every transition
        means = torch.tanh(means) if rule.bounded else means
        variance = 1 / (1 / variances).sum(dim=2)
        posterior = torch.distributions.Normal(variance * (means / variances).sum(dim=2), variance.sqrt())
        noise = torch.randn(variance.flatten(0, 1).shape, generator=self.draw, dtype=variance.dtype)
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, rule.prior_std))
        return posterior.mean + posterior.stddev * noise.view_as(variance), kl.sum(dim=(1, 2)).mean()

    def train_discriminator(self, states: Tensor, logged: Tensor) -> None:
        rule, discriminator = self.settings.regularisation, self.networks["discriminator"]
        with torch.no_grad():
            mine, _ = self.act(states)
        u = torch.rand((*states.shape[:-1], 1), generator=self.draw, dtype=states.dtype)
        mixed = (mine + u * (logged - mine)).requires_grad_()
        score = self.score(discriminator, states, mixed)
        (slope,) = torch.autograd.grad(score.sum(), mixed, create_graph=True)
        size = score.abs() if self.settings.released.penalise_output else slope.norm(dim=-1)
        penalty = (size - 1).clamp_min(0).square().mean()
        loss = rule.gradient_penalty * penalty - self.divergence(states, mine, logged).mean()
        self.descend("discriminator", loss, rule.discriminator_learning_rate)

    def act(self, states: Tensor) -> tuple[Tensor, Tensor]:
        body, settings = self.networks["policy"], self.settings
        features = plain(body.body, states)
        mean, log_std = (features @ head.weight.T + head.bias for head in (body.mean, body.log_std))
        gaussian = torch.distributions.Normal(mean, log_std.clamp(settings.log_std_min, settings.log_std_max).exp())
        noise = torch.randn(mean.shape, generator=self.draw, dtype=mean.dtype)
        unsquashed = gaussian.mean + gaussian.stddev * noise
        actions = torch.tanh(unsquashed)
        return actions, (gaussian.log_prob(unsquashed) - torch.log1p(-actions.square())).sum(dim=-1)

    def score(self, network: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
        return plain(network.body, torch.cat([states, actions], dim=-1)).squeeze(-1)

    def q(self, name: str, states: Tensor, actions: Tensor) -> Tensor:
        first, second = (self.score(one, states, actions) for one in self.networks[name].children())
        return torch.minimum(first, second)

    def divergence(self, states: Tensor, mine: Tensor, logged: Tensor) -> Tensor:
        ours, theirs = (self.score(self.networks["discriminator"], states, actions) for actions in (mine, logged))
        if self.settings.regularisation.divergence == "wasserstein":
            return ours - theirs
        return torch.log(softplus(ours)) - softplus(theirs) + 1

    def metric_loss(self, embeddings: Tensor, labels: list[int]) -> Tensor:
        rule, same, different = self.settings.distance, [], []
        released = rule.form == "released"
        for i, j in itertools.combinations(range(len(labels)), 2):
            square = (embeddings[i] - embeddings[j]).square().mean()
            if labels[i] == labels[j]:
                same.append((square + 1e-3).sqrt() if released else square)
            elif released:
                different.append(1 / (square + 0.1))
            else:
                distance = square.sqrt() ** abs(rule.power)
                different.append(rule.beta / (distance + rule.epsilon) if rule.power < 0 else -rule.beta * distance)
        return rule.weight * sum(sum(terms) / (len(terms) + 1e-3 * released) for terms in (same, different))

    def descend(self, name: str, loss: Tensor, rate: float) -> None:
        parameters = list(self.networks[name].parameters())
        optimiser = self.adams.setdefault(name, torch.optim.Adam(parameters, lr=rate))
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()


def join(observations: Tensor, embeddings: Tensor) -> Tensor:
    return torch.cat([observations, embeddings.unsqueeze(1).expand(-1, observations.shape[1], -1)], dim=-1)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def test_without_a_target_the_entropy_is_steered_to_minus_the_number_of_actions():
    assert Focal(TINY, RAW, 2, torch.Generator()).control.target_entropy == -2


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_what_its_losses_say_in_their_order(name: str):
    settings = override(ODD, STEPS[name])
    settings.check()
    focal, batch = prepared(settings)
    expected = PlainStep(focal, torch.Generator().manual_seed(2))
    before = {name: flat(network.parameters()) for name, network in focal.networks.items()}
    expected.take(batch)
    focal.update(batch, torch.Generator().manual_seed(2))
    for network, ours in focal.networks.items():
        found = flat(ours.parameters())
        assert not torch.equal(found, before[network]), network
        assert torch.allclose(found, flat(expected.networks[network].parameters()), rtol=0, atol=1e-7), network
    for scalar, ours in focal.scalars.items():
        assert ours.item() == pytest.approx(expected.scalars[scalar].item(), rel=1e-5), scalar


# Reading it

FILES = {"focal", "replay", "control", "distance", "divergence"}
USED = {"networks", "encoder", "agent", "optimisers", "settings"}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_followed_through_the_five_files_that_the_packages_page_names(name: str):
    settings, visited, losses, back = override(ODD, STEPS[name]), set(), set(), set()
    focal, replay = Focal(settings, RAW, 2, torch.Generator()), TaskReplay(walk_data().tasks, RAW, settings)

    def note(frame: FrameType, *_: object) -> None:
        path, caller = Path(frame.f_code.co_filename), Path(frame.f_back.f_code.co_filename)
        if path.parent.name != "trainer":
            return
        visited.add(path.stem)
        losses.update({path.stem} if "loss" in frame.f_code.co_name else ())
        back.update({(caller.stem, path.stem)} if caller.parent == path.parent and caller.stem in USED else ())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        focal.train_step(replay, 0, torch.Generator())
    finally:
        sys.setprofile(before)
    assert {"focal", "replay", "control", "distance"} <= visited <= FILES | USED
    assert losses <= FILES
    assert all(called in USED for _, called in back), "what is used calls none of the five"
    assert all(f"`{file}.py`" in focal_trainer.__doc__ for file in visited - {"settings"})


@pytest.mark.parametrize("update", [Focal.update, ActorCritic.update])
def test_an_update_fits_one_screen(update: Callable):
    assert len(inspect.getsource(update).splitlines()) <= 50


# Settings

_PENALTY = {"regularisation.kind": "value-penalty"}
_ADAPTIVE = {"regularisation.kind": "policy", "regularisation.adaptive": True}
_LEARNT = {"entropy.learnt": True}
_PROBABILISTIC = {"encoder.kind": "probabilistic"}
_FIRST = {"schedule": "encoder-first", "encoder_steps": 3}
# Every setting of FOCAL that decides training: what it needs to have an effect, and another value than it has then.
EFFECTS: dict[str, tuple[dict[str, object], object]] = {
    "latent_dim": ({}, 4),
    "meta_batch": ({}, 2),
    "context_size": ({}, 15),
    "batch_size": ({}, 7),
    "next_observation_in_context": ({}, True),
    "context_reward": ({}, "sparse"),
    "discount": ({}, 0.5),
    "encoder_hidden": ({}, "16,15"),
    "encoder_learning_rate": ({}, 1e-2),
    "critic_learning_rate": ({}, 1e-2),
    "actor_learning_rate": ({}, 1e-2),
    "tau": ({}, 0.5),
    "observation_scale": ({}, "none"),
    "hide_x": ({}, True),
    "precision": ({}, "bf16"),
    "encoder.kind": ({}, "probabilistic"),
    "encoder.kl_weight": (_PROBABILISTIC, 0.2),
    "encoder.prior_std": (_PROBABILISTIC, 0.05),
    "encoder.bounded": (_PROBABILISTIC, False),
    "reward_scale": ({}, 2),
    "control_hidden": ({}, "16,15"),
    "policy_penalty": ({}, 0.1),
    "log_std_min": ({}, -0.0001),
    "log_std_max": ({}, 0.0001),
    "regularisation.kind": ({}, "policy"),
    "regularisation.divergence": (_PENALTY, "wasserstein"),
    "regularisation.alpha": (_PENALTY, 2),
    "regularisation.adaptive": (_PENALTY, True),
    "regularisation.alpha_min": ({**_ADAPTIVE, "regularisation.target_divergence": 9}, 1),
    "regularisation.alpha_max": ({**_ADAPTIVE, "regularisation.target_divergence": -9}, 1),
    "regularisation.alpha_learning_rate": (_ADAPTIVE, 0.1),
    "regularisation.target_divergence": (_ADAPTIVE, 0.3),
    "regularisation.discriminator_steps": (_PENALTY, 2),
    "regularisation.discriminator_learning_rate": (_PENALTY, 1e-2),
    "regularisation.gradient_penalty": ({**_PENALTY, "regularisation.discriminator_learning_rate": 1}, 1),
    "entropy.enabled": ({}, False),
    "entropy.weight": ({}, 0.5),
    "entropy.learnt": ({}, True),
    "entropy.target": (_LEARNT, 5),
    "entropy.learning_rate": (_LEARNT, 1e-2),
    "released.discard_bellman": ({"gradients": "coupled"}, True),
    "released.penalise_output": ({**_PENALTY, "regularisation.discriminator_learning_rate": 1}, True),
    "released.penalty_at_state": (_PENALTY, True),
    "released.no_actor_divergence": (_PENALTY, True),
    "released.limits_terminate": ({}, True),
    "schedule": ({"encoder_steps": 3}, "encoder-first"),
    "encoder_steps": (_FIRST, 2),
    "encoder_after": (_FIRST, "decaying"),
    "encoder_half_life": ({**_FIRST, "encoder_after": "decaying"}, 2),
    "gradients": ({}, "coupled"),
    "task_replacement": ({}, True),
    "context_draws": ({"task_replacement": True}, 1),
    "distance.power": ({}, 1),
    "distance.beta": ({}, 2),
    "distance.epsilon": ({}, 0.2),
    "distance.form": ({}, "released"),
    "distance.weight": (_PROBABILISTIC, 5),  # alone, Adam does not see it
}
# How long, how often it is logged, when it is stopped: test_trainer_loop.py; acting: test_trainer_variants.py
ELSEWHERE = {"algo", "steps", "log_every", "checkpoint_every", "eval_every", "value_limit", "released.raw_reset"}


@functools.cache
def outcome(settings: FocalSettings) -> list[list[float]]:
    """The weights that act, after six steps."""
    settings.check()
    data = dataclasses.replace(walk_data(), absolute_x=0)
    for task in data.tasks:
        task.observations[:] *= 2  # else the largest is 1, the scale of "none"
    transform = training_transform(data, settings)
    replay = TaskReplay(data.tasks, transform, settings)
    focal, draw = Focal(settings, transform, 2, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for step in range(6):
        focal.train_step(replay, step, draw)
    return [flat(network.parameters()).tolist() for network in (focal.agent.encoder, focal.agent.policy)]


def test_every_setting_is_listed():
    assert set(EFFECTS) | ELSEWHERE == set(field_names(FocalSettings))


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_is_ignored(name: str):
    needs, value = EFFECTS[name]
    settings = override(TINY, needs)
    other = override(settings, {name: value})
    assert settings != other
    assert outcome(settings) != outcome(other)
