"""Where contexts come from: whole episodes, other tasks' policies, self-collected; and what no protocol may do."""

import dataclasses
import hashlib

import gymnasium
import numpy as np
import pytest
import torch

from focal import FocalError, UsageError
from focal.datasets import Transitions
from focal.envs import get_family, make_batch, rollout
from focal.envs.point_robot import optimal_action
from focal.evaluation import OfflineTransitions, context_source, meta_test, metatest, protocols, select_test_tasks
from focal.evaluation.metatest import RIGHT, WRONG, ZERO, episode_seeds, play_agent, play_experts
from focal.evaluation.protocols import (
    MbmlOnline,
    OfflineEpisodes,
    Online,
    Shift,
    ShiftEpisodes,
    embed_steps,
    join_episodes,
)
from focal.experiment import training_data
from focal.settings import override
from focal.trainer.loop import train
from focal.trainer.networks import TanhGaussianPolicy
from focal.trainer.policies import save_policy
from focal.trainer.settings import FocalSettings, TrainSettings
from focal.trainer.transform import ObservationTransform

TASKS, EPISODES = 4, 5


class Recorder:
    """Embeds a context as [rewards' sum, number of transitions] and remembers all it was shown."""

    settings = TrainSettings(context_reward="dense", latent_dim=2, context_size=8)
    transform = ObservationTransform(2, (0, 1), (1.0, 1.0))
    device = torch.device("cpu")

    def __init__(self):
        self.seen = []

    def embed(self, context):
        self.seen.append(context.numpy())
        return torch.stack([context[..., 4].sum(-1), torch.full((len(context),), float(context.shape[1]))], dim=-1)

    def act(self, observations, embeddings, deterministic=True, generator=None, at_reset=False):
        shape = (*observations.shape[:-1], 2)
        if deterministic:
            return np.zeros(shape, np.float32)
        return (2 * torch.rand(shape, generator=generator) - 1).numpy()


class GoalReader(Recorder):
    """Reads the goal out of the context's dense rewards and walks to it; explores at random."""

    def embed(self, context):
        position = (context[..., :2] + 0.1 * context[..., 2:4]).double()
        matrix = 2 * (position[:, 1:] - position[:, :1])
        square = position.square().sum(-1) - context[..., 4].double().square()
        return torch.linalg.lstsq(matrix, (square[:, 1:] - square[:, :1]).unsqueeze(-1)).solution.squeeze(-1)

    def act(self, observations, embeddings, deterministic=True, generator=None, at_reset=False):
        if not deterministic:
            return super().act(observations, embeddings, deterministic, generator)
        return optimal_action(observations.astype(float), embeddings[:, None], np.zeros(2)).astype(np.float32)


def constant_policy(action):
    """A policy that takes `action` (2,) always, to a few decimals."""
    policy = TanhGaussianPolicy(2, (4,), 2, log_std_min=-20.0, log_std_max=-20.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy.mean.bias.copy_(torch.atanh(torch.tensor(action)))
    return policy


def direction(index):
    """The constant action of every behaviour policy of a task: no two tasks share it."""
    angle = 0.7 * index + 0.2
    return [0.9 * np.cos(angle), 0.9 * np.sin(angle)]


@pytest.fixture(scope="module")
def collection(make_collection, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "point"
    made = make_collection(path, tasks=TASKS + 2, test=TASKS, terminate_from=8)
    names = [f"policies/task_{index:04d}/step_{1000 * c:09d}" for index in range(TASKS + 2) for c in range(5)]
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save_policy(path / name, constant_policy(direction(int(name[14:18]))), {})
    files = {
        f"{name}{suffix}": (len(data), hashlib.sha256(data).hexdigest())
        for name in names
        for suffix in (".json", ".safetensors")
        for data in [(path / f"{name}{suffix}").read_bytes()]
    }
    return dataclasses.replace(made, files={**made.files, **files})


@pytest.fixture(scope="module")
def tasks(collection):
    return select_test_tasks(collection, "mixed")


@pytest.fixture
def envs(tasks):
    return make_batch(tasks.family, [entry.record.params for entry in tasks.entries for _ in range(EPISODES)])


def logged_sums(collection, entry):
    episodes = collection.load(entry.index)
    starts = np.concatenate([[0], np.cumsum(episodes.lengths)[:-1]])
    return {
        (round(float(s), 3), int(n))
        for s, n in zip(np.add.reduceat(episodes.rewards, starts), episodes.lengths, strict=True)
    }


def test_whole_episodes_are_whole_and_the_tasks_own(collection, tasks, envs):
    contexts = OfflineEpisodes(1).gather(Recorder(), tasks, envs, seed=0)
    own = [logged_sums(collection, entry) for entry in tasks.entries]
    lengths = set()
    for m, (total, length) in enumerate(contexts.embeddings):
        assert (round(float(total), 3), int(length)) in own[m // EPISODES]
        lengths.add(int(length))
    assert lengths == {10, 20}, "terminated episodes are half as long"
    for m, (total, length) in enumerate(contexts.wrong):
        assert (round(float(total), 3), int(length)) in own[(m // EPISODES + TASKS // 2) % TASKS]


def test_episodes_of_one_context_differ_and_are_not_more_than_there_are(tasks, envs):
    recorder = Recorder()
    OfflineEpisodes(50).gather(recorder, tasks, envs, seed=0)  # all there are: 5 checkpoints of 10
    held = [len(context.rows) for context in tasks.contexts]
    assert {context.shape[1] for context in recorder.seen} == set(held)
    with pytest.raises(
        FocalError, match=r"only 50 mixed episodes, found a context of 51; take at most --context-size 50"
    ):
        OfflineEpisodes(51).gather(recorder, tasks, envs, seed=0)


def test_shift_follows_every_other_tasks_policy_in_the_test_task(tasks, envs):
    recorder = Recorder()
    contexts = ShiftEpisodes(2).gather(recorder, tasks, envs, seed=0)
    (seen,) = recorder.seen  # all contexts have 40 transitions
    assert seen.shape == (TASKS * EPISODES, 40, 5)
    for m, context in enumerate(seen):
        k, e = divmod(m, EPISODES)
        other = tasks.entries[(k + 1 + e % (TASKS - 1)) % TASKS]
        assert context[:, 2:4] == pytest.approx(np.tile(direction(other.index), (40, 1)), abs=1e-3)
        arrived, goal = context[:, :2] + 0.1 * context[:, 2:4], tasks.entries[k].record.params["goal"]
        assert context[:, 4] == pytest.approx(-np.linalg.norm(arrived - goal, axis=1), abs=1e-5), (
            "the test task's reward"
        )
    assert contexts.returns.dense.shape == (TASKS, EPISODES, 2)
    assert contexts.returns.dense[0, 0, 0] == pytest.approx(seen[0, :20, 4].sum(), abs=1e-4)
    half = TASKS // 2 * EPISODES
    assert (contexts.wrong == np.roll(contexts.embeddings, -half, axis=0)).all()


def test_shift_draws_transitions_from_as_many_episodes_as_hold_them(tasks, envs):
    recorder = Recorder()
    contexts = Shift(30).gather(recorder, tasks, envs, seed=0)
    assert contexts.returns.dense.shape == (TASKS, EPISODES, 2)
    assert recorder.seen[0].shape == (TASKS * EPISODES, 30, 5)


def test_shift_policies_are_stochastic_and_of_the_contexts_quality(collection, monkeypatch):
    read = []

    def noisy(collection, stem):
        read.append(stem)
        policy = constant_policy([0.0, 0.0])
        policy.log_std_min = policy.log_std_max = -1.0
        return policy

    monkeypatch.setattr(protocols, "read_policy", noisy)
    expert = select_test_tasks(collection, "expert")
    envs = make_batch(expert.family, [entry.record.params for entry in expert.entries for _ in range(EPISODES)])
    recorder = Recorder()
    ShiftEpisodes(2).gather(recorder, expert, envs, seed=0)
    actions = recorder.seen[0][:, :, 2:4]
    assert len({step.tobytes() for step in actions.reshape(-1, 2)}) == TASKS * EPISODES * 40, "no two steps alike"
    steps = {
        f"policies/task_{entry.index:04d}/step_{step:09d}"
        for entry in expert.entries
        for episodes in [collection.load(entry.index)]
        for step in set(episodes.sac_steps[episodes.qualities == 3].tolist())
    }
    assert set(read) <= steps
    assert {name[:20] for name in read} == {name[:20] for name in steps}, "every task's"


def test_transitions_of_a_shifted_context_are_drawn_at_random(tasks, envs):
    first, second = Recorder(), Recorder()
    Shift(20).gather(first, tasks, envs, seed=0)
    ShiftEpisodes(1).gather(second, tasks, envs, seed=0)
    assert first.seen[0].shape == second.seen[0].shape
    repeated = [len(np.unique(context, axis=0)) for context in first.seen[0]]
    assert max(repeated) < 20, "with replacement, some come twice"
    assert first.seen[0] != pytest.approx(second.seen[0])


def test_wrong_contexts_are_half_way_round_an_odd_number_of_tasks(tasks):
    three = dataclasses.replace(tasks, entries=tasks.entries[:3], contexts=tasks.contexts[:3])
    envs = make_batch(three.family, [entry.record.params for entry in three.entries for _ in range(2)])
    goals = np.array([entry.record.params["goal"] for entry in three.entries])
    for source in (OfflineTransitions(20), Online(1)):
        contexts = source.gather(GoalReader(), three, envs, seed=0)
        assert contexts.embeddings == pytest.approx(np.repeat(goals, 2, axis=0), abs=2e-2)
        assert contexts.wrong == pytest.approx(np.repeat(goals[[1, 2, 0]], 2, axis=0), abs=2e-2)


def test_experts_are_each_tasks_own(tasks, envs):
    played = play_experts(envs, tasks, EPISODES, [0] * len(envs.tasks))
    for m, actions in enumerate(played.actions):
        expected = direction(tasks.entries[m // EPISODES].index)
        assert actions == pytest.approx(np.tile(expected, (20, 1)), abs=1e-3)


def test_episodes_that_gather_a_context_have_seeds_of_their_own():
    seeds = [episode_seeds(0, 50), episode_seeds(0, 50, 1), episode_seeds(0, 50, 2)]
    assert len({seed for stream in seeds for seed in stream}) == 150
    assert episode_seeds(0, 60)[:50] == seeds[0]


def test_shift_needs_behaviour_policies(tasks, envs):
    bare = dataclasses.replace(tasks, collection=dataclasses.replace(tasks.collection, files={}))
    with pytest.raises(FocalError, match=r"has no policies/task_\d+/step_\d+.json: --protocol shift rolls"):
        Shift(30).gather(Recorder(), bare, envs, seed=0)


def test_online_starts_without_a_context_and_learns_from_its_own_episodes(tasks):
    result = meta_test(GoalReader(), GoalReader(), tasks, Online(1), EPISODES, seed=0)
    assert (result.protocol, result.context_unit, result.context_size) == ("online", "episodes", 1)
    assert result.context_returns.dense.shape == (TASKS, EPISODES, 1)
    goals = np.array([entry.record.params["goal"] for entry in tasks.entries])
    assert result.embeddings == pytest.approx(np.repeat(goals[:, None], EPISODES, axis=1), abs=1e-2)
    assert result.mean(RIGHT) > 0.9 * result.optimum.mean()
    assert result.mean(WRONG) == 0.0
    assert result.context_returns.sparse.mean() < 0.2 * result.optimum.mean(), "the exploration itself earns little"


class Sampler(GoalReader):
    """Its prior is a known goal; samples of the posterior are the goal read, a little off."""

    def __init__(self):
        super().__init__()
        self.samples = 0

    def prior(self, count, generator):
        return torch.tensor([[0.0, -1.0]]).expand(count, -1)

    def embed(self, context, generator=None):
        self.seen.append(context.numpy())
        self.samples += generator is not None
        return super().embed(context) + (0 if generator is None else 0.01 * torch.randn(2, generator=generator))


def test_mbmls_protocol_starts_from_the_prior_and_reports_the_last_three(tasks):
    agent = Sampler()
    result = meta_test(agent, Sampler(), tasks, context_source("mbml", None, None, 8), EPISODES, seed=0)
    assert (result.protocol, result.context_unit, result.context_size) == ("mbml", "episodes", 5)
    assert WRONG not in result.conditions
    returns = result.context_returns
    assert returns.dense.shape == returns.sparse.shape == (TASKS, EPISODES, 5)
    assert result.conditions[RIGHT].sparse == pytest.approx(returns.sparse[..., 2:].mean(axis=-1))
    assert result.conditions[RIGHT].dense == pytest.approx(returns.dense[..., 2:].mean(axis=-1))
    assert returns.sparse[..., 0].max() == 0.0, "the prior's goal is nobody's"
    assert result.mean(RIGHT) > 0.9 * result.optimum.mean()
    # a sample of the posterior after each episode, of everything so far, and the means for the centroids
    assert agent.samples == 5
    assert [context.shape[1] for context in agent.seen[:5]] == [20, 40, 60, 80, 100]
    assert (agent.seen[4][:, :80] == agent.seen[3]).all()
    assert isinstance(context_source("mbml", None, 3, 8), MbmlOnline)


def test_mbmls_protocol_plays_episodes_of_their_own_in_every_round(tasks, envs, monkeypatch):
    seeds = []

    def play(envs, agent, embeddings, chosen, generator=None):
        seeds.extend(chosen)
        return play_agent(envs, agent, embeddings, chosen, generator)

    monkeypatch.setattr("focal.evaluation.protocols.play_agent", play)
    MbmlOnline(5).gather(Sampler(), tasks, envs, seed=0)
    assert len(set(seeds)) == len(seeds) == 5 * TASKS * EPISODES
    assert not set(seeds) & set(episode_seeds(0, TASKS * EPISODES)), "nor are they those of the other conditions"


def test_online_embeds_everything_gathered_so_far(tasks, envs):
    class Explorer(Recorder):
        told, resets = [], []

        def act(self, observations, embeddings, deterministic=True, generator=None, at_reset=False):
            self.told.append((deterministic, np.abs(embeddings).max()))
            self.resets.append(at_reset)
            return super().act(observations, embeddings, deterministic, generator)

    recorder = Explorer()
    Online(3).gather(recorder, tasks, envs, seed=0)
    assert not any(deterministic for deterministic, _ in recorder.told), "it explores"
    assert recorder.resets == 3 * ([True] + [False] * 19), "the first observations are said to be such (D7)"
    assert [largest for _, largest in recorder.told[:20]] == [0.0] * 20, "without a context: embedding 0"
    assert recorder.told[20][1] > 0
    assert [context.shape[1] for context in recorder.seen] == [20, 40, 60]
    assert (recorder.seen[2][:, :40] == recorder.seen[1]).all()


def test_the_command_lines_words():
    assert type(context_source("offline", None, None, 256)) is OfflineTransitions
    assert context_source("offline", None, None, 256).size == 256
    assert context_source("shift", None, 64, 256) == Shift(64)
    assert context_source("shift", "episodes", None, 256) == ShiftEpisodes(1)
    assert context_source("online", None, None, 256) == Online(1)
    with pytest.raises(UsageError, match="online collects whole episodes, found --context-unit transitions"):
        context_source("online", "transitions", None, 256)


def test_same_seed_same_contexts(tasks, envs):
    for source in (OfflineEpisodes(2), Shift(30), Online(2)):
        first, second = (source.gather(GoalReader(), tasks, envs, seed=3).embeddings for _ in range(2))
        assert first == pytest.approx(second, rel=1e-6)
        other = source.gather(GoalReader(), tasks, envs, seed=4).embeddings
        assert (first != other).any()


def test_joined_episodes_are_the_steps_that_were_taken():
    family = get_family("walker")
    params = family.sample_tasks(2, 1, seed=0).parameters
    envs = make_batch(family, params, threads=1)
    played = [
        rollout(envs, lambda obs: np.zeros((len(obs), 6), np.float32), [3 * r, 3 * r + 1, 3 * r + 2]) for r in (0, 1)
    ]
    envs.close()
    joined = join_episodes(played)
    for m, data in enumerate(joined):
        lengths = [int(rollouts.lengths[m]) for rollouts in played]
        assert max(lengths) < 200, "a walker without torque falls"
        assert len(data.rows) == sum(lengths) == len(data.actions) == len(data.rewards)
        assert np.flatnonzero(data.terminated).tolist() == [lengths[0] - 1, sum(lengths) - 1]
        assert np.flatnonzero(~data.next_action_valid).tolist() == [lengths[0] - 1, sum(lengths) - 1]
        second = data.observations[data.rows[lengths[0]]]
        assert (second == played[1].observations[m, 0]).all(), "the second episode starts at its reset"
        assert data.rewards.sum(dtype=float) == pytest.approx(sum(r.rewards[m].sum() for r in played), rel=1e-5)


def test_returns_stop_where_an_episode_terminates():
    """Against Gymnasium stepped by hand: nothing after the fall counts, and the other episodes go on."""
    family = get_family("walker")
    params = family.sample_tasks(3, 1, seed=1).parameters
    envs = make_batch(family, params, threads=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, len(params), 6)).astype(np.float32)
    steps = iter(actions)
    rollouts = rollout(envs, lambda obs: next(steps), [10, 11, 12, 13])
    envs.close()
    assert len(set(rollouts.lengths.tolist())) > 1
    for m, task in enumerate(params):
        env = gymnasium.make(family.env_id, disable_env_checker=True, task=task)
        env.reset(seed=10 + m)
        total, ended, t = 0.0, False, 0
        while not ended:
            _, reward, terminated, truncated, _ = env.step(actions[t, m])
            total, ended, t = total + reward, terminated or truncated, t + 1
        assert rollouts.returns[m] == pytest.approx(total, abs=1e-9)
        assert (int(rollouts.lengths[m]), bool(rollouts.terminated[m])) == (t, terminated)
        assert not rollouts.rewards[m, t:].any()


def test_training_sees_no_test_task_and_no_held_out_episode(collection):
    data = training_data(collection, "mixed")
    assert set(data.task_indices) == {entry.index for entry in collection.train_tasks()}
    seen = {row.tobytes() for task in data.tasks for row in np.hstack([task.observations[task.rows], task.actions])}
    kept = 0
    for entry in collection.tasks:
        for heldout in (False, True):
            episodes = collection.load(entry.index, heldout=heldout)
            steps = episodes.transitions()
            rows = np.hstack([steps.observations[steps.rows], steps.actions])
            # skill 1 walks without noise, so its steps repeat from episode to episode
            noisy = np.repeat(episodes.sac_steps < 4000, episodes.lengths)
            found = [row.tobytes() in seen for row in rows[noisy]]
            if entry.split == "train" and not heldout:
                assert all(found)
                kept += len(found)
            else:
                assert not any(found), (entry.index, heldout)
    assert kept


class TestAppendixC:
    """Tasks whose contexts coincide get equal embeddings, and then no policy controls both."""

    @pytest.fixture
    def twins(self, tasks):
        """Two test tasks with opposite goals whose logged transitions are the same, far from both: sparse reward 0."""
        ends = (tasks.entries[0], tasks.entries[-1])
        goals = np.array([entry.record.params["goal"] for entry in ends])
        assert np.linalg.norm(goals[0] - goals[1]) > 1.2
        start = np.zeros((41, 2), np.float32)
        start[:, 0] = np.linspace(0, 0.05, 41)
        shared = Transitions(
            observations=start, rows=np.arange(40), actions=np.full((40, 2), 0.1, np.float32),
            rewards=np.zeros(40, np.float32), infos={"sparse_reward": np.zeros(40, np.float32)},
            terminated=np.zeros(40, bool), next_action_valid=np.arange(40) < 39,
        )  # fmt: skip
        return metatest.TestTasks(tasks.family, ends, (shared, shared), (), "random", tasks.collection)

    @pytest.fixture(scope="class")
    def trained(self, make_collection, tmp_path_factory):
        """FOCAL trained on two tasks a right angle apart, from sparse contexts, and their held-out contexts."""
        collection = make_collection(tasks=2, both=True)
        settings = override(
            FocalSettings(),
            {
                "schedule": "encoder-first", "encoder_steps": 150, "steps": 400, "meta_batch": 2, "batch_size": 32,
                "context_size": 64, "context_reward": "sparse", "latent_dim": 3, "encoder_hidden": (64, 64),
                "control_hidden": (64, 64), "encoder_learning_rate": 3e-3, "critic_learning_rate": 3e-3,
                "actor_learning_rate": 3e-3, "tau": 0.02, "discount": 0.7, "reward_scale": 20.0,
            },
        )  # fmt: skip
        agent = train(tmp_path_factory.mktemp("runs") / "run", training_data(collection, "mixed"), settings, 0)
        return agent, select_test_tasks(collection, "mixed")

    def test_equal_contexts_have_equal_embeddings_and_at_most_one_goal_is_reached(self, trained):
        """What two tasks log far from both goals is the same; a trained encoder cannot tell them apart by it, whatever
        the order, and its policy then walks the same way in both. By contexts of their own it reaches both goals."""
        agent, tasks = trained
        envs = make_batch(tasks.family, [entry.record.params for entry in tasks.entries])

        def reached(embeddings):
            rollouts = play_agent(envs, agent, embeddings, [0, 0])
            return rollouts, (rollouts.sparse_returns > 0).tolist()

        first, second = self.far_from_both(tasks, seed=0), self.far_from_both(tasks, seed=1)
        assert (first.observations[first.rows] != second.observations[second.rows]).any(), "another order"
        every = [np.arange(len(first.rows))] * 2
        equal = embed_steps(agent, (first, second), np.array([0, 1]), every)
        assert equal[0] == pytest.approx(equal[1], abs=1e-5)
        rollouts, goals = reached(equal)
        assert rollouts.observations[0] == pytest.approx(rollouts.observations[1], abs=1e-2), "the same walk in both"
        assert not all(goals)

        own = embed_steps(agent, tasks.contexts, np.array([0, 1]), [np.arange(len(c.rows)) for c in tasks.contexts])
        assert np.linalg.norm(own[0] - own[1]) > 0.1
        assert reached(own)[1] == [True, True]
        assert reached(own[[0, 0]])[1] == [True, False], "the context alone says where to go"
        assert reached(own[[1, 1]])[1] == [False, True]

    @staticmethod
    def far_from_both(tasks, seed):
        """The transitions of both tasks that earn nothing in either, in an order drawn by `seed`."""
        goals = [np.array(entry.record.params["goal"]) for entry in tasks.entries]
        parts = []
        for data in tasks.contexts:
            seen = data.observations[data.rows]
            arrived = seen + 0.1 * data.actions
            far = np.all([np.linalg.norm(arrived - goal, axis=1) > 0.25 for goal in goals], axis=0)
            assert not data.infos["sparse_reward"][far].any()
            parts.append(np.hstack([seen, data.actions])[far])
        rows = np.random.default_rng(seed).permutation(np.concatenate(parts))
        count = len(rows)
        return Transitions(
            observations=rows[:, :2], rows=np.arange(count), actions=rows[:, 2:], rewards=np.zeros(count, np.float32),
            infos={"sparse_reward": np.zeros(count, np.float32)}, terminated=np.zeros(count, bool),
            next_action_valid=np.zeros(count, bool),
        )  # fmt: skip

    def test_no_policy_however_good_reaches_both(self, twins):
        """The straight line to either goal, or the best compromise between them, earns nothing in one of the tasks."""
        goals = np.array([entry.record.params["goal"] for entry in twins.entries])
        envs = make_batch(twins.family, [entry.record.params for entry in twins.entries])
        for share in np.linspace(0, 1, 11):
            target = share * goals[0] + (1 - share) * goals[1]
            walk = rollout(envs, lambda obs, to=target: optimal_action(obs.astype(float), to, np.zeros(2)), [0, 0])
            assert walk.sparse_returns.min() == 0.0
        told_apart = meta_test(
            GoalReader(),
            GoalReader(),
            dataclasses.replace(twins, contexts=self.dense(twins)),
            OfflineTransitions(20),
            1,
            0,
        )
        assert told_apart.conditions[RIGHT].sparse.min() > 9.0, "with contexts that differ, both goals are reached"
        assert told_apart.conditions[ZERO].sparse.max() == 0.0

    @staticmethod
    def dense(twins):
        return tuple(entry_context for entry_context in twins.collection.load_context("mixed", twins.entries))
