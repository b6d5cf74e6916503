"""Runs that tests of Ray compare, and ways to strike them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.record import journal
from cluster.setup import assemble, config
from cluster.setup.run import Run
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from learners.base import Meta

FEW = Evaluation(every=10, validation_tasks=8, tasks=8, steps=2, pictures=0)


def sinusoid(tmp_path: Path) -> Run:
    run = config.load("sinusoid")
    return replace(run, iterations=30, meta_batch=16, shard=4, execution="vmap")


def navigation() -> Run:
    run = config.load("navigation")
    task = replace(run.task, rollouts=3, horizon=15, test_steps=30)
    return replace(run, task=task, execution="loop", meta_batch=6, shard=2, model=replace(run.model, hidden=(8,)))


def train(parts, params, pool, directory: Path, hook: Callable[[Driver], None] = lambda d: None, **options) -> Meta:
    holder: list[Driver] = []

    def look() -> bool:
        hook(holder[0])
        return False

    driver = Driver(
        parts,
        params,
        pool,
        directory,
        iterations=30,
        meta_batch=16,
        shard=4,
        evaluation=FEW,
        interrupted=look,
        **options,
    )
    holder.append(driver)
    try:
        return driver.run()
    finally:
        pool.close()


def train_control(pool_of: Callable, directory: Path, hook: Callable[[Driver], None] = lambda d: None) -> str:
    """Three iterations of TRPO on navigation: gradient, curvature products, line search, on the same recorded
    episodes.
    """
    run, holder = navigation(), []
    parts, params = assemble.recipe(run)
    pool = pool_of(parts)

    def look() -> bool:
        hook(holder[0])
        return False

    driver = Driver(parts, params, pool, directory, iterations=3, meta_batch=6, shard=2, interrupted=look,
                    evaluation=Evaluation(validation_tasks=0, tasks=2, steps=1, pictures=0))  # fmt: skip
    holder.append(driver)
    try:
        return digest(driver.run())
    finally:
        pool.close()


def joined(directory: Path) -> list[int]:
    """Process ids of workers in the order they joined."""
    events = [r["event"] for r in journal.read(directory / "journal") if r["kind"] == "fleet"]
    return [int(e["where"].rpartition(":")[2]) for e in events if e["kind"] == "joined"]


def striking(directory: Path, number: int) -> tuple[list[int], Callable[[Driver], None]]:
    """(who was struck, a hook that sends this signal to the first worker, once, from iteration 5 on)."""
    struck: list[int] = []

    def strike(driver: Driver) -> None:
        if not struck and driver.iteration >= 5:
            struck.append(joined(directory)[0])
            os.kill(struck[0], number)

    return struck, strike


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends (or is a zombie) within some time."""
    for _ in range(int(seconds * 10)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
