"""Whom a pool gives a shard: whoever remembers its tasks, the least busy, or someone else than last time. No Ray."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TypeVar

from cluster.fleet.messages import Assignment

K = TypeVar("K", bound=Hashable)

IN_FLIGHT = 2  # per worker: one computing, one waiting, so that a worker never waits for the driver
# As many where the worker has run just these tasks before: what it remembers of them saves more than waiting costs.
STICKY = 4
REMEMBERED = 4096


class Placement:
    """Remembers who ran what, and decides whom to ask."""

    def __init__(self) -> None:
        self._ran: OrderedDict[tuple[str, int, int], str] = OrderedDict()  # task range → who last ran it
        self._asked: OrderedDict[int, str] = OrderedDict()  # ticket → who was last asked

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

    def answered(self, worker: str, assignment: Assignment) -> None:
        """A worker finished a shard: it remembers these tasks."""
        _remember(self._ran, (assignment.split, assignment.start, assignment.stop), worker)


def _remember(table: OrderedDict[K, str], key: K, worker: str) -> None:
    table[key] = worker
    while len(table) > REMEMBERED:
        table.popitem(last=False)
