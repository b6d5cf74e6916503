"""When to step: what a meta-iteration waits for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from cluster.dispatch import Dispatcher, Shards
from learners.base import Meta, Outer, Params, Sum, pack


@dataclass(frozen=True)
class Step:
    """One outer step: where it led, what it was made of, and scalars to log."""

    meta: Meta
    state: Params
    metrics: dict[str, float]
    tickets: list[int] = field(default_factory=list)


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

    def step(self, outer: Outer, meta: Meta, state: Params, dispatcher: Dispatcher, batch: Shards) -> Step:
        """One step of `outer` over the tasks of `batch`."""


@dataclass(frozen=True)
class Synchronous:
    """Each round waits for the whole meta-batch; the result does not depend on the fleet."""

    deadlines: Deadlines = Deadlines()
    """When a shard is late."""
    max_attempts: int = 5
    """Attempts at a shard before the run stops."""
    max_rejected: float = 0.1
    """Share of a round that may be rejected as not finite before the run stops."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or not 0 <= self.max_rejected <= 1:
            raise ValueError(
                f"max_attempts={self.max_attempts}, max_rejected={self.max_rejected}: at least 1 and a share from 0 to 1 wanted"
            )

    def step(self, outer: Outer, meta: Meta, state: Params, dispatcher: Dispatcher, batch: Shards) -> Step:
        """One step of `outer` over the tasks of `batch`."""
        begin, compute = time.perf_counter(), 0.0
        metrics: dict[str, float] = {}
        tickets: list[int] = []
        at = dispatcher.publish(pack(*meta))

        def reduce(verb: str, operand: Params | None) -> Sum:
            nonlocal compute
            beside = dispatcher.publish(operand) if operand is not None else None
            try:
                round_ = dispatcher.start(verb, at, beside, batch)
                result = dispatcher.finish(round_)
            finally:
                if beside is not None:
                    dispatcher.release(beside)
            compute += round_.seconds
            tickets.extend(round_.tickets)
            metrics[f"perf/{verb}_s"] = metrics.get(f"perf/{verb}_s", 0.0) + round_.seconds
            metrics.update(_logged(result))
            return result

        try:
            meta, state, own = outer.step(meta, state, reduce)
        finally:
            dispatcher.release(at)
        seconds = time.perf_counter() - begin
        counted = {"tasks": float(batch.count * batch.size)} | {
            name.removeprefix("count/"): metrics.pop(name) for name in list(metrics) if name.startswith("count/")
        }
        metrics |= own | {"perf/iteration_s": seconds, "perf/compute_s": compute}
        metrics |= {f"perf/{name}_per_s": number / seconds for name, number in counted.items()}
        return Step(meta, state, metrics, tickets)


def _logged(result: Sum) -> dict[str, float]:
    """Means over tasks; sums of what is time (`perf/…`) or is counted (`count/…`)."""
    rows = {name: values.double() for name, values in result.rows.items()}
    return {
        name if name.startswith(SUMMED) else f"train/{name}": float(v.sum() if name.startswith(SUMMED) else v.mean())
        for name, v in rows.items()
    }


SUMMED = ("perf/", "count/")

DEFAULT: Policy = Synchronous()
