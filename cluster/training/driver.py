"""The driver: holds θ, hands out tasks, steps. It knows no algorithm, no task family and no policy by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

from cluster.fleet.machine import environment, set_up_torch
from cluster.fleet.messages import FleetEvent, RunStopped
from cluster.fleet.pool import Pool
from cluster.fleet.recipe import Recipe
from cluster.record.checkpoint import Checkpointing, Checkpoints, State, Work
from cluster.record.journal import Journal, unfinished
from cluster.record.lease import Fenced, Lease
from cluster.record.mirror import Mirror
from cluster.record.storage import Place, make_folder, place
from cluster.results import history
from cluster.results.monitor import Monitor
from cluster.results.report import Report
from cluster.training.callbacks import Callback, Callbacks, Evaluated
from cluster.training.dispatch import Dispatcher
from cluster.training.evaluation import Evaluation, Pending, judge, overruled
from cluster.training.identity import digest, identity, initial
from cluster.training.ledger import COUNTS, Ledger
from cluster.training.policy import Batch, Policy, Step, idle
from cluster.training.roster import Roster
from cluster.training.synchronous import DEFAULT
from learners.base import HasRates, Meta, Params, Shows

log = logging.getLogger("metafleet")

JOURNAL_SCHEMA = 1


class Driver:
    """Meta-trains θ with a pool, from a run directory that it owns while it runs.

    The directory receives metrics, checkpoints, journal and pictures; if it already holds checkpoints of this run,
    the run goes on from the newest good one.
    """

    def __init__(self, recipe: Recipe, params: Params, pool: Pool, directory: str | Place, *, iterations: int,
                 meta_batch: int, shard: int, policy: Policy = DEFAULT, checkpoint: Checkpointing | None = None,
                 evaluation: Evaluation | None = None, allow_mixed_fleet: bool = False, lease: Lease | None = None,
                 prometheus_port: int = 0, hparams: dict[str, object] | None = None, begin: Meta | None = None,
                 interrupted: Callable[[], bool] = lambda: False,
                 callbacks: Sequence[Callback] = ()) -> None:  # fmt: skip
        """`lease`: one on the directory that the caller holds; without it the driver takes its own. `begin`: what
        another run learned, to go on from. `prometheus_port`: where to serve the metrics; 0: nowhere.
        """
        if iterations < 0 or shard < 1 or meta_batch < 1 or meta_batch % shard:
            raise ValueError(f"meta_batch={meta_batch} is not a positive multiple of shard={shard}")
        self.recipe, self.pool, self.directory = recipe, pool, place(directory)
        self.iterations, self.meta_batch, self.shard, self.policy = iterations, meta_batch, shard, policy
        self.checkpoint = checkpoint or Checkpointing()
        self.evaluation = evaluation or Evaluation()
        for sentence in overruled(self.evaluation, recipe):
            log.warning("%s", sentence)
        self._allow_mixed_fleet, self._lease = allow_mixed_fleet, lease
        self._hparams, self._interrupted, self._prometheus_port = hparams or {}, interrupted, prometheus_port
        self.checkpoints = Checkpoints(self.directory / "checkpoints", self.checkpoint.keep)
        self.iteration = 0
        set_up_torch(recipe.threads, "cpu")  # its own work is sums and steps: a head node needs no GPU
        self.meta, self.state = initial(recipe, params, begin)
        if getattr(recipe.outer, "schedule", "constant") != "constant" and not getattr(recipe.outer, "horizon", 0):
            log.warning(
                "outer.schedule has no horizon, at which it ends (the command line takes the run's iterations): the "
                "rate stays as it is"
            )
        if recipe.compression != "none" and self.meta.slots:
            names = ", ".join(list(self.meta.slots)[:3])
            raise ValueError(
                f"compression={recipe.compression!r} would round what the run carries on ({names}): 'none' wanted"
            )
        self._callbacks, self._asked = Callbacks(tuple(callbacks)), ""
        self._best: dict[str, float] = {}
        self._facts = identity(recipe, self.meta, meta_batch, shard)
        self._pending: Pending | None = None
        self._saved_at = time.monotonic()

    def run(self) -> Meta:
        """Meta-train to the last iteration, evaluate on test tasks, and return θ.

        Raises KeyboardInterrupt when interrupted and RunStopped when it cannot go on, both after a checkpoint;
        ValueError where the directory holds another run; BlockingIOError where another driver owns it; Fenced where
        one took it over meanwhile; OSError where the journal or the last checkpoint cannot be written.
        """
        make_folder(self.directory)
        with ExitStack() as stack:
            self.lease = self._lease or stack.enter_context(Lease(self.directory).held())
            self._open(stack)
            try:
                self._callbacks.begin(self._hparams, self._earlier())
                while self.iteration < self.iterations and not self._asked:
                    self.iterate()
                self._collect(wait=True)
                if self._asked:
                    self._note_stop()
                self.dispatcher.abandon()  # what an asynchronous policy still has under way
                self.journal.sync()
                self._save_last()
                self.monitor.end_progress()
                self._finish()
            except (KeyboardInterrupt, RunStopped) as stop:
                self._stop("interrupted" if isinstance(stop, KeyboardInterrupt) else f"stopped: {stop}")
                raise
            except Fenced:
                raise
            except Exception as error:
                self._status(f"failed: {error}", now=True)
                self._callbacks.end(f"failed: {error}")
                raise
        return self.meta

    def iterate(self) -> None:
        """One meta-iteration."""
        self._apply(self.stepper.step(self.meta, self.state, self.iteration))
        self._collect(wait=False)
        if self.evaluation.validation_tasks and self.iteration % self._every() == 0:
            self._evaluate()
        if time.monotonic() - self._saved_at > self.checkpoint.seconds:
            self._collect(wait=True)
            self.save()

    def save(self) -> None:
        """Write a checkpoint. A disk that cannot take it is a warning: the last good one stays, and we try again; one
        that cannot take the journal ends the run (OSError).
        """
        self._saved_at = time.monotonic()
        self.journal.sync()
        try:
            self._save(self._snapshot())
        except OSError as error:
            log.warning(
                "checkpoint at iteration %d not written (%s); the last good one stays, will try again",
                self.iteration,
                error,
            )

    def _open(self, stack: ExitStack) -> None:
        """Restore the newest checkpoint, open journal and monitor; `stack` closes them."""
        restored = self.checkpoints.newest()
        if restored:
            self._restore(restored)
        self.roster = Roster(self._facts, allow_mixed=self._allow_mixed_fleet)
        path = self.directory / "journal"
        before = unfinished(path)
        self._asked = self._stopped_before(before.stops) if restored else ""
        self.journal = Journal(path, self.lease.check)
        stack.callback(self.journal.close)
        self.ledger = Ledger(self.journal, max(before.following, restored.next_ticket if restored else 0))
        if restored:
            self.ledger.restore(restored.counts)
        if before.tickets:  # of an attempt that was killed
            self.journal.write("abandon", tickets=before.tickets)
        self.journal.write(
            "attempt", schema=JOURNAL_SCHEMA, attempt=self.lease.attempt, iteration=self.iteration,
            theta=digest(self.meta), configuration=self._hparams, driver=environment(), **self._facts,
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            self.pool, self.ledger, max_attempts=self.policy.max_attempts, max_rejected=self.policy.max_rejected,
            quarantine=self.policy.quarantine, backups=self.policy.backups,
            on_event=self._fleet_event, interrupted=self._interrupted,
        )  # fmt: skip
        batch = Batch(self.meta_batch // self.shard, self.shard, self.recipe.groups())
        self.stepper = self.policy.begin(
            self.recipe.outer, self.dispatcher, batch, restored.work if restored else Work()
        )
        self.mirror = Mirror(self.directory, self.lease.check, kept=(history.METRICS,))
        stack.callback(self.mirror.close)
        self.monitor = Monitor(
            self.mirror.local, self.iteration, self.iterations, prometheus_port=self._prometheus_port, counters=COUNTS
        )
        stack.callback(self.monitor.close)
        self.monitor.best = self._best
        if restored and restored.evaluation_due and self.evaluation.validation_tasks:
            self._evaluate()
        self._status("running", now=True)

    def _restore(self, state: State) -> None:
        """Take over a checkpoint, if it is of this run."""
        for key, wanted in self._facts.items():
            seen = state.facts.get(key)
            if seen != wanted:
                raise ValueError(
                    f"{self.directory} holds a run with {key} = {seen}, this one has {wanted}: another run needs "
                    "another directory"
                )
        self.iteration, self.meta, self.state, self._best = state.iteration, state.meta, state.outer, state.best
        self._facts = state.facts
        log.info("resuming %s at iteration %d (attempt %d)", self.directory, self.iteration, self.lease.attempt)

    def _apply(self, step: Step) -> None:
        self.meta, self.state = step.meta, step.state
        self.iteration += 1
        self.journal.write(
            "apply", version=self.iteration, tickets=step.tickets, theta=digest(self.meta), **step.record
        )
        self.ledger.apply(step.tickets)
        fleet = {f"fleet/{k}": float(v) for k, v in self.ledger.counts.items()} | {
            "fleet/workers": float(len(self.roster.workers)), "fleet/nodes": float(len(self.roster.nodes)),
            "fleet/in_flight": float(len(self.ledger.open)), "fleet/queued": float(self.dispatcher.queued),
        }  # fmt: skip
        answers, shares = sum(self.dispatcher.shares.values()), self.dispatcher.shares
        fleet |= {f"share/{worker}": n / answers for worker, n in shares.items()}
        shares.clear()
        waited = idle(len(self.roster.workers), step.metrics)
        metrics = step.metrics | waited | fleet
        self.monitor.scalars(self.iteration, metrics, step.samples)
        self._asked = self._callbacks.step(self.iteration, metrics) or self._asked
        self._status("running")

    def _every(self) -> int:
        return self.evaluation.every or max(1, self.iterations // 20)

    def _evaluate(self) -> None:
        """Evaluate the present θ on validation tasks, in the background."""
        self._collect(wait=True)
        if isinstance(self.recipe.learner, HasRates):
            self.monitor.distributions(self.iteration, "rate", self.recipe.learner.rates(self.meta.params))
        if isinstance(self.recipe.outer, Shows):
            for name, images in self.recipe.outer.shown(self.state).items():
                self.monitor.images(self.iteration, name, images)
        self._pending = Pending(self.dispatcher, self._snapshot(), "validation", self.evaluation.validation_tasks,
                                self.shard, groups=self.recipe.groups())  # fmt: skip

    def _collect(self, *, wait: bool) -> None:
        """Take in a background evaluation that is done, or wait for it."""
        if self._pending is None or not (wait or self._pending.done):
            return
        state, curves = self._pending.state, self._pending.result()
        self._pending = None
        self.monitor.curve(state.iteration, "validation", curves.mean)
        if curves.beats(self._best.get("score")):
            best = {"iteration": state.iteration, "score": curves.score()}
            try:
                self.lease.check()
                self.checkpoints.save_best(replace(state, best=best))
            except OSError as error:
                log.warning("best checkpoint not written (%s); the one before it stays the best", error)
            else:
                self._best = self.monitor.best = best
        self._asked = self._callbacks.evaluation(state.iteration, "validation", curves) or self._asked

    def _finish(self) -> None:
        chosen = self.evaluation.checkpoint == "best" and bool(self._best)
        state = self.checkpoints.best() if chosen else self._snapshot()
        results = judge(self.recipe, self.dispatcher, state, "test", self.evaluation.tasks, self.shard)
        self.lease.check()
        Report(self.recipe, self.monitor, self.mirror, self.evaluation.pictures).publish(state, results, self._hparams)
        self._callbacks.evaluation(state.iteration, "test", results.curves)
        self.journal.sync()
        self._status("finished", now=True)
        self._callbacks.end("finished")

    def _earlier(self) -> list[Evaluated]:
        """What validation said in the attempts before this one, for callbacks where there are any."""
        rows = history.lines(self.mirror.local) if self._callbacks.members else []
        return [Evaluated(row["iteration"], row["curve"]) for row in rows if row["kind"] == "validation"]

    def _note_stop(self) -> None:
        """A callback asked: the run is finished here, also for whoever begins it again as it is."""
        self.journal.write("stop", iteration=self.iteration, iterations=self.iterations, reason=self._asked)
        self.monitor.end_progress()
        self.monitor.message(f"stopped at iteration {self.iteration} of {self.iterations}: {self._asked}")

    def _stopped_before(self, stops: list[dict[str, Any]]) -> str:
        """Who asked an earlier attempt at as many iterations to stop where the checkpoint is; "" for nobody."""
        here = [r["reason"] for r in stops if (r["iteration"], r["iterations"]) == (self.iteration, self.iterations)]
        return here[-1] if here else ""

    def _stop(self, state: str) -> None:
        self.dispatcher.abandon()
        # An evaluation under way cannot be carried over, but the state it began from can: a few iterations are computed
        # again.
        due = replace(self._pending.state, evaluation_due=True) if self._pending else self._snapshot()
        self._pending = None
        self._status(state, now=True)
        self._callbacks.end(state)
        self.journal.sync()
        self._save_last(due)
        again = "" if due.iteration == self.iteration else (
            f" (the validation under way there is begun again, and iterations up to {self.iteration} with it)"
        )  # fmt: skip
        self.monitor.message(f"checkpoint at iteration {due.iteration} in {self.directory}{again}; {self._how()}")

    def _how(self) -> str:
        """What goes on from the last checkpoint."""
        command = (self.directory / "run.toml").exists()
        return ("`metafleet resume`" if command else "the same program, run again,") + " goes on from there"

    @retry(retry=retry_if_exception_type(OSError), stop=stop_after_attempt(3), wait=wait_fixed(1), reraise=True)
    def _save_last(self, state: State | None = None) -> None:
        """Nobody tries again after this one."""
        self._save(state or self._snapshot())

    def _save(self, state: State) -> None:
        self.lease.check()
        self.checkpoints.save(state)

    def _snapshot(self) -> State:
        return State(
            self.iteration, self.meta, self.state, next_ticket=self.ledger.next_ticket, attempt=self.lease.attempt,
            best=self._best, counts=dict(self.ledger.counts), facts=self._facts, work=self.stepper.work(self.iteration),
        )  # fmt: skip

    def _status(self, state: str, *, now: bool = False) -> None:
        self.monitor.status(
            state, self.iteration, now=now, attempt=self.lease.attempt, workers=self.roster.workers,
            nodes=self.roster.nodes, counts=self.ledger.counts, best=self._best,
            stopped_by=self._asked,
        )  # fmt: skip

    def _fleet_event(self, event: FleetEvent) -> None:
        self.journal.write("fleet", event=asdict(event))
        reason = event.detail.get("reason", "")
        self.monitor.event(self.iteration, f"{event.kind}: {event.worker} ({event.where}) {reason}".strip())
        self.roster.note(event)
