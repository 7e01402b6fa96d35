"""The MuJoCo families on Gymnasium's own models: Half-Cheetah (velocity, direction), Ant (direction), Walker2D.

Rewards, observations and health rules are written for arrays with any leading batch axes, so that one environment
and a batch of hundreds (`batch.py`) run the very same expressions and give the same bits.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box

from .tasks import WALKER_FACTORS, TaskParameters


def _warn(message: str) -> None:
    """Log MuJoCo's warnings; its own handler appends to MUJOCO_LOG.TXT in whatever folder the user is in."""
    expected = "settotalmass" in message  # Gymnasium's half_cheetah.xml, at every loading
    logging.getLogger("focal.mujoco").log(logging.DEBUG if expected else logging.WARNING, message)


mujoco.set_mju_user_warning(_warn)


@dataclass(frozen=True)
class State:
    """What rewards and observations read from the simulator; any leading axes. Metres, radians, seconds, newtons."""

    qpos: np.ndarray  # (..., nq)
    qvel: np.ndarray  # (..., nv)
    torso: np.ndarray  # (..., 3) world position of the torso as MuJoCo leaves it after a step
    contact_forces: np.ndarray | None = None  # (..., nbody, 6), only for families that read them

    def at(self, rows: np.ndarray) -> "State":
        """Return copies of some rows of the first axis."""
        forces = None if self.contact_forces is None else self.contact_forces[rows]
        return State(self.qpos[rows], self.qvel[rows], self.torso[rows], forces)


def finite(values: np.ndarray) -> np.ndarray:
    """Return `values` with 0 where they are not finite, which a diverged simulation's last step may be."""
    good = np.isfinite(values)
    return values if good.all() else np.where(good, values, np.zeros_like(values))


class LocomotionEnv(MujocoEnv):
    """Base of the MuJoCo families: actions Box(-1, 1), float32 observations, `terminated` or `truncated`, never both.

    Episodes are truncated after 200 steps. `info["x_velocity"]` is the torso's speed along x in m/s.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 20,
    }
    horizon = 200
    model_file: ClassVar[str]
    frames: ClassVar[int] = 5  # simulator steps per environment step
    obs_dim: ClassVar[int]
    default_task: ClassVar[TaskParameters]
    needs_contact_forces: ClassVar[bool] = False

    def __init__(self, task: TaskParameters | None = None, **render: Any):
        self.task = dict(self.default_task if task is None else task)
        self._steps = 0
        space = Box(-np.inf, np.inf, (self.obs_dim,), np.float32)
        super().__init__(self.model_file, self.frames, space, **render)
        self.torso_id = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "torso")

    @staticmethod
    def observe(state: State) -> np.ndarray:
        """Return the observation (..., obs_dim) as float32."""
        raise NotImplementedError

    @staticmethod
    def reward(task: TaskParameters, velocity: np.ndarray, action: np.ndarray, after: State) -> np.ndarray:
        """Return the dense reward (...,) from x velocity (m/s), action (..., act_dim) and the state after the step.

        `task` may hold arrays with the same leading axes.
        """
        raise NotImplementedError

    @staticmethod
    def healthy(state: State) -> np.ndarray:
        """Return False (...,) where the episode terminates: here, only where the simulation diverged."""
        return np.isfinite(state.qpos).all(axis=-1) & np.isfinite(state.qvel).all(axis=-1)

    @staticmethod
    def x_position(state: State) -> np.ndarray:
        """Position (...,) whose change per step is the x velocity."""
        return state.qpos[..., 0]

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, data = super()._initialize_simulation()
        # MuJoCo would answer a diverged simulation by silently putting the robot back at its start
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        return model, data

    def draw_start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw qpos and qvel of an episode's start: uniform +-0.1 and normal 0.1, as Gymnasium's v5 environments."""
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, self.model.nq)
        return qpos, self.init_qvel + 0.1 * rng.standard_normal(self.model.nv)

    def read_state(self, data: Any) -> State:
        """Copy the quantities of `State` out of an `MjData`."""
        forces = data.cfrc_ext.copy() if self.needs_contact_forces else None
        return State(data.qpos.copy(), data.qvel.copy(), data.xpos[self.torso_id].copy(), forces)

    def reset_model(self) -> np.ndarray:
        """Called by Gymnasium's `reset` after the simulator was cleared and the generator seeded."""
        self.set_state(*self.draw_start(self.np_random))
        self._steps = 0
        return self.observe(self.read_state(self.data))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        """Advance `frames` simulator steps."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        before = self.x_position(self.read_state(self.data))
        self.do_simulation(action, self.frame_skip)
        after = self.read_state(self.data)
        velocity = finite((self.x_position(after) - before) / self.dt)
        self._steps += 1
        terminated = not bool(self.healthy(after))
        reward = float(finite(self.reward(self.task, velocity, action, after)))
        if self.render_mode == "human":
            self.render()
        truncated = self._steps >= self.horizon and not terminated
        return finite(self.observe(after)), reward, terminated, truncated, {"x_velocity": float(velocity)}


class HalfCheetahEnv(LocomotionEnv):
    """Half-Cheetah body. Observation (20,): qpos without x (8), qvel (9), torso position (3, absolute x included)."""

    model_file = "half_cheetah.xml"
    obs_dim = 20

    @staticmethod
    def observe(state: State) -> np.ndarray:
        """Return (..., 20) float32."""
        return np.concatenate([state.qpos[..., 1:], state.qvel, state.torso], axis=-1).astype(np.float32)


class HalfCheetahVelEnv(HalfCheetahEnv):
    """Run at a target velocity in [0, 3] m/s: reward -|v - v*| - 0.05 |a|^2. Control cost 0.05, not v5's 0.1."""

    default_task = {"target_velocity": 1.5}  # noqa: RUF012

    @staticmethod
    def reward(task: TaskParameters, velocity: np.ndarray, action: np.ndarray, after: State) -> np.ndarray:
        """Return -|v - v*| - 0.05 |a|^2."""
        return -np.abs(velocity - task["target_velocity"]) - 0.05 * np.square(action).sum(axis=-1)


class HalfCheetahFwdBackEnv(HalfCheetahEnv):
    """Run forward (direction 1) or backward (-1): reward d v - 0.05 |a|^2."""

    default_task = {"direction": 1.0}  # noqa: RUF012

    @staticmethod
    def reward(task: TaskParameters, velocity: np.ndarray, action: np.ndarray, after: State) -> np.ndarray:
        """Return d v - 0.05 |a|^2."""
        return task["direction"] * velocity - 0.05 * np.square(action).sum(axis=-1)


class AntFwdBackEnv(LocomotionEnv):
    """Ant along +x (direction 1) or -x (-1). Observation (27,): qpos without x, y (13), qvel (14).

    Reward d v - 0.5 |a|^2 - 0.0005 sum(clip(contact forces, -1, 1)^2) + 1; terminates when the torso's height leaves
    [0.2, 1.0] m or a state is not finite. The contact term is computed as Gymnasium does; in the released code
    (mujoco-py 2) the forces were never filled and the term was about 0.
    """

    model_file = "ant.xml"
    obs_dim = 27
    default_task = {"direction": 1.0}  # noqa: RUF012
    needs_contact_forces = True

    @staticmethod
    def observe(state: State) -> np.ndarray:
        """Return (..., 27) float32."""
        return np.concatenate([state.qpos[..., 2:], state.qvel], axis=-1).astype(np.float32)

    @staticmethod
    def reward(task: TaskParameters, velocity: np.ndarray, action: np.ndarray, after: State) -> np.ndarray:
        """Return d v - 0.5 |a|^2 - contact cost + 1."""
        assert after.contact_forces is not None
        contact = 0.5e-3 * np.square(np.clip(after.contact_forces, -1.0, 1.0)).sum(axis=(-2, -1))
        return task["direction"] * velocity - 0.5 * np.square(action).sum(axis=-1) - contact + 1.0

    @staticmethod
    def healthy(state: State) -> np.ndarray:
        """Return whether everything is finite and 0.2 <= z <= 1.0."""
        return LocomotionEnv.healthy(state) & (state.qpos[..., 2] >= 0.2) & (state.qpos[..., 2] <= 1.0)

    @staticmethod
    def x_position(state: State) -> np.ndarray:
        """Position of the torso body, as in Gymnasium's Ant."""
        return state.torso[..., 0]


class Walker2DParamsEnv(LocomotionEnv):
    """Walker2D whose masses, inertias, joint dampings and frictions are multiplied element by element.

    The task holds the factors: body_mass (8), body_inertia (8, 3), dof_damping (9), geom_friction (8, 3).
    Gymnasium's `walker2d.xml` (frictions 0.9 and 1.9 like the original) at timestep 0.004 and 4 frames a step: 0.016 s
    a step, 200 steps. Observation (17,): qpos without x (8), qvel clipped to +-10 (9). Reward v + 1 - 0.001 |a|^2;
    terminates unless 0.8 < height < 2.0 and |angle| < 1. Unlike the released code, constants derived from masses
    (inverse weights, mean inertia) are recomputed after scaling, so that the contact solver sees the true body.
    """

    metadata: ClassVar[dict[str, Any]] = LocomotionEnv.metadata | {"render_fps": 62}  # type: ignore[misc]
    model_file = "walker2d.xml"
    frames = 4
    obs_dim = 17
    default_task = {name: np.ones(shape).tolist() for name, (_, shape) in WALKER_FACTORS.items()}  # noqa: RUF012

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, _ = super()._initialize_simulation()
        model.opt.timestep = 0.004
        for name in WALKER_FACTORS:
            getattr(model, name)[:] *= np.asarray(self.task[name], np.float64)
        refresh_derived_constants(model)
        return model, mujoco.MjData(model)

    def draw_start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw qpos and qvel uniform within 0.005 of the initial state."""
        qpos = self.init_qpos + rng.uniform(-0.005, 0.005, self.model.nq)
        return qpos, self.init_qvel + rng.uniform(-0.005, 0.005, self.model.nv)

    @staticmethod
    def observe(state: State) -> np.ndarray:
        """Return (..., 17) float32."""
        velocities = np.clip(state.qvel, -10.0, 10.0)
        return np.concatenate([state.qpos[..., 1:], velocities], axis=-1).astype(np.float32)

    @staticmethod
    def reward(task: TaskParameters, velocity: np.ndarray, action: np.ndarray, after: State) -> np.ndarray:
        """Return v + 1 - 0.001 |a|^2."""
        return velocity + 1.0 - 1e-3 * np.square(action).sum(axis=-1)

    @staticmethod
    def healthy(state: State) -> np.ndarray:
        """Return whether 0.8 < height < 2.0 and |torso angle| < 1 (rad)."""
        height, angle = state.qpos[..., 1], state.qpos[..., 2]
        return LocomotionEnv.healthy(state) & (height > 0.8) & (height < 2.0) & (np.abs(angle) < 1.0)


def refresh_derived_constants(model: Any) -> None:
    """Recompute what MuJoCo's compiler derives from masses and inertias, after they were changed in place.

    `mj_setConst` leaves its data at qpos_spring, so it works on a scratch one; it does not touch
    `stat.meaninertia`, the mean diagonal of the mass matrix that scales the solver's tolerances.
    """
    scratch = mujoco.MjData(model)
    mujoco.mj_setConst(model, scratch)
    mujoco.mj_resetData(model, scratch)
    mujoco.mj_forward(model, scratch)
    mass_matrix = np.zeros((model.nv, model.nv))
    for column in range(model.nv):
        unit = np.zeros(model.nv)
        unit[column] = 1.0
        mujoco.mj_mulM(model, scratch, mass_matrix[column], unit)
    model.stat.meaninertia = float(np.trace(mass_matrix) / model.nv)
