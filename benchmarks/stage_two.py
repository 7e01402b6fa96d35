"""Speed of stage two: transitions per second and share of the matrix-product rate, beside a plain eager implementation.

    python benchmarks/stage_two.py [--threads N] [--rounds N] [--precisions fp32] [--json]

The paper's configuration of half-cheetah-vel (16 tasks x 256 transitions, 3 discriminator steps, its networks) on
made-up data of its dimensions. docs/benchmarks.md says how floating-point operations are counted and what was measured.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from plain_focal import PlainFocal

from focal.datasets import Transitions
from focal.provenance import provenance
from focal.settings import override
from focal.trainer.focal import Focal
from focal.trainer.methods import train_settings
from focal.trainer.replay import TaskReplay, sample_meta_batch
from focal.trainer.settings import FocalSettings
from focal.trainer.transform import ObservationTransform

OBS_DIM, ACT_DIM, TASKS, EPISODES, HORIZON = 20, 6, 80, 50, 200


def made_up_task(seed: int) -> Transitions:
    """EPISODES truncated episodes of normal noise, a task's worth of the laptop collection."""
    draw, steps = np.random.default_rng(seed), EPISODES * HORIZON
    valid = np.ones((EPISODES, HORIZON), bool)
    valid[:, -1] = False
    return Transitions(
        observations=draw.normal(size=(steps + EPISODES, OBS_DIM)).astype(np.float32),
        rows=(np.arange(EPISODES)[:, None] * (HORIZON + 1) + np.arange(HORIZON)).ravel(),
        actions=draw.uniform(-1, 1, (steps, ACT_DIM)).astype(np.float32),
        rewards=draw.normal(size=steps).astype(np.float32),
        infos={},
        terminated=np.zeros(steps, bool),
        next_action_valid=valid.ravel(),
    )


def ours(settings: FocalSettings, tasks: Sequence[Transitions], device: str) -> Callable[[], object]:
    """Return a step of trainer/: sampling and update."""
    transform = ObservationTransform(OBS_DIM, tuple(range(OBS_DIM)), (1.0,) * OBS_DIM)
    replay = TaskReplay(tasks, transform, settings, device)
    generator = torch.Generator(device).manual_seed(0)
    focal = Focal(settings, transform, ACT_DIM, torch.Generator().manual_seed(0), device)
    return lambda: focal.update(sample_meta_batch(replay, settings, generator, True, True), generator)


def useful_flops(settings: FocalSettings) -> float:
    """Floating-point operations that one step of FOCAL needs: 2 per multiply-add of its matrix products, each once.

    For joint training with policy regularisation; the terms are explained in docs/benchmarks.md.
    """
    state, control = OBS_DIM + settings.latent_dim, settings.control_hidden
    rows, contexts = settings.meta_batch * settings.batch_size, 2 * settings.meta_batch * settings.context_size

    def products(inputs: int, hidden: Sequence[int], outputs: int) -> list[int]:
        widths = [inputs, *hidden, outputs]
        return [a * b for a, b in itertools.pairwise(widths)]

    encoder = products(OBS_DIM + ACT_DIM + 1, settings.encoder_hidden, settings.latent_dim)
    policy = products(state, control, 2 * ACT_DIM)
    scalar = products(state + ACT_DIM, control, 1)  # one critic, or the discriminator
    action = ACT_DIM * control[0]  # the first layer's columns of the action
    to_action = sum(scalar) - scalar[0] + action  # backward to the action

    def trained(layers: Sequence[int]) -> int:  # forward, gradient of weights, gradient of all inputs but the data
        return 3 * sum(layers) - layers[0]

    hidden = sum(scalar[1:-1])
    penalty = sum(scalar[:-1]) + 3 * (hidden + action)
    discriminator = sum(policy) + 2 * trained(scalar) + penalty
    targets = sum(policy) + 2 * sum(scalar)
    critic = 2 * trained(scalar)
    actor = trained(policy) + 2 * (sum(scalar) + to_action) + 2 * sum(scalar) + to_action
    control_sum = settings.regularisation.discriminator_steps * discriminator + targets + critic + actor
    return 2.0 * (rows * control_sum + contexts * trained(encoder))


def rates(step: Callable[[], object], seconds: float, device: str) -> list[tuple[float, float]]:
    """Calls per second and per CPU second in five equal stretches of `seconds`, after two calls that do not count."""
    step(), step()
    found = []
    for _ in range(5):
        count, start, cpu = 0, time.perf_counter(), time.process_time()
        while count == 0 or time.perf_counter() - start < seconds / 5:
            step()
            count += 1
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((count / (time.perf_counter() - start), count / (time.process_time() - cpu)))
    return found


def matmul_rate(dtype: torch.dtype, device: str, seconds: float = 3.0) -> tuple[float, float]:
    """Best rate of `torch.mm` in FLOP per second and per CPU second, over square matrices and the networks' shapes."""
    best = 0.0, 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 304, 304), (4096, 300, 300)):
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        found = rates(functools.partial(torch.mm, a, b), seconds / 3, device)
        best = tuple(max(x, 2.0 * m * k * n * max(y)) for x, y in zip(best, zip(*found, strict=True), strict=True))
    return best


def measure(rounds: int, seconds: float, device: str, precisions: Sequence[str]) -> dict[str, Any]:
    """Measure everything in turns, so that all cases meet the same load; medians over all stretches."""
    settings = train_settings("half-cheetah-vel", "paper")
    assert isinstance(settings, FocalSettings)
    tasks = [made_up_task(seed) for seed in range(TASKS)]
    half = override(settings, {"precision": "bf16"})
    steps: dict[str, Callable[[], object]] = {
        "plain eager fp32": PlainFocal(settings, tasks, OBS_DIM, ACT_DIM).step,
        "focal fp32": ours(settings, tasks, device),
        "focal bf16": ours(half, tasks, device),
    }
    if device == "cuda":
        del steps["plain eager fp32"]  # it is written for the CPU
    steps = {name: step for name, step in steps.items() if name.rsplit(" ", 1)[1] in precisions}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    matmul: dict[str, list[tuple[float, float]]] = {name: [] for name in precisions}
    load, cpu, wall = os.getloadavg()[0], time.process_time(), time.perf_counter()
    for _ in range(rounds):
        for name, measured in matmul.items():
            measured.append(matmul_rate({"fp32": torch.float32, "bf16": torch.bfloat16}[name], device))
        for name, step in steps.items():
            found[name] += rates(step, seconds, device)
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    flops, per_step = useful_flops(settings), settings.meta_batch * settings.batch_size
    matmul_median = {name: medians(values) for name, values in matmul.items()}
    rows = {}
    for name, values in found.items():
        per_second, per_cpu_second = medians(values)
        peak, cpu_peak = matmul_median[name.rsplit(" ", 1)[1]]
        rows[name] = {
            "steps_per_second": per_second,
            "steps_per_cpu_second": per_cpu_second,
            "transitions_per_second": per_second * per_step,
            "share_of_matmul_rate": per_second * flops / peak,
            "share_of_matmul_rate_by_cpu_time": per_cpu_second * flops / cpu_peak,
        }
    return {
        "configuration": "half-cheetah-vel, paper",
        "gflop_per_step": flops / 1e9,
        "matmul_gflops": {name: value / 1e9 for name, (value, _) in matmul_median.items()},
        "rows": rows,
        "threads": torch.get_num_threads(),
        "device": device,
        "load_before": load,
        "cores_used": cores,  # below `threads` where other programs took some
        "provenance": provenance(),
    }


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Median of the first and of the second numbers."""
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="per case and round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"),
                        help="fp32 alone on a CPU without bf16 instructions, which is very slow at it")  # fmt: skip
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.rounds, arguments.seconds, arguments.device, arguments.precisions)
    if arguments.as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['configuration']}: {result['gflop_per_step']:.1f} GFLOP a step, {result['threads']} threads, "
          f"{result['cores_used']:.2f} cores got, load before {result['load_before']:.1f}")  # fmt: skip
    print("matrix products, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in result["matmul_gflops"].items()))
    plain = result["rows"].get("plain eager fp32")
    print(f"{'':18s}{'steps/s':>9s}{'transitions/s':>15s}{'of matmul':>11s}{'(CPU time)':>11s}{'of plain':>10s}"
          f"{'(CPU time)':>11s}")  # fmt: skip
    for name, row in result["rows"].items():
        both = ("steps_per_second", "steps_per_cpu_second")
        ratios = [f"{row[key] / plain[key]:.2f}" if plain else "-" for key in both]
        print(f"{name:18s}{row['steps_per_second']:9.3f}{row['transitions_per_second']:15,.0f}"
              f"{row['share_of_matmul_rate']:11.2f}{row['share_of_matmul_rate_by_cpu_time']:11.2f}"
              f"{ratios[0]:>10s}{ratios[1]:>11s}")  # fmt: skip


if __name__ == "__main__":
    main()
