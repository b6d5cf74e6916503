"""Mutated inputs to every reader of what comes from disk or network: only ValueError may come out, and no memory may
pile up.

python -m tests.fuzz [INPUTS] [SEED]
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgpack
import numpy as np
import torch

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from cluster.operations.replay import steps
from cluster.record import checkpoint, journal
from cluster.record.checkpoint import State, Work
from cluster.record.journal import Journal
from cluster.setup import config
from learners.base import Meta, Sum

GROWTH = 64 << 20  # bytes that the process may grow by
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    -(2**63),
    1e300,
    float("nan"),
    "",
    "kind",
    b"",
    b"\x00" * 9,
    [],
    {},
    [[]],
    {"a": {}},
]


@dataclass(frozen=True)
class Target:
    """A reader, what it reads when all is well, and how a changed payload is made to pass its checksums."""

    name: str
    sample: bytes
    read: Callable[[bytes], object]
    unwrap: Callable[[bytes], bytes] | None = None
    wrap: Callable[[bytes], bytes] = lambda payload: payload
    share: float = 1.0


def targets(folder: Path) -> list[Target]:
    """All readers; those of files read from `folder`."""
    params = {"w": torch.randn(3, 2), "b": torch.zeros(2)}
    result = Sum({"params/w": torch.randn(3, 2)}, 2.0, {"loss": torch.randn(2)})
    assignment = Assignment(7, 1, "gradient", 3, None, "train", 10, 12, 2)
    header, vector = wire.encode_sum(assignment, "w1", 0.5, result)
    state = State(
        3, Meta(params, {}), {"m": torch.zeros(2)}, 9, 2, {"score": 1.0}, {"applied": 3}, {"seed": 0}, Work(4, (1, 2))
    )
    file, recorded = folder / "file", folder / "recorded"
    book = Journal(recorded)
    book.write("attempt", iteration=0, theta="ab", configuration={})
    for ticket in range(3):
        book.write(
            "dispatch", ticket=ticket, attempt=0, verb="gradient", at=1, split="train", start=ticket, stop=ticket + 1
        )
    book.write("apply", version=1, tickets=[0, 1], theta="cd", staleness=[0, 0])
    book.close()

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def reader(content: bytes) -> object:
            file.write_bytes(content)
            return read(file)

        return reader

    def toml(content: bytes) -> object:
        path = folder / "run.toml"
        path.write_bytes(content)
        return config.load(str(path))

    def sealed(payload: bytes) -> bytes:
        head = checkpoint._HEAD.pack(
            checkpoint.MAGIC, checkpoint.VERSION, len(payload), hashlib.sha256(payload).digest()
        )
        return head + payload

    def framed(payload: bytes) -> bytes:
        return (
            journal._FRAME.pack(len(payload), zlib.crc32(len(payload).to_bytes(4, "little")), zlib.crc32(payload))
            + payload
        )

    broadcast, numbers = wire.broadcast(params)
    whole = checkpoint.encode(state)
    journals = {"read": lambda p: list(journal.read(p)), "unfinished": journal.unfinished, "replay": steps}
    return [
        Target("assignment", wire.encode_assignment(assignment), wire.decode_assignment, bytes),
        Target("sum", header, lambda m: wire.decode_sum(m, vector), bytes),
        Target("broadcast", broadcast, lambda m: wire.received((m, numbers)), bytes),
        Target("checkpoint", whole, lambda m: checkpoint.decode(m, "checkpoint"), lambda m: m[checkpoint._HEAD.size :],
        sealed), *(
            Target(f"journal, {name}", recorded.read_bytes(), from_file(read), lambda m: m[12 : 12 + m[0]], framed, 0.5)
            for name, read in journals.items()
        ),
        Target("configuration", config.to_toml(config.load("omniglot-5way-1shot")).encode(), toml, share=0.02),
    ]  # fmt: skip


def mutated(target: Target, rng: np.random.Generator) -> bytes:
    """A changed sample: bytes changed, lost, repeated or cut off; or, past its checksums, another value somewhere in
    its structure.
    """
    if target.unwrap and rng.random() < 0.5:
        value = msgpack.unpackb(target.unwrap(target.sample), raw=False)
        return target.wrap(msgpack.packb(_disturbed(value, rng), use_bin_type=True))
    content = bytearray(target.sample)
    for _ in range(1 + int(rng.integers(4))):
        at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 9))
        match int(rng.integers(5)):
            case 0 if at < len(content):
                content[at] ^= 1 << int(rng.integers(8))
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = rng.bytes(length)
            case 3:
                content[at:at] = content[at : at + 8 * length]
            case _:
                content[at : at + length] = rng.bytes(length)
    return bytes(content[: int(rng.integers(len(content) + 1))] if rng.random() < 0.1 else content)


def _disturbed(value: Any, rng: np.random.Generator) -> Any:
    """`value` with one thing somewhere in it lost, added or replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[int(rng.integers(len(value)))]
        match int(rng.integers(6)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {"surprise": ODD[int(rng.integers(len(ODD)))]}
            case _:
                return value | {key: _disturbed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        return [*value[:at], _disturbed(value[at], rng), *value[at + int(rng.integers(2)) :]]
    return ODD[int(rng.integers(len(ODD)))]


def attempt(target: Target, content: bytes) -> bool:
    """Whether the reader took it. Anything but ValueError is ours to mend."""
    try:
        target.read(content)
    except ValueError:
        return False
    except Exception as error:
        raise AssertionError(f"{target.name}: {type(error).__name__}: {error} from {content!r}") from error
    return True


def main() -> None:
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    rng = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        readers = targets(Path(folder))
        for target in readers:
            target.read(target.sample)
        shares = np.array([t.share for t in readers])
        tried, taken = Counter[str](), Counter[str]()
        begin, before = time.monotonic(), 0
        for i in range(inputs):
            target = readers[int(rng.choice(len(readers), p=shares / shares.sum()))]
            tried[target.name] += 1
            taken[target.name] += attempt(target, mutated(target, rng))
            if i == min(20_000, inputs // 10):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    for target in readers:
        print(
            f"{target.name:22s} {tried[target.name]:8d} inputs, {taken[target.name]:7d} still readable, the others "
            "ValueError"
        )
    print(
        f"{inputs} inputs in {time.monotonic() - begin:.0f} s; memory grew by {grown / 2**20:.1f} MiB after the first "
        "tenth or 20 000"
    )
    if grown > GROWTH:
        sys.exit(f"more than {GROWTH >> 20} MiB")


if __name__ == "__main__":
    main()
