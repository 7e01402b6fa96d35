"""Do stage one's engines learn the same? Learning curves of both on the same tasks, settings and numbers of seeds.

    python benchmarks/parity.py --env sparse-point-robot --tasks 0,1,2,3,4,5,6,7,8,9 --steps 3000
    python benchmarks/parity.py --env half-cheetah-fwd-back --tasks 0 --steps 100000         # task 0 is forward
    python benchmarks/parity.py --env sparse-point-robot --engines fleet,bf16 --reference fleet

A seed is one number: the mean stochastic return of its agents, one on each task. Engines are compared with the
reference by the interval of the difference of their last points (design section 9). Agents are saved at every point:
run the same command again to continue, or with more --seeds. `bf16` is the fleet engine with `fleet.precision=bf16`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from focal.console import print_table
from focal.datagen import generate_settings
from focal.datagen.settings import SacSettings
from focal.datagen.worker import as_policy
from focal.envs import get_family
from focal.envs.batch import make_batch, rollout
from focal.errors import FocalError
from focal.evaluation.figures import return_curves
from focal.evaluation.statistics import difference_interval, seed_interval, verdict
from focal.files import write_json
from focal.provenance import provenance
from focal.settings import override, parse_assignments, to_dict
from focal.workers import Report, available_cores, run_jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """The agents of one engine and seed: one on each task for the fleet, one task's only for stable-baselines3."""

    engine: str
    seed: int
    env: str
    tasks: tuple[int, ...]
    sac: SacSettings
    points: int
    episodes: int
    folder: Path

    def number(self, task: int, chunk: int, stream: int = 0) -> int:
        """A seed of its own for every purpose, the same for both engines."""
        return int(np.random.SeedSequence(self.seed, spawn_key=(stream, task, chunk)).generate_state(1)[0])

    def step(self, point: int) -> int:
        """Environment steps at a point of the curve."""
        return self.sac.total_steps * point // self.points

    @property
    def result(self) -> Path:
        """Where the mean returns are kept, a list over points for every task, and the machine that measured them."""
        return self.folder / "returns.json"


def work(job: Job, report: Report) -> None:
    """Train to the end, evaluate at every point, and write the returns."""
    if job.result.exists():
        return
    from focal.datagen.agent import SacAgent
    from focal.datagen.fleet import Fleet

    family = get_family(job.env)
    parameters = family.sample_tasks(seed=0).parameters
    learner: Any
    if job.engine == "sb3":
        (task,) = job.tasks
        learner = SacAgent(family, parameters[task], job.sac, lambda chunk: job.number(task, chunk))
    else:
        seeds = [lambda chunk, attempt, task=task: job.number(task, chunk) for task in job.tasks]
        precision = "bf16" if job.engine == "bf16" else "fp32"
        learner = Fleet(family, [parameters[task] for task in job.tasks], job.sac, seeds, precision=precision)
    job.folder.mkdir(parents=True, exist_ok=True)
    unfinished = job.folder / "unfinished.json"
    restored = learner.restore(job.folder)
    returns = json.loads(unfinished.read_text())[: learner.chunk + 1] if restored else []
    while True:
        if len(returns) == learner.chunk:
            returns.append([])
            for slot, task in enumerate(job.tasks):
                envs = make_batch(family, [parameters[task]] * job.episodes, threads=1)
                policy = learner.policy() if job.engine == "sb3" else learner.policy(slot)
                starts = [job.number(task, learner.chunk, 1 + episode) for episode in range(job.episodes)]
                act = as_policy(policy, deterministic=False, seed=job.number(task, learner.chunk))
                returns[-1].append(float(rollout(envs, act, starts).returns.mean()))
                envs.close()
            write_json(unfinished, returns)
            learner.save(job.folder)
            report(job, learner.chunk, float(np.mean(returns[-1])))
        if learner.chunk == job.points:
            break
        learner.train_chunk(job.step(learner.chunk + 1) - job.step(learner.chunk), lambda *_: None)
    write_json(job.result, {"returns": np.transpose(returns).tolist(), "provenance": provenance()})
    for path in job.folder.iterdir():
        if path != job.result:
            path.unlink()


def keep_to(folder: Path, asked: dict[str, Any]) -> None:
    """Write down what is compared in `folder`. Raises `FocalError` where agents of another comparison are there."""
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, asked)
    found = json.loads(file.read_text())
    if found != asked:
        other = ", ".join(name for name in asked if found[name] != asked[name])
        raise FocalError(f"{folder} holds agents with another {other}; choose another --output, or rm -r {folder}")


def chosen_seeds(text: str) -> list[int]:
    """`3` as seeds 0, 1 and 2; `0,1,7` as these."""
    return [int(seed) for seed in text.split(",")] if "," in text else list(range(int(text)))


def jobs_of(arguments: argparse.Namespace, sac: SacSettings) -> list[Job]:
    """All agents, those of one seed together where the engine can."""
    tasks = tuple(int(task) for task in arguments.tasks.split(","))
    jobs = []
    for seed in arguments.seeds:
        for engine in arguments.engines.split(","):
            shares = [(task,) for task in tasks] if engine == "sb3" else [tasks]
            for share in shares:
                name = f"{engine}-{seed}" + (f"-{share[0]}" if engine == "sb3" else "")
                folder = arguments.output / name
                jobs.append(Job(engine, seed, arguments.env, share, sac, arguments.points, arguments.episodes, folder))
    return jobs


def curves_of(jobs: list[Job]) -> dict[str, dict[int, dict[int, float]]]:
    """Mean return over tasks by engine, seed and environment steps."""
    found: dict[str, dict[int, list[list[float]]]] = {}
    for job in jobs:
        found.setdefault(job.engine, {}).setdefault(job.seed, []).extend(json.loads(job.result.read_text())["returns"])
    steps = [jobs[0].step(point) for point in range(jobs[0].points + 1)]
    return {
        engine: {seed: dict(zip(steps, np.mean(rows, 0).tolist(), strict=True)) for seed, rows in seeds.items()}
        for engine, seeds in found.items()
    }


def compare(curves: dict[str, dict[int, dict[int, float]]], reference: str) -> list[dict[str, str]]:
    """Each engine's last point, and how it differs from the reference's."""
    ends = {engine: [list(curve.values())[-1] for curve in seeds.values()] for engine, seeds in curves.items()}
    starts = [next(iter(curve.values())) for curve in curves[reference].values()]
    span = float(np.mean(ends[reference]) - np.mean(starts))
    rows = []
    for engine, values in ends.items():
        row = {"engine": engine, "final return": str(seed_interval(values)), "seeds": str(len(values))}
        if engine != reference:
            difference = difference_interval(values, ends[reference])
            row |= {f"minus {reference}": str(difference), "within": f"{0.1 * span:.2f}"}
            row["verdict"] = verdict(difference, span)
        else:
            row |= {f"minus {reference}": "", "within": "", "verdict": f"{span:.2f} above the untrained policy"}
        rows.append(row)
    return rows


def main() -> None:
    """Parse, train what is missing, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="sparse-point-robot")
    parser.add_argument("--engines", default="sb3,fleet", help="of sb3, fleet, bf16 (default sb3,fleet)")
    parser.add_argument("--reference", default="sb3")
    parser.add_argument("--tasks", default="0,1,2,3,4,5,6,7,8,9", help="numbers in the family's list of seed 0")
    parser.add_argument("--seeds", type=chosen_seeds, default="5", help="how many, or which: 5, or 0,1,7 (default 5)")
    parser.add_argument("--steps", type=int, help="environment steps an agent (default: the laptop scale's)")
    parser.add_argument("--points", type=int, default=10, help="of the curve, after the untrained policy")
    parser.add_argument("--episodes", type=int, default=20, help="at each point")
    parser.add_argument("--processes", type=int, default=available_cores())
    parser.add_argument("--output", type=Path, help="folder (default: parity/ENV)")
    parser.add_argument("--set", action="append", default=[], metavar="sac.NAME=VALUE", dest="changes")
    arguments = parser.parse_args()
    settings = override(generate_settings(arguments.env, "laptop"), parse_assignments(arguments.changes))
    sac = dataclasses.replace(settings.sac, total_steps=arguments.steps or settings.sac.total_steps)
    arguments.output = arguments.output or Path("parity") / arguments.env
    names = ("env", "tasks", "points", "episodes")
    keep_to(arguments.output, {name: getattr(arguments, name) for name in names} | {"sac": to_dict(sac)})
    jobs = jobs_of(arguments, sac)

    def progress(job: Job, point: int, mean: float) -> None:
        print(f"{job.folder.name}: {job.step(point):,} steps, mean return {mean:.1f}", flush=True)

    failures = run_jobs(work, dict(enumerate(jobs)), arguments.processes, progress, "run the same command again")
    for error in failures.values():
        raise error
    curves = curves_of(jobs)
    rows = compare(curves, arguments.reference)
    write_json(arguments.output / "parity.json",
               {"curves": curves, "rows": rows, "sac": to_dict(sac), "provenance": provenance()})  # fmt: skip
    return_curves(
        arguments.output / "parity.png",
        {arguments.env: curves},
        ["mean return, stochastic"],
        xlabel="environment steps",
    )
    print_table(rows, f"{arguments.env}, {sac.total_steps:,} steps an agent, {provenance()['cpu']}")


if __name__ == "__main__":
    main()
