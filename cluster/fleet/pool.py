"""Where assignments run. `LocalPool` runs them in this process: the reference, and the debugger."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from cluster.fleet import wire
from cluster.fleet.machine import environment, whereabouts
from cluster.fleet.messages import Assignment, Broadcast, Event, FleetEvent
from cluster.fleet.recipe import Recipe
from cluster.fleet.worker import Worker
from learners.base import Params


class Pool(Protocol):
    """The driver's view of a fleet. It cannot tell one kind from another."""

    def publish(self, value: Params) -> int:
        """Broadcast `value`; the handle by which assignments name it. Handles grow."""

    def release(self, handle: int) -> None:
        """No open assignment names `handle` any more."""

    def free(self) -> int:
        """How many more assignments the fleet takes now."""

    def submit(self, assignment: Assignment) -> None:
        """Have one worker run `assignment`. A retry (attempt > 0) goes to another worker where there is one."""

    def poll(self, timeout: float) -> list[Event]:
        """What happened; waits up to `timeout` seconds for the first event."""

    def close(self) -> None:
        """Give all resources back."""


class LocalPool:
    """One worker in this process, through the same encoding as a remote one."""

    def __init__(self, recipe: Recipe) -> None:
        self._worker = Worker(recipe, "local")
        self._values: dict[int, Broadcast] = {}
        self._next = 0
        self._waiting: deque[tuple[Assignment, Broadcast, Broadcast | None]] = deque()
        self._events: list[Event] = [FleetEvent("joined", "local", whereabouts(), environment())]

    def publish(self, value: Params) -> int:
        self._next += 1
        self._values[self._next] = wire.broadcast(value)
        return self._next

    def release(self, handle: int) -> None:
        del self._values[handle]

    def free(self) -> int:
        return 2 - len(self._waiting)

    def submit(self, assignment: Assignment) -> None:
        operand = self._values[assignment.operand] if assignment.operand is not None else None
        self._waiting.append((assignment, self._values[assignment.at], operand))

    def poll(self, timeout: float) -> list[Event]:
        events, self._events = self._events, []
        if self._waiting:
            assignment, at, operand = self._waiting.popleft()
            header, vector = self._worker.run(wire.encode_assignment(assignment), at, operand)
            events.append(wire.decode_sum(header, vector))
        return events

    def close(self) -> None:
        self._values.clear()
