"""Everything decided that "auto" and 0 leave open."""

from __future__ import annotations

from dataclasses import replace

import torch

from cluster.fleet import seeds
from cluster.setup.assemble import model
from cluster.setup.data_free import _as_taught
from cluster.setup.run import Run
from cluster.training.synchronous import Synchronous
from envs.images.data_free import DataFree
from learners.base import training_steps
from learners.engine import execution


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
