"""Batch PEARL: PEARL (arXiv 1903.08254) on logged data, the baseline of FOCAL's figures 3 and 4.

A probabilistic context encoder learns from the Bellman error alone, with a KL term to its prior; control is a plain
soft actor-critic (control.py). `regularisation.kind` other than "none" makes the stronger variant of figure 4, with
FOCAL's behaviour regularisation. K tasks, B transitions per task, N context transitions, L latent size.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..settings import Scale
from .agent import new_policy_agent
from .control import ActorCritic
from .optimisers import Metrics, adam, descend, matrix_precision
from .replay import MetaBatch, TaskReplay, sample_joint_batch
from .settings import ControlSettings, EncoderSettings
from .transform import ObservationTransform


@dataclass(frozen=True)
class BatchPearlSettings(ControlSettings):
    """Everything that decides a run of Batch PEARL."""

    algo: Literal["batch-pearl"] = "batch-pearl"
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(kind="probabilistic"))

    def check(self) -> None:
        """Raise `UsageError` for settings that are each fine and wrong together."""
        super().check()
        learns_from_kl = self.encoder.kind == "probabilistic" and self.encoder.kl_weight > 0
        if self.released.discard_bellman and not learns_from_kl:
            raise UsageError("released.discard_bellman=true leaves the encoder nothing to learn from but the KL, found "
                             f"encoder.kind={self.encoder.kind} with encoder.kl_weight={self.encoder.kl_weight:g}; "
                             "--set encoder.kind=probabilistic --set encoder.kl_weight=0.1")  # fmt: skip


# Differences of a scale from what settings.py has for the family, whose rule of regularisation is FOCAL's.
_PLAIN: dict[str, Any] = {"regularisation.kind": "none"}
SCALES: dict[Scale, dict[str, Any]] = {
    "paper": _PLAIN,
    "laptop": {**_PLAIN, "encoder_hidden": (256,) * 3, "control_hidden": (256,) * 3},
    "smoke": _PLAIN,
}


class BatchPearl:
    """The networks, their optimisers, and one gradient step.

    Departures from the released code (reference-facts 5.1): the gradient of the Bellman error reaches the encoder,
    whose optimiser steps after the critic's (D1; `released.discard_bellman` takes it away); the KL is to N(0, 1), the
    prior that z is drawn from before any context (`encoder.prior_std`), not to N(0, 0.05^2). Those of control are in
    control.py.
    """

    def __init__(
        self,
        settings: BatchPearlSettings,
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
        """Take the gradient step after `step`."""
        settings = self.settings
        further = settings.regularisation.discriminator_steps - 1 if settings.regularisation.kind != "none" else 0
        return self.update(sample_joint_batch(replay, settings, generator, further), generator)

    def update(self, batch: MetaBatch, generator: torch.Generator) -> Metrics:
        """Take one gradient step with each optimiser. Returns metrics, tensors ().

        Critic and policy see z, one sample of each task's posterior; the encoder's gradient is that of

            critic loss  +  kl_weight sum over tasks of KL(q(z | c) || prior)

        by the chain rule through z (PEARL's section 4.2). The policy's loss does not reach it.
        """
        assert batch.transitions is not None
        with matrix_precision(self.settings.precision, self.agent.device):
            embeddings, kl = self.agent.encoder.infer(batch.contexts[0], generator)  # (K, L), (K,)
            seen = embeddings.detach().requires_grad_()
            metrics, bellman = self.control.update(batch.transitions, batch.discriminator, seen, generator)
            assert bellman is not None
            loss = self.settings.encoder.kl_weight * kl.sum()
            if not self.settings.released.discard_bellman:
                loss = loss + (embeddings * bellman).sum()
            norm, _ = descend(self.optimisers["encoder"], loss)
        return metrics | {"encoder/kl": kl.detach().mean(), "encoder/gradient_norm": norm}
