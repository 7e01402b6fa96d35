"""ESR, RMS and task accuracy on embeddings made by hand."""

import itertools

import numpy as np
import pytest

from focal.evaluation.embeddings import nearest_centroid_accuracy, spread


def test_uniform_embeddings_separate_half_of_their_pairs():
    embeddings = np.random.default_rng(0).uniform(-1, 1, (300, 1, 20))
    found = spread(embeddings)
    assert found["esr"] == pytest.approx(0.5, abs=0.05)  # the threshold is the mean squared distance
    assert found["rms"] ** 2 == pytest.approx(2 / 3, abs=0.02)


def test_corners_of_the_cube_are_all_apart():
    # two corners of the 5-cube differ in at least one coordinate by 2: squared distance 4 > 10 / 3
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))[:, None]
    found = spread(corners)
    assert found["esr"] == 1.0
    assert found["rms"] == pytest.approx(np.sqrt(2 * 32 / 31))
    assert found["dimensions"] == pytest.approx(5.0)


def test_one_pile_is_not_apart_at_all():
    assert spread(np.full((20, 4, 5), 0.3)) == {"esr": 0.0, "rms": pytest.approx(0, abs=1e-12), "dimensions": 0.0}


def test_spread_is_of_the_tasks_means_not_of_single_contexts():
    # contexts of a task at +-0.9 around its mean, in an order of its own: far apart each, and the means are one pile
    noise = np.where((np.arange(10) + np.arange(6)[:, None]) % 2, 0.9, -0.9)
    assert spread(np.repeat(noise[:, :, None], 3, axis=-1))["esr"] == 0.0
    assert spread(np.zeros((1, 4, 3))) == {}


def test_accuracy_by_hand():
    centroids = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    embeddings = np.array(
        [[[0.1, 0.1], [0.4, 0.0]], [[0.9, 0.2], [0.2, 0.1]], [[0.0, 0.6], [0.8, 0.7]]]
    )  # right, right; right, wrong; right, wrong
    assert nearest_centroid_accuracy(embeddings, centroids) == pytest.approx(4 / 6)


def test_tasks_that_share_a_centroid_cannot_be_told_apart():
    centroids = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    embeddings = np.repeat(centroids[:, None], 5, axis=1)
    assert nearest_centroid_accuracy(embeddings, centroids) == pytest.approx(1 / 3)
