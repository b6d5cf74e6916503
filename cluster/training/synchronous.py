"""When to step: what a meta-iteration waits for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.record.checkpoint import Work
from cluster.training.dispatch import Dispatcher, Shards
from cluster.training.policy import Batch, Policy, Step, Stepper, logged, times
from learners.base import Meta, Outer, Params, Sum, pack


@dataclass(frozen=True)
class Synchronous(Policy):
    """Each round waits for the whole meta-batch; the result does not depend on the fleet."""

    backups: float = 0.0
    """A shard out for this many times its verb's median is given to a second worker that has nothing to do, and the
    first answer counts; 0: never. Numbers do not change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backups < 0:
            raise ValueError(f"backups={self.backups}: 0 or more wanted")

    def begin(self, outer: Outer, dispatcher: Dispatcher, batch: Batch, work: Work) -> Stepper:
        """Set to work; which shards are due follows from θ's version alone."""
        return Rounds(outer, dispatcher, batch)


@dataclass(frozen=True)
class Rounds:
    """Every step takes the whole of the next meta-batch, in as many rounds as the outer step wants."""

    outer: Outer
    dispatcher: Dispatcher
    batch: Batch

    def step(self, meta: Meta, state: Params, version: int) -> Step:
        begin, compute, busiest = time.perf_counter(), 0.0, 0.0
        metrics: dict[str, float] = {}
        tickets: list[int] = []
        shards = Shards("train", version * self.batch.shards * self.batch.size, self.batch.shards, self.batch.size)
        dispatcher, at = self.dispatcher, self.dispatcher.publish(pack(*meta))

        def reduce(verb: str, operand: Params | None, *, over: tuple[str, int] | None = None) -> Sum:
            nonlocal compute, busiest
            beside = dispatcher.publish(operand) if operand is not None else None
            asked = Shards(over[0], version * over[1], over[1], 1) if over else shards
            try:
                # An outer step with rounds of its own needs every part of them.
                round_ = dispatcher.start(verb, at, beside, asked, tolerated=0 if over else None)
                result = dispatcher.finish(round_)
            finally:
                if beside is not None:
                    dispatcher.release(beside)
            seconds = float(round_.busy.total())
            compute += seconds
            busiest += max(round_.busy.values(), default=0.0)
            # others were rejected: they have ended
            tickets.extend(t for t in round_.tickets if t in dispatcher.ledger.held)
            metrics[f"perf/{verb}_s"] = metrics.get(f"perf/{verb}_s", 0.0) + seconds
            metrics.update(logged(result))
            return result

        try:
            meta, state, own = self.outer.step(meta, state, reduce)
        finally:
            dispatcher.release(at)
        metrics |= (
            own
            | times(metrics, time.perf_counter() - begin, compute, shards.count * shards.size)
            | {"perf/busiest_s": busiest}
        )
        return Step(meta, state, metrics, tickets)

    def work(self, version: int) -> Work:
        return Work(version * self.batch.shards)


DEFAULT: Policy = Synchronous()
