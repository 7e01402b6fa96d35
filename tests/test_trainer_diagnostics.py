"""ESR and RMS of embeddings, by hand."""

import pytest
import torch

from focal.settings import override
from focal.trainer.diagnostics import (
    effective_dimensions,
    effective_separation_rate,
    embedding_metrics,
    root_mean_square_spread,
    separation_matrix,
    value_bound,
    value_drift,
)
from focal.trainer.settings import FocalSettings


def test_esr_counts_pairs_beyond_two_thirds_per_dimension():
    # L = 2; squared distances 0-1: 1.44 > 4/3, 0-2: 1.21 < 4/3, 1-2: 1.44 + 1.21 > 4/3
    embeddings = torch.tensor([[0.0, 0.0], [1.2, 0.0], [0.0, 1.1]])
    assert effective_separation_rate(embeddings) == pytest.approx(2 / 3)


def test_rms_is_the_mean_population_deviation_scaled_to_pairs():
    # deviations over the two tasks: 0.5 and 0.1, mean 0.3; times sqrt(2 * 2 / 1) = 2
    assert root_mean_square_spread(torch.tensor([[0.0, 0.2], [1.0, 0.4]])) == pytest.approx(0.6, abs=1e-7)


def test_uniform_embeddings_have_the_distance_the_threshold_stands_for():
    embeddings = torch.rand(400, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert root_mean_square_spread(embeddings) ** 2 == pytest.approx(2 / 3, rel=0.02)
    assert 0.4 < effective_separation_rate(embeddings) < 0.6


def test_one_task_has_no_spread():
    assert embedding_metrics(torch.zeros(1, 3)) == {}


def test_dimensions_count_the_directions_in_use():
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    assert effective_dimensions(line) == pytest.approx(1, abs=1e-6)
    corners = torch.tensor([[a, b, 0.3] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    assert effective_dimensions(corners) == pytest.approx(2, abs=1e-6)
    assert effective_dimensions(torch.ones(4, 3)) == 0


def test_separation_is_the_mean_square_difference_per_dimension():
    matrix = separation_matrix(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0]]))
    assert matrix.tolist() == [[0, 0.5, 1.0], [0.5, 0, 2.5], [1.0, 2.5, 0]]


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"entropy.weight": 1}, 100 * (5 * 3 + 1) / 0.1),
        ({"regularisation.kind": "policy", "regularisation.alpha": 50}, 100 * (5 * 3 + 1) / 0.1),
        ({"regularisation.kind": "value-penalty", "regularisation.alpha": 50}, 100 * (5 * 3 + 50 + 1) / 0.1),
        ({"regularisation.kind": "value-penalty", "regularisation.adaptive": True}, 100 * (5 * 3 + 2000 + 1) / 0.1),
        ({"value_limit": 7}, 7),
        ({"discount": 1}, 100 * (5 * 3 + 1) / 0.001),
    ],
)
def test_values_are_bounded_by_100_times_the_largest_return(changes: dict, bound: float):
    settings = override(FocalSettings(), {"discount": 0.9, "reward_scale": 5} | changes)
    assert value_bound(settings, largest_reward=3.0) == pytest.approx(bound)


def test_drift_is_the_growth_per_thousand_steps_since_the_last_row():
    now = {"critic/value": 7.0, "critic/next_value": 1.0}
    assert value_drift(now, 300, {"step": 100, "critic/value": 5.0}) == {"critic/value_drift": 10.0}
    assert value_drift(now, 300, {"step": 100, "critic/value": None}) == {}  # it was not finite
    assert value_drift(now, 300, {}) == {}
    assert value_drift({}, 300, {"step": 100, "critic/value": 5.0}) == {}
