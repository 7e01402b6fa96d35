"""Replay episodes and save frames: `python -m focal.evaluation.render JOB.json FOLDER`, with MUJOCO_GL set.

Frame 7 of episode 0 becomes FOLDER/000_0007.jpg. Replaying the seed and the actions gives the very same episode, so
nothing else need be handed over.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
from PIL import Image

from ..envs import families as _families  # noqa: F401 (registers the environments)


def main(job: Path, folder: Path) -> None:
    """Render every episode of the job file."""
    wanted = json.loads(job.read_text())
    for number, episode in enumerate(wanted["episodes"]):
        _render(wanted, episode, folder, number)


def _render(job: dict[str, Any], episode: dict[str, Any], folder: Path, number: int) -> None:
    env = gymnasium.make(
        job["env_id"], task=episode["task"], render_mode="rgb_array", width=job["width"], height=job["height"],
        disable_env_checker=True,
    ).unwrapped  # fmt: skip
    camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # type: ignore[attr-defined]
    env.mujoco_renderer.camera_id = camera if camera >= 0 else None  # type: ignore[attr-defined]
    env.reset(seed=episode["seed"])
    for step, action in enumerate(episode["actions"]):
        if step % job["every"] == 0:
            frame: Any = env.render()
            Image.fromarray(frame).save(folder / f"{number:03d}_{step:04d}.jpg", quality=70)
        env.step(action)
    env.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
