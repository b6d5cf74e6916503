"""From a configuration to the parts of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cluster import seeds, teachers
from cluster.config import Run
from cluster.policies import Synchronous
from cluster.pool import LocalPool, Pool
from cluster.teachers import TeacherPool
from cluster.worker import Recipe
from envs.data_free import DataFree
from learners import execution
from learners.base import Objective, Params
from learners.control import Control, Rollouts
from learners.inner import is_plain
from learners.models import Functional, Gaussian, functional
from learners.objectives import Supervised
from learners.proto_net import ProtoNet
from learners.purer.calibration import DataFreeMAML
from learners.purer.objective import DataFree as DataFreeObjective
from learners.purer.outer import Purer
from learners.verbs import training_steps


def model(run: Run) -> Functional:
    """The run's model, initialised from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return functional(run.model.build(run.task.inputs, run.task.outputs))


def recipe(run: Run) -> tuple[Recipe, Params]:
    """What workers are made from, and the model's initial parameters. Execution must be resolved."""
    if run.execution == "auto":
        raise ValueError("execution='auto' must be resolved first")
    _check_attacks(run)
    network = model(run)
    params = network.params()
    if isinstance(run.task, DataFree):
        taught_by = teacher_pool(run.task)
        objective: Objective = _data_free(run, network, taught_by)
        params = teachers.beginning(taught_by, run.model, params, getattr(run.outer, "start", "random"))
    else:
        objective = _objective(run, network)
    parts = Recipe(
        tasks=run.task, learner=run.learner, objective=objective, outer=run.outer, seed=run.seed,
        evaluation_seed=run.evaluation.seed, evaluation_steps=run.evaluation.steps,
        robustness=run.evaluation.robustness if run.evaluation.robustness.eps else None, execution=run.execution,
        chunk=run.chunk, dtype=run.dtype, device=run.device, threads=run.threads, compression=run.compression,
    )  # fmt: skip
    return parts, params


def teacher_pool(task: DataFree) -> TeacherPool:
    """The teachers of a data-free task."""
    if not task.pools:
        raise ValueError("task.pools is empty: a folder of teachers wanted (`metafleet teachers` makes one)")
    return teachers.together([teachers.load(Path(folder).expanduser()) for folder in task.pools])


def _data_free(run: Run, network: Functional, pool: TeacherPool) -> Objective:
    task = run.task
    assert isinstance(task, DataFree)
    if pool.shape != task.inputs:
        raise ValueError(f"the teachers take images of shape {pool.shape}, task.source gives {task.inputs}")
    if run.dtype != "float32":
        raise ValueError(f"dtype={run.dtype!r}: teachers are float32, and so are runs that learn from them")
    if task.ways > len(set(pool.names)):
        raise ValueError(f"ways={task.ways} exceeds the {len(set(pool.names))} classes that the teachers know")
    if not isinstance(run.outer, Purer):
        raise ValueError(f"a data-free task wants the outer step of PURER (--outer.name purer), not {type(run.outer).__name__}")
    if run.execution != "loop":
        raise ValueError(f"execution={run.execution!r}: teachers differ from each other, so that tasks run in a loop")
    return DataFreeObjective(
        network, "cross_entropy", run.objective.norm, run.objective.scale, run.evaluation.norms, run.objective.momentum,
        pool.teachers, task.per_class, pool.shape,
    )  # fmt: skip


def _objective(run: Run, network: Functional) -> Objective:
    if run.task.kind == "control":
        if not isinstance(run.task, Rollouts):
            raise TypeError(f"{type(run.task).__name__} is of kind control, but has no method rollout")
        if not isinstance(network.module, Gaussian):
            raise ValueError("RL tasks want a policy: --model.name gaussian_mlp")
        keys = run.control
        if keys.exploration and not is_plain(run.learner):
            raise ValueError(f"control.exploration={keys.exploration}: the outer loss of {type(run.learner).__name__} has no place for it")
        return Control(network, run.task, keys.inner_loss, keys.discount, keys.gae, keys.exploration)
    return Supervised(
        network,
        loss="mse" if run.task.kind == "regression" else "cross_entropy",
        norm=run.objective.norm,
        scale=run.objective.scale,
        report=run.evaluation.norms,
        momentum=run.objective.momentum,
    )


def _check_attacks(run: Run) -> None:
    """Raise ValueError for attacks that the tasks do not admit, and for learners that want labels where there are none."""
    eps, name = run.evaluation.robustness.eps, type(run.learner).__name__
    own = getattr(run.learner, "attack", None)
    if eps and isinstance(run.task, DataFree):
        raise ValueError(f"eps={eps}: attacks are in pixels, and the images of data-free runs are normalised")
    if run.task.kind == "control":
        if eps:
            raise ValueError(f"evaluation.robustness.eps={eps}: attacks are on the inputs of examples, and RL tasks have none")
        if own is not None or isinstance(run.learner, DataFreeMAML | ProtoNet):
            raise ValueError(f"{name} wants labelled examples, and RL tasks have none")
    elif run.task.kind == "regression":
        for key, attack in (("learner.attack", own), ("evaluation.robustness", run.evaluation.robustness if eps else None)):
            if attack and (math.isfinite(attack.low) or math.isfinite(attack.high)):
                raise ValueError(
                    f"{key} keeps inputs within [{attack.low:g}, {attack.high:g}], as pixels are; for {type(run.task).__name__} "
                    f"--{key}.low=-inf --{key}.high=inf wanted"
                )


def resolved(run: Run) -> tuple[Run, str]:
    """The run with everything decided that "auto" and 0 leave open, and one sentence on why.

    Needs the task's data. The decisions do not depend on the number of workers, so that the numbers do not either.
    """
    if getattr(run.outer, "horizon", None) == 0:
        run = replace(run, outer=replace(run.outer, horizon=run.iterations))  # type: ignore[type-var]
    if isinstance(run.task, DataFree):
        run = _as_taught(run, run.task)
    if run.execution != "auto":
        return run, f"execution = {run.execution}, as the run says"
    if run.task.kind == "control":
        return replace(run, execution="loop"), "execution = loop: a policy's batch is large enough by itself"
    if isinstance(run.task, DataFree):
        return replace(run, execution="loop"), "execution = loop: teachers differ from each other"
    task = run.task.sample("train", seeds.generator(run.seed, "train", 0, "task"))
    x = torch.from_numpy(task.get("query_x", task["support_x"]))
    mode, chunk, why = execution.choose(
        activation_bytes=model(run).widest(x),
        device=run.device,
        inner_steps=training_steps(run.learner),
        tasks_per_call=run.shard,
        calls=run.iterations * (run.meta_batch // run.shard),
        compiler=execution.has_compiler(),
    )
    return replace(run, execution=mode, chunk=run.chunk or chunk), why


def idle_workers(run: Run) -> tuple[str, str] | None:
    """(what is wrong, what to do) where a meta-batch has fewer shards than there are workers."""
    shards = run.meta_batch // run.shard
    if run.pool != "ray" or not isinstance(run.policy, Synchronous) or shards >= run.workers:
        return None
    smaller = next(s for s in range(max(1, run.meta_batch // run.workers), 0, -1) if run.meta_batch % s == 0)
    return f"a meta-batch of {run.meta_batch} in shards of {run.shard} keeps {shards} of {run.workers} workers busy", f"--shard {smaller}"


def _as_taught(run: Run, task: DataFree) -> Run:
    """With what the teachers say of themselves."""
    found = teacher_pool(task)
    kinds = {name: i for i, name in enumerate(dict.fromkeys(found.names))}
    shared = tuple(kinds[name] for name in found.names) if len(kinds) < len(found.names) else ()
    return taught(run, replace(task, teachers=len(found.teachers), teacher_ways=found.ways, kinds=shared, mean=found.mean, std=found.std))


def taught(run: Run, of: DataFree) -> Run:
    """The data-free run with what the teachers of the task `of` say of themselves."""
    said = {k: getattr(of, k) for k in ("teachers", "teacher_ways", "kinds", "mean", "std")}
    outer = replace(run.outer, teachers=of.teachers) if isinstance(run.outer, Purer) else run.outer
    return replace(run, task=replace(run.task, **said), outer=outer)  # type: ignore[type-var]


@contextmanager
def pool(run: Run, parts: Recipe) -> Iterator[Pool]:
    """The pool that the run asks for, closed at the end."""
    if run.pool == "local":
        fleet: Pool = LocalPool(parts)
    else:
        from cluster.ray_pool import RayPool  # importing Ray takes its time; local runs do without

        fleet = RayPool(parts, run.workers, least=run.min_workers, cpus_per_worker=run.cpus_per_worker, gpus_per_worker=run.gpus_per_worker,
                        address=run.address, sums=run.sums, limits=run.policy.deadlines, straggler=run.straggler)  # fmt: skip
    try:
        yield fleet
    finally:
        fleet.close()
