"""Stage one's engines side by side: stable-baselines3, a process per agent, against fleets, as many processes.

    python benchmarks/stage_one.py                            # both families, a fleet of 16 per process
    python benchmarks/stage_one.py --families walker --agents 8 --json
    python benchmarks/stage_one.py --profile                  # where a fleet's CPU time goes
    python benchmarks/stage_one.py --families half-cheetah-vel --agents 100 --device cuda   # one fleet on a GPU

All engines run in turn, `--rounds` times, so that what else the machine does strikes all alike; a ratio is the median
over rounds of two neighbours in time. The floor is the time the products of an update take at the speed of 256^3
products, measured in the same round in as many processes. Every environment step is followed by one update. A fleet
on a GPU is compared with stable-baselines3 in one process and in one per core of the same machine.
"""

import argparse
import cProfile
import dataclasses
import itertools
import json
import multiprocessing
import os
import pstats
import resource
import statistics
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: one thread a process, as stage one runs


import torch

from focal.console import print_table
from focal.datagen import generate_settings
from focal.datagen.agent import SacAgent
from focal.datagen.fleet import Fleet
from focal.datagen.settings import SacSettings
from focal.envs import TaskFamily, get_family
from focal.provenance import provenance
from focal.workers import available_cores

FLEETS = ("fleet fp32", "fleet bf16")
WARM_UP = 60  # steps of every agent before the clock starts


def products_of(family: TaskFamily, settings: SacSettings) -> float:
    """Floating-point operations of the matrix products in one update of one agent, with no gradient taken in vain."""

    def layers(inputs: int, outputs: int) -> list[int]:
        widths = [inputs, *settings.hidden_sizes, outputs]
        return [2 * a * b * settings.batch_size for a, b in itertools.pairwise(widths)]

    actor, critic = layers(family.obs_dim, 2 * family.act_dim), layers(family.obs_dim + family.act_dim, 1)
    forward = 2 * sum(actor) + 3 * 2 * sum(critic)  # actor: s, s'; both targets: s'; both critics: logged a, own a
    weights = sum(actor) + 2 * sum(critic)
    to_actions = 2 * critic[0] * family.act_dim / (family.obs_dim + family.act_dim)
    inputs = sum(actor[1:]) + 2 * 2 * sum(critic[1:]) + to_actions
    return forward + weights + inputs


def short(family: TaskFamily) -> SacSettings:
    """The family's settings at paper scale, but for a replay that is soon allocated and updates from the start."""
    return dataclasses.replace(generate_settings(family.name, "paper").sac, total_steps=20_000, learning_starts=30)


def parameters(family: TaskFamily, count: int) -> list[Any]:
    """As many tasks as asked for."""
    tasks = family.sample_tasks().parameters
    return [tasks[index % len(tasks)] for index in range(count)]


def new_fleet(family: TaskFamily, agents: int, precision: str, device: str = "cpu") -> Fleet:
    """A fleet whose agents have nothing in common but the family."""
    seeds = [lambda chunk, attempt, task=task: 1000 * task + chunk for task in range(agents)]
    return Fleet(family, parameters(family, agents), short(family), seeds, device, precision=precision)


def trainer(engine: str, family: TaskFamily, agents: int, device: str) -> tuple[Any, int]:
    """Return what trains `n` steps of all its agents when called, and how many agents those are."""
    if engine == "sb3":
        agent = SacAgent(family, parameters(family, 1)[0], short(family), lambda chunk: chunk)
        return lambda steps: agent.train_chunk(steps, lambda done: None), 1
    fleet = new_fleet(family, agents, engine.removeprefix("fleet "), device)

    def train(steps: int) -> None:
        fleet.train_chunk(steps, lambda slots, done: None)
        if device != "cpu":
            torch.cuda.synchronize()

    return train, agents


def work(engine: str, family_name: str, agents: int, device: str, seconds: float, barrier: Any, results: Any) -> None:
    """One process: warm up, wait for the others, train for `seconds`, report."""
    torch.set_num_threads(1)
    if engine == "products":
        a, b, out = torch.randn(4, 256, 256), torch.randn(4, 256, 256), torch.empty(4, 256, 256)
        per_call, call = 4 * 2 * 256**3, lambda: torch.bmm(a, b, out=out)
    else:
        train, count = trainer(engine, get_family(family_name), agents, device)
        train(WARM_UP)
        # long enough that the fresh episode at the start of each chunk does not count
        steps = max(10, 200 // count)
        per_call, call = count * steps, lambda: train(steps)
    call()
    barrier.wait()
    begin, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        call()
        done += per_call
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put({"rate": done / wall, "cpu": cpu / done, "mib": mib})


def cases_of(arguments: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """What runs in turn, and in how many processes; "sb3" is what the others are compared with."""
    count = arguments.processes
    if arguments.device == "cpu":
        return {engine: (engine, count) for engine in ("sb3", *FLEETS, "products")}
    fleets = {engine: (engine, 1) for engine in FLEETS}
    return {"sb3": ("sb3", 1), f"sb3, {count} processes": ("sb3", count), **fleets, "products": ("products", count)}


def measure(engine: str, count: int, family: TaskFamily, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one engine in `count` processes at once; rates add up."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    settings = (engine, family.name, arguments.agents, arguments.device, arguments.seconds, barrier, results)
    processes = [context.Process(target=work, args=settings) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return {
        "rate": sum(one["rate"] for one in found),
        "cpu": statistics.mean(one["cpu"] for one in found),
        "mib": max(one["mib"] for one in found),
    }


def compare(family: TaskFamily, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All engines in turn, `rounds` times; medians."""
    cases, settings = cases_of(arguments), short(family)
    rounds = [
        {name: measure(engine, count, family, arguments) for name, (engine, count) in cases.items()}
        for _ in range(arguments.rounds)
    ]

    def median(engine: str, name: str) -> float:
        return statistics.median(one[engine][name] for one in rounds)

    def ratio(engine: str, name: str) -> float:
        pairs = [(one[engine][name], one["sb3"][name]) for one in rounds]
        return statistics.median(a / b if name == "rate" else b / a for a, b in pairs)

    products = products_of(family, settings)
    return [
        {
            "family": family.name,
            "networks": "x".join(map(str, settings.hidden_sizes)),
            "engine": name,
            "agents": count * (1 if engine == "sb3" else arguments.agents),
            "updates/s": round(median(name, "rate")),
            "env steps/s": round(median(name, "rate") * settings.update_every / settings.updates_each),
            "times sb3": round(ratio(name, "rate"), 2),
            "CPU ms per update": round(1e3 * median(name, "cpu"), 3),
            "times sb3, CPU": round(ratio(name, "cpu"), 2),
            "share of the CPUs' fp32 floor": round(median(name, "rate") * products / median("products", "rate"), 2),
            "MiB per process": round(median(name, "mib")),
        }
        for name, (engine, count) in cases.items()
        if engine != "products"
    ]


SHARES = {  # what a function's name in the profile says about its work, first match first
    "products": ("torch.bmm", "torch.baddbmm"),
    "Adam and Polyak": ("_fused_adam_", "_foreach_add_", "lerp_"),
    "ReLU and its gradient": ("relu_", "_ops.aten"),
    "copies": ("copy_", "contiguous"),
    "random numbers": ("normal_", "uniform_", "randint"),
    "replay gather": ("index_select",),
    "other tensor work": ("torch", "TensorBase"),
    "environments": ("mujoco", "numpy", "envs/"),
}


def profile(family: TaskFamily, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Where a fleet's CPU time goes, by kind of work: ms a step of one agent (the profiler adds to Python's)."""
    spent = {precision: _profile(family, arguments.agents, precision) for precision in ("fp32", "bf16")}
    rows = []
    for kind in [*SHARES, "Python", "all"]:
        row: dict[str, Any] = {"family": family.name, "work": kind}
        for precision, times in spent.items():
            row |= {
                f"{precision} ms": round(times[kind], 3),
                f"{precision} share": round(times[kind] / times["all"], 3),
            }
        rows.append(row)
    return rows


def _profile(family: TaskFamily, agents: int, precision: str, steps: int = 60) -> dict[str, float]:
    torch.set_num_threads(1)
    fleet = new_fleet(family, agents, precision)
    fleet.train_chunk(WARM_UP, lambda slots, done: None)
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    fleet.train_chunk(steps, lambda slots, done: None)
    profiler.disable()
    times = dict.fromkeys([*SHARES, "Python"], 0.0)
    functions: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in functions.items():
        kinds = (kind for kind, words in SHARES.items() if any(word in name or word in file for word in words))
        builtin = file == "~" or "envs/" in file or "numpy" in file
        times[next(kinds, "Python") if builtin else "Python"] += 1e3 * own / steps / agents
    return times | {"all": sum(times.values())}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="half-cheetah-fwd-back,sparse-point-robot", help="comma-separated")
    parser.add_argument("--agents", type=int, default=16, help="in a fleet (default 16)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="side by side (default: all cores)")
    parser.add_argument("--device", default="cpu", help="of the fleets: cpu (default), cuda")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured per engine and round (default 10)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="only show where one process's CPU time goes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    families = [get_family(name) for name in arguments.families.split(",")]
    load = os.getloadavg()[0]
    rows = [row for family in families for row in (profile if arguments.profile else compare)(family, arguments)]
    if arguments.json:
        print(json.dumps({"rows": rows, "load before": load, "provenance": provenance()}, indent=2))
    else:
        where = f"{provenance()['cpu']}, {arguments.processes} processes of one thread, load before {load:.1f}"
        print_table(rows, where)


if __name__ == "__main__":
    main()
