"""What a policy is, and what it says of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.fleet.deadlines import Deadlines
from cluster.record.checkpoint import Work
from cluster.training.dispatch import Dispatcher
from learners.base import CARRIED, GROUP, Meta, Outer, Params, Sum


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
class Policy(ABC):
    """Decides what an outer step waits for, and what is put up with until then."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    """When a shard is late."""
    max_attempts: int = 5
    """Attempts at a shard before the run stops."""
    max_rejected: float = 0.1
    """Share of a round (asynchronously: of the last hundred shards) that may be rejected as not finite before the run
    stops."""
    quarantine: int = 3
    """Workers that may die of a shard before it is given up."""

    def __post_init__(self) -> None:
        if self.quarantine < 1:
            raise ValueError(f"quarantine={self.quarantine}: at least 1 wanted")
        if self.max_attempts < 1 or not 0 <= self.max_rejected <= 1:
            raise ValueError(
                f"max_attempts={self.max_attempts}, max_rejected={self.max_rejected}: at least 1 and a share from 0 to "
                "1 wanted"
            )

    @property
    def backups(self) -> float:
        """A shard out for this many times its verb's median is given to a second worker that has nothing to do; 0:
        never.
        """
        return 0.0

    def check(self, outer: Outer) -> None:  # noqa: B027 - most policies serve every outer step
        """Raise ValueError for an outer step that it cannot serve."""

    @abstractmethod
    def begin(self, outer: Outer, dispatcher: Dispatcher, batch: Batch, work: Work) -> Stepper:
        """Set to work, where `work` was left."""


SUMMED = ("perf/", "count/")


def logged(result: Sum) -> dict[str, float]:
    """Means over tasks; sums of what is time (`perf/…`) or is counted (`count/…`)."""
    rows = {
        name: values.double() for name, values in result.rows.items() if name != GROUP and not name.startswith(CARRIED)
    }
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

    Waiting: until the busiest worker of each round was done; a step without rounds has none. Communication: the rest,
    in which messages travel and the driver works.
    """
    compute = metrics["perf/compute_s"]
    # What a worker computed before it was lost in this step is counted, the worker is not: the difference may be less
    # than nothing.
    waiting = max(0.0, workers * metrics.get("perf/busiest_s", 0.0) - compute)
    return {
        "perf/waiting_s": waiting,
        "perf/communication_s": workers * metrics["perf/iteration_s"] - compute - waiting,
    }
