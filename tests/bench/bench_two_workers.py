"""Sampling on two Ray workers against two processes of bare physics, each pair on the same two cores.

taskset -c 0,2 python tests/bench/bench_two_workers.py      (two physical cores; hyper-threads of one core are not two)
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from dataclasses import replace

import mujoco
import numpy as np

from cluster.fleet.ray_pool import RayPool
from cluster.record.journal import Unwritten
from cluster.setup import assemble, config
from cluster.training.dispatch import Dispatcher, Shards
from cluster.training.ledger import Ledger
from envs.control.bodies import BODIES, BodyName, load
from learners.base import pack
from tests.bench.timing import machine, quiet

TASKS, ROLLOUTS, HORIZON = 8, 20, 100
WANTED = 0.93
ROUNDS = 5


def bare(name: BodyName, seconds: float, found: multiprocessing.Queue[float]) -> None:
    """env-steps/s of one process that does nothing else."""
    body, model = BODIES[name], load(BODIES[name])
    data, rng = [mujoco.MjData(model) for _ in range(TASKS // 4 * ROLLOUTS)], np.random.default_rng(0)
    controls = rng.uniform(-1, 1, (len(data), body.actions))
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for d, control in zip(data, controls, strict=True):
            d.ctrl[:] = control
            mujoco.mj_step(model, d, body.frame_skip)
        steps += len(data)
    found.put(steps / (time.perf_counter() - begin))


def two_bare(name: BodyName) -> float:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[float] = context.Queue()
    processes = [context.Process(target=bare, args=(name, 4.0, found)) for _ in range(2)]
    for p in processes:
        p.start()
    total = sum(found.get() for _ in processes)
    for p in processes:
        p.join()
    return total


def two_workers(name: BodyName, backend: str) -> list[float]:
    """env-steps/s of rounds that only sample: episodes of θ, with baseline and advantages."""
    run = config.load("half-cheetah-direction")
    task = replace(
        run.task, body=name, backend=backend, rollouts=ROLLOUTS, horizon=HORIZON, test_steps=ROLLOUTS * HORIZON
    )
    run = replace(run, task=task, execution="loop", evaluation=replace(run.evaluation, steps=0))
    parts, params = assemble.recipe(run)
    pool = RayPool(parts, 2)
    dispatcher, speeds = Dispatcher(pool, Ledger(Unwritten())), []
    for k in range(ROUNDS + 2):
        at = dispatcher.publish(pack(params, {}))
        begin = time.perf_counter()
        dispatcher.finish(dispatcher.start("evaluate", at, None, Shards("train", 64 * k, 8, TASKS)))
        speeds.append(8 * TASKS * ROLLOUTS * HORIZON / (time.perf_counter() - begin))
        dispatcher.release(at)
    pool.close()
    return speeds[2:]


def main() -> None:
    quiet()
    print(machine())
    fine = True
    for name, backend in (
        ("half_cheetah_v5", "rollout"),
        ("half_cheetah_v5", "exact"),
        ("half_cheetah_paper", "rollout"),
    ):
        before = two_bare(name)  # type: ignore[arg-type]
        ours = statistics.median(two_workers(name, backend))  # type: ignore[arg-type]
        both = (before + two_bare(name)) / 2  # type: ignore[arg-type]
        print(
            f"{name}, {backend}: {ours:.0f} env-steps/s on two workers, {both:.0f} by two bare processes: "
            f"{ours / both:.2f}"
        )
        fine = fine and (ours / both >= WANTED or name != "half_cheetah_v5" or backend != "rollout")
    print(f"(wanted: {WANTED}, for the backend that is to be fast)")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
