"""The count of useful operations is what the update does: none missing from the formula, none wasted in the code."""

import importlib.util
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from focal.settings import override
from focal.trainer.methods import train_settings

FOLDER = Path(__file__).parent.parent / "benchmarks"
WIDE = {"control_hidden": "512,512,512", "encoder_hidden": "256,256"}  # so that the layers between dominate
SMALL = {**WIDE, "batch_size": 8, "meta_batch": 4, "context_size": 8}


@pytest.fixture(scope="module")
def stage_two():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("stage_two", FOLDER / "stage_two.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def counted(step) -> int:
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_the_update_takes_the_useful_products_and_no_more(stage_two):
    settings = override(train_settings("half-cheetah-vel", "paper"), SMALL)
    tasks = [stage_two.made_up_task(seed) for seed in range(4)]
    assert counted(stage_two.ours(settings, tasks, "cpu")) == pytest.approx(stage_two.useful_flops(settings), rel=0.02)


def test_the_plain_implementation_takes_more(stage_two):
    settings = override(train_settings("half-cheetah-vel", "paper"), SMALL)
    tasks = [stage_two.made_up_task(seed) for seed in range(4)]
    plain = stage_two.PlainFocal(settings, tasks, stage_two.OBS_DIM, stage_two.ACT_DIM)
    assert counted(plain.step) > 1.05 * stage_two.useful_flops(settings)
