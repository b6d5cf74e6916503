"""Frames of a MuJoCo body, off screen, in a process of its own: what OpenGL does there harms nobody.

`python -m envs.control.rendering MODEL POSITIONS FRAMES DISTANCE` reads positions [n, nq] (float64) and writes frames
[n, height, width, 3] (bytes).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from envs.base import Frames

HEIGHT, WIDTH = 100, 160
SECONDS = 300.0  # for all frames; software rendering takes some milliseconds each


def frames(model: Any, positions: np.ndarray[Any, Any], distance: float) -> Frames:
    """Render `positions` [n, nq] from `distance` metres beside the first body.

    Raises RuntimeError, saying what is missing, where this machine has no OpenGL.
    """
    import mujoco

    screen = "DISPLAY" in os.environ or sys.platform != "linux"
    environment = os.environ if screen else {"MUJOCO_GL": "egl", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        where, seen, drawn = (str(Path(folder) / name) for name in ("model.mjb", "positions", "frames"))
        mujoco.mj_saveModel(model, where)
        positions.astype(np.float64).tofile(seen)
        command = [sys.executable, "-m", "envs.control.rendering", where, seen, drawn, str(distance)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"rendering {len(positions)} frames took more than {SECONDS:.0f} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(
                f"rendering failed with MUJOCO_GL={environment.get('MUJOCO_GL', '')!r} ({reason}); "
                "without a screen it wants OpenGL by libEGL (MUJOCO_GL=egl) or libOSMesa (MUJOCO_GL=osmesa)"
            )
        return np.fromfile(drawn, np.uint8).reshape(len(positions), HEIGHT, WIDTH, 3)


def main(where: str, seen: str, drawn: str, distance: str) -> None:
    """The other process."""
    import mujoco

    camera = mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.azimuth, camera.elevation = float(distance), 90, -12

    model = mujoco.MjModel.from_binary_path(where)
    data, positions = mujoco.MjData(model), np.fromfile(seen).reshape(-1, model.nq)
    with mujoco.Renderer(model, HEIGHT, WIDTH) as renderer:
        pictures = []
        for qpos in positions:
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            pictures.append(renderer.render().copy())
    np.stack(pictures).tofile(drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
