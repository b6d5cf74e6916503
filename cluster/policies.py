"""When to step: what a meta-iteration waits for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.dispatch import Dispatcher, Shards
from learners.base import CARRIED, GROUP, Meta, Outer, Params, Sum, pack


@dataclass(frozen=True)
class Step:
    """One outer step: where it led, what it was made of, and scalars to log."""

    meta: Meta
    state: Params
    metrics: dict[str, float]
    tickets: list[int] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    """What the journal says of it besides."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Numbers to show as a histogram."""


@dataclass(frozen=True)
class Work:
    """Where a policy stands in the endless row of training shards: what a checkpoint must remember of it."""

    following: int = 0
    """The first shard that was never asked for."""
    again: tuple[int, ...] = ()
    """Shards before it that are not in θ."""


@dataclass(frozen=True)
class Batch:
    """How training tasks are cut up: `shards` of `size` tasks make a meta-batch."""

    shards: int
    size: int
    families: tuple[str, ...] = ()
    """Names of the kinds of tasks, where they are told apart."""


class Stepper(Protocol):
    """A policy at work in one run."""

    def step(self, meta: Meta, state: Params, version: int) -> Step:
        """The step that leads from version to version + 1."""

    def work(self, version: int) -> Work:
        """What is left to do, θ being at `version`."""


@dataclass(frozen=True)
class Deadlines:
    """When a shard is late: its worker is then killed and replaced, and the shard goes to another one."""

    factor: float = 10.0
    """A shard is late after this many times the median time of its verb,"""
    floor: float = 30.0
    """but not before this many seconds;"""
    first: float = 600.0
    """a worker's first shard of a verb, which may compile, after this many."""


class Policy(Protocol):
    """Decides what an outer step waits for."""

    @property
    def deadlines(self) -> Deadlines:
        """When a shard is late."""

    @property
    def max_attempts(self) -> int:
        """Attempts at a shard before the run stops."""

    @property
    def max_rejected(self) -> float:
        """Share of a round that may be rejected as not finite before the run stops."""

    @property
    def quarantine(self) -> int:
        """Workers that may die of a shard before it is given up."""

    @property
    def backups(self) -> float:
        """A shard out for this many times its verb's median is given to a second worker that has nothing to do; 0: never."""

    def check(self, outer: Outer) -> None:
        """Raise ValueError for an outer step that it cannot serve."""

    def begin(self, outer: Outer, dispatcher: Dispatcher, batch: Batch, work: Work) -> Stepper:
        """Set to work, where `work` was left."""


@dataclass(frozen=True)
class Limits:
    """What a policy puts up with."""

    deadlines: Deadlines = Deadlines()
    """When a shard is late."""
    max_attempts: int = 5
    """Attempts at a shard before the run stops."""
    max_rejected: float = 0.1
    """Share of a round (asynchronously: of the last hundred shards) that may be rejected as not finite before the run stops."""
    quarantine: int = 3
    """Workers that may die of a shard before it is given up."""

    def __post_init__(self) -> None:
        if self.quarantine < 1:
            raise ValueError(f"quarantine={self.quarantine}: at least 1 wanted")
        if self.max_attempts < 1 or not 0 <= self.max_rejected <= 1:
            raise ValueError(
                f"max_attempts={self.max_attempts}, max_rejected={self.max_rejected}: at least 1 and a share from 0 to 1 wanted"
            )


@dataclass(frozen=True)
class Synchronous(Limits):
    """Each round waits for the whole meta-batch; the result does not depend on the fleet."""

    backups: float = 0.0
    """A shard out for this many times its verb's median is given to a second worker that has nothing to do, and the first answer
    counts; 0: never. Numbers do not change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backups < 0:
            raise ValueError(f"backups={self.backups}: 0 or more wanted")

    def check(self, outer: Outer) -> None:
        """Any number of rounds will do."""

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
            tickets.extend(t for t in round_.tickets if t in dispatcher.ledger.held)  # others were rejected: they have ended
            metrics[f"perf/{verb}_s"] = metrics.get(f"perf/{verb}_s", 0.0) + seconds
            metrics.update(logged(result))
            return result

        try:
            meta, state, own = self.outer.step(meta, state, reduce)
        finally:
            dispatcher.release(at)
        metrics |= own | times(metrics, time.perf_counter() - begin, compute, shards.count * shards.size) | {"perf/busiest_s": busiest}
        return Step(meta, state, metrics, tickets)

    def work(self, version: int) -> Work:
        return Work(version * self.batch.shards)


SUMMED = ("perf/", "count/")


def logged(result: Sum) -> dict[str, float]:
    """Means over tasks; sums of what is time (`perf/…`) or is counted (`count/…`)."""
    rows = {name: values.double() for name, values in result.rows.items() if name != GROUP and not name.startswith(CARRIED)}
    return {
        name if name.startswith(SUMMED) else f"train/{name}": float(v.sum() if name.startswith(SUMMED) else v.mean())
        for name, v in rows.items()
    }


def times(metrics: dict[str, float], seconds: float, compute: float, tasks: int) -> dict[str, float]:
    """Times of a step, and rates of all that was counted, which leaves `metrics`."""
    counted = {"tasks": float(tasks)} | {
        name.removeprefix("count/"): metrics.pop(name) for name in list(metrics) if name.startswith("count/")
    }
    rates = {f"perf/{name}_per_s": number / seconds for name, number in counted.items()}
    return {"perf/iteration_s": seconds, "perf/compute_s": compute} | rates


def idle(workers: int, metrics: dict[str, float]) -> dict[str, float]:
    """What became of the workers' time in which they did not compute, in seconds summed over them.

    Waiting: until the busiest worker of each round was done; a step without rounds has none. Communication: the rest, in which messages
    travel and the driver works.
    """
    compute = metrics["perf/compute_s"]
    # What a worker computed before it was lost in this step is counted, the worker is not: the difference may be less than nothing.
    waiting = max(0.0, workers * metrics.get("perf/busiest_s", 0.0) - compute)
    return {"perf/waiting_s": waiting, "perf/communication_s": workers * metrics["perf/iteration_s"] - compute - waiting}


DEFAULT: Policy = Synchronous()
