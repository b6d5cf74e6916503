"""Sums that are formed by the fleet, and contributions of half the bytes: what may change in θ, and what may not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet import wire
from cluster.fleet.messages import Contribution, Event, Lost, RunStopped, Vector
from cluster.fleet.pool import LocalPool
from cluster.fleet.recipe import Recipe
from cluster.record import journal
from cluster.setup import assemble, config
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from cluster.training.policy import Policy
from learners.base import Meta
from learners.models.networks import MLP
from tests.fakes import Newton, ScriptedPool, quadratic_recipe, start

FEW = Evaluation(every=100, validation_tasks=0, tasks=4, steps=1, pictures=0)


class Fetches:
    """How many vectors came here, and how many of the next ones are lost on the way."""

    def __init__(self, lost: int = 0) -> None:
        self.count, self.lost = 0, lost


@dataclass(frozen=True)
class Far:
    """A vector that pretends to be on another machine."""

    vector: Vector
    fetches: Fetches

    def plus(self, other: Far) -> Far:
        return Far(self.vector + other.vector, self.fetches)

    def fetch(self) -> Vector:
        if self.fetches.lost:
            self.fetches.lost -= 1
            raise Lost("node gone")
        self.fetches.count += 1
        return self.vector


def train(
    recipe: Recipe, directory: Path, fetches: Fetches | None = None, policy: Policy | None = None
) -> tuple[Meta, Driver]:
    def far(answer: Contribution) -> list[Event]:
        assert isinstance(answer.vector, np.ndarray)
        return [replace(answer, vector=Far(answer.vector, fetches))] if fetches and answer.vector.size else [answer]

    options = {"policy": policy} if policy else {}
    driver = Driver(
        recipe,
        start(),
        ScriptedPool(recipe, far),
        directory,
        iterations=6,
        meta_batch=10,
        shard=2,
        evaluation=FEW,
        **options,
    )
    return driver.run(), driver


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("outer", [quadratic_recipe().outer, Newton()])
def test_sums_formed_elsewhere_have_the_same_bits_and_one_vector_a_round_travels(
    tmp_path: Path, outer, lost: int
) -> None:
    recipe = quadratic_recipe(outer=outer)
    wanted, _ = train(recipe, tmp_path / "here")
    fetches = Fetches(lost)
    meta, driver = train(recipe, tmp_path / "there", fetches)
    assert digest(meta) == digest(wanted)
    assert fetches.count == 6 * (1 + 3 * isinstance(outer, Newton))
    assert driver.ledger.counts["dropped"] == 5 * lost  # a round of five shards was asked for again each time
    assert not driver.ledger.open
    assert not driver.ledger.held
    drops = [r for r in journal.read(tmp_path / "there" / "journal") if r["kind"] == "drop"]
    assert all("node gone" in r["reason"] for r in drops)


def test_an_asynchronous_run_asks_again_for_what_was_lost(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    _, driver = train(recipe, tmp_path, Fetches(2), Asynchronous(buffer=5, in_flight=5))
    counts = driver.ledger.counts
    assert counts["dropped"] == 2
    assert counts["applied"] == 6 * 5 + 2  # training, and two shards of test tasks


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


@given(st.lists(finite, max_size=50))
def test_bfloat16_keeps_eight_bits(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    back = wire.restored(wire.compressed(vector))
    assert back.dtype == np.float32
    assert np.all(np.abs(back - vector) <= np.abs(vector) * 2.0**-8 + 1e-38)
    assert np.array_equal(wire.restored(wire.compressed(back)), back)


def test_compressed_contributions_are_half_as_long_and_change_the_run_a_little(tmp_path: Path) -> None:
    run = replace(config.load("sinusoid"), execution="vmap", pool="local", compression="bfloat16")
    thetas = {}
    for compression in ("none", "bfloat16"):
        parts, params = assemble.recipe(replace(run, compression=compression))
        driver = Driver(
            parts, params, LocalPool(parts), tmp_path / compression, iterations=5, meta_batch=8, shard=4, evaluation=FEW
        )
        thetas[compression] = driver.run().params
    first = {k: v - params[k] for k, v in thetas["none"].items()}
    distance = sum(float((thetas["none"][k] - v).square().sum()) for k, v in thetas["bfloat16"].items())
    moved = sum(float(v.square().sum()) for v in first.values())
    assert 0 < distance < 1e-3 * moved
    assert wire.compressed(np.zeros(10, np.float32)).nbytes == 20


def test_what_a_run_carries_on_is_not_rounded(tmp_path: Path) -> None:
    run = config.load("sinusoid", {"learner.name": "maml_plus_plus"})
    parts, params = assemble.recipe(replace(run, execution="loop", pool="local", compression="bfloat16"))
    with pytest.raises(ValueError, match="compression='bfloat16' would round what the run carries on"):
        Driver(parts, params, LocalPool(parts), tmp_path, iterations=5, meta_batch=8, shard=4)


@pytest.mark.ray
def test_a_ray_fleet_that_adds_by_itself_gives_the_drivers_bits(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from cluster.fleet.ray_pool import RayPool

    # 233 KB: no longer part of the answer
    run = replace(config.load("sinusoid"), execution="vmap", model=MLP(hidden=(240, 240)))
    parts, params = assemble.recipe(run)
    thetas = []
    for name in ("here", "there"):
        pool = RayPool(parts, 2, sums="fleet") if name == "there" else LocalPool(parts)
        driver = Driver(parts, params, pool, tmp_path / name, iterations=4, meta_batch=20, shard=4, evaluation=FEW)
        thetas.append(digest(driver.run()))
        pool.close()
    assert thetas[0] == thetas[1]
    assert torch.tensor([v.numel() for v in params.values()]).sum() > 51_200


def test_sums_that_are_lost_again_and_again_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="5 sums in a row were lost where they were made; the last time: node gone"):
        train(quadratic_recipe(), tmp_path, Fetches(100))


class EveryThird(Fetches):
    """Loses every third vector."""

    @property
    def lost(self) -> int:
        self.asked += 1
        return int(self.asked % 3 == 0)

    @lost.setter
    def lost(self, value: int) -> None:
        self.asked = getattr(self, "asked", 0)


@pytest.mark.parametrize("policy", [None, Asynchronous(buffer=5, in_flight=5)])
def test_losses_with_successes_in_between_are_not_in_a_row(tmp_path: Path, policy: Policy | None) -> None:
    fetches = EveryThird()
    _, driver = train(quadratic_recipe(), tmp_path, fetches, policy)
    assert driver.iteration == 6
    assert fetches.asked // 3 == driver.ledger.counts["dropped"] // (1 if policy else 5)
    if policy:
        assert driver.ledger.counts["dropped"] > 5
