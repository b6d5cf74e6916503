"""A pool of Ray actors: in flight, deadlines, replacement of those that die or fall silent."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from cluster.fleet import ray_fleet, wire
from cluster.fleet.deadlines import Deadlines, Patience
from cluster.fleet.machine import data_files, environment, whereabouts
from cluster.fleet.messages import Assignment, Broadcast, Contribution, Event, Failure, FleetEvent, RunStopped
from cluster.fleet.placement import IN_FLIGHT, Placement
from cluster.fleet.ray_fleet import FETCH_SECONDS, Adders, Remote, cause
from cluster.fleet.recipe import Recipe
from cluster.fleet.worker import Worker
from envs import store
from learners.base import Params

log = logging.getLogger("metafleet")

START_SECONDS = 300.0  # without a single worker ready for this long, the pool gives up
LONGEST_BACKOFF = 30.0
NODES_EVERY = 5.0  # seconds between looks at the cluster's nodes
RETURNED_INLINE = 100 << 10  # bytes of a result that Ray sends with the answer, not by the object store
INLINE = 256 << 10  # bytes of a broadcast that is sent with the first call of each worker, not by the object store


class _Actor:
    """The remote end: a Worker, plus what is needed before there can be one."""

    def __init__(self, recipe: Recipe, name: str, slower: float = 1.0) -> None:
        self._recipe, self._name, self._slower = recipe, name, slower
        self._worker: Worker | None = None

    def hello(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """Where this is, its environment, and the data files of its node."""
        return whereabouts(), environment(), data_files(self._recipe.tasks)

    def install(self, file: str, content: NDArray[np.uint8]) -> None:
        """Write a data file that the driver sent."""
        store.install(file, lambda path: path.write_bytes(content.tobytes()))

    def run(self, message: bytes, at: Broadcast | None, operand: Broadcast | None) -> tuple[bytes, NDArray[Any]]:
        self._worker = self._worker or Worker(self._recipe, self._name, self._slower)
        return self._worker.run(message, at, operand)


@dataclass
class _Member:
    """The driver's end of an actor."""

    name: str
    handle: Any
    hello: Any
    where: str = ""
    ready: bool = False
    tickets: deque[tuple[Assignment, Any]] = field(default_factory=deque)  # in the order they run
    since: float = 0.0
    """When the first of `tickets` began to run."""
    holds: set[int] = field(default_factory=set)
    """Handles of the broadcasts it was sent."""


class RayPool:
    """Workers as Ray actors, on whatever nodes the cluster has.

    An actor that dies, or whose code raises, is replaced, with growing pauses if that goes on. Ray never notices one
    that is frozen, so every assignment has a deadline (`limits`); a worker that passes it is killed and replaced.
    Ray's own restarts and retries are off: whether work is repeated is the driver's decision.
    """

    actor: type = _Actor
    """The remote end."""

    def __init__(self, recipe: Recipe, workers: int = 2, *, least: int = 1, cpus_per_worker: float = 1.0,
                 gpus_per_worker: float = 0.0, address: str = "local", sums: Literal["driver", "fleet"] = "driver",
                 limits: Deadlines | None = None, straggler: float = 1.0,
                 variables: dict[str, str] | None = None) -> None:  # fmt: skip
        """`workers` is as many as there may be: those that the cluster has no room for start when it grows. With fewer
        than `least` no work is given out. With `sums` by the fleet, totals too large for the answer itself stay
        where they were made and are added there. `straggler`: how many times as long as it needs the first worker
        takes. `variables`: environment variables of the workers, where they should differ from the cluster's.
        """
        if not 1 <= least <= workers:
            raise ValueError(f"workers={workers}, of which at least {least}: 1 ≤ least ≤ workers wanted")
        self._least = least
        self._placement, self._patience = Placement(), Patience(limits or Deadlines())
        self._started = ray_fleet.join(address, workers * cpus_per_worker, workers * gpus_per_worker)
        options: dict[str, Any] = {
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if variables:
            options["runtime_env"] = {"env_vars": variables}
        self._class: Any = ray.remote(**options)(self.actor)
        self._apart, self._adders = sums == "fleet", Adders()
        self._nodes: dict[str, str] = {}
        self._looked = 0.0
        self._wanted = f"{workers} workers of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs"
        self._recipe = ray.put(recipe)
        self._files = data_files(recipe.tasks)
        self._values: dict[int, Any] = {}
        self._last_handle = self._last_name = 0
        self._actors: list[_Member] = []
        self._events: deque[Event] = deque()
        self._losses = 0
        self._respawn: list[float] = []
        # when some worker, and enough of them, were last seen ready
        self._ready_at = self._enough_at = time.monotonic()
        self._began = False  # whether some worker was ever ready
        self._sent: dict[str, Any] = {}
        self._straggler = straggler
        for _ in range(workers):
            self._spawn()

    def publish(self, value: Params) -> int:
        self._last_handle += 1
        message = wire.broadcast(value)
        # Small ones travel in the call itself, which spares the worker a visit to the object store.
        self._values[self._last_handle] = message if message[1].nbytes <= INLINE else ray.put(message)
        return self._last_handle

    def release(self, handle: int) -> None:
        del self._values[handle]

    def free(self) -> int:
        ready = [a for a in self._actors if a.ready]
        return sum(max(0, IN_FLIGHT - len(a.tickets)) for a in ready) if len(ready) >= self._least else 0

    def submit(self, assignment: Assignment) -> None:
        name = self._placement.choose(assignment, {a.name: len(a.tickets) for a in self._actors if a.ready})
        actor = next(a for a in self._actors if a.name == name)
        actor.holds = {h for h in actor.holds if h >= assignment.oldest}
        at, operand = self._unsent(actor, assignment.at), self._unsent(actor, assignment.operand)
        call = actor.handle.run.options(num_returns=2) if self._apart else actor.handle.run
        ref = call.remote(wire.encode_assignment(assignment), at, operand)
        if not actor.tickets:
            actor.since = time.monotonic()
        actor.tickets.append((assignment, ref))

    def poll(self, timeout: float) -> list[Event]:
        self._replace_lost()
        self._look()
        self._count()
        refs = [a.hello for a in self._actors if not a.ready] + [
            _first(ref) for a in self._actors for _, ref in a.tickets
        ]
        if refs and not self._events:
            ray.wait(refs, num_returns=1, timeout=self._wait(timeout))
        elif not refs:
            time.sleep(min(timeout, 0.05))
        # one call, however many actors
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        for actor in list(self._actors):
            self._greet(actor, done) if not actor.ready else self._collect(actor, done)
        self._check_deadlines()
        events = list(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        self._values.clear()
        self._adders.close()
        if self._started:
            ray.shutdown()

    def _count(self) -> None:
        """Note that workers are ready, and say every minute that they are too few."""
        ready, now = sum(a.ready for a in self._actors), time.monotonic()
        if ready:
            self._ready_at = now
        if ready >= self._least:
            self._enough_at = now
        elif self._began and now - self._enough_at > 60:
            log.warning("%d workers are ready, at least %d wanted: no work is given out", ready, self._least)
            self._enough_at = now

    def _spawn(self) -> None:
        self._last_name += 1
        name = f"worker-{self._last_name}"
        handle = self._class.remote(self._recipe, name, self._straggler if self._last_name == 1 else 1.0)
        self._actors.append(_Member(name, handle, handle.hello.remote()))

    def _greet(self, actor: _Member, done: set[Any]) -> None:
        """Take in a new actor once it answers, after sending it the data files that its node lacks."""
        if actor.hello not in done:
            if time.monotonic() - self._ready_at > START_SECONDS:
                has = ray_fleet.resources()
                text = f"no worker started within {START_SECONDS:.0f} s: {self._wanted} wanted, the cluster has {has}"
                raise RunStopped(text) if self._began else TimeoutError(text)
            return
        try:
            actor.where, facts, theirs = ray.get(actor.hello)
            missing = [file for file, version in self._files.items() if theirs.get(file) != version]
            ray.get([actor.handle.install.remote(file, self._file(file)) for file in missing], timeout=FETCH_SECONDS)
        except RayTaskError as error:
            if not self._began:
                raise RuntimeError(f"worker {actor.name} could not start: {cause(error)}") from error
            self._lose(actor, "error", f"could not start: {cause(error)}")  # this node's trouble, not the run's
        except RayError as error:
            self._lose(actor, "died", cause(error))
        else:
            actor.ready = self._began = True
            self._events.append(FleetEvent("joined", actor.name, actor.where, facts))

    def _file(self, file: str) -> Any:
        """A data file as a reference, sent once however many workers lack it."""
        if file not in self._sent:
            self._sent[file] = ray.put(np.frombuffer((store.data_folder() / file).read_bytes(), np.uint8))
        return self._sent[file]

    def _collect(self, actor: _Member, done: set[Any]) -> None:
        while actor.tickets and _first(actor.tickets[0][1]) in done:
            assignment, ref = actor.tickets[0]
            try:
                answer = self._answer(ref)
            except RayTaskError as error:
                # Perhaps the work is at fault, perhaps this process or its node: another process will tell.
                self._lose(actor, "error", cause(error))
                return
            except RayError as error:
                self._lose(actor, "died", cause(error))
                return
            else:
                self._events.append(answer)
                self._placement.answered(actor.name, assignment)
                self._patience.answered(actor.name, assignment.verb, answer.seconds)
                self._losses = 0
            actor.tickets.popleft()
            actor.since = time.monotonic()

    def _answer(self, ref: Any) -> Contribution:
        """The answer of a finished call; where sums are the fleet's, without a vector that is large and finite."""
        if not self._apart:
            return wire.decode_sum(*ray.get(ref, timeout=FETCH_SECONDS))
        header, vector = ray.get(ref[0], timeout=FETCH_SECONDS), ref[1]
        answer = wire.decode_sum(header, Remote((vector,), self._adders))
        if answer.finite and 2 * wire.size(answer.layout) > RETURNED_INLINE:
            return answer
        return wire.decode_sum(header, ray.get(vector, timeout=FETCH_SECONDS))

    def _look(self) -> None:
        """Tell of nodes that came or went."""
        if time.monotonic() - self._looked < NODES_EVERY:
            return
        self._looked = time.monotonic()
        now = ray_fleet.nodes()
        for node, address in now.items() - self._nodes.items():
            self._events.append(FleetEvent("node joined", node[:8], address, {}))
        for node, address in self._nodes.items() - now.items():
            self._events.append(FleetEvent("node lost", node[:8], address, {"reason": "Ray no longer counts it"}))
        self._nodes = now

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for actor in list(self._actors):
            if actor.tickets and now - actor.since > self._deadline(actor):
                allowed = self._deadline(actor)
                # Finished while we looked elsewhere? Then it is not late.
                if not ray.wait([_first(actor.tickets[0][1])], timeout=0)[0]:
                    self._lose(actor, "late", f"no answer for {allowed:.1f} s")

    def _deadline(self, actor: _Member) -> float:
        return self._patience.deadline(actor.name, actor.tickets[0][0].verb)

    def _wait(self, timeout: float) -> float:
        """Seconds to wait for an answer before some deadline passes."""
        now = time.monotonic()
        return max(0.0, min([timeout, *(a.since + self._deadline(a) - now for a in self._actors if a.tickets)]))

    def _lose(self, actor: _Member, kind: Literal["died", "late", "error"], reason: str) -> None:
        """Kill an actor, report its work as failed, and have it replaced."""
        self._actors.remove(actor)
        self._patience.lost(actor.name)
        ray.kill(actor.handle)
        for position, (assignment, _) in enumerate(actor.tickets):
            blamed = kind if position == 0 else "died"  # only the first was running
            self._events.append(
                Failure(assignment.ticket, assignment.attempt, actor.name, blamed, reason, position == 0)
            )
        self._events.append(
            FleetEvent("lost" if actor.ready else "failed", actor.name, actor.where, {"reason": reason})
        )
        # The first loss is replaced at once; a row of losses, without an answer in between, ever more slowly.
        pause = min(LONGEST_BACKOFF, 0.5 * 2.0 ** (self._losses - 1)) if self._losses else 0.0
        self._losses += 1
        self._respawn.append(time.monotonic() + pause)

    def _replace_lost(self) -> None:
        now = time.monotonic()
        due = [t for t in self._respawn if t <= now]
        self._respawn = [t for t in self._respawn if t > now]
        for _ in due:
            self._spawn()

    def _unsent(self, actor: _Member, handle: int | None) -> Any:
        """The broadcast of `handle`, unless this actor was sent it before: its calls run in order, and it remembers."""
        if handle is None or handle in actor.holds:
            return None
        actor.holds.add(handle)
        return self._values[handle]


def _first(ref: Any) -> Any:
    """What to wait for: all returns of a call come at once."""
    return ref[0] if isinstance(ref, list) else ref
