"""The meta-testing benchmark counts what it plays, and rates both clocks alike."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "evaluation.py"


def test_it_measures_three_ways_and_their_ratios(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", PATH)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    played = []
    monkeypatch.setattr(
        benchmark, "play_agent", lambda *given, real=benchmark.play_agent: played.append(real(*given)) or played[-1]
    )
    result = benchmark.measure(tasks=2, episodes=1, repeats=1, scale="smoke")
    assert [rollouts.lengths.tolist() for rollouts in played] == [[200, 200]] * 2, "the right and the wrong context"
    for unit in ("steps per second", "steps per CPU second"):
        found = result[unit]
        assert found["meta-test / bare physics"] == pytest.approx(found["meta-test"] / found["bare physics"])
        assert found["meta-test / step by step"] == pytest.approx(found["meta-test"] / found["step by step"])
        assert all(rate > 0 for rate in found.values())
