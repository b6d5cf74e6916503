"""A run that meets what is no number says where it stood first: in θ, the data, a loss, a gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.fleet.messages import RunStopped
from cluster.fleet.pool import LocalPool, Pool
from cluster.fleet.recipe import Recipe
from cluster.record import journal
from cluster.setup import assemble, config
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from envs.base import Arrays
from envs.control import navigation
from envs.control.navigation import PointWorld
from learners.algorithms.maml import MAML
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.outer.descent import Descent

QUIET = Evaluation(validation_tasks=0, tasks=2, steps=1, pictures=0)


class Lines:
    """y = x, but for what is spoiled in every fourth task."""

    def __init__(self, key: str = "", value: float = 0.0) -> None:
        self.key, self.value = key, value

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        x = rng.uniform(1, 2, (5, 1))
        task: Arrays = {"support_x": x, "support_y": x, "query_x": x, "query_y": x, "number": rng.integers(4)}
        if self.key and split == "train":
            task[self.key] = task[self.key].copy()
            task[self.key][3] = self.value
        return task


class Root(nn.Module):
    """√(w − 1 + x − x): its derivative at w = 1 is infinite, its value 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(self.w - 1 + 0 * x)


def run(tasks: Lines, directory: Path, model: nn.Module | None = None, loss: Any = "mse", steps: int = 1,
        pool: type[Pool] | Any = LocalPool, **options: Any) -> None:  # fmt: skip
    torch.manual_seed(0)
    recipe = Recipe(tasks, MAML(0.1, steps), Supervised(functional(model or nn.Linear(1, 1)), loss), Descent())
    fleet = pool(recipe)
    try:
        Driver(recipe, recipe.objective.model.params(), fleet, directory, iterations=2, meta_batch=4, shard=2,
               evaluation=QUIET, **options).run()  # fmt: skip
    finally:
        fleet.close()


@pytest.mark.parametrize("key", ["support_x", "query_x", "query_y"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_are_named_by_key_task_and_place(tmp_path: Path, key: str, value: float) -> None:
    words = rf"the first is in the data, {key} of task 0 at \[3, 0\]: tasks whose arrays hold numbers wanted"
    with pytest.raises(RunStopped, match=words):
        run(Lines(key, value), tmp_path)
    reasons = [r["reason"] for r in journal.read(tmp_path / "journal") if r["kind"] == "reject"]
    assert reasons[0] == f"not finite, twice: data, {key} of task 0 at [3, 0]"


def test_an_asynchronous_run_says_it_too(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"the first is in the data, query_x of task \d+ at \[3, 0\]"):
        run(Lines("query_x", np.nan), tmp_path, policy=Asynchronous())


def test_a_loss_that_is_no_number_on_data_that_are(tmp_path: Path) -> None:
    def broken(output: Tensor, target: Tensor) -> Tensor:
        return (output * torch.log(target - target)).mean()

    with pytest.raises(RunStopped, match="loss, query_loss of task 0, whose data are finite: the run diverges"):
        run(Lines(), tmp_path, loss=broken)


def test_a_gradient_that_is_no_number_where_the_loss_is(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="gradient, w, while data and losses are finite"):
        run(Lines(), tmp_path, Root(), steps=0)


def test_theta_itself(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, torch.nan)
    with pytest.raises(RunStopped, match="θ, params/weight"):
        run(Lines(), tmp_path, net)


class Spoiled:
    """A world whose third observation, reward or action is no number."""

    def __init__(self, world: Any, what: str) -> None:
        self.world, self.what = world, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def step(self, actions: Any, alive: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        observations, rewards, over = self.world.step(actions, alive)
        third = self.steps == 3
        if third and self.what == "rewards":
            rewards = rewards * np.nan
        return observations * np.nan if third and self.what == "observations" else observations, rewards, over


@pytest.mark.parametrize("what", ["observations", "rewards"])
def test_an_environment_that_gives_no_numbers_is_named_by_what_it_gives(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(navigation, "PointWorld", lambda *a: Spoiled(PointWorld(*a), what))
    run = config.load("navigation")
    task = replace(run.task, rollouts=2, horizon=6, test_steps=12)
    parts, params = assemble.recipe(replace(run, task=task, execution="loop"))
    words = rf"the first is in the data, {what} of task 0 at \[0, \d+(, 0)?\]: tasks whose arrays hold numbers"
    with pytest.raises(RunStopped, match=words):
        Driver(parts, params, LocalPool(parts), tmp_path, iterations=1, meta_batch=2, shard=1, evaluation=QUIET).run()
