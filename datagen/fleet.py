"""The SAC agents of several tasks trained together, and their state on disk.

Like `SacAgent`, a fleet trains in chunks, one per checkpoint; each starts with fresh episodes and with every agent's
generator reseeded from (seed, task, chunk), so that networks, optimisers, temperatures and replay are its whole state.

On a GPU all agents are one group. On a CPU a group holds a few, for the sake of its caches, and the groups are trained
through a chunk one after the other: agents have nothing in common, so nobody notices. How the products of an agent are
rounded may depend on who shares its group, which is why fleets are fixed by the settings, and why an agent that fails
keeps its slot.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..envs import TaskFamily, TaskParameters
from ..trainer.networks import TanhGaussianPolicy
from .group import Group, group_size
from .learner import explain_damage, read_progress, read_rows, read_tensors, save_learner, save_rows
from .sac import Scratch
from .settings import SacSettings

SeedOf = Callable[[int, int], int]
"""(chunk, attempt) to the seed of one agent's numbers; chunk 0 initialises its networks."""


class Fleet:
    """SAC on K tasks. `dtype` is float32 but in tests; `precision` is that of products between hidden layers."""

    def __init__(
        self, family: TaskFamily, tasks: Sequence[TaskParameters], settings: SacSettings, seeds: Sequence[SeedOf],
        device: str = "cpu", precision: str = "fp32", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        assert len(tasks) == len(seeds)
        self.seeds, self.agents = list(seeds), len(tasks)
        self.chunk = self.steps = 0
        self.failures: list[str] = []  # of a fleet of one that starts again: every attempt draws other numbers
        self.saved_chunk: int | None = None
        self._saved_steps = 0
        like, low = torch.empty(0, dtype=dtype, device=device), precision == "bf16"
        size = min(self.agents, group_size(settings)) if device == "cpu" else self.agents
        scratch = Scratch(family.obs_dim, family.act_dim, size, settings, like, low)
        self.groups: list[tuple[slice, Group]] = []
        for start in range(0, self.agents, size):
            slots = slice(start, min(start + size, self.agents))
            generators = [torch.Generator().manual_seed(seed_of(0, 0)) for seed_of in self.seeds[slots]]
            self.groups.append((slots, Group(family, tasks[slots], settings, generators, like, low, scratch)))

    @property
    def parked(self) -> dict[int, str]:
        """Slots whose agent is no longer trained here, and why."""
        return {slots.start + row: why for slots, group in self.groups for row, why in group.parked.items()}

    @property
    def live(self) -> list[int]:
        """Slots of the agents that are trained here."""
        return [slots.start + row for slots, group in self.groups for row in group.live]

    def park(self, slot: int, why: str) -> None:
        """Stop training one agent."""
        group, row = self._place(slot)
        group.park(row, why)

    def train_chunk(self, steps: int, on_steps: Callable[[Sequence[int], int], None]) -> None:
        """Train for `steps` steps of every environment. `on_steps` receives slots and how many more steps they did."""
        self.chunk += 1
        self.steps += steps
        for slots, group in self.groups:
            for generator, seed_of in zip(group.generators, self.seeds[slots], strict=True):
                generator.manual_seed(seed_of(self.chunk, len(self.failures)))

            def report(count: int, start: int = slots.start, group: Group = group) -> None:
                on_steps([start + row for row in group.live], count)

            group.train(steps, report)

    def policy(self, slot: int) -> TanhGaussianPolicy:
        """Return a copy of one agent's actor as the project's own network."""
        group, row = self._place(slot)
        return group.stack.policy(row)

    def close(self) -> None:
        """Release the environments."""
        for _, group in self.groups:
            group.envs.close()

    def save(self, folder: Path, left: Iterable[int] = ()) -> None:
        """Write the fleet's state, in which slots that `left` hold no agent's.

        The learner file is replaced last and atomically: it is the commit point.
        """
        if self.steps > self._saved_steps:
            rows = torch.cat([group.replay[:, self._saved_steps : self.steps].cpu() for _, group in self.groups])
            save_rows(folder, self.chunk, {"rows": rows.numpy()})
        updates = max(group.updates for _, group in self.groups)
        progress = {"chunk": self.chunk, "steps": self.steps, "updates": updates, "failures": self.failures}
        save_learner(folder, self.tensors(), progress | {"left": sorted(left)})
        self.saved_chunk, self._saved_steps = self.chunk, self.steps

    def restore(self, folder: Path) -> bool:
        """Continue from what `save` or `single_out` wrote; return False when there is nothing to continue from.

        Raises `FocalError` when a file is missing or damaged: training again from the start gives the same episodes.
        """
        progress = read_progress(folder)
        if progress is None:
            return False
        with explain_damage(folder):
            tensors, end = read_tensors(folder), 0
            for chunk in range(1, progress["chunk"] + 1):
                rows = torch.from_numpy(read_rows(folder, chunk)["rows"])
                start, end = end, end + rows.shape[1]
                for slots, group in self.groups:
                    group.replay[:, start:end] = rows[slots]
            assert end == progress["steps"], (end, progress)
            for slots, group in self.groups:
                group.stack.load({name: tensor[slots] for name, tensor in tensors.items()}, progress["updates"])
                group.steps, group.updates = end, progress["updates"]
        self.chunk = self.saved_chunk = progress["chunk"]
        self.steps = self._saved_steps = end
        self.failures = progress["failures"]
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return all groups' state joined along the agents, on the CPU."""
        states = [group.stack.tensors() for _, group in self.groups]
        return {name: torch.cat([state[name] for state in states]).cpu() for name in states[0]}

    def _place(self, slot: int) -> tuple[Group, int]:
        slots, group = next(pair for pair in self.groups if slot < pair[0].stop)
        return group, slot - slots.start


def single_out(source: Path, slot: int, target: Path, why: str) -> None:
    """Write one agent of the fleet saved in `source` as a fleet of one, to be tried again with other numbers.

    Where source and target are the same, the agent is alone already, and only its next attempt is prepared.
    """
    progress: dict[str, Any] | None = read_progress(source)
    assert progress is not None
    with explain_damage(source):
        tensors = {name: tensor[slot : slot + 1].clone() for name, tensor in read_tensors(source).items()}
        for chunk in range(1, progress["chunk"] + 1) if target != source else ():
            save_rows(target, chunk, {"rows": read_rows(source, chunk)["rows"][slot : slot + 1]})
    save_learner(target, tensors, progress | {"failures": [*progress["failures"], why], "left": []})
