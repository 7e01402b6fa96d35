"""FOCAL (arXiv 2010.01112, Algorithm 1): distance metric learning of a context encoder, and behaviour-regularised
actor-critic on observations joined to the task embedding, their gradients decoupled.

K tasks, B transitions per task, N context transitions, L latent size. An augmented state is (observation, z). Each loss
is one function below; their variants are settings (settings.py), named where they act. D1 to D7 are the departures of
the released code (reference-facts section 7).
"""

import copy

import torch
from torch import Tensor, nn

from .agent import augment, new_agent
from .distance import Metrics, distance_metric_loss
from .divergence import discriminator_loss, policy_divergence
from .networks import StateActionNet, TanhGaussianPolicy, TwinCritic, sample_tanh_gaussian
from .replay import Batch, MetaBatch
from .settings import EntropySettings, RegularisationSettings, TrainSettings
from .transform import ObservationTransform


class Focal:
    """The networks, their optimisers, and one gradient step.

    Departures from the released code (reference-facts 3.3): twin action values with target networks instead of value
    networks; two contexts per task; every loss is computed from the weights of its own moment (D5); the value penalty
    is at the next state (D3); time limits bootstrap (D6).
    """

    def __init__(
        self,
        settings: TrainSettings,
        transform: ObservationTransform,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks. The CPU `generator` decides their weights, the same on every device."""
        settings.check()
        self.settings = settings
        self.agent = new_agent(settings, transform, act_dim, generator, device)
        state_dim = transform.dim + settings.latent_dim
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
            "encoder": self.agent.encoder,
            "policy": self.agent.policy,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "discriminator": self.discriminator,
        }
        return {name: network for name, network in named.items() if network is not None}

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Every learnt number outside the networks, by name; to be changed in place only."""
        return {"alpha": self.alpha, "log_entropy_weight": self.log_entropy_weight}

    def embed(self, context: Tensor) -> Tensor:
        """Map contexts (K, N, context_dim) to task embeddings (K, L), without gradient."""
        return self.agent.embed(context)

    def act(
        self,
        observations: Tensor,
        embeddings: Tensor,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
        at_reset: bool = False,
    ) -> Tensor:
        """Map raw observations (K, M, obs_dim) and embeddings (K, L) to actions (K, M, act_dim); see `Agent.act`."""
        return self.agent.act(observations, embeddings, deterministic, generator, at_reset)

    def update(self, batch: MetaBatch, generator: torch.Generator, encoder_rate: float = 1.0) -> Metrics:
        """Take one gradient step with each optimiser that `batch` has data for. Returns metrics, tensors ().

        `encoder_rate` multiplies the encoder's learning rate. Control sees the embedding as it was before the encoder's
        step, without gradient (decoupled) or with that of the critic's loss alone (coupled, as in PEARL).
        """
        settings, metrics = self.settings, Metrics()
        bf16 = settings.precision == "bf16"  # a cache would keep the casts of weights that have since stepped
        with torch.autocast(self.agent.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            with torch.set_grad_enabled(batch.trains_encoder):
                embeddings, kl = self.agent.encoder.infer(batch.contexts.flatten(0, 1), generator)  # (draws K, L), ..
            seen = embeddings[: len(batch.tasks)].detach()  # (K, L)
            seen.requires_grad_(settings.gradients == "coupled" and batch.trains_encoder)
            bellman = None  # gradient of the critic's loss in `seen`
            if batch.transitions is not None:
                metrics, bellman = self._update_control(batch.transitions, batch.discriminator, seen, generator)
            if batch.trains_encoder:
                labels = batch.tasks.repeat(len(batch.contexts))
                loss, encoder_metrics = encoder_loss(embeddings, kl, labels, settings)
                if bellman is not None and not settings.released.discard_bellman:  # D1
                    loss = loss + (embeddings[: len(batch.tasks)] * bellman).sum()  # the chain rule
                self.optimisers["encoder"].param_groups[0]["lr"] = settings.encoder_learning_rate * encoder_rate
                encoder_metrics["encoder/gradient_norm"], _ = self._step("encoder", loss)
                metrics |= encoder_metrics
        return metrics

    def _update_control(
        self, batch: Batch, fresh: tuple[Batch, ...], embeddings: Tensor, generator: torch.Generator
    ) -> tuple[Metrics, Tensor | None]:
        """Step discriminator, critic and policy. Returns metrics, and the critic loss's gradient in `embeddings`."""
        policy, discriminator, settings = self.agent.policy, self.discriminator, self.settings
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
        norm, bellman = self._step("critic", loss, embeddings if embeddings.requires_grad else None)
        metrics |= target_metrics | critic_metrics | {"critic/gradient_norm": norm}

        loss, actor_metrics = actor_loss(
            policy, self.critic, discriminator, states, batch.actions, settings, self.alpha, entropy_weight, generator
        )
        norm, _ = self._step("policy", loss)
        metrics |= actor_metrics | {"actor/gradient_norm": norm}

        polyak_update(self.target_critic, self.critic, settings.tau)
        if settings.regularisation.adaptive and discriminator is not None:
            self.alpha.copy_(updated_alpha(self.alpha, metrics["regularisation/divergence"], settings.regularisation))
        if settings.entropy.learnt and settings.entropy.enabled:
            entropy = metrics["actor/entropy"]
            self._step("entropy", entropy_weight_loss(self.log_entropy_weight, entropy, self.target_entropy))
        return metrics, bellman

    def _update_discriminator(
        self, discriminator: StateActionNet, batch: Batch, embeddings: Tensor, generator: torch.Generator
    ) -> Metrics:
        states = augment(batch.observations, embeddings.detach())
        with torch.no_grad():
            actions, _ = self.agent.policy.sample(states, generator)
        rule, output = self.settings.regularisation, self.settings.released.penalise_output  # D2
        loss, metrics = discriminator_loss(
            discriminator, states, actions, batch.actions, rule.divergence, rule.gradient_penalty, generator, output
        )
        norm, _ = self._step("discriminator", loss)
        return metrics | {"discriminator/gradient_norm": norm}

    def _entropy_weight(self) -> Tensor:
        entropy: EntropySettings = self.settings.entropy
        return self.log_entropy_weight.detach().exp() * float(entropy.enabled)

    def _new_optimisers(self) -> dict[str, torch.optim.Adam]:
        settings, rule = self.settings, self.settings.regularisation
        groups: dict[str, tuple[list[Tensor], float]] = {
            "encoder": (list(self.agent.encoder.parameters()), settings.encoder_learning_rate),
            "policy": (list(self.agent.policy.parameters()), settings.actor_learning_rate),
            "critic": (list(self.critic.parameters()), settings.critic_learning_rate),
            "entropy": ([self.log_entropy_weight], settings.entropy.learning_rate),
        }
        if self.discriminator is not None:
            groups["discriminator"] = (list(self.discriminator.parameters()), rule.discriminator_learning_rate)
        # fused: one pass over the weights, 3 to 4 times faster than the loop on a CPU core
        return {name: torch.optim.Adam(weights, lr=rate, fused=True) for name, (weights, rate) in groups.items()}

    def _step(self, name: str, loss: Tensor, also: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Move the parameters of one optimiser down `loss`, and nothing else.

        Gradients are taken with respect to these parameters alone (and `also`), so none is computed for, or left on,
        another network: an actor step costs no gradient of the critic's weights. Returns the norm () of the parameters'
        gradient, and the gradient in `also`.
        """
        optimiser = self.optimisers[name]
        parameters = optimiser.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters if also is None else [*parameters, also])
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient
        optimiser.step()
        norms = torch._foreach_norm(gradients[: len(parameters)])
        return torch.linalg.vector_norm(torch.stack(norms)), None if also is None else gradients[-1]


def encoder_loss(embeddings: Tensor, kl: Tensor, labels: Tensor, settings: TrainSettings) -> tuple[Tensor, Metrics]:
    """Loss of the encoder for `embeddings` (D, L) of the tasks `labels` (D,), with their KL terms (D,).

        distance.weight * distance metric loss (eq. 13) + encoder.kl_weight * sum over tasks of KL(q(z | c) || prior)

    The KL, of the probabilistic encoder only, is averaged over a task's draws, and summed over tasks as in PEARL.
    """
    rule = settings.distance
    loss, metrics = distance_metric_loss(embeddings, labels, rule.power, rule.beta, rule.epsilon, rule.form)
    loss = rule.weight * loss
    if settings.encoder.kind == "probabilistic":
        loss = loss + settings.encoder.kl_weight * kl.sum() / settings.context_draws
        metrics["encoder/kl"] = kl.detach().mean()
    return loss, metrics


@torch.no_grad()
def critic_targets(
    policy: TanhGaussianPolicy,
    target_critic: TwinCritic,
    discriminator: StateActionNet | None,
    batch: Batch,
    states: Tensor,
    next_states: Tensor,
    settings: TrainSettings,
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
    settings: TrainSettings,
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
    13), which suits one magnitude of alpha, and does not clip what it stores, so alpha winds up; the clipped, relative
    step serves 0.1 and 1e6 alike and cannot jump.
    """
    step = rule.alpha_learning_rate * (divergence - rule.target_divergence).clamp(-1.0, 1.0)
    return (alpha * step.exp()).clamp(rule.alpha_min, rule.alpha_max)


def entropy_weight_loss(log_weight: Tensor, entropy: Tensor, target: float) -> Tensor:
    """Loss of the log entropy weight (): raises the weight while `entropy` () is below `target` (SAC, on the log)."""
    return log_weight * (entropy - target)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move the target network a share `tau` of the way to `source`, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
