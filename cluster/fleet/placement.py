"""What a pool remembers of its workers: who ran what, how long shards take, hence when one is late. No Ray."""

from __future__ import annotations

import statistics
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cluster.fleet.messages import Assignment

K = TypeVar("K", bound=Hashable)

IN_FLIGHT = 2  # per worker: one computing, one waiting, so that a worker never waits for the driver
# as many where the worker has run just these tasks before: what it remembers of them saves more than waiting costs
STICKY = 4
REMEMBERED = 4096
MEASURED = 64  # shard times per verb that the median is taken of


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
    """Medians of what shards took lately, by verb."""

    def __init__(self) -> None:
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MEASURED))

    def add(self, verb: str, seconds: float) -> None:
        """One more shard."""
        self._times[verb].append(seconds)

    def of(self, verb: str) -> float | None:
        """The median; None before the first."""
        return statistics.median(self._times[verb]) if verb in self._times else None


class Experience:
    """Learns from answers; decides whom to ask, and for how long to wait."""

    def __init__(self, limits: Deadlines) -> None:
        self._limits = limits
        self._ran: OrderedDict[tuple[str, int, int], str] = OrderedDict()  # task range → who last ran it
        self._asked: OrderedDict[int, str] = OrderedDict()  # ticket → who was last asked
        # worker → verbs it has run: their next shard needs no compilation
        self._known: defaultdict[str, set[str]] = defaultdict(set)
        self._usual = Usual()

    def choose(self, assignment: Assignment, loads: Mapping[str, int]) -> str:
        """Whom to give `assignment`, of workers with so many shards each; at least one must have room."""
        able = [w for w, load in loads.items() if load < IN_FLIGHT]
        if assignment.attempt:
            # Whoever was asked last may be what is wrong.
            able = [w for w in able if w != self._asked.get(assignment.ticket)] or able
        else:
            before = self._ran.get((assignment.split, assignment.start, assignment.stop))
            able = [before] if before is not None and loads.get(before, STICKY) < STICKY else able
        chosen = min(able, key=lambda w: loads[w])
        _remember(self._asked, assignment.ticket, chosen)
        return chosen

    def answered(self, worker: str, assignment: Assignment, seconds: float) -> None:
        """A worker finished a shard, in so many seconds of its own."""
        if assignment.verb in self._known[worker]:
            self._usual.add(assignment.verb, seconds)
        self._known[worker].add(assignment.verb)
        _remember(self._ran, (assignment.split, assignment.start, assignment.stop), worker)

    def lost(self, worker: str) -> None:
        """There is no such worker any more."""
        self._known.pop(worker, None)

    def deadline(self, worker: str, verb: str) -> float:
        """Seconds that a worker may take for a shard of a verb."""
        usual = self._usual.of(verb)
        if verb not in self._known[worker] or usual is None:
            return self._limits.first
        return max(self._limits.floor, self._limits.factor * usual)


def _remember(table: OrderedDict[K, str], key: K, worker: str) -> None:
    table[key] = worker
    while len(table) > REMEMBERED:
        table.popitem(last=False)
