"""The driver: holds θ, hands out tasks, steps. It knows no algorithm, no task family and no policy by name."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster import evaluate, seeds, wire
from cluster.checkpoint import Checkpoints, Lease, State
from cluster.dispatch import Dispatcher, RunStopped, Shards
from cluster.evaluate import Curves, Evaluation, Pending
from cluster.journal import Journal
from cluster.ledger import Ledger
from cluster.messages import FleetEvent
from cluster.monitor import Monitor
from cluster.policies import Step, Synchronous
from cluster.pool import Pool
from cluster.worker import Recipe, environment, set_up_torch
from learners import tree
from learners.base import Meta, Params, pack

log = logging.getLogger("metafleet")

JOURNAL_SCHEMA = 1


@dataclass(frozen=True)
class Checkpointing:
    """When a run saves itself."""

    seconds: float = 60.0
    """Time between checkpoints."""
    keep: int = 3
    """How many of the newest to keep, beside the best."""


class Driver:
    """Meta-trains θ with a pool, from a run directory that it owns while it runs.

    The directory receives metrics, checkpoints, journal and pictures; if it already holds checkpoints of this run,
    the run goes on from the newest good one. The caller has made sure that it is the same run.
    """

    def __init__(self, recipe: Recipe, params: Params, pool: Pool, directory: str | Path, *, iterations: int, meta_batch: int,
                 shard: int, policy: Synchronous | None = None, checkpoint: Checkpointing | None = None,
                 evaluation: Evaluation | None = None, allow_mixed_fleet: bool = False, take_over: bool = False,
                 hparams: dict[str, object] | None = None, interrupted: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
        if iterations < 0 or shard < 1 or meta_batch < 1 or meta_batch % shard:
            raise ValueError(f"meta_batch={meta_batch} is not a positive multiple of shard={shard}")
        self.recipe, self.pool, self.directory = recipe, pool, Path(directory)
        self.iterations, self.meta_batch, self.shard = iterations, meta_batch, shard
        self.policy = policy or Synchronous()
        self.checkpoint = checkpoint or Checkpointing()
        self.evaluation = evaluation or Evaluation()
        self._allow_mixed_fleet, self._take_over = allow_mixed_fleet, take_over
        self._hparams, self._interrupted = hparams or {}, interrupted
        self.checkpoints = Checkpoints(self.directory / "checkpoints", self.checkpoint.keep)
        self.iteration = 0
        self.meta, self.state = self._initial(params)
        self._best: dict[str, float] = {}
        self._facts: dict[str, Any] = {"execution": recipe.execution, "chunk": recipe.chunk, "threads": recipe.threads}
        self._pending: tuple[int, Pending] | None = None
        self._saved_at = time.monotonic()
        self.workers: dict[str, str] = {}

    def run(self) -> Meta:
        """Meta-train to the last iteration, evaluate on test tasks, and return θ.

        Raises KeyboardInterrupt when interrupted and RunStopped when it cannot go on, both after a checkpoint;
        BlockingIOError where another driver owns the directory; Fenced where one took it over meanwhile.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._lease = stack.enter_context(Lease(self.directory).held(self._take_over))
            stack.callback(self._open())
            try:
                while self.iteration < self.iterations:
                    self.iterate()
                self._collect(wait=True)
                self.save()
                self._finish()
            except (KeyboardInterrupt, RunStopped) as stop:
                self._stop("interrupted" if isinstance(stop, KeyboardInterrupt) else f"stopped: {stop}")
                raise
        return self.meta

    def iterate(self) -> None:
        """One meta-iteration."""
        shards = Shards("train", self.iteration * self.meta_batch, self.meta_batch // self.shard, self.shard)
        step = self.policy.step(self.recipe.outer, self.meta, self.state, self.dispatcher, shards)
        self._apply(step)
        self._collect(wait=False)
        if self.iteration % self._every() == 0:
            self._evaluate()
        if time.monotonic() - self._saved_at > self.checkpoint.seconds:
            self._collect(wait=True)
            self.save()

    def save(self) -> None:
        """Write a checkpoint. A disk that cannot take it is a warning: the last good one stays, and we try again."""
        self._lease.check()
        self._saved_at = time.monotonic()
        try:
            self.journal.sync()
            self.checkpoints.save(self._snapshot())
        except OSError as error:
            log.warning("checkpoint at iteration %d not written (%s); the last good one stays, will try again", self.iteration, error)

    def _initial(self, params: Params) -> tuple[Meta, Params]:
        set_up_torch(self.recipe.threads, self.recipe.device)
        cast = getattr(torch, self.recipe.dtype)
        params = tree.apply(lambda v: v.detach().to("cpu", cast), params)
        meta = self.recipe.learner.init(params, seeds.generator(self.recipe.seed, "none", 0, "init"))
        slots = tree.apply(lambda v: v.to("cpu", cast), self.recipe.objective.slots())
        meta = Meta(meta.params, slots | meta.slots)
        return meta, self.recipe.outer.init(meta)

    def _open(self) -> Callable[[], None]:
        """Restore the newest checkpoint, open journal and monitor; returns what closes them."""
        restored = self.checkpoints.newest()
        if restored:
            self.iteration, self.meta, self.state = restored.iteration, restored.meta, restored.outer
            self._best, self._facts = restored.best, self._facts | restored.facts
            log.info("resuming %s at iteration %d (attempt %d)", self.directory, self.iteration, self._lease.attempt)
        self.journal = Journal(self.directory / "journal", lambda: self._lease.check(always=False))
        self.ledger = Ledger(self.journal, restored.next_ticket if restored else 0)
        if restored:
            self.ledger.counts |= restored.counts
        self.journal.write(
            "attempt", schema=JOURNAL_SCHEMA, attempt=self._lease.attempt, iteration=self.iteration, theta=digest(self.meta),
            configuration=self._hparams, meta_batch=self.meta_batch, shard=self.shard, driver=environment(), **self._facts,
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            self.pool, self.ledger, max_attempts=self.policy.max_attempts, max_rejected=self.policy.max_rejected,
            on_event=self._fleet_event, interrupted=self._interrupted,
        )  # fmt: skip
        self.monitor = Monitor(self.directory, self.iteration, self.iterations)
        self._status("running", now=True)

        def close() -> None:
            self.monitor.close()
            self.journal.close()

        return close

    def _apply(self, step: Step) -> None:
        self.meta, self.state = step.meta, step.state
        self.iteration += 1
        self.journal.write("apply", version=self.iteration, tickets=step.tickets, theta=digest(self.meta))
        fleet = {f"fleet/{k}": float(v) for k, v in self.ledger.counts.items()} | {"fleet/workers": float(len(self.workers))}
        self.monitor.scalars(self.iteration, step.metrics | fleet)
        self._status("running")

    def _every(self) -> int:
        return self.evaluation.every or max(1, self.iterations // 20)

    def _evaluate(self) -> None:
        self._collect(wait=True)
        pending = Pending(self.dispatcher, self.meta, "validation", self.evaluation.validation_tasks, self.shard)
        self._pending = self.iteration, pending

    def _collect(self, *, wait: bool) -> None:
        """Take in a background evaluation that is done, or wait for it."""
        if self._pending is None or not (wait or self._pending[1].done):
            return
        iteration, pending = self._pending
        curves = pending.result()
        self._pending = None
        self.monitor.curve(iteration, "validation", curves.mean)
        score, higher = curves.score()
        if not self._best or (score > self._best["score"] if higher else score < self._best["score"]):
            self._best = {"iteration": iteration, "score": score}
            try:
                self.checkpoints.save_best(replace(self._snapshot(), iteration=iteration, meta=pending.meta))
            except OSError as error:
                log.warning("best checkpoint not written (%s)", error)

    def _finish(self) -> None:
        curves = Pending(self.dispatcher, self.meta, "test", self.evaluation.tasks, self.shard).result()
        self.monitor.curve(self.iteration, "test", curves.mean)
        results = {"iteration": self.iteration, "seed": self.recipe.seed, **curves.as_dict()}
        (self.directory / "evaluation.json").write_text(json.dumps(results, indent=1))
        path = self.directory / "adaptation.png"
        if evaluate.picture(self.recipe, self.meta, path, self.evaluation.pictures):
            self.monitor.picture(self.iteration, "test/adaptation", path)
        self.monitor.hparams(self._hparams, {f"{k}_{i}": float(v[i]) for k, v in curves.mean.items() for i in (0, -1)})
        self._status("finished", now=True)
        self._report(curves, path)

    def _report(self, curves: Curves, picture: Path) -> None:
        self.monitor.console.print(
            curves.table(f"Held-out test tasks: {curves.tasks} tasks, mean ± 95 % CI, after {self.iteration} meta-iterations")
        )
        if picture.exists():
            self.monitor.message(f"picture:     {picture}")
        self.monitor.message(f"tensorboard: {self.monitor.tensorboard}")

    def _stop(self, state: str) -> None:
        self.dispatcher.abandon()
        self._pending = None
        self.save()
        self._status(state, now=True)

    def _snapshot(self) -> State:
        return State(
            self.iteration, self.meta, self.state, self.ledger.next_ticket, self._lease.attempt, self._best, self.ledger.counts, self._facts
        )

    def _status(self, state: str, *, now: bool = False) -> None:
        self.monitor.status(state, self.iteration, now=now, attempt=self._lease.attempt, workers=self.workers,
                            counts=self.ledger.counts, best=self._best)  # fmt: skip

    def _fleet_event(self, event: FleetEvent) -> None:
        self.journal.write("fleet", event=asdict(event))
        if event.kind == "joined":
            self.workers[event.worker] = event.where
            self._check_fleet(event)
        else:
            self.workers.pop(event.worker, None)
            log.warning("worker %s (%s) %s: %s", event.worker, event.where, event.kind, event.detail.get("reason", ""))

    def _check_fleet(self, event: FleetEvent) -> None:
        """Bits depend on versions and processor features: a fleet where they differ must be allowed explicitly."""
        wanted = self._facts.setdefault("environment", event.detail)  # that of the first worker ever
        different = [f"{k} {v!r} instead of {wanted.get(k)!r}" for k, v in event.detail.items() if wanted.get(k) != v]
        if different and not self._allow_mixed_fleet:
            raise RunStopped(
                f"worker {event.worker} has {', '.join(different)}: results would depend on who computes what (--allow-mixed-fleet)"
            )


def digest(meta: Meta) -> str:
    """A short hash of every bit of θ and its slots."""
    _, vector = wire.flatten(pack(*meta))
    return hashlib.blake2b(vector.tobytes(), digest_size=16).hexdigest()
