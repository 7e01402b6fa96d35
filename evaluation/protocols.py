"""Where the context of a test episode comes from.

    offline   logged transitions of the test task, or whole logged episodes: FOCAL's protocol (algorithm 2)
    shift     the behaviour policies of OTHER tasks rolled out in the test task: the right task, but states and actions
              that its own data may never show (as UNICORN's out-of-distribution test)
    online    episodes that the agent collects in the test task, the first without a context (embedding 0, the mean of
              every encoder's prior); size 1 is one-shot adaptation
    mbml      the protocol of MBML's code (reference-facts 5.2): 5 episodes, the first with an embedding drawn from the
              prior, each further one with a draw from the posterior of all before it; their last 3 are the result

In all but the last the episode reported is played after the context has been gathered, which stays fixed. Reported
episodes are always played deterministically.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ..datasets import Selection, TaskEntry, Transitions
from ..envs import BatchedEnvs, Rollouts, make_batch, rollout
from ..errors import FocalError, UsageError
from ..trainer.agent import Agent
from ..trainer.networks import TanhGaussianPolicy
from ..trainer.replay import TaskReplay
from .embeddings import halves
from .metatest import (
    TOLD_APART_STREAM,
    Contexts,
    ContextSource,
    OfflineTransitions,
    TaskReturns,
    TestTasks,
    episode_seeds,
    half_way_round,
    play_agent,
    read_policy,
    task_of_episode,
    task_returns,
)

PROTOCOLS = ("offline", "shift", "online", "mbml")
MBML_EPISODES, MBML_REPORTED = 5, 3
UNITS = ("transitions", "episodes")
DRAW_STREAM, POLICY_STREAM, NOISE_STREAM = 8, 9, 10  # children of the test seed


class OfflineEpisodes(ContextSource):
    """Whole logged episodes of the test task, drawn without replacement."""

    protocol: ClassVar[str] = "offline"
    unit = "episodes"

    def check(self, tasks: TestTasks) -> None:
        """See `ContextSource`."""
        fewest = min(len(_episode_starts(context)) - 1 for context in tasks.contexts)
        if fewest < self.size:
            raise FocalError(
                f"a test task has only {fewest} {tasks.quality} episodes, found a context of {self.size}; "
                f"take at most --context-size {fewest}"
            )

    def gather(self, agent: Agent, tasks: TestTasks, envs: BatchedEnvs, seed: int) -> Contexts:
        """See `ContextSource`. Raises `FocalError` where a task has fewer episodes than asked for."""
        self.check(tasks)
        own, rng = task_of_episode(tasks, envs), _generator(seed, DRAW_STREAM)
        other = half_way_round(own, len(tasks.entries))
        right, wrong = (self._draw(agent, tasks.contexts, source, self.size, rng) for source in (own, other))
        return Contexts(right, wrong)

    def told_apart(self, agent: Agent, tasks: TestTasks, contexts: Contexts, seed: int) -> np.ndarray:
        """See `ContextSource`: as many contexts, of the episodes that the centroids are not of, or of all of those."""
        data = [halves(one)[1] for one in tasks.contexts]
        own = np.repeat(np.arange(len(data)), len(contexts.embeddings) // len(data))
        size = min(self.size, *(len(_episode_starts(one)) - 1 for one in data))
        return self._draw(agent, data, own, size, _generator(seed, TOLD_APART_STREAM))

    def _draw(
        self, agent: Agent, data: Sequence[Transitions], source: np.ndarray, size: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Embed `size` whole episodes of `data[source[m]]` for every m, drawn without replacement."""
        starts = [_episode_starts(one) for one in data]
        steps = []
        for k in source:
            chosen = rng.choice(len(starts[k]) - 1, size, replace=False)
            steps.append(np.concatenate([np.arange(starts[k][e], starts[k][e + 1]) for e in chosen]))
        return embed_steps(agent, data, source, steps)


class Shift(ContextSource):
    """Stochastic behaviour policies of other test tasks, rolled out in the test task; transitions of those episodes.

    Episode e of task k follows a policy of the e-th task after k (round the list, k left out), from a checkpoint of
    the context's quality: all other tasks in turn. As many episodes are rolled out as give `size` transitions at full
    length, and the transitions are drawn from them with replacement.
    """

    protocol: ClassVar[str] = "shift"

    def check(self, tasks: TestTasks) -> None:
        """See `ContextSource`. Raises `FocalError` for a single task, or a collection without behaviour policies."""
        collection = tasks.collection
        if len(tasks.entries) < 2:
            raise FocalError(f"--protocol shift needs another test task, {collection.source} has 1 with such data")
        for entry in tasks.entries:
            for step in _checkpoints(entry, tasks.quality):
                name = f"{_policy_name(entry, step)}.json"
                if name not in collection.files:
                    raise FocalError(
                        f"{collection.source} has no {name}: --protocol shift rolls behaviour policies out, and "
                        "imported data have none; use --protocol offline"
                    )

    def gather(self, agent: Agent, tasks: TestTasks, envs: BatchedEnvs, seed: int) -> Contexts:
        """See `ContextSource`. Raises as `check` does."""
        self.check(tasks)
        played = self._play(tasks, envs, seed)
        data, rng = join_episodes(played), _generator(seed, DRAW_STREAM)
        steps = [self._choose(rng, len(one.rows)) for one in data]
        return _as_contexts(embed_steps(agent, data, np.arange(len(data)), steps), played, tasks)

    def _play(self, tasks: TestTasks, envs: BatchedEnvs, seed: int) -> list[Rollouts]:
        """Roll all the episodes of a context out at once, so that those that share a policy are computed together."""
        rounds, count = self._episodes(tasks), len(envs.tasks)
        policies = _policies_of_others(tasks, envs, seed) * rounds
        wide = make_batch(tasks.family, envs.tasks * rounds)
        generator = torch.Generator().manual_seed(_word(seed, NOISE_STREAM))
        played = rollout(wide, _follow(policies, generator), episode_seeds(seed, count * rounds, 1))
        wide.close()
        return [_episodes_of(played, slice(r * count, (r + 1) * count)) for r in range(rounds)]

    def _episodes(self, tasks: TestTasks) -> int:
        return -(-self.size // tasks.family.horizon)

    def _choose(self, rng: np.random.Generator, held: int) -> np.ndarray:
        return rng.integers(held, size=self.size)


class ShiftEpisodes(Shift):
    """As `Shift`, with whole episodes as context."""

    unit = "episodes"

    def _episodes(self, tasks: TestTasks) -> int:
        return self.size

    def _choose(self, rng: np.random.Generator, held: int) -> np.ndarray:
        return np.arange(held)


class Online(ContextSource):
    """`size` episodes that the agent collects itself, stochastically, with a new embedding after each."""

    protocol: ClassVar[str] = "online"
    unit = "episodes"

    def gather(self, agent: Agent, tasks: TestTasks, envs: BatchedEnvs, seed: int) -> Contexts:
        """See `ContextSource`."""
        generator = torch.Generator(agent.device).manual_seed(_word(seed, NOISE_STREAM))
        embeddings = np.zeros((len(envs.tasks), agent.settings.latent_dim), np.float32)
        played: list[Rollouts] = []
        for r in range(self.size):
            seeds = episode_seeds(seed, len(envs.tasks), 1 + r)
            played.append(play_agent(envs, agent, embeddings, seeds, generator))
            data = join_episodes(played)
            embeddings = embed_steps(agent, data, np.arange(len(data)), [np.arange(len(one.rows)) for one in data])
        return _as_contexts(embeddings, played, tasks)


class MbmlOnline(ContextSource):
    """`size` episodes with embeddings drawn from the prior and then from the posterior; the last 3 are the result."""

    protocol: ClassVar[str] = "mbml"
    unit = "episodes"

    def gather(self, agent: Agent, tasks: TestTasks, envs: BatchedEnvs, seed: int) -> Contexts:
        """See `ContextSource`."""
        generator = torch.Generator(agent.device).manual_seed(_word(seed, NOISE_STREAM))
        count = len(envs.tasks)
        embeddings = agent.prior(count, generator).cpu().numpy()
        played: list[Rollouts] = []
        for r in range(self.size):
            played.append(play_agent(envs, agent, embeddings, episode_seeds(seed, count, 1 + r)))
            data = join_episodes(played)
            steps = [np.arange(len(one.rows)) for one in data]
            embeddings = embed_steps(agent, data, np.arange(count), steps, generator)
        return _as_contexts(embeddings, played, tasks)

    def result(self, contexts: Contexts) -> TaskReturns | None:
        """Return the mean of the last 3 episodes (K, E), or of what there is."""
        assert contexts.returns is not None
        return contexts.returns.mean_of_last(MBML_REPORTED)


_SOURCES: dict[tuple[str, str], type[ContextSource]] = {
    ("offline", "transitions"): OfflineTransitions,
    ("offline", "episodes"): OfflineEpisodes,
    ("shift", "transitions"): Shift,
    ("shift", "episodes"): ShiftEpisodes,
    ("online", "episodes"): Online,
    ("mbml", "episodes"): MbmlOnline,
}


def context_source(protocol: str, unit: str | None, size: int | None, trained_size: int) -> ContextSource:
    """Return the source that the command line's words mean.

    `unit` defaults to transitions (online, mbml: episodes), `size` to the training's for transitions, to 1 episode, and
    to 5 with mbml. Raises `UsageError` for contexts in transitions where the agent collects them.
    """
    unit = unit or ("episodes" if protocol in ("online", "mbml") else "transitions")
    if (protocol, unit) not in _SOURCES:
        raise UsageError(f"--protocol {protocol} collects whole episodes, found --context-unit {unit}; leave it out")
    usual = trained_size if unit == "transitions" else MBML_EPISODES if protocol == "mbml" else 1
    return _SOURCES[protocol, unit](size or usual)


def embed_steps(
    agent: Agent,
    data: Sequence[Transitions],
    source: np.ndarray,
    steps: Sequence[np.ndarray],
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Embed the transitions `steps[m]` of `data[source[m]]` for every m: (M, L). Contexts may differ in length.

    With a `generator` the embeddings are samples of the posteriors, not their means.
    """
    replay = TaskReplay(data, agent.transform, agent.settings, agent.device)
    first = replay.first.cpu().numpy()[source]
    lengths = np.array([len(one) for one in steps])
    embeddings = np.zeros((len(steps), agent.settings.latent_dim), np.float32)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        chosen = np.stack([first[m] + steps[m] for m in rows.tolist()])
        context = replay.context_at(torch.as_tensor(chosen, device=agent.device))
        embedded = agent.embed(context) if generator is None else agent.embed(context, generator)
        embeddings[rows] = embedded.cpu().numpy()
    return embeddings


def join_episodes(played: Sequence[Rollouts]) -> list[Transitions]:
    """Join the m-th episodes of all `played`, M episodes each, to the transitions of one store, for every m.

    Rewards and infos are rounded to float32 as in a store.
    """
    return [_transitions([(rollouts, m) for rollouts in played]) for m in range(len(played[0].lengths))]


def _transitions(episodes: Sequence[tuple[Rollouts, int]]) -> Transitions:
    lengths = np.array([rollouts.lengths[m] for rollouts, m in episodes])

    def joined(name: str, extra: int = 0) -> np.ndarray:
        return np.concatenate([getattr(r, name)[m, : r.lengths[m] + extra] for r, m in episodes]).astype(np.float32)

    last = np.cumsum(lengths) - 1
    terminated, next_action_valid = np.zeros(lengths.sum(), bool), np.ones(lengths.sum(), bool)
    terminated[last], next_action_valid[last] = [r.terminated[m] for r, m in episodes], False
    infos = {
        name: np.concatenate([r.infos[name][m, : r.lengths[m]] for r, m in episodes]).astype(np.float32)
        for name in episodes[0][0].infos
    }
    return Transitions(
        observations=joined("observations", 1),
        rows=np.arange(lengths.sum()) + np.repeat(np.arange(len(lengths)), lengths),
        actions=joined("actions"),
        rewards=joined("rewards"),
        infos=infos,
        terminated=terminated,
        next_action_valid=next_action_valid,
    )


def _episodes_of(rollouts: Rollouts, rows: slice) -> Rollouts:
    return Rollouts(
        rollouts.observations[rows],
        rollouts.actions[rows],
        rollouts.rewards[rows],
        {name: values[rows] for name, values in rollouts.infos.items()},
        rollouts.lengths[rows],
        rollouts.terminated[rows],
    )


def _as_contexts(embeddings: np.ndarray, played: Sequence[Rollouts], tasks: TestTasks) -> Contexts:
    """The wrong context of an episode is the one collected in the task half-way round, for the same episode number."""
    count, episodes = len(tasks.entries), len(embeddings) // len(tasks.entries)
    wrong = np.roll(embeddings.reshape(count, episodes, -1), -(count // 2), axis=0).reshape(embeddings.shape)
    returns = [task_returns(rollouts, count, episodes) for rollouts in played]
    dense = np.stack([one.dense for one in returns], axis=-1)
    sparse = [one.sparse for one in returns if one.sparse is not None]
    return Contexts(embeddings, wrong, type(returns[0])(dense, np.stack(sparse, axis=-1) if sparse else None))


def _policies_of_others(tasks: TestTasks, envs: BatchedEnvs, seed: int) -> list[TanhGaussianPolicy]:
    """One behaviour policy per episode, of another test task, at a checkpoint of the context's quality.

    The wrong context is one collected in another task, and there some episode's policy is the test task's own: of two
    tasks in all episodes, of ten in a tenth.
    """
    count, rng = len(tasks.entries), _generator(seed, POLICY_STREAM)
    steps = [_checkpoints(entry, tasks.quality) for entry in tasks.entries]
    loaded: dict[str, TanhGaussianPolicy] = {}
    policies = []
    for m, k in enumerate(task_of_episode(tasks, envs)):
        episode = m % (len(envs.tasks) // count)
        other = (k + 1 + episode % (count - 1)) % count
        name = _policy_name(tasks.entries[other], rng.choice(steps[other]))
        if name not in loaded:
            loaded[name] = read_policy(tasks.collection, name)
        policies.append(loaded[name])
    return policies


def _policy_name(entry: TaskEntry, step: int) -> str:
    return f"policies/task_{entry.index:04d}/step_{step:09d}"


def _checkpoints(entry: TaskEntry, quality: str) -> np.ndarray:
    """SAC steps of the policies that collected a task's data of this quality."""
    table = entry.store.read_table()
    return np.unique(table["sac_steps"][Selection(quality).mask(table)])


def _follow(policies: Sequence[TanhGaussianPolicy], generator: torch.Generator) -> Any:
    """Act with policy m in episode m, stochastically; episodes that share a policy are computed together."""
    rows: dict[TanhGaussianPolicy, list[int]] = {}
    for m, policy in enumerate(policies):
        rows.setdefault(policy, []).append(m)

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        actions = np.zeros((len(policies), policies[0].architecture["action_dim"]), np.float32)
        for policy, own in rows.items():
            actions[own] = policy.sample(torch.from_numpy(observations[own]), generator)[0].numpy()
        return actions

    return act


def _episode_starts(data: Transitions) -> np.ndarray:
    """Return the first step of every episode, and the number of steps as the end of the last."""
    return np.concatenate([[0], np.flatnonzero(~data.next_action_valid) + 1])


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))


def _word(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0])
