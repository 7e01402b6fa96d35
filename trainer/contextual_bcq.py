"""Contextual BCQ: batch-constrained Q-learning on observations joined to the task embedding, the baseline of MBML
(arXiv 1909.11373) and of FOCAL's figure 3.

A probabilistic context encoder learns from the losses of critic and generative model alone; the generative model, the
perturbation and the twin action values are BCQ's (bcq.py). K tasks, B transitions per task, L latent size.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..settings import Scale
from .agent import augment, new_encoder
from .bcq import (
    ActionDecoder,
    ActionEncoder,
    BcqAgent,
    Perturbation,
    bcq_targets,
    decoding_noise,
    perturbation_loss,
    plain,
    twin_error,
    vae_loss,
)
from .networks import TwinCritic
from .optimisers import Metrics, adam, descend, matrix_precision, polyak_update
from .replay import Batch, MetaBatch, TaskReplay, sample_joint_batch
from .settings import BcqSettings, EncoderSettings, TrainSettings
from .transform import ObservationTransform


@dataclass(frozen=True)
class ContextualBcqSettings(TrainSettings):
    """Everything that decides a run of Contextual BCQ. Defaults are the released code's (reference-facts 5.2)."""

    algo: Literal["contextual-bcq"] = "contextual-bcq"
    context_size: int = 128
    batch_size: int = 128
    encoder: EncoderSettings = field(
        default_factory=lambda: EncoderSettings(kind="probabilistic", kl_weight=0.0, bounded=False)
    )
    bcq: BcqSettings = field(default_factory=BcqSettings)


def _widths(width: int, layers: int) -> dict[str, Any]:
    return {f"bcq.{name}_hidden": (width,) * layers for name in ("critic", "vae", "perturbation")}


# Differences of a scale from what settings.py has for the family, whose KL weight is Batch PEARL's.
_NO_KL: dict[str, Any] = {"encoder.kl_weight": 0.0}
SCALES: dict[Scale, dict[str, Any]] = {
    "paper": {**_NO_KL, "context_size": 128, "steps": 100_000},
    "laptop": {**_NO_KL, "encoder_hidden": (256,) * 3, **_widths(256, 3), "meta_batch": 8, "batch_size": 64},
    "smoke": {**_NO_KL, **_widths(32, 2), "bcq.candidates": 4},
}


class ContextualBcq:
    """The networks, their optimisers, and one gradient step.

    Departures from the released code (reference-facts 5.2): a step takes `meta_batch` tasks, not all; context and
    transitions are independent draws, not disjoint ones; context rows hold the next observation only in families whose
    FOCAL runs have it; latent size and discount are the family's; time limits bootstrap; acting decodes every state
    from the same candidates' noise.
    """

    def __init__(
        self,
        settings: ContextualBcqSettings,
        transform: ObservationTransform,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks. The CPU `generator` decides their weights, the same on every device."""
        settings.check()
        self.settings = settings
        self.agent = new_bcq_agent(settings, transform, act_dim, generator, device)
        state_dim = transform.dim + settings.latent_dim
        vae_hidden = settings.bcq.vae_hidden
        self.action_encoder = ActionEncoder(plain(generator), state_dim, act_dim, vae_hidden).to(device)
        critic = self.agent.critic
        assert isinstance(critic, TwinCritic)
        self.critic = critic
        self.target_critic = copy.deepcopy(critic).requires_grad_(False)
        self.target_perturbation = copy.deepcopy(self.agent.perturbation).requires_grad_(False)
        generative = nn.ModuleList([self.action_encoder, self.agent.decoder])
        self.optimisers = {
            "encoder": adam(self.agent.encoder.parameters(), settings.encoder_learning_rate),
            "vae": adam(generative.parameters(), settings.actor_learning_rate),
            "critic": adam(critic.parameters(), settings.critic_learning_rate),
            "perturbation": adam(self.agent.perturbation.parameters(), settings.bcq.perturbation_learning_rate),
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name; with `scalars` and `optimisers` this is the whole state of training."""
        return {
            **self.agent.networks,
            "action_encoder": self.action_encoder,
            "target_critic": self.target_critic,
            "target_perturbation": self.target_perturbation,
        }

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Nothing is learnt outside the networks."""
        return {}

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Take the gradient step after `step`."""
        return self.update(sample_joint_batch(replay, self.settings, generator), generator)

    def update(self, batch: MetaBatch, generator: torch.Generator) -> Metrics:
        """Take one gradient step with each optimiser. Returns metrics, tensors ().

        The encoder's gradient is the chain rule through the embeddings z:

            sum over tasks of z . d(L_vae + L_critic)/dz  +  kl_weight sum over tasks of KL(q(z | c) || prior)

        with z one sample of the posterior per task. The perturbation's loss does not reach it, and kl_weight is 0 in
        the released code.
        """
        transitions = batch.transitions
        assert transitions is not None
        with matrix_precision(self.settings.precision, self.agent.device):
            embeddings, kl = self.agent.encoder.infer(batch.contexts[0], generator)  # (K, L), (K,)
            seen = embeddings.detach().requires_grad_()
            metrics, of_vae = self._update_vae(transitions, seen, generator)
            critic_metrics, of_critic = self._update_critic(transitions, seen, generator)
            metrics |= critic_metrics | self._update_perturbation(transitions, seen.detach(), generator)
            polyak_update(self.target_critic, self.critic, self.settings.tau)
            polyak_update(self.target_perturbation, self.agent.perturbation, self.settings.tau)

            loss = (embeddings * (of_vae + of_critic)).sum() + self.settings.encoder.kl_weight * kl.sum()
            norm, _ = descend(self.optimisers["encoder"], loss)
        return metrics | {"encoder/kl": kl.detach().mean(), "encoder/gradient_norm": norm}

    def _update_vae(self, batch: Batch, seen: Tensor, generator: torch.Generator) -> tuple[Metrics, Tensor]:
        """Step the generative model; returns metrics and the gradient of its loss in the embeddings `seen` (K, L)."""
        decoder, shape = self.agent.decoder, batch.actions.shape[:-1]
        noise = torch.randn((*shape, decoder.noise_width), generator=generator, device=generator.device)
        states = augment(batch.observations, seen)
        loss, error, kl = vae_loss(self.action_encoder, decoder, states, batch.actions, noise)
        norm, gradient = descend(self.optimisers["vae"], loss.mean(), seen)
        assert gradient is not None
        return {"vae/error": error.mean(), "vae/kl": kl.mean(), "vae/gradient_norm": norm}, gradient

    def _update_critic(self, batch: Batch, seen: Tensor, generator: torch.Generator) -> tuple[Metrics, Tensor]:
        """Step the action values; returns metrics and the gradient of their loss in the embeddings `seen` (K, L)."""
        agent, rule = self.agent, self.settings.bcq
        next_states = augment(batch.next_observations, seen.detach())
        shape = (*batch.rewards.shape, rule.candidates, agent.decoder.noise_width)
        targets = bcq_targets(
            agent.decoder,
            self.target_perturbation,
            self.target_critic,
            batch,
            next_states,
            decoding_noise(shape, generator),
            self.settings.discount,
            rule.min_weight,
        )
        values = self.critic(augment(batch.observations, seen), batch.actions)  # (2, K, B)
        loss = twin_error(values, targets).mean()
        norm, gradient = descend(self.optimisers["critic"], loss, seen)
        assert gradient is not None
        metrics = {
            "critic/loss": loss.detach(),
            "critic/value": values.detach().mean(),
            "critic/value_largest": values.detach().abs().amax(),
            "critic/target": targets.mean(),
            "critic/gradient_norm": norm,
        }
        return metrics, gradient

    def _update_perturbation(self, batch: Batch, embeddings: Tensor, generator: torch.Generator) -> Metrics:
        agent, states = self.agent, augment(batch.observations, embeddings)
        noise = decoding_noise((*batch.rewards.shape, agent.decoder.noise_width), generator)
        with torch.no_grad():
            decoded = agent.decoder(states, noise)
        loss = perturbation_loss(self.critic.first, agent.perturbation, states, decoded).mean()
        norm, _ = descend(self.optimisers["perturbation"], loss)
        return {"perturbation/value": -loss.detach(), "perturbation/gradient_norm": norm}


def new_bcq_agent(
    settings: ContextualBcqSettings,
    transform: ObservationTransform,
    act_dim: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> BcqAgent:
    """Make an untrained agent; the CPU `generator` decides its weights on every device."""
    rule, state_dim = settings.bcq, transform.dim + settings.latent_dim
    build = plain(generator)
    return BcqAgent(
        settings,
        transform,
        new_encoder(settings, transform, act_dim, generator).to(device),
        ActionDecoder(build, state_dim, act_dim, rule.vae_hidden).to(device),
        Perturbation(build, state_dim, act_dim, rule.perturbation_hidden, rule.perturbation_limit).to(device),
        TwinCritic(state_dim, act_dim, rule.critic_hidden, generator).to(device),
        rule.candidates,
    )
