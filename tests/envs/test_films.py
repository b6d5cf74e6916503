"""Films: frames of a robot off screen, a strip, animations, and one clear sentence where there is no OpenGL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mujoco")
from cluster.results import pictures
from cluster.results.monitor import Monitor
from cluster.setup import assemble, config
from envs.control import rendering
from envs.control.bodies import BODIES, load
from learners.base import Meta


def drawn(body: str, positions: np.ndarray) -> np.ndarray:
    try:
        return rendering.frames(load(BODIES[body]), positions, 3.0)
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_frame_shows_where_the_joints_are() -> None:
    model = load(BODIES["half_cheetah_v5"])
    still, bent, away = model.qpos0.copy(), model.qpos0.copy(), model.qpos0.copy()
    bent[3:] = 0.5
    away[0] = 2.0
    a, b, c, again = drawn("half_cheetah_v5", np.stack([still, bent, away, still]))
    assert a.shape == (rendering.HEIGHT, rendering.WIDTH, 3)
    np.testing.assert_array_equal(a, again)
    assert (a != b).any(-1).mean() > 0.01
    assert (a != c).any(-1).mean() > 0.01  # the camera follows, the floor moves


def test_without_opengl_one_sentence_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "abacus")
    with pytest.raises(RuntimeError, match="rendering failed with MUJOCO_GL='abacus'"):
        rendering.frames(load(BODIES["half_cheetah_v5"]), np.zeros((1, 9)), 3.0)


def test_a_film_strip_and_an_animation_per_task(tmp_path: Path) -> None:
    drawn("half_cheetah_v5", np.zeros((1, 9)))
    run = config.load("half-cheetah-direction")
    run = replace(run, task=replace(run.task, horizon=12, rollouts=2, test_steps=24), execution="loop", pool="local")
    parts, params = assemble.recipe(run)
    shown = pictures.shown(parts, Meta(params, {}), 2)
    assert shown is not None
    strip, first, second = pictures.film(run.task, shown, tmp_path / "film.png")
    with Image.open(strip) as image:
        assert image.width > image.height
    with Image.open(first) as animation:
        # steps 0, 1 and 3 side by side
        assert (animation.n_frames, animation.size) == (2, (3 * rendering.WIDTH, rendering.HEIGHT))
    assert second.exists()
    (tmp_path / "run").mkdir()
    monitor = Monitor(tmp_path / "run", 0, 1)
    monitor.picture(1, "test/film-0", first)
    monitor.close()
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert first.read_bytes() in events.read_bytes()


def test_navigation_draws_paths_to_the_goal(tmp_path: Path) -> None:
    from envs.control.navigation import Navigation

    goals = [{"goal": np.array([0.4, -0.3])}, {"goal": np.array([-0.2, 0.1])}]
    predict = [lambda x, g=task["goal"]: [0 * x, 10 * (g - x)] for task in goals]
    figure = Navigation(horizon=20).picture(goals, predict, [0, 1])
    for axes, task in zip(figure.axes, goals, strict=True):
        still, moving, cross = (np.stack(line.get_data(), 1) for line in axes.lines)
        assert not still.any()
        np.testing.assert_allclose(moving[-1], task["goal"], atol=1e-6)
        np.testing.assert_allclose(cross[0], task["goal"])
        assert np.abs(np.diff(moving, axis=0)).max() <= 0.1 + 1e-6
