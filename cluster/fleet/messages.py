"""The only things that cross processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.floating]
Layout: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
Broadcast: TypeAlias = tuple[bytes, Vector]
"""What `Pool.publish` sends: an encoded layout and one flat vector."""


class RunStopped(RuntimeError):
    """The run cannot go on as it is; what it reached is on disk, and it can be resumed."""


class Lost(RuntimeError):
    """A vector that stayed where it was made is gone, with its node."""


class Elsewhere(Protocol):
    """A vector that stayed on the machine that made it, or a sum of such; only `fetch` brings it here."""

    def plus(self, other: Any) -> Elsewhere:
        """The sum of both; nothing need be added before `fetch`."""

    def fetch(self) -> Vector:
        """The vector. Raises Lost."""


@dataclass(frozen=True)
class Assignment:
    """Run `verb` over tasks start ≤ index < stop of `split`, at the broadcast `at` (a packed Meta)."""

    ticket: int
    attempt: int
    verb: str
    at: int
    operand: int | None
    split: str
    start: int
    stop: int
    oldest: int
    """Handles below this one will not be named again: workers may forget them."""


@dataclass(frozen=True)
class Contribution:
    """The sum over an assignment's tasks."""

    ticket: int
    attempt: int
    worker: str
    seconds: float
    """Time the worker spent on it."""
    weight: float
    layout: Layout
    vector: Vector | Elsewhere
    """`Sum.total`, flat, in the order of `layout`."""
    rows: dict[str, NDArray[np.floating]]
    """Per-task metrics, [tasks, …]."""
    finite: bool = True
    """Whether the worker found every number of the total finite."""
    culprit: str = ""
    """What was not, first, where one was not."""


@dataclass(frozen=True)
class Failure:
    """An attempt that will bring nothing: its worker died, it passed its deadline, or its code raised."""

    ticket: int
    attempt: int
    worker: str
    kind: Literal["died", "late", "error"]
    reason: str
    running: bool = True
    """Whether the worker was at it; otherwise it waited behind another one, which may be to blame."""


@dataclass(frozen=True)
class FleetEvent:
    """A worker joined, was lost, or could not be started; or a node came or went."""

    kind: Literal["joined", "lost", "failed", "node joined", "node lost"]
    worker: str
    """Or the node's id."""
    where: str
    """Host and process; a node's address."""
    detail: dict[str, str]
    """The environment of one that joined; the reason why one was lost or failed."""


Event: TypeAlias = Contribution | Failure | FleetEvent
