"""Getting shards done by a fleet that may fail: submit, collect, retry, judge."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cluster.fleet.deadlines import Usual
from cluster.fleet.messages import Assignment, Contribution, Event, Failure, FleetEvent, Lost, RunStopped
from cluster.fleet.pool import Pool
from cluster.training.aggregate import Tree, is_finite
from cluster.training.ledger import Ledger
from envs.base import HELD_OUT
from learners.base import CARRIED, Params, Sum

log = logging.getLogger("metafleet")


@dataclass(frozen=True)
class Shards:
    """`count` consecutive shards of `size` tasks, from task `start` of `split`."""

    split: str
    start: int
    count: int
    size: int


class Round:
    """One verb over some shards; `total()` once `done`."""

    def __init__(self, verb: str, at: int, operand: int | None, shards: Shards, tolerated: float) -> None:
        """`tolerated`: how many shards may be rejected before the run stops."""
        self.verb, self.at, self.operand, self.shards, self.tolerated = verb, at, operand, shards, tolerated
        self.busy: Counter[str] = Counter()
        """Seconds that each worker spent on it."""
        self.clear()

    def clear(self) -> None:
        """Begin from nothing."""
        self.tickets: dict[int, int] = {}  # ticket → shard index
        self.tree = Tree(self.shards.count)
        self.rejected = 0
        self.culprits: list[str] = []
        """Of those rejected as not finite."""

    @property
    def done(self) -> bool:
        return self.tree.done

    def total(self) -> Sum:
        """Σ over the shards. Raises Lost where a part that stayed elsewhere is gone."""
        return self.tree.total()


class Dispatcher:
    """Turns rounds into assignments, and events into answers.

    A failed attempt is repeated, up to `max_attempts` in all. An answer that is not finite is computed once more,
    elsewhere if possible: the same again means that the tasks do it, so they are rejected; something else means
    that a worker is broken, and is counted as corruption.
    """

    def __init__(self, pool: Pool, ledger: Ledger, *, max_attempts: int = 5, max_rejected: float = 0.1,
                 quarantine: int = 3, backups: float = 0.0,
                 on_event: Callable[[FleetEvent], None] = lambda event: None,
                 interrupted: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
        self.pool, self.ledger = pool, ledger
        self.max_attempts, self.max_rejected, self.quarantine, self.backups = (
            max_attempts,
            max_rejected,
            quarantine,
            backups,
        )
        self._on_event, self._interrupted = on_event, interrupted
        self._queues: tuple[deque[Assignment], deque[Assignment]] = (deque(), deque())  # training, background
        self._rounds: dict[int, Round] = {}  # open ticket → its round
        self._background: set[int] = set()
        self._suspects: dict[int, bytes] = {}  # ticket → digest of a non-finite first answer
        self._handles: set[int] = set()
        self._lost = 0  # sums in a row
        self._background_last = False
        self._killed: Counter[int] = Counter()  # ticket → workers that died while at it
        self._since: dict[int, float] = {}  # ticket → when it first went out
        self._usual = Usual()  # from going out to the answer
        self.shares: Counter[str] = Counter()
        """Answers by worker, since it was last cleared."""

    def publish(self, value: Params) -> int:
        """Broadcast `value` to the fleet."""
        handle = self.pool.publish(value)
        self._handles.add(handle)
        return handle

    def release(self, handle: int) -> None:
        """Take a broadcast back."""
        self._handles.discard(handle)
        self.pool.release(handle)

    def idle(self) -> int:
        """How many more training shards would begin at once; background shards that wait get every other slot."""
        training, background = self._queues
        return self.pool.free() - len(training) - int(bool(background) and not self._background_last)

    def start(self, verb: str, at: int, operand: int | None, shards: Shards, *, background: bool = False,
              tolerated: float | None = None) -> Round:  # fmt: skip
        """Queue a round. Background rounds are submitted only while no other assignment waits."""
        started = Round(verb, at, operand, shards, self.max_rejected * shards.count if tolerated is None else tolerated)
        self._ask(started, background)
        return started

    def _ask(self, round_: Round, background: bool = False) -> None:
        """Queue all shards of a round."""
        shards = round_.shards
        for index in range(shards.count):
            first = shards.start + index * shards.size
            ticket, self.ledger.next_ticket = self.ledger.next_ticket, self.ledger.next_ticket + 1
            round_.tickets[ticket] = index
            self._rounds[ticket] = round_
            if background:
                self._background.add(ticket)
            self._enqueue(
                Assignment(
                    ticket, 0, round_.verb, round_.at, round_.operand, shards.split, first, first + shards.size, 0
                )
            )

    def _repeat(self, round_: Round, reason: str) -> None:
        """Ask for a whole round again: part of its sum was lost after it had arrived."""
        log.warning(
            "%r of tasks from %d on: %s; asking for all of them again", round_.verb, round_.shards.start, reason
        )
        for ticket in round_.tickets:
            if ticket in self.ledger.held:
                self.ledger.drop(ticket, reason)
        round_.clear()
        self._ask(round_)

    def finish(self, wanted: Round) -> Sum:
        """Work until `wanted` is done. Raises RunStopped where it cannot be, KeyboardInterrupt where asked to stop."""
        while True:
            while not wanted.done:
                self.pump(1.0)
            try:
                return self.collect(wanted)
            except Lost as error:
                self._repeat(wanted, str(error))

    def collect(self, done: Round) -> Sum:
        """The sum of a round that is done. Raises Lost where it stayed elsewhere and is gone, RunStopped where that
        goes on and on.
        """
        try:
            total = done.total()
        except Lost as error:
            self._lost += 1
            if self._lost >= self.max_attempts:
                raise RunStopped(
                    f"{self._lost} sums in a row were lost where they were made; the last time: {error}"
                ) from error
            raise
        self._lost = 0
        return total

    @property
    def queued(self) -> int:
        """Assignments that wait for a free worker."""
        return sum(map(len, self._queues))

    def pump(self, timeout: float) -> None:
        """Submit what the fleet takes, then handle what comes back within `timeout` seconds."""
        if self._interrupted():
            raise KeyboardInterrupt
        while any(self._queues) and self.pool.free() > 0:
            self._background_last = not self._queues[0]
            assignment = self._queues[self._background_last].popleft()
            if assignment.ticket in self._rounds:  # else an earlier attempt was answered after all
                self._send(assignment)
        self._back_up()
        for event in self.pool.poll(timeout):
            self._handle(event)

    def abandon(self) -> None:
        """Forget everything queued and open."""
        self.ledger.abandon()
        for queue in self._queues:
            queue.clear()
        self._rounds.clear()
        self._background.clear()
        self._suspects.clear()
        self._since.clear()

    def _send(self, assignment: Assignment) -> None:
        assignment = replace(assignment, oldest=min(self._handles, default=0))
        self.ledger.dispatch(assignment)
        self._since.setdefault(assignment.ticket, time.monotonic())
        self.pool.submit(assignment)

    def _enqueue(self, assignment: Assignment) -> None:
        queue = self._queues[assignment.ticket in self._background]
        if assignment.attempt:
            queue.appendleft(assignment)
        else:
            queue.append(assignment)

    def _handle(self, event: Event) -> None:
        if isinstance(event, FleetEvent):
            self._on_event(event)
        elif self.ledger.is_open(event.ticket):
            if isinstance(event, Failure):
                self._retry(event)
            else:
                self._judge(event)

    def _retry(self, failure: Failure) -> None:
        assignment = self.ledger.open[failure.ticket]
        where = _tasks(assignment)
        self._killed[failure.ticket] += failure.running and failure.kind != "error"
        if self._killed[failure.ticket] >= self.quarantine:
            self._quarantine(failure, where)
            return
        if failure.attempt != assignment.attempt:
            return  # a later attempt is under way
        if assignment.attempt + 1 >= self.max_attempts:
            raise RunStopped(
                f"{where} failed {self.max_attempts} times; the last time on {failure.worker}: {failure.reason}"
            )
        log.warning("%s: %s on %s (%s); trying again", where, failure.kind, failure.worker, failure.reason)
        self._enqueue(replace(assignment, attempt=assignment.attempt + 1))

    def _quarantine(self, failure: Failure, where: str) -> None:
        round_ = self._close(failure.ticket)
        self.ledger.quarantine(
            failure.ticket, f"{self.quarantine} workers died of it, the last one {failure.worker}: {failure.reason}"
        )
        log.error("%s killed %d workers (the last one %s: %s): in quarantine, the run goes on without them",
                  where, self.quarantine, failure.worker, failure.reason)  # fmt: skip
        self._go_without(round_, failure.ticket, f"{where} kill workers")

    def _back_up(self) -> None:
        """Copies of shards that are late, where a worker has nothing to do; the first answer counts."""
        if not self.backups or any(self._queues):
            return
        now = time.monotonic()
        for ticket, a in list(self.ledger.open.items()):
            if self.pool.free() <= 0:
                return
            usual = self._usual.of(a.verb) if a.attempt == 0 and a.split not in HELD_OUT else None
            if usual is not None and now - self._since[ticket] > self.backups * usual:
                self._send(replace(a, attempt=1))

    def _judge(self, answer: Contribution) -> None:
        ticket = answer.ticket
        if is_finite(answer):
            if ticket in self._suspects:
                self._corrupted(answer)
            self._settle(answer)
            return
        assert isinstance(answer.vector, np.ndarray)  # pools bring it here where it is not finite
        carried = [v.tobytes() for name, v in sorted(answer.rows.items()) if name.startswith(CARRIED)]
        digest = hashlib.sha256(b"".join([answer.vector.tobytes(), *carried])).digest()
        if ticket not in self._suspects:
            self._suspects[ticket] = digest
            assignment = self.ledger.open[ticket]
            self._enqueue(replace(assignment, attempt=assignment.attempt + 1))
        elif self._suspects[ticket] == digest:
            self._reject(answer)
        else:
            self._corrupted(answer)
            self._retry(
                Failure(
                    ticket,
                    self.ledger.open[ticket].attempt,
                    answer.worker,
                    "error",
                    "numbers that are not finite, and differ",
                )
            )

    def _corrupted(self, answer: Contribution) -> None:
        self.ledger.counts["corrupted"] += 1
        log.warning(
            "ticket %d gave different answers to the same work; the last worker was %s", answer.ticket, answer.worker
        )

    def _settle(self, answer: Contribution) -> None:
        verb, begun = self.ledger.open[answer.ticket].verb, self._since[answer.ticket]
        self._usual.add(verb, time.monotonic() - begun)
        self.shares[answer.worker] += 1
        round_ = self._close(answer.ticket)
        self.ledger.arrive(answer.ticket)
        round_.busy[answer.worker] += answer.seconds  # type: ignore[assignment]  # typeshed: counters count
        round_.tree.add(round_.tickets[answer.ticket], answer)

    def _reject(self, answer: Contribution) -> None:
        round_, why = self._close(answer.ticket), answer.culprit or "a number of the answer"
        a = self.ledger.open[answer.ticket]
        self.ledger.reject(answer.ticket, f"not finite, twice: {why}")
        log.warning("%s give numbers that are not finite, first of all in the %s; rejected", _tasks(a), why)
        round_.culprits.append(why)
        self._go_without(
            round_, answer.ticket,
            f"{round_.rejected + 1} of {round_.shards.count} shards of {a.verb!r} are not finite (more than "
            f"{self.max_rejected:.0%}): {advice(round_.culprits)}",
        )  # fmt: skip

    def _go_without(self, round_: Round, ticket: int, complaint: str) -> None:
        round_.rejected += 1
        round_.tree.reject(round_.tickets[ticket])
        if round_.rejected > round_.tolerated:
            raise RunStopped(complaint)

    def _close(self, ticket: int) -> Round:
        self._background.discard(ticket)
        self._suspects.pop(ticket, None)
        self._since.pop(ticket, None)
        self._killed.pop(ticket, None)
        return self._rounds.pop(ticket)


def advice(culprits: list[str]) -> str:
    """What was not finite in most of some shards, and what may help."""
    data = [c for c in culprits if c.startswith("data,")]
    if 2 * len(data) > len(culprits):
        return f"the first is in the {data[0]}: tasks whose arrays hold numbers wanted"
    return f"the first is in the {culprits[0]}: the run diverges; a smaller rate or gradient clipping may help"


def _tasks(a: Assignment) -> str:
    return f"tasks {a.start}–{a.stop - 1} ({a.split}, {a.verb})"
