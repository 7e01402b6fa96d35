"""FOCAL (arXiv 2010.01112, Algorithm 1): distance metric learning of a context encoder, and behaviour-regularised
actor-critic on observations joined to the task embedding (control.py), their gradients decoupled.

K tasks, N context transitions, L latent size. The variants are settings (settings.py), named where they act.
"""

import torch
from torch import Tensor, nn

from .agent import new_policy_agent
from .control import ActorCritic
from .distance import distance_metric_loss
from .optimisers import Metrics, adam, descend, matrix_precision
from .replay import MetaBatch, TaskReplay, sample_meta_batch
from .settings import FocalSettings
from .transform import ObservationTransform


class Focal:
    """The networks, their optimisers, and one gradient step.

    Departure from the released code (reference-facts 3.3): two contexts per task, so that every task has a positive
    pair. Those of control are in control.py.
    """

    def __init__(
        self,
        settings: FocalSettings,
        transform: ObservationTransform,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the untrained networks. The CPU `generator` decides their weights, the same on every device."""
        settings.check()
        self.settings = settings
        self.agent = new_policy_agent(settings, transform, act_dim, generator, device)
        state_dim = transform.dim + settings.latent_dim
        self.control = ActorCritic(settings, self.agent.policy, state_dim, act_dim, generator, device)
        encoder = adam(self.agent.encoder.parameters(), settings.encoder_learning_rate)
        self.optimisers = {"encoder": encoder, **self.control.optimisers}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name; with `scalars` and `optimisers` this is the whole state of training."""
        return {"encoder": self.agent.encoder, **self.control.networks}

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Every learnt number outside the networks, by name; to be changed in place only."""
        return self.control.scalars

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Take the gradient step after `step`, as the schedule has it."""
        rate, control = self.settings.encoder_rate(step), self.settings.trains_control(step)
        batch = sample_meta_batch(replay, self.settings, generator, rate > 0, control)
        return self.update(batch, generator, rate)

    def update(self, batch: MetaBatch, generator: torch.Generator, encoder_rate: float = 1.0) -> Metrics:
        """Take one gradient step with each optimiser that `batch` has data for. Returns metrics, tensors ().

        `encoder_rate` multiplies the encoder's learning rate. Control sees the embedding as it was before the encoder's
        step, without gradient (decoupled) or with that of the critic's loss alone (coupled, as in PEARL).
        """
        settings, metrics = self.settings, Metrics()
        with matrix_precision(settings.precision, self.agent.device):
            with torch.set_grad_enabled(batch.trains_encoder):
                embeddings, kl = self.agent.encoder.infer(batch.contexts.flatten(0, 1), generator)  # (draws K, L), ..
            seen = embeddings[: len(batch.tasks)].detach()  # (K, L)
            seen.requires_grad_(settings.gradients == "coupled" and batch.trains_encoder)
            bellman = None  # gradient of the critic's loss in `seen`
            if batch.transitions is not None:
                metrics, bellman = self.control.update(batch.transitions, batch.discriminator, seen, generator)
            if batch.trains_encoder:
                labels = batch.tasks.repeat(len(batch.contexts))
                loss, encoder_metrics = encoder_loss(embeddings, kl, labels, settings)
                if bellman is not None and not settings.released.discard_bellman:  # D1
                    loss = loss + (embeddings[: len(batch.tasks)] * bellman).sum()  # the chain rule
                self.optimisers["encoder"].param_groups[0]["lr"] = settings.encoder_learning_rate * encoder_rate
                encoder_metrics["encoder/gradient_norm"], _ = descend(self.optimisers["encoder"], loss)
                metrics |= encoder_metrics
        return metrics


def encoder_loss(embeddings: Tensor, kl: Tensor, labels: Tensor, settings: FocalSettings) -> tuple[Tensor, Metrics]:
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
