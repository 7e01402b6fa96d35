"""Meta-testing with agents whose behaviour is known: what each condition must measure."""

import dataclasses

import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.envs import get_family, make_batch
from focal.envs.point_robot import SparsePointRobotEnv, optimal_action, optimal_return
from focal.evaluation import OfflineTransitions, meta_test, quick_test, select_test_tasks
from focal.evaluation.embeddings import embed_contexts, embed_tasks
from focal.evaluation.metatest import (
    EXPERT,
    RIGHT,
    UNTRAINED,
    WRONG,
    ZERO,
    Contexts,
    TaskReturns,
    half_way_round,
    play_agent,
    reference_returns,
    task_centroids,
)
from focal.evaluation.protocols import context_source
from focal.trainer.diagnostics import embedding_metrics
from focal.trainer.networks import TanhGaussianPolicy
from focal.trainer.policies import save_policy
from focal.trainer.settings import TrainSettings
from focal.trainer.transform import ObservationTransform

TASKS, EPISODES = 6, 3


class GoalReader:
    """An oracle with an agent's interface: it reads the goal out of the context and walks to it.

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
        return optimal_action(observations.astype(float), embeddings[:, None], np.zeros(2)).astype(np.float32)


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
    best = np.array([optimal_return(SparsePointRobotEnv, {"goal": goal.tolist()}, sparse=True) for goal in goals])
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


def test_half_way_round_is_the_task_least_like_it():
    assert half_way_round(np.arange(6), 6).tolist() == [3, 4, 5, 0, 1, 2]
    assert half_way_round(np.repeat(np.arange(5), 2), 5).tolist() == [2, 2, 3, 3, 4, 4, 0, 0, 1, 1]


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


def with_references(tasks, **returns):
    """The same test tasks with reference returns of their own."""
    entries = []
    for entry in tasks.entries:
        references = dataclasses.replace(entry.record.references, **returns)
        entries.append(dataclasses.replace(entry, record=dataclasses.replace(entry.record, references=references)))
    return dataclasses.replace(tasks, entries=tuple(entries))


def test_references_are_deterministic_and_in_the_reported_reward(tasks):
    known = with_references(
        tasks,
        random_returns=np.array([-50.0]), expert_returns=np.array([-40.0]),
        random_deterministic=np.array([-30.0, -32.0]), expert_deterministic=np.array([-20.0]),
        random_sparse_deterministic=np.array([1.0]), expert_sparse_deterministic=np.array([6.0, 8.0]),
    )  # fmt: skip
    untrained, expert = reference_returns(known)
    assert (untrained.tolist(), expert.tolist()) == ([1.0] * TASKS, [7.0] * TASKS)
    dense = dataclasses.replace(known, family=get_family("wind"))  # a family without a sparse reward
    untrained, expert = reference_returns(dense)
    assert (untrained.tolist(), expert.tolist()) == ([-31.0] * TASKS, [-20.0] * TASKS)
    imported = with_references(tasks, random_sparse_deterministic=(), expert_sparse_deterministic=())
    assert np.isnan(reference_returns(imported)).all()


def test_an_expert_no_better_than_the_untrained_policy_is_not_counted(tasks):
    backwards = with_references(
        tasks, random_sparse_deterministic=np.array([5.0]), expert_sparse_deterministic=np.array([5.0])
    )
    result = meta_test(GoalReader(), Idle(), backwards, OfflineTransitions(32), 1, 0)
    assert not result.counted.any()
    assert result.score(RIGHT) is None


def test_the_first_observations_are_said_to_be_such(tasks):
    class Listener(Idle):
        told = []  # noqa: RUF012 (one test's own class)

        def act(self, observations, embeddings, at_reset=False):
            self.told.append(at_reset)
            return super().act(observations, embeddings)

    envs = make_batch(tasks.family, [entry.record.params for entry in tasks.entries])
    play_agent(envs, Listener(), np.zeros((TASKS, 2)), [0] * TASKS)
    assert Listener.told == [True] + [False] * 19


class Sampler(GoalReader):
    """Embeds a context as the sum of its rewards: another context, another embedding."""

    def embed(self, context):
        return context[..., 4:].sum(dim=1)


class Listener(GoalReader):
    """Keeps every transition that it embeds."""

    settings = dataclasses.replace(GoalReader.settings, latent_dim=2)

    def __init__(self):
        self.heard = set()

    def embed(self, context):
        self.heard |= {row.numpy().tobytes() for row in context.reshape(-1, context.shape[-1])}
        return super().embed(context)


@pytest.mark.parametrize("unit", ["transitions", "episodes"])
@pytest.mark.parametrize("episodes", [4, 1])
def test_accuracy_is_of_contexts_that_share_no_transition_with_the_centroids(make_collection, tmp_path, unit, episodes):
    # random walks: no two steps alike
    collection = make_collection(tmp_path / "point", tasks=3, test=2, skills=(0.0, 0.02, 0.5), episodes=episodes)
    tasks = select_test_tasks(collection, "random")
    first, second = Listener(), Listener()
    centroids = task_centroids(first, tasks, seed=0)
    assert centroids.shape == (2, 2)
    contexts = Contexts(np.zeros((6, 2)), np.zeros((6, 2)))
    source = context_source("offline", unit, 99, 8)  # more than there are: then of all of the half
    judged = source.told_apart(second, tasks, contexts, seed=0)
    assert judged.shape == (6, 2)
    assert first.heard
    assert second.heard
    assert not first.heard & second.heard
    again = [row.tobytes() for task in tasks.contexts for row in task.actions]
    assert len(set(again)) == len(again)
    if unit == "episodes":
        assert len(second.heard) == sum(len(task.rows) for task in tasks.contexts) // 2


class TestEmbedTasks:
    """Embeddings for the pictures: of contexts that training never saw."""

    @pytest.fixture(scope="class")
    def mixed(self, make_collection, tmp_path_factory):
        """Six training tasks and two unseen ones; no two steps alike, so that a step tells its episode."""
        return make_collection(tmp_path_factory.mktemp("stores") / "point", tasks=8, test=2, skills=(0.0, 0.02, 0.5))

    def test_they_are_each_tasks_own_in_the_familys_order(self, mixed):
        found = embed_tasks(GoalReader(), mixed, "mixed", draws=3, seed=0)
        assert found.embeddings.shape == (8, 3, 2)
        goals = np.array([mixed.task(index).record.params["goal"] for index in found.tasks])
        assert found.embeddings == pytest.approx(np.repeat(goals[:, None], 3, axis=1), abs=1e-2)
        assert found.unseen == tuple(mixed.task(index).split == "test" for index in found.tasks)
        assert found.of(unseen=True) == pytest.approx(found.embeddings[np.array(found.unseen)])
        assert len(found.of(unseen=True)) == 2
        points, task_of = found.points
        assert points[4] == pytest.approx(found.embeddings[1, 1])
        assert task_of.tolist() == sorted([*range(8)] * 3)

    def test_some_are_chosen_along_the_whole_order(self, mixed):
        every = embed_tasks(GoalReader(), mixed, "mixed", 1, 0).tasks
        assert embed_tasks(GoalReader(), mixed, "mixed", 1, 0, most=3).tasks == (every[0], every[4], every[7])

    def test_training_never_saw_them(self, mixed):
        class Reader(Sampler):
            seen = []  # noqa: RUF012 (one test's own class)

            def embed(self, context):
                self.seen.append(context[..., 2:4].reshape(-1, 2).numpy())
                return super().embed(context)

        embed_tasks(Reader(), mixed, "mixed", 20, 0)
        trained = {row.tobytes() for _, data in mixed.load_training("mixed") for row in data.actions}
        assert not any(row.tobytes() in trained for row in np.concatenate(Reader.seen))

    def test_tasks_trained_and_tested_on_are_not_unseen(self, make_collection, tmp_path):
        both = make_collection(tmp_path / "both", tasks=2, both=True)
        assert embed_tasks(GoalReader(), both, "mixed", 2, 0).unseen == (False, False)


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
    assert quick["test/tasks"] == list(result.task_indices)
    assert quick["test/context_size"] == 32
    for name, condition in (("return", RIGHT), ("wrong_context_return", WRONG)):  # every return, not the mean alone
        assert np.array(quick[f"test/{name}s"]) == pytest.approx(result.conditions[condition].reported, abs=1e-5)
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


def test_tasks_that_lack_another_quality_can_be_left_out(make_collection, tmp_path):
    collection = make_collection(tmp_path / "point", tasks=4, test=3, unreached=(2,))
    assert select_test_tasks(collection, "random").skipped == ()
    shared = [select_test_tasks(collection, quality, ("random", "expert")) for quality in ("random", "expert")]
    for tasks in shared:
        assert {entry.index for entry in tasks.entries} == {1, 3}
        assert tasks.skipped == (2,)
        assert len(tasks.contexts) == 2


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


def test_tasks_of_no_family_are_refused(make_collection, tmp_path):
    """Their parameters come from a file."""
    collection = make_collection(tmp_path / "half-cheetah-vel", family="half-cheetah-vel")
    message = r'task 3 of .* has parameters .*goal.*, expected the form \{"target_velocity": '
    with pytest.raises(FocalError, match=message):
        select_test_tasks(collection, "mixed")


@pytest.mark.parametrize(
    "params",
    [{"goal": [1.0, [2.0]]}, {"goal": [1.0]}, {"goal": 1.0}, {"goal": [1.0, float("nan")]}, {}, {"goal": True}],
)
def test_parameters_of_another_form_are_refused(params):
    family = get_family("point")
    with pytest.raises(UsageError, match=r'task x has parameters .* expected the form \{"goal": \['):
        family.checked(params, "task x")
    assert family.checked({"goal": [1, 0]}, "task x") == {"goal": [1.0, 0.0]}
    for one in map(get_family, ("wind", "cheetah-vel", "cheetah-dir", "ant-dir", "walker")):
        tasks = one.sample_tasks(*([2, 2] if one.fixed_tasks else [3, 2])).parameters
        assert [one.checked(task, "task x") for task in tasks] == list(tasks)
