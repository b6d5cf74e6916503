"""The lease that keeps a run directory to one driver."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.record.storage import Place, children, create, make_folder, write_atomically

log = logging.getLogger("metafleet")

LOOKS_EVERY = 1.0  # seconds between looks for a later attempt, where many writes follow each other


class Fenced(RuntimeError):
    """Another driver took this run over; this one must not write any more."""


class Lease:
    """Ownership of a run directory: `lease/N` for attempt N, made by exclusive creation, the highest being the owner.

    The owner's file says who it is and is renewed every few seconds. Whoever comes while it is fresh is refused;
    once it is stale (or its process is seen to be dead) the newcomer creates N + 1, and the old owner finds that
    before its next write.
    """

    FRESH = 30.0  # seconds since the last renewal
    RENEW = 5.0

    def __init__(self, directory: Place) -> None:
        self.folder = directory / "lease"
        self.attempt = 0
        self._checked = 0.0
        self._stopped = threading.Event()

    @contextmanager
    def held(self, take_over: bool = False) -> Iterator[Lease]:
        """Own the directory inside. Raises BlockingIOError while another driver does, unless `take_over`."""
        make_folder(self.folder)
        self._acquire(take_over)
        renewal = threading.Thread(target=self._renew, daemon=True)
        renewal.start()
        try:
            yield self
        finally:
            self._stopped.set()
            renewal.join()
            self._try_write(0.0)

    def check(self, always: bool = True) -> None:
        """Raise Fenced where a later attempt exists. Without `always`, look every LOOKS_EVERY seconds."""
        now = time.monotonic()
        if not always and now - self._checked < LOOKS_EVERY:
            return
        self._checked = now
        if self._highest() > self.attempt:
            raise Fenced(
                f"{self.folder.parent} was taken over by attempt {self._highest()}; attempt {self.attempt} stops "
                "without writing"
            )

    def _acquire(self, take_over: bool) -> None:
        highest = self._highest()
        holder = self._holder(highest) if highest else {}
        alive = bool(holder) and _alive(holder, self.FRESH)
        if alive and not take_over:
            raise BlockingIOError(
                f"{self.folder.parent} is in use by process {holder['pid']} on {holder['host']} (attempt {highest}); "
                "wait for it, or use --take-over if it is gone"
            )
        self.attempt = highest + 1
        try:
            create(self._path(self.attempt), _owner(time.time()))
        except FileExistsError as error:
            raise BlockingIOError(f"{self.folder.parent} was just taken by another driver") from error
        if alive:  # which may write until it looks again
            time.sleep(LOOKS_EVERY + 0.2)

    def _renew(self) -> None:
        while not self._stopped.wait(self.RENEW):
            self._try_write(time.time())

    def _try_write(self, renewed: float) -> None:
        try:
            if renewed or self._highest() == self.attempt:
                self._write(renewed)
        except OSError as error:  # a full disk must neither end a run that could still finish nor hide why one ended
            log.warning("cannot renew the lease on %s (%s)", self.folder.parent, error)

    def _write(self, renewed: float) -> None:
        write_atomically(self._path(self.attempt), _owner(renewed))

    def _holder(self, attempt: int) -> dict[str, Any]:
        try:
            holder = json.loads(self._path(attempt).read_text())
        except (OSError, ValueError):
            # Just created, not yet written: as fresh as the file.
            age = time.time() - self._path(attempt).stat().st_mtime
            return {"host": "?", "pid": 0, "renewed": time.time() - age}
        return holder if isinstance(holder, dict) else {}

    def _highest(self) -> int:
        return max((int(p.name) for p in children(self.folder) if p.name.isdigit()), default=0)

    def _path(self, attempt: int) -> Place:
        return self.folder / f"{attempt:06d}"


def _owner(renewed: float) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "renewed": renewed}).encode()


def _alive(holder: dict[str, Any], fresh: float) -> bool:
    if time.time() - float(holder["renewed"]) > fresh:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
