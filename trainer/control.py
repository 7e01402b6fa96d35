"""Behaviour-regularised actor-critic on observations joined to the task embedding: the control of FOCAL (arXiv
2010.01112, Algorithm 1) and of Batch PEARL.

K tasks, B transitions per task, L latent size. An augmented state is (observation, z). Each loss is one function below;
their variants are settings (settings.py), named where they act. D1 to D7 are the departures of the released code
(reference-facts section 7).
"""

import copy

import torch
from torch import Tensor, nn

from .agent import augment
from .divergence import discriminator_loss, policy_divergence
from .networks import StateActionNet, TanhGaussianPolicy, TwinCritic, sample_tanh_gaussian
from .optimisers import Metrics, adam, descend, polyak_update
from .replay import Batch
from .settings import ControlSettings, EntropySettings, RegularisationSettings


class ActorCritic:
    """Policy, twin action values, discriminator and learnt weights, their optimisers, and one gradient step of each.

    Departures from the released code (reference-facts 3.3): twin action values with target networks instead of value
    networks; every loss is computed from the weights of its own moment (D5); the value penalty is at the next state
    (D3); time limits bootstrap (D6).
    """

    def __init__(
        self,
        settings: ControlSettings,
        policy: TanhGaussianPolicy,
        state_dim: int,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks around `policy`. The CPU `generator` decides their weights on every device."""
        self.settings, self.policy = settings, policy
        self.critic = TwinCritic(state_dim, act_dim, settings.control_hidden, generator).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.discriminator = None
        if settings.regularisation.kind != "none":
            self.discriminator = StateActionNet(state_dim, act_dim, settings.control_hidden, generator).to(device)
        self.alpha = torch.tensor(settings.regularisation.alpha, device=device)
        self.log_entropy_weight = torch.tensor(settings.entropy.weight, device=device).log().requires_grad_()
        target = settings.entropy.target
        self.target_entropy = -float(act_dim) if target is None else target
        self.optimisers = self._new_optimisers()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name; with `scalars` and `optimisers` this is the whole state of training."""
        named = {
            "policy": self.policy,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "discriminator": self.discriminator,
        }
        return {name: network for name, network in named.items() if network is not None}

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Every learnt number outside the networks, by name; to be changed in place only."""
        return {"alpha": self.alpha, "log_entropy_weight": self.log_entropy_weight}

    def update(
        self, batch: Batch, fresh: tuple[Batch, ...], embeddings: Tensor, generator: torch.Generator
    ) -> tuple[Metrics, Tensor | None]:
        """Step discriminator (also on each of `fresh`), critic, policy and learnt weights, given `embeddings` (K, L).

        Returns metrics, tensors (), and the gradient (K, L) of the critic's loss in `embeddings` if they require one.
        """
        policy, discriminator, settings = self.policy, self.discriminator, self.settings
        entropy_weight, metrics = self._entropy_weight(), Metrics()
        if discriminator is not None:
            for other in (*fresh, batch):
                metrics |= self._update_discriminator(discriminator, other, embeddings, generator)

        states = augment(batch.observations, embeddings)  # (K, B, dim + L)
        next_states = augment(batch.next_observations, embeddings)
        targets, target_metrics = critic_targets(
            policy, self.target_critic, discriminator, batch, states, next_states, settings, self.alpha,
            entropy_weight, generator,
        )  # fmt: skip
        loss, critic_metrics = critic_loss(self.critic, states, batch.actions, targets)
        norm, bellman = descend(self.optimisers["critic"], loss, embeddings if embeddings.requires_grad else None)
        metrics |= target_metrics | critic_metrics | {"critic/gradient_norm": norm}

        loss, actor_metrics = actor_loss(
            policy, self.critic, discriminator, states, batch.actions, settings, self.alpha, entropy_weight, generator
        )
        norm, _ = descend(self.optimisers["policy"], loss)
        metrics |= actor_metrics | {"actor/gradient_norm": norm}

        polyak_update(self.target_critic, self.critic, settings.tau)
        if settings.regularisation.adaptive and discriminator is not None:
            self.alpha.copy_(updated_alpha(self.alpha, metrics["regularisation/divergence"], settings.regularisation))
        if settings.entropy.learnt and settings.entropy.enabled:
            loss = entropy_weight_loss(self.log_entropy_weight, metrics["actor/entropy"], self.target_entropy)
            descend(self.optimisers["entropy"], loss)
        return metrics, bellman

    def _update_discriminator(
        self, discriminator: StateActionNet, batch: Batch, embeddings: Tensor, generator: torch.Generator
    ) -> Metrics:
        states = augment(batch.observations, embeddings.detach())
        with torch.no_grad():
            actions, _ = self.policy.sample(states, generator)
        rule, output = self.settings.regularisation, self.settings.released.penalise_output  # D2
        loss, metrics = discriminator_loss(
            discriminator, states, actions, batch.actions, rule.divergence, rule.gradient_penalty, generator, output
        )
        norm, _ = descend(self.optimisers["discriminator"], loss)
        return metrics | {"discriminator/gradient_norm": norm}

    def _entropy_weight(self) -> Tensor:
        entropy: EntropySettings = self.settings.entropy
        return self.log_entropy_weight.detach().exp() * float(entropy.enabled)

    def _new_optimisers(self) -> dict[str, torch.optim.Adam]:
        settings = self.settings
        optimisers = {
            "policy": adam(self.policy.parameters(), settings.actor_learning_rate),
            "critic": adam(self.critic.parameters(), settings.critic_learning_rate),
            "entropy": adam([self.log_entropy_weight], settings.entropy.learning_rate),
        }
        if self.discriminator is not None:
            rate = settings.regularisation.discriminator_learning_rate
            optimisers["discriminator"] = adam(self.discriminator.parameters(), rate)
        return optimisers


@torch.no_grad()
def critic_targets(
    policy: TanhGaussianPolicy,
    target_critic: TwinCritic,
    discriminator: StateActionNet | None,
    batch: Batch,
    states: Tensor,
    next_states: Tensor,
    settings: ControlSettings,
    alpha: Tensor,
    entropy_weight: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Metrics]:
    """Return the regression targets of the action values, (K, B), for augmented states and next states (K, B, dim + L).

        y = c r + discount (1 - terminated) [min Q'(s', a') - w log pi(a' | s') - alpha D(s') m],   a' ~ pi(. | s')

    with c the reward scale, w the entropy weight, and, with the value penalty only, D the divergence at the NEXT state
    between a' and the action logged there (the paper's eq. 7 and 27, as in BRAC). m is 0 where the episode ends,
    because no action is logged there. `released.penalty_at_state` (D3) takes D at s instead, without m. A time limit is
    no termination: its state's value is bootstrapped (`released.limits_terminate`, D6, acts in replay.py).
    """
    actions, log_prob = policy.sample(next_states, generator)
    values = target_critic(next_states, actions).amin(dim=0) - entropy_weight * log_prob
    rule = settings.regularisation
    if rule.kind == "value-penalty":
        assert discriminator is not None
        if settings.released.penalty_at_state:
            actions, _ = policy.sample(states, generator)
            penalty = policy_divergence(discriminator, rule.divergence, states, actions, batch.actions)
        else:
            penalty = policy_divergence(discriminator, rule.divergence, next_states, actions, batch.next_actions)
            penalty = penalty * batch.next_action_valid
        values = values - alpha * penalty
    targets = settings.reward_scale * batch.rewards + settings.discount * values * ~batch.terminated
    return targets, {"critic/next_value": values.mean(), "critic/next_value_std": values.std(correction=0)}


def critic_loss(critic: TwinCritic, states: Tensor, actions: Tensor, targets: Tensor) -> tuple[Tensor, Metrics]:
    """Squared error of both action values (eq. 8, 27): mean over `states` (K, B, dim + L), summed over the twins."""
    values = critic(states, actions)  # (2, K, B)
    loss = (values - targets).square().mean(dim=(1, 2)).sum()
    found = values.detach()
    return loss, {
        "critic/loss": loss.detach(),
        "critic/value": found.mean(),
        "critic/value_std": found.std(correction=0),
        "critic/value_largest": found.abs().amax(),
        "critic/target": targets.mean(),
    }


def actor_loss(
    policy: TanhGaussianPolicy,
    critic: TwinCritic,
    discriminator: StateActionNet | None,
    states: Tensor,
    logged_actions: Tensor,
    settings: ControlSettings,
    alpha: Tensor,
    entropy_weight: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Metrics]:
    """Mean over `states` (K, B, dim + L) of  w log pi(a | s) - min Q(s, a) + alpha D(s),  a ~ pi(. | s)  (eq. 9, 28).

    D, between a and the logged action, is there for both kinds of regularisation; with `released.no_actor_divergence`
    (D4) it gives no gradient. The maximum-entropy term is the paper's appendix F; the penalty on mean^2 + log_std^2 is
    the released code's (reference-facts 3.2).
    """
    mean, log_std = policy(states)
    actions, log_prob = sample_tanh_gaussian(mean, log_std, generator)
    value = critic(states, actions).amin(dim=0).mean()
    entropy = -log_prob.mean()
    loss = -value - entropy_weight * entropy
    loss = loss + settings.policy_penalty * (mean.square().mean() + log_std.square().mean())
    metrics = {"actor/value": value.detach(), "actor/entropy": entropy.detach(), "actor/entropy_weight": entropy_weight}
    if discriminator is not None:
        rule = settings.regularisation
        divergence = policy_divergence(discriminator, rule.divergence, states, actions, logged_actions).mean()
        loss = loss + alpha * (divergence.detach() if settings.released.no_actor_divergence else divergence)
        metrics |= {"regularisation/divergence": divergence.detach(), "regularisation/alpha": alpha.clone()}
    return loss, {"actor/loss": loss.detach(), **metrics}


def updated_alpha(alpha: Tensor, divergence: Tensor, rule: RegularisationSettings) -> Tensor:
    """Return alpha () a step nearer to holding the mean `divergence` () at its target.

        alpha <- clip(alpha exp(rate clip(D - target, -1, 1)), alpha_min, alpha_max)

    Dual ascent on log alpha. Departure: the released code adds D - target to alpha itself (reference-facts 3.3, item
    13) and does not clip what it stores, so alpha winds up; the clipped, relative step cannot jump. At paper scale the
    rate is 1 / alpha, with which both begin at the same pace.
    """
    step = rule.alpha_learning_rate * (divergence - rule.target_divergence).clamp(-1.0, 1.0)
    return (alpha * step.exp()).clamp(rule.alpha_min, rule.alpha_max)


def entropy_weight_loss(log_weight: Tensor, entropy: Tensor, target: float) -> Tensor:
    """Loss of the log entropy weight (): raises the weight while `entropy` () is below `target` (SAC, on the log)."""
    return log_weight * (entropy - target)
