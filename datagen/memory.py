"""How much memory fleets need, found out before they start."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..envs import TaskFamily
from ..errors import FocalError
from .sac import RowLayout
from .settings import GenerateSettings

PROCESS_BYTES = 400 * 2**20  # Python with torch and MuJoCo, before any agent
_GIB = 2**30
_UNLIMITED = 2**62
_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class FleetMemory:
    """Bytes of one fleet: on its compute device, and of that the replay."""

    total: int
    replay: int


def fleet_memory(family: TaskFamily, agents: int, settings: GenerateSettings) -> FleetMemory:
    """Estimate one fleet's bytes: replay of all steps, parameters with their optimiser, activations of an update.

    A tenth is added for what is allocated in passing: batches, rollouts, one chunk of replay on its way to a file.
    """
    obs_dim, act_dim, hidden = family.obs_dim, family.act_dim, settings.sac.hidden_sizes
    replay = 4 * agents * settings.sac.total_steps * RowLayout(obs_dim, act_dim).width
    actor, critic = _parameters(obs_dim, hidden, 2 * act_dim), _parameters(obs_dim + act_dim, hidden, 1)
    # values and gradients of all, Adam's two moments but of the targets, and the copy that a checkpoint saves
    parameters = 4 * agents * ((4 + 3) * actor + 2 * (4 + 3) * critic + 2 * (2 + 1) * critic)
    # rows forward and backward: 2B and B of the actor, B and B of either critic; bfloat16 keeps as much again
    rows = settings.sac.batch_size * (2 + 1 + 2 * 2) * (2 if settings.fleet.precision == "bf16" else 1)
    return FleetMemory(int(1.1 * (replay + parameters + 4 * agents * rows * sum(hidden))), replay)


def _parameters(inputs: int, hidden: tuple[int, ...], outputs: int) -> int:
    widths = [inputs, *hidden, outputs]
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def check_memory(
    family: TaskFamily, fleets: list[int], settings: GenerateSettings, workers: int, device: str,
    free: int | None = None,
) -> None:  # fmt: skip
    """Raise `FocalError` with advice where the `workers` largest of `fleets` (agents each) do not fit side by side.

    `free` is measured on the device when it is not given.
    """
    free = free_memory(device) if free is None else free
    sizes = sorted(fleets, reverse=True)
    needs = [fleet_memory(family, agents, settings).total + PROCESS_BYTES for agents in sizes]
    if sum(needs[:workers]) <= free:
        return
    largest = fleet_memory(family, sizes[0], settings)
    fitting = max((n for n in range(1, workers) if sum(needs[:n]) <= free), default=0)
    if fitting:
        advice = f"use --workers {fitting}"
    else:
        fits = [n for n in range(1, sizes[0]) if fleet_memory(family, n, settings).total + PROCESS_BYTES <= free]
        smaller = f"start anew with --workers 1 --set fleet.size={max(fits, default=1)}"
        advice = smaller if fits else f"{smaller} and fewer steps than sac.total_steps={settings.sac.total_steps}"
    where = "memory" if device == "cpu" else f"memory of {device}"
    raise FocalError(
        f"{min(workers, len(fleets))} fleet(s) side by side, the largest of {sizes[0]} agents with "
        f"{largest.replay / _GIB:.1f} GiB of replay, need {sum(needs[:workers]) / _GIB:.1f} GiB of {where}, and "
        f"{free / _GIB:.1f} GiB are free; {advice}"
    )


def free_memory(device: str) -> int:
    """Return the bytes that can still be allocated: on a GPU, or in RAM within this process's control group."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_free_ram(), _free_in_groups())


def _free_ram() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all there is


def _free_in_groups() -> int:
    """Room under the limits of all control groups (version 2) that this process is in: a container's, a Slurm job's."""
    try:
        path = _OWN_GROUP.read_text().strip().splitlines()[-1].rpartition(":")[2]
    except (OSError, IndexError):
        return _UNLIMITED
    group = _GROUPS / path.lstrip("/")
    return min(_free_in(folder) for folder in (group, *group.parents))


def _free_in(group: Path) -> int:
    """Room under one group's own limit; what it caches can be freed."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return _UNLIMITED
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int((group / "memory.current").read_text()) + int(fields.get("inactive_file", 0))
    except (OSError, ValueError):  # not a group, or the root, which has no limit
        return _UNLIMITED
