"""Everything decided that "auto" and 0 leave open: by rule when a run begins, as it was then when it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from cluster.fleet import seeds
from cluster.setup import data_free, families
from cluster.setup.run import Run
from cluster.setup.tables import flat, to_table
from cluster.training.synchronous import Synchronous
from envs.images.data_free import DataFree
from learners.base import training_steps
from learners.engine import execution

RESUMABLE = (
    "iterations", "workers", "min_workers", "pool", "address", "cpus_per_worker", "gpus_per_worker",
    "allow_mixed_fleet", "checkpoint", "evaluation", "sums", "prometheus_port", "policy.deadlines",
    "policy.max_attempts",
)  # fmt: skip
"""Keys, and tables of keys, that may change when a run goes on: the fleet, and what looks at θ without moving it."""


def resolved(run: Run, before: Run | None = None) -> tuple[Run, str]:
    """`run` with nothing left open, and one sentence on its execution; `before`: the same run as it was resolved when
    it began.

    A new run's data is fetched for that. The decisions do not depend on the number of workers, so that the numbers do
    not either. Raises ValueError where the run that began was another one.
    """
    if before is None:
        families.prepare(run.task)
    if getattr(run.outer, "horizon", None) == 0:
        horizon = getattr(before.outer, "horizon", 0) if before else run.iterations
        run = replace(run, outer=replace(run.outer, horizon=horizon))  # type: ignore[type-var]
    if isinstance(run.task, DataFree):
        run = data_free.taught(run, run.task, before.task if before else None)
    if before and run.execution == "auto":
        run = replace(run, execution=before.execution, chunk=run.chunk or before.chunk)
    if before is None:
        return _executed(run)
    check_resumable(before, run)
    return run, f"execution = {run.execution}, as when the run began"


def _executed(run: Run) -> tuple[Run, str]:
    """With an execution mode, and why."""
    if run.execution != "auto":
        return run, f"execution = {run.execution}, as the run says"
    if run.gradient_checkpointing:
        return replace(run, execution="loop"), "execution = loop: gradient checkpointing is for a loop over tasks"
    if run.kind == "control":
        return replace(run, execution="loop"), "execution = loop: a policy's batch is large enough by itself"
    if isinstance(run.task, DataFree):
        return replace(run, execution="loop"), "execution = loop: teachers differ from each other"
    task = run.task.sample("train", seeds.generator(run.seed, "train", 0, "task"))
    x = torch.from_numpy(task.get("query_x", task["support_x"]))
    mode, chunk, why = execution.choose(
        activation_bytes=run.network().widest(x),
        device=run.device,
        inner_steps=training_steps(run.learner),
        tasks_per_call=run.shard,
        calls=run.iterations * (run.meta_batch // run.shard),
        compiler=execution.has_compiler(),
    )
    return replace(run, execution=mode, chunk=run.chunk or chunk), why


def within(key: str, tables: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or in a table that is."""
    return f"{key}.".startswith(tuple(f"{t}." for t in tables))


def check_resumable(old: Run, new: Run) -> None:
    """Raise ValueError where `new` differs from `old` in a key that the numbers depend on."""
    before, after = flat(to_table(old)), flat(to_table(new))
    for key in before | after:
        if before.get(key) != after.get(key) and not within(key, RESUMABLE):
            raise ValueError(
                f"{key} was {before.get(key)!r} when this run began and is {after.get(key)!r} now: it cannot change on "
                "resume "
                f"(only {', '.join(RESUMABLE)} can); use another directory for another run"
            )


def idle_workers(run: Run) -> tuple[str, str] | None:
    """(what is wrong, what to do) where a meta-batch has fewer shards than there are workers."""
    shards = run.meta_batch // run.shard
    if run.pool != "ray" or not isinstance(run.policy, Synchronous) or shards >= run.workers:
        return None
    smaller = next(s for s in range(max(1, run.meta_batch // run.workers), 0, -1) if run.meta_batch % s == 0)
    return (
        f"a meta-batch of {run.meta_batch} in shards of {run.shard} keeps {shards} of {run.workers} workers busy",
        f"--shard {smaller}",
    )
