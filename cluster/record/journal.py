"""The append-only record of a run: what was dispatched, applied, rejected, and what became of the fleet."""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Protocol

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from cluster.fleet import wire
from cluster.record.storage import Place, children, create, is_local, move, read_all

log = logging.getLogger("metafleet")

_FRAME = struct.Struct("<III")  # payload length, CRC-32 of the length, CRC-32 of the payload
SEGMENT_BYTES, SEGMENT_SECONDS = 1 << 20, 10.0  # a segment is written once it is so large or so old


class _Ticket(TypedDict):
    ticket: wire.Natural


class _Tickets(TypedDict):
    tickets: list[wire.Natural]


class _Dispatch(_Ticket):
    verb: str
    split: str
    start: wire.Natural
    stop: wire.Natural


class _Apply(_Tickets):
    version: wire.Natural
    theta: str
    staleness: NotRequired[list[wire.Natural]]


class _Attempt(TypedDict):
    iteration: wire.Natural
    meta_batch: NotRequired[wire.Natural]
    shard: NotRequired[wire.Natural]


class _Stop(TypedDict):
    iteration: wire.Natural
    iterations: wire.Natural
    reason: str


_KINDS: dict[str, TypeAdapter[Any]] = {
    "attempt": TypeAdapter(_Attempt), "dispatch": TypeAdapter(_Dispatch), "apply": TypeAdapter(_Apply),
    "abandon": TypeAdapter(_Tickets), "reject": TypeAdapter(_Ticket), "drop": TypeAdapter(_Ticket),
    "quarantine": TypeAdapter(_Ticket), "stop": TypeAdapter(_Stop),
}  # fmt: skip
"""What readers rely on in a record, by its kind."""


class Journal:
    """Records are msgpack maps with a `kind`, each in a frame with its length and checksum.

    On a disk they are one file, in an object store (which cannot append) a folder of segments, each of whole records. A
    record cut off by a crash is removed when the file is opened again. A record that cannot be written stops the run
    (OSError): what was not recorded did not happen.
    """

    def __init__(self, path: Place, check: Callable[[bool], None] = lambda always: None) -> None:
        """`check` is called before anything is written and raises if this process no longer owns the run; it may look
        less often unless it is told `always`.
        """
        self._check, self._path = check, path
        end = _usable(path)
        self._out: _Out = (
            _File(path, end) if isinstance(path, Path) and not path.is_dir() else _Segments(path, lambda: check(True))
        )

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record; on a disk it survives this process, and anywhere the machine once `sync` returned."""
        payload = wire.encode({"kind": kind, **fields})
        if isinstance(self._out, _File):  # segments ask before each is written
            self._check(False)
        try:
            self._out.append(_framed(payload))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write to {self._path} ({error.strerror or error}); the run stops and can be resumed",
            ) from error

    def sync(self) -> None:
        """Force everything written so far to the disk or store."""
        self._out.sync()

    def close(self) -> None:
        """Write what waits, unless another process owns the run by now, and give the file back."""
        try:
            self._out.sync()
        except (OSError, RuntimeError) as error:
            log.warning("the end of %s is not written: %s", self._path, error)
        self._out.close()


class _Out(Protocol):
    def append(self, frame: bytes) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _File:
    def __init__(self, path: Path, end: int | None) -> None:
        # Unbuffered: what a full disk refused must not come back at the next write.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - held for the life of the run
        if end is not None:
            self._file.truncate(end)

    def append(self, frame: bytes) -> None:
        if self._file.write(frame) < len(frame):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Segments:
    """Numbered objects, none of which is ever written twice."""

    def __init__(self, folder: Place, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._waiting, self._since = bytearray(), time.monotonic()
        self._number = len(children(folder))

    def append(self, frame: bytes) -> None:
        self._waiting += frame
        if len(self._waiting) > SEGMENT_BYTES or time.monotonic() - self._since > SEGMENT_SECONDS:
            self.sync()

    def sync(self) -> None:
        while self._waiting:
            self._check()
            try:
                create(self._folder / f"{self._number:08d}", bytes(self._waiting))
                self._waiting.clear()
            except FileExistsError:
                # A driver that we took over from wrote once more before it found out; a later one would have fenced us
                # just now.
                log.warning("%s has a segment %d of another driver", self._folder, self._number)
            self._number += 1
        self._since = time.monotonic()

    def close(self) -> None:
        pass


class Unwritten(Journal):
    """A journal for work that changes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, **fields: Any) -> None:
        pass


def read(path: Place) -> Iterator[dict[str, Any]]:
    """Records in order, up to the end or to a record cut off there. Raises ValueError for damage before the end, and
    for records that are not ours.
    """
    content = _content(path)
    end, damaged = _scan(content)
    if damaged:
        raise ValueError(f"{path} is damaged at byte {end} of {len(content)}")
    yield from _records(content, end)


def _content(path: Place) -> bytes:
    """Everything written, b"" where there is nothing."""
    if is_local(path) and not path.is_dir():
        return path.read_bytes() if path.exists() else b""
    return read_all(path)


def _usable(path: Place) -> int | None:
    """How much of an existing journal to keep; one damaged in the middle is set aside whole."""
    content = _content(path)
    if not content:
        return None
    end, damaged = _scan(content)
    if damaged or (end < len(content) and not (is_local(path) and path.is_file())):  # a segment is never cut
        aside = path.with_name(f"{path.name}.damaged-{end}")
        move(path, aside)
        log.warning("%s was damaged at byte %d; set aside as %s, a new one is begun", path, end, aside.name)
        return None
    return end


class Unfinished(NamedTuple):
    """How the attempts so far have left a journal."""

    tickets: list[int]
    """Dispatched and never settled."""
    following: int
    """The first unused ticket."""
    stops: list[dict[str, Any]]
    """Records of stops that were asked for."""


def unfinished(path: Place) -> Unfinished:
    """What a journal says up to its end, or to damage; ([], 0, []) where there is none."""
    content = _content(path)
    end, _ = _scan(content)
    waiting: set[int] = set()
    following = 0
    stops: list[dict[str, Any]] = []
    for record in _records(content, end):
        if record["kind"] == "dispatch":
            waiting.add(record["ticket"])
            following = max(following, record["ticket"] + 1)
        elif record["kind"] in ("apply", "abandon"):
            waiting -= set(record["tickets"])
        elif record["kind"] in ("reject", "drop", "quarantine"):
            waiting.discard(record["ticket"])
        elif record["kind"] == "stop":
            stops.append(record)
    return Unfinished(sorted(waiting), following, stops)


def _records(content: bytes, end: int) -> Iterator[dict[str, Any]]:
    position = 0
    while position < end:
        length, _, _ = _FRAME.unpack_from(content, position)
        position += _FRAME.size
        record = wire.decode(content[position : position + length])
        kind = record.get("kind") if isinstance(record, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"the journal's record at byte {position} has no kind")
        if kind in _KINDS:
            _KINDS[kind].validate_python(record)
        yield record
        position += length


def _framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), _crc_of_length(len(payload)), zlib.crc32(payload)) + payload


def _crc_of_length(length: int) -> int:
    return zlib.crc32(length.to_bytes(4, "little"))


def _scan(content: bytes) -> tuple[int, bool]:
    """(end of the last whole record, whether it is damage, and not one record cut off, that follows)."""
    position = 0
    while len(content) - position >= _FRAME.size:
        length, of_length, of_payload = _FRAME.unpack_from(content, position)
        following = position + _FRAME.size + length
        if not length or of_length != _crc_of_length(length):
            # After a power failure a file may end in zeros that were never written.
            return position, any(content[position:])
        if following > len(content):
            break
        if zlib.crc32(content[position + _FRAME.size : following]) != of_payload:
            return position, following < len(content)
        position = following
    return position, False
