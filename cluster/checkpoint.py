"""Checkpoints: msgpack, checksummed, written in one step; and the lease that keeps a run directory to one driver."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from cluster import wire
from learners.base import Meta, Params, pack, unpack

log = logging.getLogger("metafleet")

MAGIC = b"METAFLEET-CKPT"
VERSION = 1
_HEAD = struct.Struct(f"<{len(MAGIC)}sHQ32s")  # magic, format version, payload bytes, SHA-256 of the payload
LARGEST = 1 << 40  # bytes


@dataclass(frozen=True)
class State:
    """All that a run needs to go on."""

    iteration: int
    meta: Meta
    outer: Params
    next_ticket: int = 0
    attempt: int = 1
    best: dict[str, float] = field(default_factory=dict)
    """Iteration and validation score of the best θ so far."""
    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the numbers depend on: learner, execution mode, shapes, the first worker's environment …"""
    evaluation_due: bool = False
    """Whether the validation of this θ was under way, and has to be begun again."""


def encode(state: State) -> bytes:
    """A state as the bytes of a checkpoint file."""
    payload = wire.encode({
        "iteration": state.iteration, "next_ticket": state.next_ticket, "attempt": state.attempt,
        "best": state.best, "counts": state.counts, "facts": state.facts, "evaluation_due": state.evaluation_due,
        "meta": _arrays(pack(*state.meta)), "outer": _arrays(state.outer),
    })  # fmt: skip
    return _HEAD.pack(MAGIC, VERSION, len(payload), hashlib.sha256(payload).digest()) + payload


def decode(content: bytes, name: str) -> State:
    """Inverse of `encode`. Raises ValueError, naming `name`, for anything cut, changed or foreign."""
    if len(content) < _HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{name} is not a checkpoint, or is cut short ({len(content)} bytes)")
    _, version, length, digest = _HEAD.unpack_from(content)
    payload = memoryview(content)[_HEAD.size :]
    if version != VERSION:
        raise ValueError(f"{name} has format version {version}, this program reads {VERSION}")
    if len(payload) != length:
        raise ValueError(f"{name} is cut short: {len(payload)} bytes of {length}")
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{name} is damaged: its checksum does not match")
    fields = msgpack.unpackb(payload, raw=False)
    return State(meta=unpack(_tensors(fields.pop("meta"))), outer=_tensors(fields.pop("outer")), **fields)


def _arrays(params: Params) -> dict[str, object]:
    return {k: wire.pack_array(v.detach().cpu().contiguous().numpy()) for k, v in params.items()}


def _tensors(packed: dict[str, Any]) -> Params:
    return {k: wire.owned(wire.unpack_array(v)) for k, v in packed.items()}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all, also across a power failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best on validation."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: State) -> Path:
        """Write `state` as the newest, then remove the oldest beyond `keep`. Raises OSError; nothing is lost then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(state.iteration)
        write_atomically(path, encode(state))
        for old in self._all()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def save_best(self, state: State) -> None:
        """Write `state` as the best on validation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "best.ckpt", encode(state))

    def newest(self) -> State | None:
        """The newest good one, or None where there is none at all. A damaged one is skipped, and said so.

        Raises ValueError where there are some and none is good.
        """
        errors = []
        for path in self._all():
            try:
                state = load(path)
            except ValueError as error:
                errors.append(str(error))
                log.warning("%s; falling back to the one before it", error)
            else:
                return state
        if errors:
            raise ValueError(f"no good checkpoint in {self.folder}: {errors[0]}")
        return None

    def best(self) -> State:
        """The best on validation."""
        return load(self.folder / "best.ckpt")

    def at(self, iteration: int) -> State:
        """The one of an iteration, if it is still kept."""
        path = self._path(iteration)
        if not path.exists():
            kept = ", ".join(str(int(p.stem)) for p in reversed(self._all()))
            raise ValueError(f"{self.folder} has no checkpoint of iteration {iteration}; there are {kept or 'none'}")
        return load(path)

    def _path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:010d}.ckpt"

    def _all(self) -> list[Path]:
        found = [p for p in self.folder.glob("*.ckpt") if re.fullmatch(r"\d{10}", p.stem)]
        return sorted(found, reverse=True)


def load(path: Path) -> State:
    """Read a checkpoint file. Raises ValueError for a damaged one, FileNotFoundError for a missing one."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
    return decode(path.read_bytes(), str(path))


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

    def __init__(self, directory: Path) -> None:
        self.folder = directory / "lease"
        self.attempt = 0
        self._checked = 0.0
        self._stopped = threading.Event()

    @contextmanager
    def held(self, take_over: bool = False) -> Iterator[Lease]:
        """Own the directory inside. Raises BlockingIOError while another driver does, unless `take_over`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire(take_over)
        renewal = threading.Thread(target=self._renew, daemon=True)
        renewal.start()
        try:
            yield self
        finally:
            self._stopped.set()
            renewal.join()
            if self._highest() == self.attempt:
                self._try_write(0.0)

    def check(self, always: bool = True) -> None:
        """Raise Fenced where a later attempt exists. Without `always`, look at most once a second."""
        now = time.monotonic()
        if not always and now - self._checked < 1.0:
            return
        self._checked = now
        if self._highest() > self.attempt:
            raise Fenced(f"{self.folder.parent} was taken over by attempt {self._highest()}; attempt {self.attempt} stops without writing")

    def _acquire(self, take_over: bool) -> None:
        highest = self._highest()
        if highest and not take_over:
            holder = self._holder(highest)
            if holder and _alive(holder, self.FRESH):
                raise BlockingIOError(
                    f"{self.folder.parent} is in use by process {holder['pid']} on {holder['host']} (attempt {highest}); "
                    "wait for it, or use --take-over if it is gone"
                )
        self.attempt = highest + 1
        try:
            os.close(os.open(self._path(self.attempt), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError as error:
            raise BlockingIOError(f"{self.folder.parent} was just taken by another driver") from error
        self._write(time.time())

    def _renew(self) -> None:
        while not self._stopped.wait(self.RENEW):
            self._try_write(time.time())

    def _try_write(self, renewed: float) -> None:
        try:
            self._write(renewed)
        except OSError as error:  # a full disk must neither end a run that could still finish nor hide why one ended
            log.warning("cannot renew the lease on %s (%s)", self.folder.parent, error)

    def _write(self, renewed: float) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "renewed": renewed}
        write_atomically(self._path(self.attempt), json.dumps(owner).encode())

    def _holder(self, attempt: int) -> dict[str, Any]:
        try:
            holder = json.loads(self._path(attempt).read_text())
        except (OSError, ValueError):
            # Just created, not yet written: as fresh as the file.
            age = time.time() - self._path(attempt).stat().st_mtime
            return {"host": "?", "pid": 0, "renewed": time.time() - age}
        return holder if isinstance(holder, dict) else {}

    def _highest(self) -> int:
        return max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=0)

    def _path(self, attempt: int) -> Path:
        return self.folder / f"{attempt:06d}"


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
