"""Which tickets are open and what became of the others. Every ticket ends in exactly one way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.fleet.messages import Assignment
from cluster.record.journal import Journal
from envs.base import HELD_OUT

COUNTS = (
    "dispatched",
    "applied",
    "dropped",
    "rejected",
    "quarantined",
    "abandoned",
    "retried",
    "duplicates",
    "corrupted",
)
ENDS = ("applied", "dropped", "rejected", "quarantined", "abandoned")


@dataclass
class Ledger:
    """dispatched = applied + dropped + rejected + quarantined + abandoned + open + held, at any moment; journalled as
    it happens.

    A ticket is open until its answer is there, then held until a step uses it or the policy drops it. Tickets of
    held-out tasks are counted too, but not journalled: they leave no trace in θ, and are applied as they arrive.
    """

    journal: Journal
    next_ticket: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    open: dict[int, Assignment] = field(default_factory=dict)
    held: dict[int, Assignment] = field(default_factory=dict)

    def restore(self, counts: dict[str, int]) -> None:
        """Go on from a checkpoint's counts; what was open or held then is abandoned."""
        self.counts |= counts
        ended = sum(self.counts[k] for k in ENDS)
        self.counts["abandoned"] += self.counts["dispatched"] - ended

    def dispatch(self, assignment: Assignment) -> None:
        """A first or a further attempt at a ticket goes out."""
        first = assignment.ticket not in self.open
        self.open[assignment.ticket] = assignment
        self.counts["dispatched" if first else "retried"] += 1
        if assignment.split not in HELD_OUT:
            a = assignment
            self.journal.write(
                "dispatch",
                ticket=a.ticket,
                attempt=a.attempt,
                verb=a.verb,
                at=a.at,
                split=a.split,
                start=a.start,
                stop=a.stop,
            )

    def is_open(self, ticket: int) -> bool:
        """Whether an answer to this ticket is still awaited; others are late duplicates."""
        if ticket not in self.open:
            self.counts["duplicates"] += 1
        return ticket in self.open

    def arrive(self, ticket: int) -> None:
        """The answer that counts is here."""
        assignment = self.open.pop(ticket)
        self.held[ticket] = assignment
        if assignment.split in HELD_OUT:
            self.apply([ticket])

    def apply(self, tickets: Iterable[int]) -> None:
        """What these tickets brought is in θ now. The caller journals it, together with what became of θ."""
        for ticket in tickets:
            if self.held.pop(ticket, None):  # else rejected: a step may be made of what was left
                self.counts["applied"] += 1

    def drop(self, ticket: int, reason: str) -> None:
        """The answer comes too late to be used; its tasks are asked for again."""
        a = self.held.pop(ticket)
        self.counts["dropped"] += 1
        self.journal.write("drop", ticket=ticket, start=a.start, stop=a.stop, reason=reason)

    def reject(self, ticket: int, reason: str) -> None:
        """The answer cannot be used; the run goes on without these tasks."""
        a = self.open.pop(ticket)
        self.counts["rejected"] += 1
        self.journal.write("reject", ticket=ticket, start=a.start, stop=a.stop, reason=reason)

    def quarantine(self, ticket: int, reason: str) -> None:
        """These tasks kill workers; nobody is asked for them again."""
        a = self.open.pop(ticket)
        self.counts["quarantined"] += 1
        self.journal.write("quarantine", ticket=ticket, start=a.start, stop=a.stop, reason=reason)

    def abandon(self) -> None:
        """Give up on everything open or held: the run stops here, and asks again when it resumes."""
        given_up = sorted(self.open | self.held)
        if given_up:
            self.journal.write("abandon", tickets=given_up)
        self.counts["abandoned"] += len(given_up)
        self.open.clear()
        self.held.clear()
