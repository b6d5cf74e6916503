"""Our environments as Gymnasium ids, and Gymnasium ids as tasks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
from gymnasium.utils.env_checker import check_env  # noqa: E402

from cluster.fleet.pool import LocalPool  # noqa: E402
from cluster.setup import assemble, config  # noqa: E402
from cluster.training.driver import Driver  # noqa: E402
from cluster.training.evaluation import Evaluation  # noqa: E402
from envs.control.gymnasium_tasks import GymnasiumTasks  # noqa: E402
from envs.registration import ids  # noqa: E402
from learners.outer.descent import Descent  # noqa: E402


@pytest.mark.parametrize("name", ids())
def test_single_environments_pass_gymnasiums_checks(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in (
            ".*maximum value.*",
            ".*minimum value.*",
            ".*normalized.*",
            ".*symmetric.*",
            ".*settotalmass.*",
        ):
            warnings.filterwarnings("ignore", harmless)
        check_env(gymnasium.make(name).unwrapped)


@pytest.mark.parametrize("name", ids())
def test_the_vector_environment_steps_as_single_ones_do(name: str) -> None:
    vector = gymnasium.make_vec(name, num_envs=3)
    assert type(vector.unwrapped).__name__ == "TaskVectorEnv"
    tasks = vector.unwrapped.sample_tasks(3, np.random.default_rng(5))
    vector.unwrapped.set_tasks(tasks)
    singles = [gymnasium.make(name) for _ in range(3)]
    first, _ = vector.reset(seed=11)
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(first[i], single.reset(seed=11 + i, options={"task": tasks[i]})[0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-0.1, 0.1, vector.action_space.shape).astype(np.float32)
        observations, rewards, ended, truncated, _ = vector.step(action)
        for i, single in enumerate(singles):
            wanted = single.step(action[i])
            np.testing.assert_array_equal(observations[i], wanted[0])
            assert (rewards[i], ended[i], truncated[i]) == wanted[1:4]
    again, _ = vector.reset()  # without a seed the generators go on
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(again[i], single.reset()[0])
    shared, _ = vector.reset(seed=3, options={"task": tasks[1]})
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(shared[i], single.reset(seed=3 + i, options={"task": tasks[1]})[0])
    action = np.full(vector.action_space.shape, 0.05, np.float32)
    np.testing.assert_array_equal(vector.step(action)[1], [single.step(action[0])[1] for single in singles])
    with pytest.raises(ValueError, match="2 tasks for 3 environments"):
        vector.unwrapped.set_tasks(tasks[:2])


@dataclass(frozen=True)
class Pendulums(GymnasiumTasks):
    id: str = "Pendulum-v1"

    def sample(self, split: str, rng: np.random.Generator) -> dict[str, Any]:
        return {"mass": np.asarray(rng.uniform(0.5, 1.5))}

    def set_task(self, environment: Any, task: dict[str, Any]) -> None:
        environment.unwrapped.m = float(task["mass"])


def test_any_gymnasium_id_with_something_to_set_becomes_a_family_of_tasks(tmp_path: Path) -> None:
    family = Pendulums(rollouts=2, horizon=10, test_steps=20)
    run = replace(config.load("navigation"), task=family, outer=Descent(), execution="loop", meta_batch=2, shard=1)
    parts, params = assemble.recipe(run)
    pool = LocalPool(parts)
    driver = Driver(parts, params, pool, tmp_path, iterations=2, meta_batch=2, shard=1,
                    evaluation=Evaluation(validation_tasks=0, tasks=2, steps=1, pictures=0))  # fmt: skip
    meta = driver.run()
    assert any(not torch.equal(meta.params[k], v) for k, v in params.items())


def test_an_environment_without_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="CartPole-v1 has actions Discrete\\(2\\): a Box wanted"):
        Pendulums(id="CartPole-v1").prepare()
