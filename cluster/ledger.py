"""Which tickets are open and what became of the others. Every ticket ends in exactly one way."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.journal import Journal
from cluster.messages import Assignment

COUNTS = ("dispatched", "applied", "rejected", "abandoned", "retried", "duplicates", "corrupted")


@dataclass
class Ledger:
    """dispatched = applied + rejected + abandoned + open, at any moment; journalled as it happens.

    Tickets of held-out tasks are counted too, but not journalled: they leave no trace in θ.
    """

    journal: Journal
    next_ticket: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    open: dict[int, Assignment] = field(default_factory=dict)

    def dispatch(self, assignment: Assignment) -> None:
        """A first or a further attempt at a ticket goes out."""
        first = assignment.ticket not in self.open
        self.open[assignment.ticket] = assignment
        self.counts["dispatched" if first else "retried"] += 1
        if assignment.split == "train":
            a = assignment
            self.journal.write(
                "dispatch", ticket=a.ticket, attempt=a.attempt, verb=a.verb, at=a.at, split=a.split, start=a.start, stop=a.stop
            )

    def is_open(self, ticket: int) -> bool:
        """Whether an answer to this ticket is still awaited; others are late duplicates."""
        if ticket not in self.open:
            self.counts["duplicates"] += 1
        return ticket in self.open

    def arrive(self, ticket: int) -> None:
        """The answer that counts is here."""
        del self.open[ticket]
        self.counts["applied"] += 1

    def reject(self, ticket: int, reason: str) -> None:
        """The answer cannot be used; the run goes on without these tasks."""
        a = self.open.pop(ticket)
        self.counts["rejected"] += 1
        self.journal.write("reject", ticket=ticket, start=a.start, stop=a.stop, reason=reason)

    def abandon(self) -> None:
        """Give up on everything open: the run stops here, and asks again when it resumes."""
        if self.open:
            self.journal.write("abandon", tickets=sorted(self.open))
        self.counts["abandoned"] += len(self.open)
        self.open.clear()
