"""The benchmark of stage one counts the products that an update takes, and none besides."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from focal.datagen.sac import SacStack
from focal.datagen.settings import SacSettings
from focal.envs import get_family


@pytest.fixture(scope="module")
def stage_one():
    path = Path(__file__).parent.parent / "benchmarks" / "stage_one.py"
    spec = importlib.util.spec_from_file_location("stage_one", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hidden", [(256, 256), (128, 64, 96)])
def test_products_of_an_update(stage_one, hidden):
    family, settings = get_family("cheetah-dir"), SacSettings(hidden_sizes=hidden, batch_size=32)
    stack = SacStack(family.obs_dim, family.act_dim, 2, settings)
    batch, noise = torch.randn(2, 32, stack.columns.width), torch.randn(2, family.act_dim, 64)
    with FlopCounterMode(display=False) as counter:
        stack.update(batch, noise)
    assert counter.get_total_flops() / 2 == pytest.approx(stage_one.products_of(family, settings), rel=0.01)
