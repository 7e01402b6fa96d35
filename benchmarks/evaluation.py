"""How fast meta-testing plays Half-Cheetah, beside bare physics and beside a loop over tasks and steps, in one run.

    python benchmarks/evaluation.py                20 tasks x 5 episodes x 200 steps
    python benchmarks/evaluation.py --scale paper --json

    bare physics    the same models and episodes, fixed controls, mj_step in a thread pool: no policy, no observation
    meta-test       environments made, contexts drawn and embedded, episodes played with the right and with the wrong
                    context (evaluation/metatest.py)
    step by step    what the released code does: one Gymnasium environment, one task and one step at a time

The three take turns, `--repeats` times; the rates are the best of each, in environment steps per second of wall time
and, since other programs on the machine change that, of CPU time of all threads.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch

from focal.datasets import Transitions
from focal.envs import get_family, make_batch, rollout
from focal.evaluation.metatest import OfflineTransitions, TestTasks, episode_seeds, play_agent
from focal.evaluation.protocols import join_episodes
from focal.trainer.agent import Agent, new_policy_agent
from focal.trainer.methods import train_settings
from focal.trainer.settings import FocalSettings
from focal.trainer.transform import fit_transform

FAMILY = get_family("cheetah-vel")


class Entry:
    """What meta-testing reads of a task entry."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.record = type("Record", (), {"params": params})


def logged(tasks: int) -> tuple[list[dict[str, Any]], list[Transitions]]:
    """Tasks and some transitions of each, by random actions."""
    params = list(FAMILY.sample_tasks(tasks, 1, seed=0).parameters[:tasks])
    generator = np.random.default_rng(0)
    envs = make_batch(FAMILY, params)
    draw = lambda observations: generator.uniform(-1, 1, (tasks, FAMILY.act_dim)).astype(np.float32)  # noqa: E731
    data = join_episodes([rollout(envs, draw, range(r * tasks, (r + 1) * tasks)) for r in range(2)])
    envs.close()
    return params, data


def meta_test(agent: Agent, tasks: TestTasks, episodes: int) -> int:
    """Play every task with right and wrong contexts, two of the conditions of `focal-cli test`; return the steps."""
    envs = make_batch(FAMILY, [entry.record.params for entry in tasks.entries for _ in range(episodes)])
    contexts = OfflineTransitions(agent.settings.context_size).gather(agent, tasks, envs, 0)
    seeds = episode_seeds(0, len(envs.tasks))
    played = [play_agent(envs, agent, told, seeds) for told in (contexts.embeddings, contexts.wrong)]
    envs.close()
    return sum(int(rollouts.lengths.sum()) for rollouts in played)


def bare_physics(tasks: TestTasks, episodes: int) -> int:
    """Step the same models with fixed controls in a thread pool."""
    env: Any = gymnasium.make(FAMILY.env_id, disable_env_checker=True).unwrapped
    count = len(tasks.entries) * episodes
    data = [mujoco.MjData(env.model) for _ in range(count)]
    generator = np.random.default_rng(0)
    for one in data:
        one.qpos[:], one.qvel[:] = env.draw_start(generator)
        one.ctrl[:] = generator.uniform(-1, 1, FAMILY.act_dim)

    def advance(share: list[Any]) -> None:
        for _ in range(FAMILY.horizon):
            for one in share:
                mujoco.mj_step(env.model, one, nstep=env.frame_skip)

    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(advance, [data[i::threads] for i in range(threads)]))
    env.close()
    return count * FAMILY.horizon


def step_by_step(agent: Agent, tasks: TestTasks, episodes: int) -> int:
    """Play one environment after the other, one step at a time; two episodes are enough for a rate."""
    steps = 0
    embedding = np.zeros((1, agent.settings.latent_dim), np.float32)
    for entry in tasks.entries[:2]:
        env = gymnasium.make(FAMILY.env_id, disable_env_checker=True, task=entry.record.params)
        observation, _ = env.reset(seed=0)
        ended = False
        while not ended:
            action = agent.act(observation[None, None], embedding)[0, 0]
            observation, _, terminated, truncated, _ = env.step(action)
            ended, steps = terminated or truncated, steps + 1
        env.close()
    return steps


def measure(tasks: int, episodes: int, repeats: int, scale: str) -> dict[str, Any]:
    """Time the three in turn; environment steps per second and their ratios."""
    torch.set_num_threads(1)
    params, data = logged(tasks)
    settings = train_settings(FAMILY.name, scale)
    assert isinstance(settings, FocalSettings)
    transform = fit_transform([one.observations for one in data], settings.observation_scale, False, None)
    agent = new_policy_agent(settings, transform, FAMILY.act_dim, torch.Generator().manual_seed(0))
    chosen = TestTasks(FAMILY, tuple(map(Entry, params)), tuple(data), (), "mixed", None)  # type: ignore[arg-type]
    ways: dict[str, Callable[[], int]] = {
        "bare physics": lambda: bare_physics(chosen, episodes),
        "meta-test": lambda: meta_test(agent, chosen, episodes),
        "step by step": lambda: step_by_step(agent, chosen, episodes),
    }
    clocks = {"steps per second": time.perf_counter, "steps per CPU second": time.process_time}
    rates: dict[str, dict[str, list[float]]] = {unit: {name: [] for name in ways} for unit in clocks}
    for _ in range(repeats):
        for name, way in ways.items():
            starts = {unit: clock() for unit, clock in clocks.items()}
            steps = way()
            for unit, clock in clocks.items():
                rates[unit][name].append(steps / (clock() - starts[unit]))
    best = {unit: {name: max(values) for name, values in found.items()} for unit, found in rates.items()}
    return {
        unit: found
        | {f"meta-test / {other}": found["meta-test"] / found[other] for other in ("bare physics", "step by step")}
        for unit, found in best.items()
    } | {
        "all rates": rates,
        "networks": f"{scale}: encoder {settings.encoder_hidden}, policy {settings.control_hidden}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", choices=["smoke", "laptop", "paper"], default="laptop", help="size of the networks")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.tasks, arguments.episodes, arguments.repeats, arguments.scale)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    units = [unit for unit in result if unit.startswith("steps per")]
    print(" " * 26 + "".join(f"{unit:>22}" for unit in units))
    for name in result[units[0]]:
        print(f"{name:26}" + "".join(f"{result[unit][name]:22,.{2 * ('/' in name)}f}" for unit in units))
    print(f"{result['networks']}; {result['machine']}")


if __name__ == "__main__":
    main()
