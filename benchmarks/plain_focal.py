"""FOCAL as one would first write it from the paper's pseudo-code (Algorithm 1): what stage_two.py compares with.

Eager PyTorch: per-task loops for sampling, embedding and the pairs of the metric loss, ordinary modules, ordinary Adam,
`loss.backward()`; the control networks see all tasks in one batch, as any implementer would do. The mathematics is that
of `trainer/focal.py` and `control.py` with dual KL as policy regularisation and adaptive alpha; numbers are those of
the settings.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.optim import Adam

from focal.datasets import Transitions
from focal.trainer.settings import FocalSettings


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """ReLU layers of the widths `hidden`, then a linear one."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class PlainFocal:
    """Networks and one training step."""

    def __init__(self, settings: FocalSettings, tasks: Sequence[Transitions], obs_dim: int, act_dim: int) -> None:
        self.settings, self.tasks = settings, tasks
        self.draw = np.random.default_rng(0)
        state, hidden = obs_dim + settings.latent_dim, settings.control_hidden
        self.encoder = mlp(obs_dim + act_dim + 1, settings.encoder_hidden, settings.latent_dim)
        self.policy = mlp(state, hidden, 2 * act_dim)
        self.q1, self.q2, self.discriminator = (mlp(state + act_dim, hidden, 1) for _ in range(3))
        self.target1, self.target2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.alpha = torch.tensor(settings.regularisation.alpha)
        self.encoder_adam = Adam(self.encoder.parameters(), settings.encoder_learning_rate)
        self.policy_adam = Adam(self.policy.parameters(), settings.actor_learning_rate)
        self.q_adam = Adam([*self.q1.parameters(), *self.q2.parameters()], settings.critic_learning_rate)
        rate = settings.regularisation.discriminator_learning_rate
        self.discriminator_adam = Adam(self.discriminator.parameters(), rate)

    def step(self) -> float:
        """Take one gradient step of every network; returns the critic's loss."""
        settings, rule = self.settings, self.settings.regularisation
        chosen = self.draw.choice(len(self.tasks), settings.meta_batch, replace=False)
        first, second = ([self.embed(task) for task in chosen] for _ in range(2))
        distance = settings.distance.weight * self.metric_loss([*first, *second], [*chosen, *chosen])
        self.encoder_adam.zero_grad()
        distance.backward()
        self.encoder_adam.step()
        z = torch.stack(first).detach().repeat_interleave(settings.batch_size, dim=0)

        for _ in range(rule.discriminator_steps):
            s, a, r, s2, d = self.batch(chosen)
            state = torch.cat([s, z], dim=1)
            self.train_discriminator(state, a)

        next_state = torch.cat([s2, z], dim=1)
        with torch.no_grad():
            a2, log_prob = self.act(next_state)
            inputs = torch.cat([next_state, a2], dim=1)
            value = torch.min(self.target1(inputs), self.target2(inputs)) - settings.entropy.weight * log_prob
            target = settings.reward_scale * r + settings.discount * (1 - d) * value
        inputs = torch.cat([state, a], dim=1)
        critic = mse_loss(self.q1(inputs), target) + mse_loss(self.q2(inputs), target)
        self.q_adam.zero_grad()
        critic.backward()
        self.q_adam.step()

        mean, log_std = self.gaussian(state)
        mine, log_prob = self.squash(mean, log_std)
        inputs = torch.cat([state, mine], dim=1)
        divergence = self.divergence(state, mine, a).mean()
        actor = settings.entropy.weight * log_prob.mean() - torch.min(self.q1(inputs), self.q2(inputs)).mean()
        actor = actor + self.alpha * divergence
        actor = actor + settings.policy_penalty * (mean.square().mean() + log_std.square().mean())
        self.policy_adam.zero_grad()
        actor.backward()
        self.policy_adam.step()

        step = rule.alpha_learning_rate * np.clip(divergence.item() - rule.target_divergence, -1, 1)
        self.alpha = (self.alpha * np.exp(step)).clamp(rule.alpha_min, rule.alpha_max)
        for target_net, net in ((self.target1, self.q1), (self.target2, self.q2)):
            for ours, theirs in zip(target_net.parameters(), net.parameters(), strict=True):
                ours.data.mul_(1 - settings.tau).add_(theirs.data, alpha=settings.tau)
        return critic.item()

    def rows(self, task: int, size: int) -> tuple[Tensor, ...]:
        """Draw `size` transitions of a task: s, a, r (size, 1), s', terminated (size, 1)."""
        data = self.tasks[task]
        steps = self.draw.integers(len(data.rows), size=size)
        rows = data.rows[steps]
        r, d = data.rewards[steps, None], data.terminated[steps, None].astype(np.float32)
        arrays = data.observations[rows], data.actions[steps], r, data.observations[rows + 1], d
        return tuple(torch.from_numpy(array) for array in arrays)

    def batch(self, chosen: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Draw the control networks' batch, all tasks one after another."""
        parts = [self.rows(task, self.settings.batch_size) for task in chosen]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def embed(self, task: int) -> Tensor:
        """Embed a fresh context of a task."""
        s, a, r, *_ = self.rows(task, self.settings.context_size)
        return torch.tanh(self.encoder(torch.cat([s, a, r], dim=1))).mean(dim=0)

    def metric_loss(self, embeddings: Sequence[Tensor], labels: Sequence[int]) -> Tensor:
        """Eq. 13, pair by pair."""
        rule, positive, negative = self.settings.distance, [], []
        for i in range(len(labels)):
            for j in range(i + 1, len(labels)):
                square = (embeddings[i] - embeddings[j]).square().mean()
                if labels[i] == labels[j]:
                    positive.append(square)
                else:
                    negative.append(1.0 / (square + rule.epsilon))
        return torch.stack(positive).mean() + torch.stack(negative).mean()

    def squash(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a tanh-Gaussian action; returns it with its log-probability (rows, 1)."""
        normal = torch.distributions.Normal(mean, log_std.exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(1 - action.square() + 1e-6)
        return action, log_prob.sum(dim=1, keepdim=True)

    def act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the policy's action."""
        return self.squash(*self.gaussian(state))

    def gaussian(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's mean and log standard deviation before tanh, each (rows, act_dim)."""
        mean, log_std = self.policy(state).chunk(2, dim=1)
        return mean, log_std.clamp(self.settings.log_std_min, self.settings.log_std_max)

    def divergence(self, state: Tensor, mine: Tensor, logged: Tensor) -> Tensor:
        """Dual KL per sample."""
        mine_score, logged_score = (softplus(self.discriminator(torch.cat([state, x], dim=1))) for x in (mine, logged))
        return torch.log(mine_score + 1e-8) - logged_score + 1.0

    def train_discriminator(self, state: Tensor, logged: Tensor) -> None:
        """One step on minus the dual KL plus BRAC's gradient penalty."""
        with torch.no_grad():
            mine, _ = self.act(state)
        mixed = (mine + torch.rand(len(state), 1) * (logged - mine)).requires_grad_()
        score = self.discriminator(torch.cat([state, mixed], dim=1)).sum()
        (gradient,) = torch.autograd.grad(score, mixed, create_graph=True)
        slope = torch.sqrt(1e-8 + gradient.square().sum(dim=1))
        penalty = (slope - 1.0).clamp_min(0.0).square().mean()
        loss = self.settings.regularisation.gradient_penalty * penalty - self.divergence(state, mine, logged).mean()
        self.discriminator_adam.zero_grad()
        loss.backward()
        self.discriminator_adam.step()
