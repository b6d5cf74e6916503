"""The same bits on any fleet: Ray workers in any number, on nodes that lack the data."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.fleet.pool import LocalPool
from cluster.setup import assemble, config
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.identity import digest
from tests.commands import PATIENCE
from tests.fakes import Newton, Noisy, quadratic_recipe, start
from tests.fleet.runs import FEW, sinusoid, train

ray = pytest.importorskip("ray")
from cluster.fleet.ray_pool import RayPool  # noqa: E402 - only where Ray is installed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("three_cpus")]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_bits_of_one_process(tmp_path: Path, reference: str, workers: int) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    assert digest(train(parts, params, RayPool(parts, workers), tmp_path)) == reference


def test_asynchronous_with_one_batch_in_flight_is_the_synchronous_run(tmp_path: Path, reference: str) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    policy = Asynchronous(buffer=4, in_flight=4)
    assert digest(train(parts, params, RayPool(parts, 3), tmp_path, policy=policy)) == reference


def test_several_rounds_with_operands_give_the_same_bits_on_ray(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Newton(rounds=2), learner=Noisy())
    bits = []
    for name, pool in (("local", LocalPool(recipe)), ("ray", RayPool(recipe, 2))):
        try:
            driver = Driver(recipe, start(), pool, tmp_path / name, iterations=4, meta_batch=8, shard=2, evaluation=FEW)
            bits.append(digest(driver.run()))
        finally:
            pool.close()
    assert bits[0] == bits[1]


def test_a_node_without_the_data_gets_it_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from envs import store
    from envs.images.episodes import Episodes
    from envs.sources.glyphs import Glyphs

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    monkeypatch.setenv("METAFLEET_DATA", str(mine))
    tasks = Episodes(Glyphs(characters=30, drawings=8), queries=2, test_queries=2)
    tasks.prepare()
    run = replace(config.load("glyphs"), task=tasks, execution="loop")
    parts, params = assemble.recipe(run)
    pool = RayPool(parts, 1, variables={"METAFLEET_DATA": str(theirs)})
    try:
        driver = Driver(parts, params, pool, tmp_path / "run", iterations=2, meta_batch=4, shard=2, evaluation=FEW)
        remote = digest(driver.run())
    finally:
        pool.close()
    for file in tasks.files():
        assert (theirs / file).read_bytes() == (store.data_folder() / file).read_bytes()
    local = Driver(
        parts, params, LocalPool(parts), tmp_path / "local", iterations=2, meta_batch=4, shard=2, evaluation=FEW
    )
    assert digest(local.run()) == remote


def test_a_dead_address_is_one_clear_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", "sinusoid", "--address", "127.0.0.1:1", "--dir",
        str(tmp_path / "x")], capture_output=True, text=True, timeout=PATIENCE,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "no Ray cluster answers at address='127.0.0.1:1'" in result.stderr
    assert "Traceback" not in result.stderr
