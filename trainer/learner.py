"""What checkpoints and the training loop need of whatever learns: a method, or MBML's first stage."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .agent import Agent
from .optimisers import Metrics
from .replay import TaskReplay


class Trainable(Protocol):
    """Networks, learnt scalars and optimisers by name: together the whole state of training."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every network."""

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """Every learnt number outside the networks, to be changed in place only."""

    @property
    def optimisers(self) -> Mapping[str, torch.optim.Adam]:
        """Every optimiser."""

    def train_step(self, replay: TaskReplay, step: int, generator: torch.Generator) -> Metrics:
        """Draw what the gradient step after `step` consumes, and take it. Returns metrics, tensors ()."""


class Learner(Trainable, Protocol):
    """A method under training."""

    @property
    def agent(self) -> Agent:
        """What meta-testing sees of it, now."""
