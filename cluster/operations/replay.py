"""Re-creating a run from its journal, in one process: what was applied, in which order, computed at which θ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from cluster.fleet.recipe import Recipe
from cluster.fleet.worker import Worker
from cluster.record import journal
from cluster.record.storage import Place
from cluster.training.aggregate import Tree
from cluster.training.asynchronous import Asynchronous, Late
from cluster.training.identity import digest, initial
from cluster.training.policy import Policy
from learners.base import Meta, OneRound, Params, Sum, pack


@dataclass(frozen=True)
class Applied:
    """One step of a run, as its journal has it."""

    version: int
    shards: list[tuple[str, int, int] | None]
    """(split, start, stop) of every contribution, in the order of summation; None: one that was rejected, and left its
    place empty."""
    staleness: list[int]
    theta: str
    """Hash of θ after the step."""


def steps(path: Place) -> list[Applied]:
    """The steps that led to a run's θ; those that a crash threw away are left out.

    Raises ValueError for a journal that does not begin with the run, is not whole, or is of steps of several rounds.
    """
    found: list[Applied] = []
    ranges: dict[int, tuple[str, int, int]] = {}
    rejected: set[int] = set()
    batch = 0
    for record in journal.read(path):
        if record["kind"] == "attempt":
            found = found[: record["iteration"]]
            batch = record.get("meta_batch", 0) // max(1, record.get("shard", 1))
        elif record["kind"] == "dispatch":
            if record["verb"] != "gradient":
                raise ValueError(
                    f"{path} is of an outer step of several rounds: replay is for those of one (train again instead)"
                )
            ranges[record["ticket"]] = (record["split"], record["start"], record["stop"])
        elif record["kind"] in ("reject", "quarantine"):
            rejected.add(record["ticket"])
        elif record["kind"] == "apply":
            found.append(_applied(record, ranges, rejected, batch))
    for expected, step in enumerate(found, 1):
        if step.version != expected:
            raise ValueError(
                f"{path} has step {step.version} where step {expected} is wanted: it does not begin with the run"
            )
    return found


def _applied(
    record: dict[str, Any], ranges: dict[int, tuple[str, int, int]], rejected: set[int], batch: int
) -> Applied:
    tickets = [t for t in record["tickets"] if t not in rejected]
    staleness = record.get("staleness", [0] * len(tickets))
    if (
        len(staleness) != len(tickets)
        or not ranges.keys() >= set(tickets)
        or max(staleness, default=0) >= record["version"]
    ):
        raise ValueError(
            f"step {record['version']} of the journal names what it does not have: tickets {tickets}, staleness "
            f"{staleness}"
        )
    shards: list[tuple[str, int, int] | None] = [ranges[t] for t in tickets]
    if "staleness" not in record and len(shards) < batch:  # a synchronous step, of which some were rejected
        if batch > len(ranges) or any(stop <= start for _, start, stop in filter(None, shards)):
            raise ValueError(
                f"step {record['version']} of the journal has a batch of {batch} shards that were not all dispatched"
            )
        places = {start // (stop - start) % batch: (split, start, stop) for split, start, stop in filter(None, shards)}
        shards, staleness = [places.get(i) for i in range(batch)], [0] * batch
    return Applied(record["version"], shards, staleness, record["theta"])


def replay(
    recipe: Recipe, params: Params, policy: Policy, applied: list[Applied], begin: Meta | None = None
) -> Iterator[tuple[int, Meta]]:
    """(version, θ) after every step, each checked against the journal's hash; RuntimeError where they part."""
    outer, combine = recipe.outer, policy if isinstance(policy, Asynchronous) else Asynchronous()
    if not isinstance(outer, OneRound):
        raise ValueError(f"replay is for outer steps of one round, {type(outer).__name__} takes several")
    worker = Worker(recipe, "replay")
    meta, state = initial(recipe, params, begin)
    oldest_used = _oldest_used(applied)
    before: dict[int, Params] = {}
    for step, oldest in zip(applied, oldest_used, strict=True):
        now = step.version - 1
        before[now] = pack(*meta)
        late = [
            Late(_contribution(worker, before[now - s], now - s, shard, oldest), s, before[now - s]) if shard else None
            for shard, s in zip(step.shards, step.staleness, strict=True)
        ]
        total, factor = combine.combined(late, before[now])
        meta, state, _ = outer.apply(meta, state, total.mean(), factor)
        if digest(meta) != step.theta:
            raise RuntimeError(f"step {step.version} ends at θ {digest(meta)}, the journal has {step.theta}")
        before = {v: p for v, p in before.items() if v >= oldest}
        yield step.version, meta


def _contribution(worker: Worker, at: Params, version: int, shard: tuple[str, int, int], oldest: int) -> Sum:
    split, start, stop = shard
    message = wire.encode_assignment(Assignment(0, 0, "gradient", version, None, split, start, stop, oldest))
    alone = Tree(1)
    alone.add(0, wire.decode_sum(*worker.run(message, wire.broadcast(at), None)))
    return alone.total()


def _oldest_used(applied: list[Applied]) -> list[int]:
    """For each step, the oldest version that it or a later one was computed at."""
    oldest, found = len(applied), []
    for step in reversed(applied):
        oldest = min(oldest, step.version - 1 - max(step.staleness, default=0))
        found.append(oldest)
    return found[::-1]
