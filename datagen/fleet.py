"""The SAC agents of several tasks trained together: stepped, stored and updated as one, each with its own numbers.

Like `SacAgent`, a fleet trains in chunks, one per checkpoint; each starts with fresh episodes and with every agent's
generator reseeded from (seed, task, chunk), so that networks, optimisers, temperatures and replay are its whole state.
All random numbers come from the agents' own generators on the CPU, on a GPU too: an agent draws the same ones alone
and in any fleet. Nothing an agent computes reads another's tensors; which rounding its products get may depend on the
number of agents stacked, which is why fleets are fixed by the settings and an agent that fails keeps its slot.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..envs import TaskFamily, TaskParameters, make_batch
from ..trainer.networks import TanhGaussianPolicy
from .learner import explain_damage, read_progress, read_rows, read_tensors, save_learner, save_rows
from .sac import RowLayout, SacStack, Scratch
from .settings import SacSettings

SeedOf = Callable[[int, int], int]
"""(chunk, attempt) to the seed of one agent's numbers; chunk 0 initialises its networks."""

REPORT_EVERY = 100  # steps
_CACHE = 2**21  # bytes; a stack whose activations fill more is slower per agent than two of half the size


class Fleet:
    """SAC on K tasks. `dtype` is float32 but in tests; `precision` is that of products between hidden layers."""

    def __init__(
        self, family: TaskFamily, tasks: Sequence[TaskParameters], settings: SacSettings, seeds: Sequence[SeedOf],
        device: str = "cpu", precision: str = "fp32", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        assert len(tasks) == len(seeds)
        self.settings, self.seeds, self.agents = settings, list(seeds), len(tasks)
        self.chunk = self.steps = self.updates = 0
        self.failures: list[str] = []  # of a fleet of one that starts again: every attempt draws other numbers
        self.parked: dict[int, str] = {}  # slots whose agent is no longer trained here, and why
        self.saved_chunk: int | None = None
        self._saved_steps = 0
        self._generators = [torch.Generator().manual_seed(seed_of(0, 0)) for seed_of in seeds]
        self._columns = RowLayout(family.obs_dim, family.act_dim)
        self._noise = torch.zeros(self.agents, family.act_dim)
        self._envs = make_batch(family, tasks, threads=1 if device == "cpu" else None)
        like, low = torch.empty(0, dtype=dtype, device=device), precision == "bf16"
        size = min(self.agents, group_size(settings)) if device == "cpu" else self.agents
        scratch = Scratch(family.obs_dim, family.act_dim, size, settings, like, low)
        self._groups = [
            _Group(family, slice(start, min(start + size, self.agents)), settings, like, low, scratch)
            for start in range(0, self.agents, size)
        ]
        for group in self._groups:
            group.stack.initialise(self._generators[group.slots])

    @property
    def live(self) -> list[int]:
        """Slots of the agents that are trained here."""
        return [slot for slot in range(self.agents) if slot not in self.parked]

    def park(self, slot: int, why: str) -> None:
        """Stop training one agent; its slot goes on computing numbers that nobody reads."""
        self.parked.setdefault(slot, why)
        self._envs.active[slot] = False

    def train_chunk(self, steps: int, on_steps: Callable[[int], None]) -> None:
        """Train for `steps` steps of every environment. `on_steps` receives how many were done since its last call."""
        self.chunk += 1
        for generator, seed_of in zip(self._generators, self.seeds, strict=True):
            generator.manual_seed(seed_of(self.chunk, len(self.failures)))
        observations = self._restart(self.live)
        for done in range(1, steps + 1):
            if not self.live:
                return
            observations = self._step(observations)
            self.steps += 1
            if self.steps > self.settings.learning_starts and self.steps % self.settings.update_every == 0:
                for _ in range(self.settings.updates_each):
                    self._update()
            if done % REPORT_EVERY == 0 or done == steps:
                on_steps((done - 1) % REPORT_EVERY + 1)
        self._park_unhealthy()

    def policy(self, slot: int) -> TanhGaussianPolicy:
        """Return a copy of one agent's actor as the project's own network."""
        group = self._group(slot)
        return group.stack.policy(slot - group.slots.start)

    def close(self) -> None:
        """Release the environments."""
        self._envs.close()

    def _restart(self, slots: Sequence[int]) -> np.ndarray:
        """Start new episodes in `slots`, with reset seeds from their agents' generators; return all observations."""
        seeds = [int(torch.randint(2**31, (), generator=self._generators[slot])) for slot in slots]
        observations = self._envs.restart(np.asarray(slots, np.int64), seeds)
        self._park_broken()
        return observations

    def _step(self, observations: np.ndarray) -> np.ndarray:
        """Act once in every environment, store the transitions, start what has ended anew."""
        actions = self._choose(observations)
        result = self._envs.step(actions)
        self._park_broken()
        columns, rows = self._columns, torch.empty(self.agents, self._columns.width)
        rows[:, columns.observation] = torch.from_numpy(observations)
        rows[:, columns.action] = torch.from_numpy(actions)
        rows[:, columns.next_observation] = torch.from_numpy(result.observations)
        rows[:, columns.reward] = torch.from_numpy(result.rewards)
        rows[:, columns.terminated] = torch.from_numpy(result.terminated)
        for group in self._groups:
            group.replay[:, self.steps] = rows[group.slots]
        ended = [slot for slot in self.live if result.terminated[slot] or result.truncated[slot]]
        return self._restart(ended) if ended else result.observations

    def _choose(self, observations: np.ndarray) -> np.ndarray:
        """Return actions (K, act_dim) float32: uniform before `learning_starts`, then the policies' samples."""
        warm = self.steps < self.settings.learning_starts
        for slot in self.live:
            row, generator = self._noise[slot], self._generators[slot]
            row.uniform_(-1.0, 1.0, generator=generator) if warm else row.normal_(generator=generator)
        if warm:
            actions = self._noise.numpy().copy()
        else:
            states = torch.from_numpy(observations)
            parts = [group.act(states[group.slots], self._noise[group.slots]) for group in self._groups]
            actions = torch.cat(parts).numpy()
        for slot in self.live:
            if not np.isfinite(actions[slot]).all():
                self.park(slot, f"its actions were not finite at step {self.steps:,}")
        actions[list(self.parked)] = 0.0
        return actions

    def _update(self) -> None:
        """One gradient step of every agent, each on a batch of its own replay."""
        for group in self._groups:
            for row, slot in enumerate(range(group.slots.start, group.slots.stop)):
                if slot not in self.parked:
                    generator = self._generators[slot]
                    torch.randint(self.steps, group.drawn[row].shape, generator=generator, out=group.drawn[row])
                    group.noise[row].normal_(generator=generator)
            group.update()
        self.updates += 1

    def _park_broken(self) -> None:
        for slot, error in self._envs.errors.items():
            if slot not in self.parked:
                said = " ".join(str(error).split())
                self.park(slot, f"its environment raised {type(error).__name__} at step {self.steps:,}: {said}")

    def _park_unhealthy(self) -> None:
        healthy = torch.ones(self.agents, dtype=torch.bool)
        for tensor in self._tensors().values():
            healthy &= tensor.flatten(1).isfinite().all(1).cpu()
        for slot in self.live:
            if not healthy[slot]:
                self.park(slot, f"its parameters were not finite at step {self.steps:,}")

    def save(self, folder: Path) -> None:
        """Write the fleet's state. The learner file is replaced last and atomically: it is the commit point."""
        if self.steps > self._saved_steps:
            rows = torch.cat([group.replay[:, self._saved_steps : self.steps].cpu() for group in self._groups])
            save_rows(folder, self.chunk, {"rows": rows.numpy()})
        progress = {"chunk": self.chunk, "steps": self.steps, "updates": self.updates, "failures": self.failures}
        save_learner(folder, self._tensors(), progress)
        self.saved_chunk, self._saved_steps = self.chunk, self.steps

    def restore(self, folder: Path) -> bool:
        """Continue from what `save` or `single_out` wrote; return False when there is nothing to continue from.

        Raises `FocalError` when a file is missing or damaged: training again from the start gives the same episodes.
        """
        progress = read_progress(folder)
        if progress is None:
            return False
        with explain_damage(folder):
            self._load(read_tensors(folder), progress["updates"])
            end = 0
            for chunk in range(1, progress["chunk"] + 1):
                rows = torch.from_numpy(read_rows(folder, chunk)["rows"])
                start, end = end, end + rows.shape[1]
                for group in self._groups:
                    group.replay[:, start:end] = rows[group.slots]
            assert end == progress["steps"], (end, progress)
        self.chunk = self.saved_chunk = progress["chunk"]
        self.steps = self._saved_steps = end
        self.updates, self.failures = progress["updates"], progress["failures"]
        return True

    def _tensors(self) -> dict[str, Tensor]:
        """All groups' state joined along the agents, on the CPU."""
        states = [group.stack.tensors() for group in self._groups]
        return {name: torch.cat([state[name] for state in states]).cpu() for name in states[0]}

    def _load(self, tensors: dict[str, Tensor], updates: int) -> None:
        for group in self._groups:
            state = group.stack.tensors()
            assert sorted(state) == sorted(tensors), sorted(set(state) ^ set(tensors))
            for name, tensor in state.items():
                assert tensors[name].shape[1:] == tensor.shape[1:], name
                tensor.copy_(tensors[name][group.slots])
            group.stack.set_updates(updates)
            group.stack.refresh()

    def _group(self, slot: int) -> "_Group":
        return next(group for group in self._groups if slot < group.slots.stop)


class _Group:
    """Agents of a fleet that are stacked together, with their replay on the compute device."""

    def __init__(
        self, family: TaskFamily, slots: slice, settings: SacSettings, like: Tensor, low: bool, scratch: Scratch
    ):
        self.slots = slots
        agents, batch, device = slots.stop - slots.start, settings.batch_size, like.device
        self.stack = SacStack(family.obs_dim, family.act_dim, agents, settings, like, low, scratch)
        self._device, self._on_gpu = device, like.is_cuda
        width = self.stack.columns.width
        self.replay = torch.empty(agents, settings.total_steps, width, device=device)
        # what an update draws, on the CPU; the first row of each agent's replay among those of all
        self.drawn = torch.zeros(agents, batch, dtype=torch.int64, pin_memory=self._on_gpu)
        self.noise = torch.zeros(agents, family.act_dim, 2 * batch, pin_memory=self._on_gpu)
        self._starts = (torch.arange(agents, device=device) * settings.total_steps).unsqueeze(1)
        self._inputs = (self.drawn.to(device), self.noise.to(device))
        self._replay_update: Callable[[], None] | None = None

    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample one action per agent, (K, act_dim) float32 on the CPU."""
        return self.stack.act(observations.to(self._device), noise.to(self._device)).float().cpu()

    def update(self) -> None:
        """Take the gradient step of what `drawn` and `noise` hold; on a GPU as a recorded graph."""
        if not self._on_gpu:
            self._compute()
            return
        for there, here in zip(self._inputs, (self.drawn, self.noise), strict=True):
            there.copy_(here)
        if self._replay_update is None:
            self._replay_update = _record(self._compute, self.stack)
        self._replay_update()

    def _compute(self) -> None:
        drawn, noise = self._inputs
        rows = self.replay.flatten(0, 1).index_select(0, (drawn + self._starts).flatten())
        self.stack.update(rows.view(*drawn.shape, -1), noise)


def _record(compute: Callable[[], None], stack: SacStack) -> Callable[[], None]:
    """Capture `compute` as a CUDA graph. The runs that warm it up change the agents, whose state is put back."""
    before = {name: tensor.clone() for name, tensor in stack.tensors().items()}
    updates = stack.updates
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    for name, tensor in stack.tensors().items():
        tensor.copy_(before[name])
    stack.set_updates(updates)
    stack.refresh()
    return graph.replay


def group_size(settings: SacSettings) -> int:
    """Agents to stack on a CPU: as many as keep both critics' widest activations in the cache, at least one."""
    return max(1, _CACHE // (2 * settings.batch_size * max(settings.hidden_sizes) * 4))


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
    save_learner(target, tensors, progress | {"failures": [*progress["failures"], why]})
