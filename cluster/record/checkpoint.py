"""Checkpoints: msgpack, checksummed, written in one step."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgpack
from annotated_types import Len
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from cluster.fleet import wire
from cluster.record.storage import Place, children, make_folder, read, remove, write_atomically
from learners.base import AVERAGED, Meta, Params, pack, unpack
from learners.engine import tree

log = logging.getLogger("metafleet")

MAGIC = b"METAFLEET-CKPT"
VERSION = 1
_HEAD = struct.Struct(f"<{len(MAGIC)}sHQ32s")  # magic, format version, payload bytes, SHA-256 of the payload
LARGEST = 1 << 40  # bytes


@dataclass(frozen=True)
class Work:
    """Where a policy stands in the endless row of training shards: what a checkpoint must remember of it."""

    following: int = 0
    """The first shard that was never asked for."""
    again: tuple[int, ...] = ()
    """Shards before it that are not in θ."""


@dataclass(frozen=True)
class Checkpointing:
    """When a run saves itself."""

    seconds: float = 60.0
    """Time between checkpoints."""
    keep: int = 3
    """How many of the newest to keep, beside the best."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least 1 wanted")


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
    work: Work = field(default_factory=Work)
    """Which training shards are to be asked for next."""
    evaluation_due: bool = False
    """Whether the validation of this θ was under way, and has to be begun again."""

    @property
    def used(self) -> Meta:
        """What is evaluated and exported: θ, or its running mean where the outer step keeps one."""
        mean = tree.under(AVERAGED, self.outer)
        return Meta(mean, self.meta.slots) if mean else self.meta


class _Fields(TypedDict):
    iteration: wire.Natural
    next_ticket: wire.Natural
    attempt: wire.Natural
    best: dict[str, float]
    counts: dict[str, int]
    facts: dict[str, Any]
    evaluation_due: bool
    work: Annotated[list[wire.Natural], Len(1)]
    meta: dict[str, wire.Packed]
    outer: dict[str, wire.Packed]


_FIELDS = TypeAdapter(_Fields)


def encode(state: State) -> bytes:
    """A state as the bytes of a checkpoint file."""
    payload = wire.encode({
        "iteration": state.iteration, "next_ticket": state.next_ticket, "attempt": state.attempt,
        "best": state.best, "counts": state.counts, "facts": state.facts, "evaluation_due": state.evaluation_due,
        "work": [state.work.following, *state.work.again],
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
    try:
        f = _FIELDS.validate_python(msgpack.unpackb(payload, raw=False))
        meta, outer = unpack(_tensors(f["meta"])), _tensors(f["outer"])
    except ValueError as error:
        raise ValueError(f"{name} is not what this program writes: {error}") from error
    following, *again = f["work"]
    return State(f["iteration"], meta, outer, f["next_ticket"], f["attempt"], f["best"], f["counts"], f["facts"],
                 Work(following, tuple(again)), f["evaluation_due"])  # fmt: skip


def _arrays(params: Params) -> dict[str, object]:
    return {k: wire.pack_array(v.detach().cpu().contiguous().numpy()) for k, v in params.items()}


def _tensors(packed: dict[str, wire.Packed]) -> Params:
    return {k: wire.owned(wire.unpack_array(v)) for k, v in packed.items()}


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best on validation."""

    def __init__(self, folder: Place, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: State) -> Place:
        """Write `state` as the newest, then remove the oldest beyond `keep`. Raises OSError; nothing is lost then."""
        make_folder(self.folder)
        path = self._path(state.iteration)
        write_atomically(path, encode(state))
        # one that is newer was skipped as damaged
        for old in [p for p in self._all() if p.name <= path.name][self.keep :]:
            remove(old)
        return path

    def save_best(self, state: State) -> None:
        """Write `state` as the best on validation."""
        make_folder(self.folder)
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

    def _path(self, iteration: int) -> Place:
        return self.folder / f"{iteration:010d}.ckpt"

    def _all(self) -> list[Place]:
        return [p for p in reversed(children(self.folder)) if re.fullmatch(r"\d{10}\.ckpt", p.name)]


def load(path: Place) -> State:
    """Read a checkpoint file. Raises ValueError for a damaged one, FileNotFoundError for a missing one."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
    return decode(read(path), str(path))
