"""Stage one of one task: train, checkpoint, roll out, measure references, seal. Runs in a process of its own.

Order of the writes at every checkpoint: policy, segment of episodes, replay rows, learner. Each is atomic and
determined by (seed, task, checkpoint), so a killed task continues at its last learner file and rewrites the same
bytes; no episode is lost or doubled. What happens at a checkpoint and after the last one is the same for both engines
(`publish_checkpoint`, `seal`); `fleet_worker.py` is the other one.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..datasets import (
    End,
    Episodes,
    References,
    TaskRecord,
    is_sealed,
    list_segments,
    read_segment,
    seal_task,
    write_segment,
)
from ..envs import BatchedEnvs, Policy, Rollouts, Split, TaskFamily, TaskParameters, get_family, make_batch, rollout
from ..files import locked, remove_leftovers
from ..settings import to_dict
from ..trainer.networks import TanhGaussianPolicy
from ..trainer.policies import load_policy_file, save_policy
from .settings import GenerateSettings

if TYPE_CHECKING:
    from .agent import SacAgent

# children of the collection's seed; (stream, task, checkpoint); streams 0 and 1 draw and split the tasks
TRAIN_STREAM, ROLLOUT_STREAM, REFERENCE_STREAM = 2, 3, 4
RANDOM_STOCHASTIC, RANDOM_DETERMINISTIC, EXPERT_STOCHASTIC, EXPERT_DETERMINISTIC = range(4)

Report = Callable[[int, str, Any], None]
"""(task index, what, value): "steps" and how many more, "sealed" and 1, or "retried" and why."""


@dataclass(frozen=True)
class TaskJob:
    """One task of a collection under way."""

    collection: Path
    family: str
    index: int
    split: Split
    parameters: TaskParameters
    settings: GenerateSettings
    seed: int
    provenance: dict[str, Any]

    def seed_of(self, stream: int, checkpoint: int, count: int = 1, attempt: int = 0) -> list[int]:
        """Return `count` 32-bit seeds for one purpose at one checkpoint; others at every attempt after a failure."""
        key = (stream, self.index, checkpoint, attempt) if attempt else (stream, self.index, checkpoint)
        return [int(word) for word in np.random.SeedSequence(self.seed, spawn_key=key).generate_state(count)]

    def training_seed(self, chunk: int, attempt: int = 0) -> int:
        """Return the seed of one chunk of training; chunk 0 initialises the networks."""
        return self.seed_of(TRAIN_STREAM, chunk, attempt=attempt)[0]

    def checkpoint_step(self, checkpoint: int) -> int:
        """Environment steps at a checkpoint: 0, then evenly spaced up to the total."""
        return self.settings.sac.total_steps * checkpoint // self.settings.checkpoints

    @property
    def learner_folder(self) -> Path:
        """Where the agent's state lives until the task is sealed."""
        return self.collection / "staging" / "learners" / f"task_{self.index:04d}"

    def policy_path(self, step: int) -> Path:
        """Behaviour policy of one checkpoint, without suffix."""
        return self.collection / "policies" / f"task_{self.index:04d}" / f"step_{step:09d}"


def run_task(job: TaskJob, report: Report) -> None:
    """Bring one task to its sealed store, continuing whatever an earlier run left.

    Raises `FocalError` when another process holds the task or the disk is full.
    """
    if is_sealed(job.collection, job.index):
        return
    from .agent import SacAgent  # imports stable-baselines3, which the fleet engine does without

    with lock(job.collection, f"task_{job.index:04d}", f"task {job.index}"):
        if is_sealed(job.collection, job.index):
            return
        for folder in (job.learner_folder, job.policy_path(0).parent):
            remove_leftovers(folder)
        family = get_family(job.family)
        agent = SacAgent(family, job.parameters, job.settings.sac, job.training_seed)
        restored = agent.restore(job.learner_folder)
        report(job.index, "steps", agent.steps)
        envs = make_batch(family, [job.parameters] * job.settings.episodes_per_checkpoint, threads=1)
        if not restored:
            _checkpoint(job, agent, envs)
        while agent.chunk < job.settings.checkpoints:
            steps = job.checkpoint_step(agent.chunk + 1) - agent.steps
            agent.train_chunk(steps, lambda n: report(job.index, "steps", n))
            _checkpoint(job, agent, envs)
        envs.close()
        seal(job, family)
        shutil.rmtree(job.learner_folder)
        report(job.index, "sealed", 1)


def _checkpoint(job: TaskJob, agent: "SacAgent", envs: BatchedEnvs) -> None:
    publish_checkpoint(job, agent.policy(), agent.chunk, envs)
    agent.save(job.learner_folder)


def publish_checkpoint(job: TaskJob, policy: TanhGaussianPolicy, checkpoint: int, envs: BatchedEnvs) -> None:
    """Write the policy of a checkpoint, and the segment of episodes that it gives in `envs`.

    What is there already stays, even where another machine went on and rounds differently: policy and segment then
    still belong together. Raises `EnvironmentFailure`.
    """
    step = job.checkpoint_step(checkpoint)
    if step in list_segments(job.collection, job.index):
        return
    meta = {"task": job.index, "sac_step": step, "algorithm": "SAC"}
    job.policy_path(step).parent.mkdir(parents=True, exist_ok=True)
    save_policy(job.policy_path(step), policy, meta)
    noise_seed, *seeds = job.seed_of(ROLLOUT_STREAM, checkpoint, 1 + job.settings.episodes_per_checkpoint)
    rollouts = rollout(envs, as_policy(policy, deterministic=False, seed=noise_seed), seeds)
    write_segment(job.collection, job.index, step, to_episodes(rollouts, seeds, step))


def as_policy(policy: TanhGaussianPolicy, deterministic: bool, seed: int = 0) -> Policy:
    """Wrap a behaviour policy for `rollout`; action noise comes from its own generator."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(observations)
        chosen = policy.mode(inputs) if deterministic else policy.sample(inputs, generator)[0]
        return chosen.numpy()

    return act


def to_episodes(rollouts: Rollouts, seeds: list[int], sac_step: int) -> Episodes:
    """Cut the padding away and join the episodes (float32; returns stay float64)."""
    lengths = rollouts.lengths
    steps = np.arange(rollouts.actions.shape[1]) < lengths[:, None]  # (E, H)
    rows = np.arange(rollouts.observations.shape[1]) <= lengths[:, None]  # (E, H + 1)
    count = len(lengths)
    return Episodes(
        observations=rollouts.observations[rows],
        actions=rollouts.actions[steps],
        rewards=rollouts.rewards[steps].astype(np.float32),
        infos={name: values[steps].astype(np.float32) for name, values in rollouts.infos.items()},
        lengths=lengths.astype(np.int32),
        ends=np.where(rollouts.terminated, End.TERMINATED, End.TRUNCATED).astype(np.uint8),
        returns=rollouts.returns,
        qualities=np.zeros(count, np.uint8),
        sac_steps=np.full(count, sac_step, np.int64),
        seeds=np.asarray(seeds, np.int64),
        heldout=np.zeros(count, np.uint8),
    )


def seal(job: TaskJob, family: TaskFamily, notes: Mapping[str, Any] | None = None) -> None:
    """Measure the references of a task that is trained and publish its store; `notes` join its provenance."""
    _complete_segments(job, family)
    record = _record(job, family, {**job.provenance, **(notes or {})})
    seal_task(job.collection, record, job.settings.quality, job.seed)


def _complete_segments(job: TaskJob, family: TaskFamily) -> None:
    """Roll out again, from the policies on disk and to the same bytes, what was deleted because it was damaged."""
    there = list_segments(job.collection, job.index)
    missing = [n for n in range(job.settings.checkpoints + 1) if job.checkpoint_step(n) not in there]
    if missing:
        envs = make_batch(family, [job.parameters] * job.settings.episodes_per_checkpoint, threads=1)
        for checkpoint in missing:
            policy, _ = load_policy_file(job.policy_path(job.checkpoint_step(checkpoint)))
            publish_checkpoint(job, policy, checkpoint, envs)
        envs.close()


def _record(job: TaskJob, family: TaskFamily, provenance: dict[str, Any]) -> TaskRecord:
    return TaskRecord(
        index=job.index,
        family=family.name,
        params=job.parameters,
        split=job.split,
        env_id=family.env_id,
        env_settings={"task": job.parameters},
        horizon=family.horizon,
        spaces={
            "observation": {"shape": [family.obs_dim], "dtype": "float32"},
            "action": {"shape": [family.act_dim], "dtype": "float32", "low": -1.0, "high": 1.0},
        },
        absolute_x=family.absolute_x,
        behaviour={"algorithm": "SAC", "engine": job.settings.engine, **to_dict(job.settings.sac)},
        references=measure_references(job, family),
        provenance=provenance,
    )


def measure_references(job: TaskJob, family: TaskFamily) -> References:
    """Estimate the untrained and the best policy's returns on fresh episodes, and test the best one absolutely."""
    best_step = best_checkpoint(job)
    envs = make_batch(family, [job.parameters] * job.settings.fresh_episodes, threads=1)
    results = {}
    for purpose, step, deterministic in (
        (RANDOM_STOCHASTIC, 0, False),
        (RANDOM_DETERMINISTIC, 0, True),
        (EXPERT_STOCHASTIC, best_step, False),
        (EXPERT_DETERMINISTIC, best_step, True),
    ):
        policy, _ = load_policy_file(job.policy_path(step))
        noise_seed, *seeds = job.seed_of(REFERENCE_STREAM, purpose, 1 + job.settings.fresh_episodes)
        results[purpose] = rollout(envs, as_policy(policy, deterministic, noise_seed), seeds)
    envs.close()
    reached, measured = expert_test(family, job.parameters, results)

    def sparse(purpose: int) -> list[float]:
        returns = results[purpose].sparse_returns
        return [] if returns is None else returns.tolist()

    return References(
        random_returns=results[RANDOM_STOCHASTIC].returns.tolist(),
        expert_returns=results[EXPERT_STOCHASTIC].returns.tolist(),
        random_deterministic=results[RANDOM_DETERMINISTIC].returns.tolist(),
        expert_deterministic=results[EXPERT_DETERMINISTIC].returns.tolist(),
        random_sparse_deterministic=sparse(RANDOM_DETERMINISTIC),
        expert_sparse_deterministic=sparse(EXPERT_DETERMINISTIC),
        expert_sac_step=best_step,
        reached_expert=reached,
        expert_test=measured,
    )


def expert_test(family: TaskFamily, task: TaskParameters, results: dict[int, Rollouts]) -> tuple[bool, str]:
    """Apply the family's absolute test, and that the expert beats the untrained policy by 5 standard errors."""
    report = family.passes_expert_test(results[EXPERT_DETERMINISTIC], task)
    expert, untrained = (results[purpose].returns for purpose in (EXPERT_STOCHASTIC, RANDOM_STOCHASTIC))
    error = np.sqrt(sum(returns.var(ddof=1) / len(returns) for returns in (expert, untrained)))
    difference = expert.mean() - untrained.mean()
    beats = bool(difference > 5.0 * error)
    margin = f"{difference:.1f} above the untrained policy, 5 standard errors are {5.0 * error:.1f}"
    return report.reached and beats, f"{report.measured}; {margin}"


def best_checkpoint(job: TaskJob) -> int:
    """Return the step of the checkpoint with the highest mean stochastic return."""
    means = {step: read_segment(job.collection, job.index, step).returns.mean()
             for step in list_segments(job.collection, job.index)}  # fmt: skip
    return max(means, key=lambda step: means[step])


LOCK_PATIENCE = 30.0  # seconds; workers of a killed command need a moment to notice


@contextmanager
def lock(collection: Path, name: str, what: str) -> Iterator[None]:
    """Hold a task, or a fleet of them, alone. A killed process releases its lock by dying."""
    path = collection / "staging" / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    held = f"{what} of {collection} is being generated by another process; "
    with locked(path, LOCK_PATIENCE, held + "wait for it, or stop it and run the same command again"):
        yield
