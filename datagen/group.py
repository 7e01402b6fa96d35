"""Agents that are stepped, stored and updated as one: an environment and a replay each, their networks stacked.

All random numbers come from the agents' own generators on the CPU, on a GPU too: an agent draws the same ones alone and
in any company. Nothing an agent computes reads another's tensors.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..envs import TaskFamily, TaskParameters, make_batch
from .sac import SacStack, Scratch
from .settings import SacSettings

REPORT_EVERY = 100  # steps
_CACHE = 2**22  # bytes that a layer of a group's critics may fill: see docs/benchmarks.md, "Stage one"


class Group:
    """SAC on K tasks, on the device of `like` and in its dtype; `scratch` may serve other groups at other times."""

    def __init__(
        self, family: TaskFamily, tasks: Sequence[TaskParameters], settings: SacSettings,
        generators: Sequence[torch.Generator], like: Tensor, low: bool, scratch: Scratch,
    ):  # fmt: skip
        self.settings, self.generators, self.agents = settings, list(generators), len(tasks)
        self.steps = self.updates = 0
        self.parked: dict[int, str] = {}  # rows whose agent is no longer trained, and why
        self.stack = SacStack(family.obs_dim, family.act_dim, self.agents, settings, like, low, scratch)
        self.stack.initialise(self.generators)
        self.envs = make_batch(family, tasks, threads=None if like.is_cuda else 1)
        self._device, self._on_gpu = like.device, like.is_cuda
        self.replay = torch.empty(self.agents, settings.total_steps, self.stack.columns.width, device=self._device)
        # what an agent draws for an action, and for an update: which rows of its replay, and noise
        self._action_noise = torch.zeros(self.agents, family.act_dim)
        self.drawn = torch.zeros(self.agents, settings.batch_size, dtype=torch.int64, pin_memory=self._on_gpu)
        self.noise = torch.zeros(self.agents, family.act_dim, 2 * settings.batch_size, pin_memory=self._on_gpu)
        self._inputs = (self.drawn.to(self._device), self.noise.to(self._device))
        self._starts = (torch.arange(self.agents, device=self._device) * settings.total_steps).unsqueeze(1)
        self._recorded: Callable[[], None] | None = None

    @property
    def live(self) -> list[int]:
        """Rows of the agents that are trained."""
        return [row for row in range(self.agents) if row not in self.parked]

    def park(self, row: int, why: str) -> None:
        """Stop training one agent; its row goes on computing numbers that nobody reads."""
        self.parked.setdefault(row, why)
        self.envs.active[row] = False

    def train(self, steps: int, on_steps: Callable[[int], None]) -> None:
        """Train for `steps` steps of every environment. `on_steps` receives how many were done since its last call."""
        observations = self._restart(self.live)
        for done in range(1, steps + 1):
            if not self.live:
                return
            observations = self._step(observations)
            self.steps += 1
            if self.steps > self.settings.learning_starts and self.steps % self.settings.update_every == 0:
                for _ in range(self.settings.updates_each):
                    self.update()
            if done % REPORT_EVERY == 0 or done == steps:
                on_steps((done - 1) % REPORT_EVERY + 1)
        self._park_unhealthy()

    def update(self) -> None:
        """One gradient step of every agent, each on a batch of its own replay; on a GPU as a recorded graph."""
        for row in self.live:
            generator = self.generators[row]
            torch.randint(self.steps, self.drawn[row].shape, generator=generator, out=self.drawn[row])
            self.noise[row].normal_(generator=generator)
        if self._on_gpu:
            for there, here in zip(self._inputs, (self.drawn, self.noise), strict=True):
                there.copy_(here)
            self._recorded = self._recorded or record(self._compute, self.stack)
            self._recorded()
        else:
            self._compute()
        self.updates += 1

    def _compute(self) -> None:
        drawn, noise = self._inputs
        rows = self.replay.flatten(0, 1).index_select(0, (drawn + self._starts).flatten())
        self.stack.update(rows.view(*drawn.shape, -1), noise)

    def _restart(self, rows: Sequence[int]) -> np.ndarray:
        """Start new episodes in `rows`, with reset seeds from their agents' generators; return all observations."""
        if not rows:
            return self.envs.observations
        seeds = [int(torch.randint(2**31, (), generator=self.generators[row])) for row in rows]
        observations = self.envs.restart(np.asarray(rows, np.int64), seeds)
        self._park_broken()
        return observations

    def _step(self, observations: np.ndarray) -> np.ndarray:
        """Act once in every environment, store the transitions, start what has ended anew."""
        actions = self._choose(observations)
        result = self.envs.step(actions)
        self._park_broken()
        numbers = observations, actions, result.observations, result.rewards[:, None], result.terminated[:, None]
        rows = np.concatenate(numbers, axis=1, dtype=np.float32)  # the order of RowLayout
        self.replay[:, self.steps] = torch.from_numpy(rows)
        ended = [row for row in self.live if result.terminated[row] or result.truncated[row]]
        return self._restart(ended)

    def _choose(self, observations: np.ndarray) -> np.ndarray:
        """Return actions (K, act_dim) float32: uniform before `learning_starts`, then the policies' samples."""
        warm = self.steps < self.settings.learning_starts
        for row in self.live:
            noise, generator = self._action_noise[row], self.generators[row]
            noise.uniform_(-1.0, 1.0, generator=generator) if warm else noise.normal_(generator=generator)
        if warm:
            actions = self._action_noise.numpy().copy()
        else:
            states = torch.from_numpy(observations).to(self._device)
            actions = self.stack.act(states, self._action_noise.to(self._device)).float().cpu().numpy()
        for row in self.live:
            if not np.isfinite(actions[row]).all():
                self.park(row, f"its actions were not finite at step {self.steps:,}")
        actions[list(self.parked)] = 0.0
        return actions

    def _park_broken(self) -> None:
        for row, error in self.envs.errors.items():
            if row not in self.parked:
                said = " ".join(str(error).split())
                self.park(row, f"its environment raised {type(error).__name__} at step {self.steps:,}: {said}")

    def _park_unhealthy(self) -> None:
        healthy = torch.ones(self.agents, dtype=torch.bool)
        for tensor in self.stack.tensors().values():
            healthy &= tensor.flatten(1).isfinite().all(1).cpu()
        for row in self.live:
            if not healthy[row]:
                self.park(row, f"its parameters were not finite at step {self.steps:,}")


def group_size(settings: SacSettings) -> int:
    """Agents to train together on a CPU: enough to share the fixed costs of a step, few enough for a core's caches."""
    return max(1, _CACHE // (2 * settings.batch_size * max(settings.hidden_sizes) * 4))


def record(compute: Callable[[], None], stack: SacStack) -> Callable[[], None]:
    """Capture `compute` as a CUDA graph. The runs that warm it up change the agents, whose state is put back."""
    before = {name: tensor.clone() for name, tensor in stack.tensors().items()}
    updates, graph = stack.updates, torch.cuda.CUDAGraph()
    with torch.cuda.device(stack.log_temperature.device):  # of another device's work a graph records nothing
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):  # its default is of the first device ever used
            compute()
    stack.load(before, updates)
    return graph.replay
