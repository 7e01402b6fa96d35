"""One episode per test task to look at: paths of the point robots, rendered frames of the MuJoCo robots."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..envs import Rollouts, TaskFamily, make_batch
from ..envs.batch import env_class
from ..envs.locomotion import LocomotionEnv
from ..envs.point_robot import GOAL_RADIUS, PointRobotEnv
from ..trainer.agent import Agent
from .metatest import OfflineTransitions, TestTasks, episode_seeds, play_agent

MOST_TASKS = {"point": 6, "mujoco": 3}
FRAMES, WIDTH, HEIGHT = 50, 240, 180
RENDER_SECONDS = 300.0
BACKENDS = ("egl", "osmesa")


@dataclass(frozen=True)
class Played:
    """An episode of some test tasks, with the right context and, where there are two tasks, with the wrong."""

    tasks: tuple[int, ...]  # indices in the collection
    parameters: tuple[Any, ...]
    seeds: tuple[int, ...]
    right: Rollouts
    wrong: Rollouts | None


def play_some(agent: Agent, tasks: TestTasks, context_size: int, seed: int) -> Played:
    """Play one episode in up to `MOST_TASKS` test tasks, evenly chosen along their order."""
    family, count = tasks.family, len(tasks.entries)
    most = MOST_TASKS["point" if is_point(family) else "mujoco"]
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    every = make_batch(family, [entry.record.params for entry in tasks.entries], threads=1)
    contexts = OfflineTransitions(context_size).gather(agent, tasks, every, seed)
    every.close()
    parameters = [tasks.entries[k].record.params for k in chosen]
    envs = make_batch(family, parameters)
    seeds = episode_seeds(seed, len(chosen))
    right = play_agent(envs, agent, contexts.embeddings[chosen], seeds)
    wrong = play_agent(envs, agent, contexts.wrong[chosen], seeds) if count > 1 else None
    envs.close()
    return Played(tuple(tasks.entries[k].index for k in chosen), tuple(parameters), tuple(seeds), right, wrong)


def is_point(family: TaskFamily) -> bool:
    """Whether the robot is a point in the plane, which needs no renderer."""
    return issubclass(env_class(family), PointRobotEnv)


def point_paths(tasks: TestTasks, played: Played) -> dict[str, Any]:
    """What the page needs to draw point robots: goals (m), goal radius, and a path (H + 1, 2) per task and context."""
    goals = [env_class(tasks.family).goal_and_wind(task)[0] for task in played.parameters]
    runs = {"right context": played.right} | ({"wrong context": played.wrong} if played.wrong else {})
    return {
        "goals": goals,
        "radius": GOAL_RADIUS,
        "tasks": [f"task {index}" for index in played.tasks],
        "paths": {name: np.round(rollouts.observations, 4).tolist() for name, rollouts in runs.items()},
    }


def render_frames(tasks: TestTasks, played: Played) -> tuple[list[list[str]] | None, str]:
    """Render the right-context episodes as lists of data: URLs (JPEG); None, and why, where nothing can render.

    Only of the built-in families: the process imports no other. In a process of its own: MuJoCo picks its renderer from
    MUJOCO_GL when it is first imported, and a missing driver may end a process.
    """
    if env_class(tasks.family).__module__ != LocomotionEnv.__module__:
        return None, "they are drawn of the built-in MuJoCo families only"
    tried = [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") in BACKENDS else list(BACKENDS)
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(_job(tasks, played)))
        for backend in tried:
            command = [sys.executable, "-m", f"{__package__}.render", str(job), folder]
            environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
            try:
                run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RENDER_SECONDS)
            except subprocess.TimeoutExpired:
                reasons.append(f"MUJOCO_GL={backend} took longer than {RENDER_SECONDS:.0f} s")
                continue
            if run.returncode == 0:
                return [_as_urls(Path(folder), e) for e in range(len(played.tasks))], f"MUJOCO_GL={backend}"
            last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            reasons.append(f"MUJOCO_GL={backend}: {last[:200]}")
    return None, f"MuJoCo could not render here ({'; '.join(reasons)}); with a GL driver, type it again"


def _job(tasks: TestTasks, played: Played) -> dict[str, Any]:
    episodes = [
        {"task": task, "seed": seed, "actions": played.right.actions[m, : played.right.lengths[m]].tolist()}
        for m, (task, seed) in enumerate(zip(played.parameters, played.seeds, strict=True))
    ]
    every = max(1, tasks.family.horizon // FRAMES)
    return {"env_id": tasks.family.env_id, "every": every, "width": WIDTH, "height": HEIGHT, "episodes": episodes}


def _as_urls(folder: Path, episode: int) -> list[str]:
    frames = sorted(folder.glob(f"{episode:03d}_*.jpg"))
    return ["data:image/jpeg;base64," + base64.b64encode(frame.read_bytes()).decode() for frame in frames]
