"""Workers that are killed, frozen, sick or wrong, or whose code is at fault, cost time and no bit."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fleet.deadlines import Deadlines
from cluster.fleet.messages import RunStopped
from cluster.fleet.pool import LocalPool
from cluster.record.checkpoint import Checkpoints
from cluster.setup import assemble
from cluster.training.driver import Driver
from cluster.training.identity import digest
from learners.outer.descent import Descent
from tests.fakes import Noisy, quadratic_recipe, start
from tests.fleet.runs import FEW, gone, joined, sinusoid, striking, train, train_control
from tests.training.test_not_finite import Lines
from tests.training.test_not_finite import run as run_of

ray = pytest.importorskip("ray")
from cluster.fleet.ray_pool import RayPool, _Actor  # noqa: E402 - only where Ray is installed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("three_cpus")]


def test_killing_workers_twice_changes_nothing(tmp_path: Path, reference: str) -> None:
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        alive = [p for p in joined(tmp_path) if p not in killed]
        if len(killed) < 2 and driver.iteration >= 5 + 10 * len(killed) and alive:
            killed.append(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    assert digest(train(parts, params, RayPool(parts, 2), tmp_path, kill)) == reference
    assert len(killed) == 2
    assert len(joined(tmp_path)) >= 3


class Sick(_Actor):
    """Cannot start where the third worker does."""

    def hello(self):
        if self._name == "worker-3":
            raise OSError(28, "No space left on device")
        return super().hello()


class SickPool(RayPool):
    actor = Sick


def test_a_newcomer_that_cannot_start_costs_the_run_nothing(
    tmp_path: Path, reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    _, kill = striking(tmp_path, signal.SIGKILL)
    assert digest(train(parts, params, SickPool(parts, 2, least=2), tmp_path, kill)) == reference
    assert "could not start" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_frozen_worker_is_replaced_after_its_deadline(tmp_path: Path, reference: str) -> None:
    frozen, freeze = striking(tmp_path, signal.SIGSTOP)
    parts, params = assemble.recipe(sinusoid(tmp_path))
    limits = Deadlines(floor=1.0, factor=5.0, first=30.0)
    began = time.monotonic()
    assert digest(train(parts, params, RayPool(parts, 2, limits=limits), tmp_path, freeze)) == reference
    assert frozen
    assert time.monotonic() - began < 40
    assert Checkpoints(tmp_path / "checkpoints").newest().counts["retried"] >= 1
    assert gone(frozen[0], 15), "the frozen process is still there"


def test_a_worker_lost_inside_conjugate_gradient_costs_its_episodes_and_no_bit(tmp_path: Path) -> None:
    wanted = train_control(LocalPool, tmp_path / "local")
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        solving = any(a.verb == "curvature" for a in driver.ledger.open.values())
        if not killed and driver.iteration >= 1 and solving:
            killed.append(joined(tmp_path / "killed")[0])
            os.kill(killed[0], signal.SIGKILL)

    assert train_control(lambda parts: RayPool(parts, 1), tmp_path / "one") == wanted
    assert train_control(lambda parts: RayPool(parts, 3), tmp_path / "killed", kill) == wanted
    assert killed


@dataclass(frozen=True)
class Picky(Noisy):
    """Raises in the first process that a file names: one broken worker among good ones."""

    marker: str = ""

    def gradient(self, meta, objective, data):
        try:
            with open(self.marker, "x") as f:
                f.write(str(os.getpid()))
        except FileExistsError:
            pass
        if Path(self.marker).read_text() == str(os.getpid()):
            raise OSError("a broken disk")
        return super().gradient(meta, objective, data)


def test_a_shard_that_fails_on_one_worker_is_given_to_another(tmp_path: Path) -> None:
    bits = []
    for learner, local in ((Picky(marker=str(tmp_path / "marker")), False), (Noisy(), True)):
        recipe = quadratic_recipe(learner=learner)
        pool = LocalPool(recipe) if local else RayPool(recipe, 2)
        try:
            driver = Driver(
                recipe, start(), pool, tmp_path / str(local), iterations=3, meta_batch=8, shard=2, evaluation=FEW
            )
            bits.append(digest(driver.run()))
        finally:
            pool.close()
    assert bits[0] == bits[1]


def test_a_worker_whose_code_raises_says_what(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(), learner=Noisy())
    pool = RayPool(recipe, 1)
    try:
        driver = Driver(
            recipe, {"wrong": torch.zeros(3)}, pool, tmp_path, iterations=1, meta_batch=2, shard=2, evaluation=FEW
        )
        with pytest.raises(RuntimeError, match=r"failed 5 times.*KeyError: 'theta'"):
            driver.run()
    finally:
        pool.close()


def test_a_worker_says_what_was_no_number(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"data, support_x of task \d+ at \[3, 0\]"):
        run_of(Lines("support_x", np.nan), tmp_path, pool=lambda recipe: RayPool(recipe, 2))
