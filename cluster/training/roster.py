"""Who computes for a run: the workers and nodes that are there, and whether their numbers can be trusted to be
equal.
"""

from __future__ import annotations

import logging
from typing import Any

from cluster.fleet.machine import environment
from cluster.fleet.messages import FleetEvent, RunStopped

log = logging.getLogger("metafleet")


class Roster:
    """Takes in what the fleet says of its members. Bits depend on versions and processor features: a fleet in which
    they differ must be allowed explicitly.
    """

    def __init__(self, facts: dict[str, Any], *, allow_mixed: bool) -> None:
        """`facts`: what the run is made of; the environment of its first worker ever is noted there."""
        self._facts, self._allow_mixed = facts, allow_mixed
        self.workers: dict[str, str] = {}
        """Name → host and process."""
        self.nodes: dict[str, str] = {}
        """Id → address."""

    def note(self, event: FleetEvent) -> None:
        """A member came or went. Raises RunStopped for a worker whose bits would be others."""
        members = self.nodes if event.kind.startswith("node") else self.workers
        if event.kind.endswith("joined"):
            members[event.worker] = event.where
        else:
            members.pop(event.worker, None)
            log.warning("%s %s (%s): %s", event.kind, event.worker, event.where, event.detail.get("reason", ""))
        if event.kind == "joined" and not self._allow_mixed:
            self._check_equal(event)

    def _check_equal(self, event: FleetEvent) -> None:
        wanted = self._facts.setdefault("environment", event.detail)
        driver = environment() | {"gpu": wanted.get("gpu", "")}  # which adds and steps, on a CPU
        for who, seen in ((f"worker {event.worker}", event.detail), ("the driver", driver)):
            different = [f"{k} {v!r} instead of {wanted.get(k)!r}" for k, v in seen.items() if wanted.get(k) != v]
            if different:
                raise RunStopped(
                    f"{who} has {', '.join(different)}: results would depend on who computes what (--allow-mixed-fleet)"
                )
