"""What TRPO through an inner step costs: a curvature product against a meta-gradient; a whole iteration against its
floors.

python tests/bench/bench_policy_gradient.py
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mujoco
import numpy as np
import torch

from cluster.fleet.pool import LocalPool
from cluster.setup import assemble, config
from cluster.setup.run import Run
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.policy import Step
from envs.control.bodies import BODIES, load
from learners.base import pack
from learners.engine.execution import Execution
from tests.bench.timing import machine, medians, quiet

TASKS = 4
WANTED = 1.5
ITERATIONS = 4


def cheetah() -> Run:
    run = config.load("half-cheetah-direction-trpo")
    return replace(run, pool="local", execution="loop", meta_batch=TASKS, shard=TASKS, iterations=ITERATIONS)


def products(run: Run) -> bool:
    """Seconds per task of the verbs at one θ."""
    parts, params = assemble.recipe(run)
    verbs, execution, at = parts.verbs(parts.objective), Execution("loop"), pack(params, {})
    gradient = verbs["gradient"]
    assert gradient.record
    tasks = [parts.tensors(parts.task("train", i, gradient)) for i in range(TASKS)]
    data = gradient.record(at, {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]})
    calls: dict[str, Any] = {"meta-gradient": lambda: execution.run(gradient.run, at, {}, data)}
    for every in (1, 4, 8):
        fix = replace(run.outer, curvature_every=every).verbs(parts.learner, parts.objective)["curvature"].fix
        assert fix
        fixed = [fix(at, {k: v[i] for k, v in data.items()}) for i in range(TASKS)]
        calls[f"curvature product, every {every}"] = lambda fixed=fixed: execution.each(fixed, params)
    calls["surrogate and KL"] = lambda: execution.run(verbs["surrogate"].run, at, params, data)
    seconds = medians(calls, 9)
    print(f"\n{TASKS} tasks of {run.task.rollouts} × {run.task.horizon} time steps before and after one inner step")
    for name, t in seconds.items():
        print(f"  {name:30s} {1e3 * t / TASKS:7.1f} ms a task   {t / seconds['meta-gradient']:5.2f}")
    ratio = seconds["curvature product, every 1"] / seconds["meta-gradient"]
    print(f"  a product on all time steps is {ratio:.2f} meta-gradients (wanted at most {WANTED})")
    return ratio <= WANTED


def flop_rate() -> float:
    """FLOP/s of the matrix products that dominate, [4000, 100] × [100, 100]."""
    a, b = torch.randn(4000, 100), torch.randn(100, 100)
    seconds = medians({"mm": lambda: torch.mm(a, b)}, 50)["mm"]
    return 2 * 4000 * 100 * 100 / seconds


def bare_physics(steps: int, copies: int = 200) -> float:
    """Seconds of `steps` time steps by mj_step alone."""
    body, model = BODIES["half_cheetah_paper"], load(BODIES["half_cheetah_paper"])
    data, rng = [mujoco.MjData(model) for _ in range(copies)], np.random.default_rng(0)
    controls = rng.uniform(-1, 1, (50, copies, body.actions))

    def run() -> None:
        for row in controls:
            for d, control in zip(data, row, strict=True):
                d.ctrl[:] = control
                mujoco.mj_step(model, d)

    return medians({"bare": run}, 5)["bare"] / (50 * copies) * steps


def breakdown(run: Run) -> None:
    """Where a meta-iteration's time goes, beside the least that each part could take."""
    parts, params = assemble.recipe(run)
    with TemporaryDirectory() as folder:
        pool = LocalPool(parts)
        driver = Driver(parts, params, pool, Path(folder), iterations=ITERATIONS, meta_batch=TASKS, shard=TASKS,
                        evaluation=Evaluation(validation_tasks=0, tasks=1, pictures=0))  # fmt: skip
        seen: list[dict[str, float]] = []
        apply = driver._apply

        def watching(step: Step) -> None:
            seen.append(step.metrics)
            apply(step)

        driver._apply = watching  # type: ignore[method-assign]
        driver.run()
        pool.close()
    middle = {k: statistics.median(m[k] for m in seen[1:]) for k in seen[1] if k.startswith(("perf/", "outer/tries"))}
    samples = TASKS * run.task.rollouts * run.task.horizon  # type: ignore[attr-defined]
    layers = [20 * 100, 100 * 100, 100 * 6]
    forward = 2 * sum(layers) * samples / flop_rate()  # of all tasks, one policy evaluation per time step
    every = run.outer.curvature_every  # type: ignore[attr-defined]
    tries = middle["outer/tries"] + 1
    # In forward passes: a gradient is 3; through it once more, 4 of its own (one product with the Hessian) and 3 of the
    # query.
    floors = {
        "physics": (middle["perf/physics_s"], bare_physics(2 * samples)),
        "policy": (middle["perf/policy_s"], 2 * forward),
        "adaptation": (middle["perf/adaptation_s"], 3 * forward),
        "meta-gradient": (
            middle["perf/gradient_s"] - sum(middle[f"perf/{k}_s"] for k in ("physics", "policy", "adaptation")),
            10 * forward,
        ),
        "curvature": (middle["perf/curvature_s"], 10 * 10 * forward / every),
        "line search": (middle["perf/surrogate_s"], 5 * tries * forward),
    }  # fmt: skip
    print(
        f"\na meta-iteration of {TASKS} tasks, {2 * samples} time steps, curvature on every {every}th: seconds, floor"
    )
    for name, (took, floor) in floors.items():
        print(f"  {name:14s} {took:7.3f}  {floor:7.3f}   × {took / floor:.2f}")
    took, floor = middle["perf/iteration_s"], sum(f for _, f in floors.values())
    print(f"  {'all':14s} {took:7.3f}  {floor:7.3f}   × {took / floor:.2f}")


def main() -> None:
    quiet()
    print(machine())
    begin = time.perf_counter()
    run = cheetah()
    fine = products(run)
    breakdown(run)
    print(f"({time.perf_counter() - begin:.0f} s)")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
