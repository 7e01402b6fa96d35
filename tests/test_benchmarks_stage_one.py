"""The benchmark of stage one counts the products that an update takes, and none besides; parity compares like."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from focal import FocalError
from focal.datagen.sac import SacStack
from focal.datagen.settings import SacSettings
from focal.envs import get_family


def benchmark(name):
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hidden", [(256, 256), (128, 64, 96)])
def test_products_of_an_update(hidden):
    stage_one = benchmark("stage_one")
    family, settings = get_family("cheetah-dir"), SacSettings(hidden_sizes=hidden, batch_size=32)
    stack = SacStack(family.obs_dim, family.act_dim, 2, settings)
    batch, noise = torch.randn(2, 32, stack.columns.width), torch.randn(2, family.act_dim, 64)
    with FlopCounterMode(display=False) as counter:
        stack.update(batch, noise)
    assert counter.get_total_flops() / 2 == pytest.approx(stage_one.products_of(family, settings), rel=0.01)


def test_agents_trained_otherwise_are_not_compared(tmp_path, monkeypatch):
    parity = benchmark("parity")
    monkeypatch.setattr(parity, "run_jobs", lambda *arguments: pytest.fail("it would have gone on"))
    command = ["parity.py", "--output", str(tmp_path / "point"), "--steps"]
    monkeypatch.setattr(sys, "argv", [*command, "3000", "--tasks", "0,1"])
    with pytest.raises(pytest.fail.Exception):
        parity.main()
    monkeypatch.setattr(sys, "argv", [*command, "4000"])
    with pytest.raises(FocalError, match=r"point holds agents with another tasks, sac; choose another --output, or rm"):
        parity.main()


def test_seeds_of_parity_are_counted_or_listed():
    parity = benchmark("parity")
    assert parity.chosen_seeds("3") == [0, 1, 2]
    assert parity.chosen_seeds("0,1,7") == [0, 1, 7]
