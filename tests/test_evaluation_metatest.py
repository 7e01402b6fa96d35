"""Meta-testing with agents whose behaviour is known: what each condition must measure."""

import numpy as np
import pytest
import torch

from focal import FocalError
from focal.envs import get_family
from focal.envs.point_robot import SparsePointRobotEnv, straight_line_action, straight_line_return
from focal.evaluation import OfflineTransitions, meta_test, quick_test, select_test_tasks
from focal.evaluation.embeddings import embed_contexts
from focal.evaluation.metatest import EXPERT, RIGHT, UNTRAINED, WRONG, ZERO, TaskReturns
from focal.trainer.diagnostics import embedding_metrics
from focal.trainer.networks import TanhGaussianPolicy
from focal.trainer.policies import save_policy
from focal.trainer.settings import TrainSettings
from focal.trainer.transform import ObservationTransform

TASKS, EPISODES = 6, 3


class GoalReader:
    """An oracle with an agent's interface: it reads the goal out of the context and walks straight to it.

    A dense reward is minus the distance to the goal; three circles around the context's positions give the goal.
    """

    settings = TrainSettings(context_reward="dense")
    transform = ObservationTransform(2, (0, 1), (1.0, 1.0))
    device = torch.device("cpu")

    def embed(self, context):
        position = (context[..., :2] + 0.1 * context[..., 2:4]).double()
        distance = -context[..., 4].double()
        # |p - g|^2 = d^2  ->  linear in g after subtracting the first transition's equation
        matrix = 2 * (position[:, 1:] - position[:, :1])
        square = position.square().sum(-1) - distance.square()
        return torch.linalg.lstsq(matrix, (square[:, 1:] - square[:, :1]).unsqueeze(-1)).solution.squeeze(-1)

    def act(self, observations, embeddings, at_reset=False):
        return straight_line_action(observations.astype(float), embeddings[:, None], np.zeros(2)).astype(np.float32)


class Idle(GoalReader):
    """Does nothing, whatever the task."""

    def act(self, observations, embeddings, at_reset=False):
        return np.zeros_like(observations)


@pytest.fixture(scope="module")
def tasks(make_collection, tmp_path_factory):
    collection = make_collection(tmp_path_factory.mktemp("stores") / "point", tasks=10, test=TASKS)
    for entry in collection.tasks:
        step = entry.record.references.expert_sac_step
        folder = collection.path / "policies" / f"task_{entry.index:04d}"
        folder.mkdir(parents=True)
        save_policy(folder / f"step_{step:09d}", TanhGaussianPolicy(2, (4,), 2), {})
    return select_test_tasks(collection, "mixed")


@pytest.fixture(scope="module")
def result(tasks):
    return meta_test(GoalReader(), Idle(), tasks, OfflineTransitions(32), episodes=EPISODES, seed=0)


def test_the_right_context_gives_the_optimum_and_the_wrong_one_another_tasks_goal(tasks, result):
    goals = [np.array(entry.record.params["goal"]) for entry in tasks.entries]
    best = np.array([straight_line_return(SparsePointRobotEnv, {"goal": goal.tolist()}, sparse=True) for goal in goals])
    right = result.conditions[RIGHT]
    assert right.sparse.shape == right.dense.shape == (TASKS, EPISODES)
    assert right.sparse == pytest.approx(np.repeat(best[:, None], EPISODES, axis=1), abs=1.0)
    assert result.optimum == pytest.approx(best)
    assert result.share_of_optimum(RIGHT) == pytest.approx(1.0, abs=0.05)
    # the wrong context is the task half-way round the ordered list: its goal is far, so nothing is earned
    assert result.mean(WRONG) == 0.0
    for k, goal in enumerate(goals):
        other = goals[(k + TASKS // 2) % TASKS]
        final_gap = np.linalg.norm(goal - other)
        assert result.conditions[WRONG].dense[k].mean() < -final_gap * 5


def test_tasks_are_in_the_order_of_their_angle(tasks):
    angles = [np.arctan2(*entry.record.params["goal"][::-1]) for entry in tasks.entries]
    assert angles == sorted(angles)


def test_zero_action_and_untrained(result):
    for condition in (ZERO, UNTRAINED):
        assert result.conditions[condition].dense == pytest.approx(-20.0)  # 20 steps at distance 1
        assert result.mean(condition) == 0.0
    assert result.conditions[EXPERT].dense.shape == (TASKS, EPISODES)


def test_scores_by_hand(result):
    k, references = 0, (result.untrained_reference, result.expert_reference)
    mean = result.conditions[RIGHT].sparse[k].mean()
    expected = (mean - references[0][k]) / (references[1][k] - references[0][k])
    assert result.task_scores(RIGHT)[k] == pytest.approx(expected)
    assert result.score(RIGHT) == pytest.approx(result.task_scores(RIGHT).mean())


def test_tasks_whose_expert_failed_are_left_out_of_the_score(make_collection, tmp_path):
    collection = make_collection(tmp_path / "point", tasks=4, test=2, unreached=(3,))
    folder = collection.path / "policies"
    tasks = select_test_tasks(collection, "mixed")
    for entry in tasks.entries:
        (folder / f"task_{entry.index:04d}").mkdir(parents=True)
        step = entry.record.references.expert_sac_step
        save_policy(folder / f"task_{entry.index:04d}" / f"step_{step:09d}", TanhGaussianPolicy(2, (4,), 2), {})
    result = meta_test(GoalReader(), Idle(), tasks, OfflineTransitions(32), 2, 0)
    scores = dict(zip(result.task_indices, result.task_scores(RIGHT), strict=True))
    assert np.isnan(scores[3])
    assert result.score(RIGHT) == pytest.approx(scores[2])
    with_expert = select_test_tasks(collection, "expert")
    assert with_expert.skipped == (3,)


def test_same_seed_same_numbers_and_every_episode_its_own_context(tasks, result):
    again = meta_test(GoalReader(), Idle(), tasks, OfflineTransitions(32), EPISODES, 0)
    # the oracle's least squares, not the protocol, differs in the last bit between calls
    assert again.conditions[RIGHT].dense == pytest.approx(result.conditions[RIGHT].dense, rel=1e-5)
    assert again.embeddings == pytest.approx(result.embeddings, rel=1e-5)
    other = embed_contexts(GoalReader(), tasks.contexts, np.zeros(2, int), 32, seed=1)
    assert (other[0] != other[1]).any()


def test_quick_test_agrees_with_the_full_one(tasks, result):
    quick = quick_test(GoalReader(), tasks, 32, EPISODES, 0)
    assert quick["test/return"] == pytest.approx(result.mean(RIGHT), rel=1e-5)
    assert quick["test/wrong_context_return"] == pytest.approx(result.mean(WRONG), abs=1e-5)
    goals = torch.tensor([entry.record.params["goal"] for entry in tasks.entries], dtype=torch.float64)
    spread = embedding_metrics(goals)  # the oracle's embedding is the goal
    assert {name: quick[f"test/{name}"] for name in spread} == pytest.approx(spread, abs=1e-4)


def test_context_of_a_task_also_trained_on_is_held_out(make_collection, tmp_path):
    collection = make_collection(tmp_path / "both", tasks=2, both=True, skills=(0.0, 0.02, 0.5))  # no two steps alike
    tasks = select_test_tasks(collection, "mixed")
    assert tasks.heldout_only
    training = {entry.index: data for entry, data in collection.load_training("mixed")}
    for entry, context in zip(tasks.entries, tasks.contexts, strict=True):
        heldout = collection.load(entry.index, heldout=True)
        assert len(context.rows) == heldout.num_steps
        assert len(context.rows) + len(training[entry.index].rows) == collection.load(entry.index).num_steps
        seen = {row.tobytes() for row in training[entry.index].actions}
        assert not any(row.tobytes() in seen for row in context.actions)


def test_no_test_task_has_the_quality(make_collection, tmp_path):
    collection = make_collection(tmp_path / "point", tasks=3, test=1, unreached=(2,))
    with pytest.raises(FocalError, match=r"no test task of .* has expert data; see what there is: focal-cli data show"):
        select_test_tasks(collection, "expert")


def test_reported_returns_are_sparse_where_there_are_any():
    dense, sparse = np.full((1, 1), -3.0), np.ones((1, 1))
    assert TaskReturns(dense, sparse).reported is sparse
    assert TaskReturns(dense, None).reported is dense
    assert get_family("point").sparse
    assert not get_family("wind").sparse
