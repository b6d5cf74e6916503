"""The fleet grows when nodes join and shrinks when they are killed; θ stays the same to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet.pool import LocalPool
from cluster.record import journal
from cluster.setup import assemble, config
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from tests.commands import PATIENCE

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from cluster.fleet.ray_pool import RayPool  # noqa: E402

pytestmark = pytest.mark.ray
FEW = Evaluation(validation_tasks=0, tasks=8, steps=1, pictures=0)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node with room for one worker."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=found.address, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def test_nodes_come_and_go_and_no_bit_changes(tmp_path: Path, cluster: Any) -> None:
    run = replace(config.load("sinusoid"), iterations=10**6, meta_batch=16, shard=4, execution="vmap")
    parts, params = assemble.recipe(run)
    nodes: list[Any] = []
    history: list[tuple[int, int]] = []  # (iteration, workers) at which something was done
    holder: list[Driver] = []

    def look() -> bool:
        driver = holder[0]
        workers, now = len(driver.roster.workers), driver.iteration
        if len(history) == 0 and workers == 1 and now >= 3:
            nodes.append(cluster.add_node(num_cpus=2))
            history.append((now, workers))
        elif len(history) == 1 and workers == 3 and now >= history[0][0] + 3:
            cluster.remove_node(nodes[0], allow_graceful=False)  # the raylet is killed, and its workers with it
            history.append((now, workers))
        elif len(history) == 2 and workers == 1 and now >= history[1][0] + 3:
            history.append((now, workers))
            driver.iterations = now + 3
        return False

    def driver_of(pool: Any, folder: str, iterations: int) -> Driver:
        return Driver(
            parts,
            params,
            pool,
            tmp_path / folder,
            iterations=iterations,
            meta_batch=16,
            shard=4,
            evaluation=FEW,
            interrupted=look,
        )

    pool = RayPool(parts, 3)
    holder.append(driver_of(pool, "elastic", 10**6))
    meta = holder[0].run()
    pool.close()
    assert [workers for _, workers in history] == [1, 3, 1]
    kinds = [r["event"]["kind"] for r in journal.read(tmp_path / "elastic" / "journal") if r["kind"] == "fleet"]
    assert kinds.count("joined") >= 3
    assert kinds.count("lost") >= 2
    iterations, history[:] = holder[0].iteration, [(0, 0)] * 3
    holder[0] = driver_of(LocalPool(parts), "calm", iterations)
    assert digest(holder[0].run()) == digest(meta)


def test_with_fewer_workers_than_the_least_no_work_is_given_out(cluster: Any) -> None:
    parts, _ = assemble.recipe(replace(config.load("sinusoid"), execution="vmap"))
    pool = RayPool(parts, 2, least=2)
    for _ in range(50):
        pool.poll(0.1)
        assert pool.free() == 0  # the head has room for one
    cluster.add_node(num_cpus=1)
    begin = time.monotonic()
    while not pool.free() and time.monotonic() < begin + PATIENCE:
        pool.poll(0.1)
    assert pool.free() == 4
    pool.close()
