"""Speed of the rivals: MBML's first stage at 1 and 20 tasks, and every method's transitions per second beside FOCAL's.

    python benchmarks/rivals.py [--threads N] [--rounds N] [--json]

Half-cheetah-vel at laptop scale, made-up data of its dimensions, all networks 3 x 256. The first stage's share of the
matrix-product rate counts 2 operations per multiply-add of its matrix products, each once (`useful_flops`), and nothing
else. Cases are measured in turns, so that all meet the same load; "CPU" figures divide by CPU seconds, which with one
thread is what the code itself needs when other programs hold the cores.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from stage_two import ACT_DIM, OBS_DIM, TASKS, made_up_task, matmul_rate, medians, rates

from focal.comparison import equal_terms
from focal.datasets import Transitions
from focal.provenance import provenance
from focal.settings import override, parse_assignments
from focal.trainer.mbml import Mbml, MbmlSettings
from focal.trainer.mbml_teachers import Teachers, TeacherSettings
from focal.trainer.methods import METHODS, train_settings
from focal.trainer.replay import TaskReplay
from focal.trainer.transform import ObservationTransform

TRANSFORM = ObservationTransform(OBS_DIM, tuple(range(OBS_DIM)), (1.0,) * OBS_DIM)


def new_teachers(settings: MbmlSettings, tasks: int) -> Teachers:
    """Untrained teachers of so many tasks."""
    draw = torch.Generator().manual_seed(0)
    return Teachers(settings.teachers, settings.discount, settings.tau, False, tasks, OBS_DIM, ACT_DIM, draw)


def first_stage(settings: MbmlSettings, data: Sequence[Transitions]) -> Callable[[], object]:
    """Return a step of the first stage on `data`."""
    replay, draw = TaskReplay(data, TRANSFORM, settings), torch.Generator().manual_seed(0)
    teachers = new_teachers(settings, len(data))
    return lambda: teachers.train_step(replay, 0, draw)


def method(algo: str, data: Sequence[Transitions]) -> tuple[Callable[[], object], int]:
    """Return a step of a method (joint training), and its transitions per step."""
    equal = parse_assignments(equal_terms("half-cheetah-vel", "laptop", algo))  # as `focal-cli compare` has them
    joint = {"schedule": "joint"} if algo == "focal" else {}  # else its first steps are of the encoder alone
    settings = override(train_settings("half-cheetah-vel", "laptop", algo), {**equal, **joint})
    replay, draw = TaskReplay(data, TRANSFORM, settings), torch.Generator().manual_seed(0)
    if isinstance(settings, MbmlSettings):
        small = override(settings, {"teachers.pool": 64})
        teachers = new_teachers(small, len(data))
        predictions = teachers.predict_pool(replay, torch.ones(OBS_DIM), draw)
        learner: Any = Mbml(small, TRANSFORM, ACT_DIM, draw, teachers, predictions)
    else:
        learner = METHODS[algo].learner(settings, TRANSFORM, ACT_DIM, draw)
    return lambda: learner.train_step(replay, 0, draw), settings.meta_batch * settings.batch_size


def useful_flops(settings: TeacherSettings) -> float:
    """Floating-point operations that one step of one task's first stage needs."""
    rule, rows, noise = settings.bcq, settings.batch_size, 2 * ACT_DIM

    def products(inputs: int, hidden: Sequence[int], outputs: int) -> tuple[int, int]:
        """Multiply-adds per row, and those of the first layer per input."""
        widths = [inputs, *hidden, outputs]
        return sum(a * b for a, b in itertools.pairwise(widths)), widths[1]

    encoder, e1 = products(OBS_DIM + ACT_DIM, rule.vae_hidden, 2 * noise)
    decoder, d1 = products(OBS_DIM + noise, rule.vae_hidden, ACT_DIM)
    moved, p1 = products(OBS_DIM + ACT_DIM, rule.perturbation_hidden, ACT_DIM)
    value, v1 = products(OBS_DIM + ACT_DIM, rule.critic_hidden, 1)
    inputs = OBS_DIM + ACT_DIM  # no gradient in data; but in the noise, and for the perturbation in the action
    vae = 3 * encoder - inputs * e1 + 3 * decoder - OBS_DIM * d1
    targets = rule.candidates * (decoder + moved + 2 * value)
    critics = 2 * (3 * value - inputs * v1)
    perturbation = decoder + 3 * moved - inputs * p1 + 2 * value - OBS_DIM * v1
    reward, r1 = products(OBS_DIM + ACT_DIM, settings.rewards.hidden, 1)
    ensemble = settings.rewards.members * settings.rewards.batch_size * (3 * reward - inputs * r1)
    return 2.0 * (rows * (vae + targets + critics + perturbation) + ensemble)


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything in turns; medians over all stretches."""
    data = [made_up_task(seed) for seed in range(TASKS)]
    settings = train_settings("half-cheetah-vel", "laptop", "mbml")
    assert isinstance(settings, MbmlSettings)
    steps = {f"first stage, {count} tasks": first_stage(settings, data[:count]) for count in (1, 20)}
    methods = {algo: method(algo, data) for algo in METHODS}
    steps |= {algo: step for algo, (step, _) in methods.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    matmul, load = [], os.getloadavg()[0]
    for _ in range(rounds):
        matmul.append(matmul_rate(torch.float32, "cpu"))
        for name, step in steps.items():
            found[name] += rates(step, seconds, "cpu")
    peak, cpu_peak = medians(matmul)
    middle = {name: medians(values) for name, values in found.items()}
    per_task = useful_flops(settings.teachers)
    stages = {
        count: {
            "steps_per_second": wall,
            "share_of_matmul_rate": wall * count * per_task / peak,
            "share_of_matmul_rate_by_cpu_time": cpu * count * per_task / cpu_peak,
        }
        for count in (1, 20)
        for wall, cpu in [middle[f"first stage, {count} tasks"]]
    }
    one, many = middle["first stage, 1 tasks"], middle["first stage, 20 tasks"]
    rows = {
        algo: {
            "steps_per_second": middle[algo][0],
            "transitions_per_step": size,
            "transitions_per_second": middle[algo][0] * size,
            "transitions_per_cpu_second": middle[algo][1] * size,
        }
        for algo, (_, size) in methods.items()
    }
    return {
        "configuration": "half-cheetah-vel, laptop",
        "first_stage_gflop_per_task": per_task / 1e9,
        "first_stage": stages,
        "cost_per_task_of_20_over_1": one[0] / (20 * many[0]),
        "cost_per_task_of_20_over_1_by_cpu_time": one[1] / (20 * many[1]),
        "methods": rows,
        "matmul_gflops": peak / 1e9,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "provenance": provenance(),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="per case and round")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.rounds, arguments.seconds)
    if arguments.as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['configuration']}: {result['threads']} threads, load before {result['load_before']:.1f}, matrix "
          f"products {result['matmul_gflops']:.0f} GFLOP/s")  # fmt: skip
    for count, row in result["first_stage"].items():
        share, cpu = (row[f"share_of_matmul_rate{by}"] for by in ("", "_by_cpu_time"))
        print(f"first stage, {count:2d} tasks: {row['steps_per_second']:8.2f} steps/s, {share:.2f} of matmul "
              f"({cpu:.2f} by CPU time)")  # fmt: skip
    print(f"cost per task at 20 over that at 1: {result['cost_per_task_of_20_over_1']:.2f} "
          f"({result['cost_per_task_of_20_over_1_by_cpu_time']:.2f} by CPU time)")  # fmt: skip
    focal = result["methods"]["focal"]
    for algo, row in result["methods"].items():
        ratios = [row[key] / focal[key] for key in ("transitions_per_second", "transitions_per_cpu_second")]
        print(f"{algo:15s}{row['transitions_per_second']:10,.0f} transitions/s, {ratios[0]:.2f} of FOCAL's "
              f"({ratios[1]:.2f} by CPU time)")  # fmt: skip


if __name__ == "__main__":
    main()
