"""When a shard is late: a rule on how long shards took lately."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

MEASURED = 64  # shard times per verb that a median is taken of


@dataclass(frozen=True)
class Deadlines:
    """When a shard is late: its worker is then killed and replaced, and the shard goes to another one."""

    factor: float = 10.0
    """A shard is late after this many times the median time of its verb,"""
    floor: float = 30.0
    """but not before this many seconds;"""
    first: float = 600.0
    """a worker's first shard of a verb, which may compile, after this many."""


class Usual:
    """Medians of what shards took lately, by verb: for deadlines, and for the dispatcher's backup copies."""

    def __init__(self) -> None:
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MEASURED))

    def add(self, verb: str, seconds: float) -> None:
        """One more shard."""
        self._times[verb].append(seconds)

    def of(self, verb: str) -> float | None:
        """The median; None before the first."""
        return statistics.median(self._times[verb]) if verb in self._times else None


class Patience:
    """How long to wait for a worker's shard, learnt from answers."""

    def __init__(self, limits: Deadlines) -> None:
        self._limits, self._usual = limits, Usual()
        # worker → verbs it has run: their next shard needs no compilation
        self._known: defaultdict[str, set[str]] = defaultdict(set)

    def answered(self, worker: str, verb: str, seconds: float) -> None:
        """A worker finished a shard, in so many seconds of its own."""
        if verb in self._known[worker]:
            self._usual.add(verb, seconds)
        self._known[worker].add(verb)

    def lost(self, worker: str) -> None:
        """There is no such worker any more."""
        self._known.pop(worker, None)

    def deadline(self, worker: str, verb: str) -> float:
        """Seconds that a worker may take for a shard of a verb."""
        usual = self._usual.of(verb)
        if verb not in self._known[worker] or usual is None:
            return self._limits.first
        return max(self._limits.floor, self._limits.factor * usual)
