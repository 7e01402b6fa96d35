"""One stable-baselines3 SAC agent that can be stopped at any checkpoint and continued without a pickle.

Training runs in chunks, one per checkpoint. Each chunk starts with a fresh episode and with every generator reseeded
from (seed, task, chunk), so that networks, optimisers, temperature and replay are the whole state: an agent restored
from its files continues exactly as one that was never stopped.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

from ..envs import TaskFamily, TaskParameters
from ..errors import FocalError
from ..files import atomic_path
from ..trainer.networks import TanhGaussianPolicy
from .settings import SacSettings

REPLAY_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
LEARNER_FILE = "learner.safetensors"
SB3_LOG_STD_BOUNDS = (-20.0, 2.0)


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
        policy = TanhGaussianPolicy(obs_dim, self.settings.hidden_sizes, act_dim, *SB3_LOG_STD_BOUNDS)
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
            with atomic_path(folder / f"replay_{self.chunk:04d}.npz") as path, open(path, "wb") as file:
                np.savez(file, allow_pickle=False, **rows)
        meta = {"chunk": self.chunk, "steps": self.steps, "updates": self.model._n_updates}
        with atomic_path(folder / LEARNER_FILE) as path:
            save_file(self._tensors(), path, metadata={"learner": json.dumps(meta)})
        self._saved_steps = self.steps

    def restore(self, folder: Path) -> bool:
        """Continue from what `save` wrote; return False when there is nothing to continue from.

        Raises `FocalError` when a file is missing or damaged: training again from the start gives the same episodes.
        """
        if not (folder / LEARNER_FILE).exists():
            return False
        try:
            self._restore(folder)
        except (OSError, EOFError, ValueError, KeyError, AssertionError, zipfile.BadZipFile, SafetensorError) as error:
            raise FocalError(
                f"{folder} is damaged ({' '.join(str(error).split())[:100]}); "
                f"type rm -r {folder}, then run the same command again: that task starts anew"
            ) from error
        return True

    def _restore(self, folder: Path) -> None:
        path = folder / LEARNER_FILE
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["learner"])
            self._load_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        self.chunk, self._saved_steps = meta["chunk"], meta["steps"]
        self.model.num_timesteps, self.model._n_updates = meta["steps"], meta["updates"]
        replay, end = self._replay(), 0
        for chunk in range(1, self.chunk + 1):
            with np.load(folder / f"replay_{chunk:04d}.npz", allow_pickle=False) as rows:
                start, end = end, end + len(rows["rewards"])
                for name in REPLAY_ARRAYS:
                    getattr(replay, name)[start:end, 0] = rows[name]
        assert end == meta["steps"], (end, meta)
        replay.pos = end

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
