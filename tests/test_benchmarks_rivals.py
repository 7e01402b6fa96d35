"""The benchmark of the rivals measures whole steps, and counts the products that MBML's first stage takes."""

import importlib.util
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from focal.settings import override
from focal.trainer.methods import train_settings


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("rivals", folder / "rivals.py")
    rivals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rivals)
    return rivals


def test_a_step_of_focal_trains_the_encoder_and_the_control(rivals):
    step, _ = rivals.method("focal", [rivals.made_up_task(seed) for seed in range(2)])
    assert {"encoder/loss", "critic/loss", "actor/loss"} <= set(step())


def test_products_of_a_step_of_the_first_stage(rivals):
    settings = override(
        train_settings("half-cheetah-vel", "laptop", "mbml"),
        {f"teachers.bcq.{name}_hidden": (64, 48) for name in ("critic", "vae", "perturbation")},
    )
    step = rivals.first_stage(settings, [rivals.made_up_task(seed) for seed in range(2)])
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() / 2 == pytest.approx(rivals.useful_flops(settings.teachers), rel=0.02)
