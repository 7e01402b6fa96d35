"""ESR and RMS of embeddings, by hand."""

import pytest
import torch

from focal.trainer.diagnostics import (
    effective_dimensions,
    effective_separation_rate,
    embedding_metrics,
    root_mean_square_spread,
)


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
