"""One stable-baselines3 SAC agent that can be stopped at any checkpoint and continued without a pickle.

Training runs in chunks, one per checkpoint. Each chunk starts with a fresh episode and with every generator reseeded
from (seed, task, chunk), so that networks, optimisers, temperature and replay are the whole state: an agent restored
from its files continues exactly as one that was never stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

from ..envs import TaskFamily, TaskParameters
from ..trainer.networks import TanhGaussianPolicy
from .learner import explain_damage, read_progress, read_rows, read_tensors, save_learner, save_rows
from .settings import LOG_STD_BOUNDS, SacSettings

REPLAY_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class SacAgent:
    """SAC on one task. `seed_of(chunk)` gives the seed of each chunk of training; chunk 0 initialises the networks."""

    def __init__(self, family: TaskFamily, task: TaskParameters, settings: SacSettings, seed_of: Callable[[int], int]):
        self.settings, self.seed_of = settings, seed_of
        self.chunk = 0  # chunks trained so far
        self._saved_steps = 0  # replay rows already on disk
        self.model = SAC(
            "MlpPolicy",
            gymnasium.make(family.env_id, task=task, disable_env_checker=True),
            learning_rate=settings.learning_rate,
            buffer_size=settings.total_steps + 1,  # never wraps, so each chunk's rows are written once
            learning_starts=settings.learning_starts,
            batch_size=settings.batch_size,
            tau=settings.tau,
            gamma=settings.discount,
            train_freq=settings.update_every,
            gradient_steps=settings.updates_each,
            policy_kwargs={"net_arch": list(settings.hidden_sizes)},
            seed=seed_of(0),
            device="cpu",
        )

    @property
    def steps(self) -> int:
        """Environment steps trained so far."""
        return self.model.num_timesteps

    def train_chunk(self, steps: int, on_steps: Callable[[int], None]) -> None:
        """Train for `steps` environment steps. `on_steps` receives how many were done since its last call."""
        self.chunk += 1
        self.model.set_random_seed(self.seed_of(self.chunk))
        self.model._last_obs = None  # a fresh episode, whether continued or restored
        self.model.learn(steps, callback=_StepReporter(on_steps), reset_num_timesteps=False)

    def policy(self) -> TanhGaussianPolicy:
        """Return a copy of the current actor as the project's own network, which needs no stable-baselines3."""
        actor: Any = self.model.actor
        obs_dim, act_dim = actor.latent_pi[0].in_features, actor.mu.out_features
        policy = TanhGaussianPolicy(obs_dim, self.settings.hidden_sizes, act_dim, *LOG_STD_BOUNDS)
        source = {f"body.{k}": v for k, v in actor.latent_pi.state_dict().items()}
        source |= {f"mean.{k}": v for k, v in actor.mu.state_dict().items()}
        source |= {f"log_std.{k}": v for k, v in actor.log_std.state_dict().items()}
        policy.load_state_dict(source)
        return policy.eval()

    def save(self, folder: Path) -> None:
        """Write the agent's state. The learner file is replaced last and atomically: it is the commit point."""
        replay, start = self._replay(), self._saved_steps
        if self.steps > start:
            rows = {name: getattr(replay, name)[start : self.steps, 0] for name in REPLAY_ARRAYS}
            save_rows(folder, self.chunk, rows)
        progress = {"chunk": self.chunk, "steps": self.steps, "updates": self.model._n_updates}
        save_learner(folder, self._tensors(), progress)
        self._saved_steps = self.steps

    def restore(self, folder: Path) -> bool:
        """Continue from what `save` wrote; return False when there is nothing to continue from.

        Raises `FocalError` when a file is missing or damaged: training again from the start gives the same episodes.
        """
        progress = read_progress(folder)
        if progress is None:
            return False
        with explain_damage(folder):
            self._load_tensors(read_tensors(folder))
            self.chunk, self._saved_steps = progress["chunk"], progress["steps"]
            self.model.num_timesteps, self.model._n_updates = progress["steps"], progress["updates"]
            replay, end = self._replay(), 0
            for chunk in range(1, self.chunk + 1):
                rows = read_rows(folder, chunk)
                start, end = end, end + len(rows["rewards"])
                for name in REPLAY_ARRAYS:
                    getattr(replay, name)[start:end, 0] = rows[name]
            assert end == progress["steps"], (end, progress)
            replay.pos = end
        return True

    def _replay(self) -> ReplayBuffer:
        assert self.model.replay_buffer is not None
        return self.model.replay_buffer

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        model: Any = self.model
        temperature = model.ent_coef_optimizer
        return {"actor": model.actor.optimizer, "critic": model.critic.optimizer, "temperature": temperature}

    def _tensors(self) -> dict[str, torch.Tensor]:
        model: Any = self.model
        tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
        tensors["log_ent_coef"] = model.log_ent_coef.detach()
        for owner, optimiser in self._optimisers().items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"adam.{owner}.{index}.{name}": value for name, value in state.items()}
        return {name: value.detach().clone().contiguous() for name, value in tensors.items()}

    def _load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        model: Any = self.model
        policy = {name.removeprefix("policy."): v for name, v in tensors.items() if name.startswith("policy.")}
        model.policy.load_state_dict(policy)
        with torch.no_grad():
            model.log_ent_coef.copy_(tensors["log_ent_coef"])
        for owner, optimiser in self._optimisers().items():
            states: dict[int, dict[str, torch.Tensor]] = {}
            prefix = f"adam.{owner}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    index, field = name.removeprefix(prefix).split(".")
                    states.setdefault(int(index), {})[field] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": states, "param_groups": groups})


class _StepReporter(BaseCallback):
    """Passes the number of steps done to the progress bar, a hundred at a time."""

    def __init__(self, on_steps: Callable[[int], None]):
        super().__init__()
        self._on_steps, self._reported = on_steps, 0

    def _on_training_start(self) -> None:
        self._reported = self.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps - self._reported >= 100:
            self._on_training_end()
        return True

    def _on_training_end(self) -> None:
        self._on_steps(self.num_timesteps - self._reported)
        self._reported = self.num_timesteps
