"""The distance metric loss against values worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focal.trainer.distance import distance_metric_loss

# Two tasks, two embeddings each, L = 2. Squared differences, mean over the two dimensions:
#   same task:       a1-a2  (0.2^2 + 0) / 2 = 0.02        b1-b2  (0 + 0.4^2) / 2 = 0.08
#   different tasks: a1-b1  (1 + 0) / 2 = 0.5             a1-b2  (1 + 0.16) / 2 = 0.58
#                    a2-b1  (0.64 + 0) / 2 = 0.32         a2-b2  (0.64 + 0.16) / 2 = 0.40
EMBEDDINGS = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 0.0], [1.0, 0.4]])
LABELS = torch.tensor([7, 7, 3, 3])
POSITIVE = 0.05  # mean of 0.02 and 0.08


@pytest.mark.parametrize(
    ("power", "beta", "negative"),
    [
        # mean of 1/0.6, 1/0.68, 1/0.42, 1/0.5
        (-2, 1.0, (1.6666667 + 1.4705882 + 2.3809524 + 2.0) / 4),
        # roots 0.7071068, 0.7615773, 0.5656854, 0.6324555: mean of 2/(root + 0.1)
        (-1, 2.0, (2.4779868 + 2.3213239 + 3.0044222 + 2.7305412) / 4),
        (1, 8.0, -8 * (0.7071068 + 0.7615773 + 0.5656854 + 0.6324555) / 4),
        (2, 16.0, -16 * (0.5 + 0.58 + 0.32 + 0.40) / 4),
    ],
)
def test_paper_form_of_each_power(power, beta, negative):
    loss, metrics = distance_metric_loss(EMBEDDINGS, LABELS, power, beta, epsilon=0.1, form="paper")
    assert metrics["encoder/positive"].item() == pytest.approx(POSITIVE, abs=1e-6)
    assert metrics["encoder/negative"].item() == pytest.approx(negative, rel=1e-5)
    assert loss.item() == pytest.approx(POSITIVE + negative, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 30), latent=st.integers(1, 8))
def test_lemma_b1_the_sum_of_squared_distances_is_twice_n_squared_times_the_variance(seed, count, latent):
    """Lemma B.1 of the paper, summed over dimensions; the positive term is that sum per pair and dimension."""
    points = torch.randn(count, latent, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    _, metrics = distance_metric_loss(points, torch.zeros(count, dtype=torch.long))
    total = metrics["encoder/positive"] * count * (count - 1) * latent  # over ordered pairs i != j
    assert torch.isclose(total, 2 * count**2 * points.var(dim=0, correction=0).sum())
    assert torch.isclose(total, (points.unsqueeze(1) - points).square().sum())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), power=st.sampled_from([-2, -1, 1, 2]), form=st.sampled_from(["paper", "released"]))
def test_the_loss_depends_on_distances_alone(seed, power, form):
    """Moving, turning or reordering all embeddings together changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(8, 3, dtype=torch.float64, generator=draw)
    labels = torch.randint(3, (8,), generator=draw)
    power = -2 if form == "released" else power
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=draw))
    order = torch.randperm(8, generator=draw)
    loss, _ = distance_metric_loss(points, labels, power, form=form)
    moved, _ = distance_metric_loss((points @ turn + 1.5)[order], labels[order], power, form=form)
    assert torch.isclose(loss, moved)


@settings(deadline=None, max_examples=40)
@given(near=st.floats(0.01, 1.0), farther=st.floats(0.01, 1.0), power=st.sampled_from([-2, -1, 1, 2]))
def test_every_power_repels_less_the_farther_apart(near, farther, power):
    labels = torch.tensor([0, 1])
    losses = [
        distance_metric_loss(torch.tensor([[0.0], [distance]], dtype=torch.float64), labels, power)[0]
        for distance in (near, near + farther)
    ]
    assert losses[1] < losses[0]


def test_without_a_beta_it_is_the_papers():
    for power, beta in ((-2, 1.0), (-1, 2.0), (1, 8.0), (2, 16.0)):
        assert (
            distance_metric_loss(EMBEDDINGS, LABELS, power)[0]
            == distance_metric_loss(EMBEDDINGS, LABELS, power, beta)[0]
        )


def test_released_form():
    # same task sqrt(0.021) and sqrt(0.081), over 2.001; different tasks as power -2 above, over 4.001
    positive = (0.1449138 + 0.2846050) / 2.001
    negative = (1.6666667 + 1.4705882 + 2.3809524 + 2.0) / 4.001
    loss, metrics = distance_metric_loss(EMBEDDINGS, LABELS, form="released")
    assert metrics["encoder/positive"].item() == pytest.approx(positive, rel=1e-5)
    assert metrics["encoder/negative"].item() == pytest.approx(negative, rel=1e-5)
    assert loss.item() == pytest.approx(positive + negative, rel=1e-5)


def test_the_papers_betas_balance_the_powers_at_a_distance_of_one_half():
    """Table 5b: the terms are about equal when embeddings differ by 0.5 per dimension."""
    pair, labels = torch.tensor([[0.0] * 5, [0.5] * 5]), torch.tensor([0, 1])
    values = [
        distance_metric_loss(pair, labels, power, beta)[1]["encoder/negative"].abs().item()
        for power, beta in ((-2, 1.0), (-1, 2.0), (1, 8.0), (2, 16.0))
    ]
    assert values == pytest.approx([1 / 0.35, 2 / 0.6, 4.0, 4.0], rel=1e-5)


@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_identical_embeddings_give_finite_gradients(power):
    embeddings = torch.zeros(6, 3, requires_grad=True)
    loss, _ = distance_metric_loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]), power)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()


def test_a_kind_of_pair_that_is_missing_adds_nothing():
    _, one_task = distance_metric_loss(EMBEDDINGS, torch.zeros(4, dtype=torch.long))
    assert one_task["encoder/negative"].item() == 0
    _, single_draws = distance_metric_loss(EMBEDDINGS, torch.arange(4))
    assert single_draws["encoder/positive"].item() == 0


def test_descent_separates_tasks_and_gathers_draws():
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).mul(0.1).requires_grad_()
    labels = torch.arange(4).repeat(2)
    before = distance_metric_loss(embeddings, labels)[1]
    for _ in range(100):
        loss, after = distance_metric_loss(embeddings, labels)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        embeddings.data -= 0.1 * gradient
    assert after["encoder/negative"] < 0.5 * before["encoder/negative"]
    assert after["encoder/positive"] < before["encoder/positive"]
