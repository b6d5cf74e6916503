"""Runs that lose everyone, or their driver: how they end, and how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.fleet.deadlines import Deadlines
from cluster.operations.replay import replay, steps
from cluster.record.checkpoint import Checkpoints
from cluster.setup import assemble
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.identity import digest
from cluster.training.ledger import ENDS
from tests.commands import PATIENCE
from tests.fleet.runs import gone, joined, sinusoid, train

ray = pytest.importorskip("ray")
from cluster.fleet.ray_pool import RayPool  # noqa: E402 - only where Ray is installed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("three_cpus")]


def test_an_asynchronous_run_with_a_worker_killed_is_balanced_and_replays_to_the_same_bits(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        if not killed and driver.iteration >= 8 and len(joined(tmp_path)) == 3:
            killed.append(joined(tmp_path)[1])
            os.kill(killed[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    policy = Asynchronous(buffer=2, compensation=0.05)
    meta = train(parts, params, RayPool(parts, 3), tmp_path, kill, policy=policy)
    assert killed
    found = steps(tmp_path / "journal")
    assert any(s for step in found for s in step.staleness)
    *_, (version, again) = replay(parts, params, policy, found)
    assert version == 30
    assert digest(again) == digest(meta)
    counts = Checkpoints(tmp_path / "checkpoints").newest().counts
    assert counts["dispatched"] == sum(counts[k] for k in ENDS)
    assert counts["retried"] >= 1
    shards = [first for step in found for _, first, _ in step.shards]
    assert len(shards) == len(set(shards)) == 60


def test_a_killed_driver_resumes_on_another_number_of_workers(tmp_path: Path) -> None:
    few = "--iterations 120 --meta-batch 16 --shard 4 --evaluation.pictures 0 "
    few += "--evaluation.tasks 8 --evaluation.validation-tasks 8"
    whole = [sys.executable, "-m", "cluster.cli", "train", "sinusoid", *few.split(), "--checkpoint.seconds", "0"]
    subprocess.run(
        [*whole, "--pool", "local", "--dir", str(tmp_path / "whole")], check=True, capture_output=True, timeout=PATIENCE
    )
    directory = tmp_path / "killed"
    with subprocess.Popen(
        [*whole, "--workers", "1", "--dir", str(directory)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as driver:
        waited = 0.0
        while not list((directory / "checkpoints").glob("00000000[2-9]*.ckpt")) and waited < 60:
            time.sleep(0.02)
            waited += 0.02
            assert driver.poll() is None, "the driver ended before it could be killed"
        workers = joined(directory)
        driver.send_signal(signal.SIGKILL)
    assert all(gone(pid, 20) for pid in workers), "workers outlived their driver"
    stopped = Checkpoints(directory / "checkpoints").newest().iteration
    assert 20 <= stopped < 120
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "resume", str(directory), "--workers", "3"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    ends = [Checkpoints(tmp_path / name / "checkpoints").newest() for name in ("whole", "killed")]
    assert ends[1].attempt == 2
    assert digest(ends[0].meta) == digest(ends[1].meta)


class Clock:
    """Time as a pool sees it, which can be set ahead."""

    ahead = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_losing_every_worker_late_in_a_run_only_costs_time(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.fleet import ray_pool

    clock, killed = Clock(), []
    monkeypatch.setattr(ray_pool, "time", clock)

    def kill(driver: Driver) -> None:
        if not killed and driver.iteration >= 5:
            clock.ahead = 2 * ray_pool.START_SECONDS  # since the pool began, and since anything was heard
            killed.append(joined(tmp_path)[0])
            os.kill(killed[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    pool = RayPool(parts, 1, limits=Deadlines(floor=1e6, first=1e6))
    assert digest(train(parts, params, pool, tmp_path, kill)) == reference
