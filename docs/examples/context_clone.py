"""A method of your own: imitate the logged actions, told the task by an encoder trained with FOCAL's distance metric.

python context_clone.py train --data expert --algo context-clone
python context_clone.py test
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from focal.cli import main
from focal.extend import add_method
from focal.trainer.agent import augment, new_policy_agent
from focal.trainer.distance import distance_metric_loss
from focal.trainer.methods import Method
from focal.trainer.optimisers import Metrics, adam, descend
from focal.trainer.replay import TaskReplay
from focal.trainer.settings import ControlSettings
from focal.trainer.transform import ObservationTransform


@dataclass(frozen=True)
class CloneSettings(ControlSettings):
    """Everything that decides a run; `--set` knows every field, and the run folder keeps them."""

    algo: Literal["context-clone"] = "context-clone"
    metric_power: int = -2  # of the distance between embeddings of different tasks


class ContextClone:
    """The networks, their optimisers, and one gradient step."""

    def __init__(
        self,
        settings: CloneSettings,
        transform: ObservationTransform,
        act_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        self.agent = new_policy_agent(settings, transform, act_dim, generator, device)  # what meta-testing sees
        policy = self.agent.policy
        mean = [*policy.body.parameters(), *policy.mean.parameters()]  # the mode has no part in the standard deviation
        self.optimisers = {
            "encoder": adam(self.agent.encoder.parameters(), settings.encoder_learning_rate),
            "policy": adam(mean, settings.actor_learning_rate),
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        """With `scalars` and `optimisers` the whole state of training: checkpoints save these."""
        return self.agent.networks

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Nothing is learnt outside the networks."""
        return {}

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Draw tasks, two contexts and a batch of each, and step both networks. All draws come from `generator`."""
        settings = self.settings
        tasks = replay.sample_tasks(settings.meta_batch, generator)  # (K,)
        twice = tasks.repeat(2)
        contexts = replay.sample_context(twice, settings.context_size, generator)  # (2 K, N, context_dim)
        embeddings = self.agent.encoder(contexts)  # (2 K, L)
        loss, metrics = distance_metric_loss(embeddings, twice, settings.metric_power)
        descend(self.optimisers["encoder"], loss)

        batch = replay.sample_batch(tasks, settings.batch_size, generator)
        states = augment(batch.observations, embeddings[: len(tasks)].detach())  # (K, B, dim + L)
        error = (self.agent.policy.mode(states) - batch.actions).square().mean()
        descend(self.optimisers["policy"], error)
        return metrics | {"policy/error": error.detach()}


# At the top level, because worker processes import this file again.
add_method("context-clone", Method(CloneSettings, ContextClone, new_policy_agent))

if __name__ == "__main__":
    main()
