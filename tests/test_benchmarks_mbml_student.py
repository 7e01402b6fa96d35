"""The comparison of MBML's student with its teachers: how alike two generative models are, and a whole run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from focal.cli import main as focal_cli
from focal.trainer.mbml_teachers import Teachers
from focal.trainer.methods import train_settings
from focal.trainer.replay import Batch


@pytest.fixture(scope="module")
def mbml_student():
    path = Path(__file__).parent.parent / "benchmarks" / "mbml_student.py"
    spec = importlib.util.spec_from_file_location("mbml_student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_slopes_of_equal_models_correlate_by_one_of_mirrored_ones_by_minus_one(mbml_student):
    generator, settings = torch.Generator().manual_seed(0), train_settings("sparse-point-robot", "smoke", "mbml")
    teachers = Teachers(settings.teachers, 0.9, 0.005, False, 2, 2, 2, generator)
    states, actions = (torch.randn(1, 16, 2, generator=generator).expand(2, -1, -1) for _ in range(2))
    none = torch.zeros(2, 16)
    batch = Batch(states, actions, none, states, none.bool(), actions, none.bool())
    tasks, width = torch.arange(2), teachers.decoder.noise_width
    with torch.no_grad():
        assert mbml_student.slope_correlation(teachers, batch, tasks, width) == pytest.approx(1.0), "all start alike"
        teachers.decoder.body.weights[-1][1] *= -1  # the action is tanh of the last layer
        teachers.decoder.body.biases[-1][1] *= -1
        assert mbml_student.slope_correlation(teachers, batch, tasks, width) == pytest.approx(-1.0)


def test_a_run_is_measured(mbml_student, collection, tmp_path):
    words = ["train", "--collection", collection.path, "--data", "mixed", "--algo", "mbml", "--scale", "smoke",
             "--name", "student", "--runs", tmp_path]  # fmt: skip
    trained = CliRunner().invoke(focal_cli, [str(word) for word in words])
    assert trained.exit_code == 0, trained.output
    stores = ["--stores", str(Path(collection.path).parent)]
    result = CliRunner().invoke(mbml_student.main, [str(tmp_path / "student"), *stores])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert len(found) == 11
    assert found["squared error of values, own embedding"] > 0
    assert found["variance of the teacher's actions in a state, over the noise"] > 0
    (tmp_path / "teachers").rename(tmp_path / "elsewhere")
    result = CliRunner().invoke(mbml_student.main, [str(tmp_path / "student"), *stores])
    assert result.exit_code == 2
    assert "no finished first stage" in result.output


def test_a_run_of_another_method_is_refused(mbml_student, point_run):
    result = CliRunner().invoke(mbml_student.main, [str(point_run[3] / "point")])
    assert result.exit_code == 2
    assert "is a run of focal, expected one of mbml" in result.output
