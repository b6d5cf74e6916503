"""The asynchronous policy: never wait, weigh what comes late, and write down what every step was made of."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.fleet.messages import Lost, RunStopped
from cluster.record.checkpoint import Work
from cluster.training.aggregate import bracketed
from cluster.training.dispatch import Dispatcher, Round, Shards, advice
from cluster.training.policy import Batch, Policy, Step, Stepper, logged, times
from learners.base import GROUP, Meta, OneRound, Outer, Params, Sum, pack
from learners.engine import tree

REMEMBERED = 100  # shards over which a share of rejected ones is taken


class Late(NamedTuple):
    """A contribution at the step that uses it."""

    total: Sum
    staleness: int
    """Outer steps between the θ it was computed at and the one it is applied to."""
    then: Params
    """That θ, packed, and its slots."""


@dataclass(frozen=True)
class Asynchronous(Policy):
    """Step after every `buffer` contributions, whoever they are from; no worker ever waits for another.

    A contribution computed at version v and applied at version v + s has staleness s. With wᵢ = (1 + sᵢ)^−power and nᵢ
    its tasks, G = Σ wᵢ totalᵢ / Σ wᵢ nᵢ, and the step's rate is multiplied by mean(wᵢ)^damping: an adaptive optimiser
    would cancel a mere scale of G. Beyond `max_staleness` a contribution is dropped and its tasks are asked for again.
    (Staleness weights: Zhang et al. 2016, Nguyen et al. 2022; compensation gᵢ + λ gᵢ ∘ gᵢ ∘ (θ_now − θ_then): Zheng et
    al. 2017.)

    `buffer` of a whole meta-batch with `in_flight` the same is the synchronous run, bit for bit.
    """

    buffer: int = 0
    """Contributions (shards) per step; 0: a meta-batch of them."""
    in_flight: int = 0
    """Shards asked for and not yet in θ, at most; 0: as many as keep every worker busy."""
    max_staleness: int = 16
    """In outer steps."""
    power: float = 0.5
    """How fast weight falls with staleness; 0: not at all."""
    damping: float = 1.0
    """How much of the mean weight the step's rate takes."""
    compensation: float = 0.0
    """λ of delay compensation; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("buffer", "in_flight", "max_staleness", "power", "damping", "compensation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more wanted")
        if self.buffer and self.in_flight and self.in_flight < self.buffer:
            raise ValueError(f"in_flight={self.in_flight} is below buffer={self.buffer}: no step would ever be full")

    def check(self, outer: Outer) -> None:
        """Raise ValueError for an outer step of several rounds: they must all see one θ."""
        if not isinstance(outer, OneRound):
            raise ValueError(
                f"an asynchronous policy wants an outer step of one round, {type(outer).__name__} takes several"
            )

    def begin(self, outer: Outer, dispatcher: Dispatcher, batch: Batch, work: Work) -> Stepper:
        """Set to work, where `work` was left."""
        self.check(outer)
        assert isinstance(outer, OneRound)
        return Flow(self, outer, dispatcher, batch, work)

    def combined(self, late: Sequence[Late | None], now: Params) -> tuple[Sum, float]:
        """(G as a sum, factor of the rate) of contributions in the order of their shards, θ being `now`, packed; None:
        a rejected one.
        """
        weights = [(1.0 + c.staleness) ** -self.power if c else 0.0 for c in late]
        parts = [_scaled(self._current(c, now), w) if c else None for c, w in zip(late, weights, strict=True)]
        total = bracketed(parts, _plus)
        if total is None:
            raise ValueError(f"all {len(late)} contributions were rejected")
        return total, (sum(weights) / sum(c is not None for c in late)) ** self.damping

    def _current(self, c: Late, now: Params) -> Sum:
        """A stale sum as of `now`: what was added to slots since then (a clock, running statistics) stays added, and if
        there is compensation, λ gᵢ ∘ gᵢ ∘ (θ_now − θ_then) is added to the mean gᵢ of its tasks.
        """
        if not c.staleness:
            return c.total
        n, λ = c.total.weight, self.compensation

        def moved(k: str, v: Tensor) -> Tensor:
            if k.startswith("slots/"):
                return v + n * (now[k] - c.then[k])
            return v + (λ / n) * v * v * (now[k] - c.then[k]) if λ else v

        return c.total._replace(total={k: moved(k, v) for k, v in c.total.total.items()})


@dataclass
class _Under:
    """A shard that was asked for."""

    shard: int
    version: int
    round: Round
    total: Sum | None = None
    """Once it is here."""


@dataclass
class Flow:
    """The policy at work: shards under way, and those that have arrived and wait for a step."""

    policy: Asynchronous
    outer: OneRound
    dispatcher: Dispatcher
    batch: Batch
    begun: Work
    _way: list[_Under] = field(default_factory=list)
    _buffer: list[_Under] = field(default_factory=list)
    _published: dict[int, tuple[int, Params]] = field(default_factory=dict)
    """version → (handle, θ), of versions that something under way was computed at."""
    _rejected: deque[bool] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _dropped: Counter[str] = field(default_factory=Counter)
    """What was sent back, by family of tasks: contributions, or tasks where there are families."""

    def __post_init__(self) -> None:
        self._following, self._again = self.begun.following, deque(self.begun.again)
        self._wanted = self.policy.buffer or self.batch.shards
        if 0 < self.policy.in_flight < self._wanted:
            raise ValueError(
                f"policy.in_flight={self.policy.in_flight} is below the {self._wanted} shards of a step, which would "
                "never be full"
            )

    def step(self, meta: Meta, state: Params, version: int) -> Step:
        begin, now = time.perf_counter(), pack(*meta)
        self._published[version] = self.dispatcher.publish(now), now
        self._drop(version)
        while len(self._buffer) < self._wanted:
            self._fill(version)
            self.dispatcher.pump(1.0)
            self._harvest(version)
        used = sorted(self._buffer[: self._wanted], key=lambda u: u.shard)
        del self._buffer[: self._wanted]
        late = [Late(u.total, version - u.version, self._published[u.version][1]) for u in used if u.total]
        total, factor = self.policy.combined(late, now)
        meta, state, own = self.outer.apply(meta, state, total.mean(), factor)
        self._forget(version)
        staleness = [float(c.staleness) for c in late]
        metrics = logged(total) | own | {"async/rate_factor": factor, "async/staleness_max": max(staleness)}
        metrics |= {"async/staleness_mean": sum(staleness) / len(late), "async/in_flight": float(len(self._way))}
        metrics |= {"async/waiting": float(len(self._buffer))} | {
            f"fleet/dropped_{k}": float(n) for k, n in self._dropped.items()
        }
        seconds = sum(u.round.busy.total() for u in used)
        metrics |= times(metrics, time.perf_counter() - begin, seconds, len(used) * self.batch.size)
        tickets = [t for u in used for t in u.round.tickets]
        record = {"staleness": [c.staleness for c in late], "factor": factor}
        return Step(meta, state, metrics, tickets, record, {"async/staleness": staleness})

    def work(self, version: int) -> Work:
        missing = sorted({u.shard for u in self._way + self._buffer} | set(self._again))
        return Work(self._following, tuple(missing))

    def _fill(self, version: int) -> None:
        """Ask for as many shards as may be under way, at the present θ."""
        while self._room():
            if self._again:
                shard = self._again.popleft()
            else:
                shard, self._following = self._following, self._following + 1
            handle, _ = self._published[version]
            tasks = Shards("train", shard * self.batch.size, 1, self.batch.size)
            self._way.append(
                _Under(shard, version, self.dispatcher.start("gradient", handle, None, tasks, tolerated=1))
            )

    def _room(self) -> bool:
        if self.policy.in_flight:
            return len(self._way) + len(self._buffer) < self.policy.in_flight
        return self.dispatcher.idle() > 0

    def _harvest(self, version: int) -> None:
        """Take in what has arrived."""
        for under in [u for u in self._way if u.round.done]:
            self._rejected.append(bool(under.round.rejected))
            if not under.round.rejected:
                self._take(under)  # if this ends the run, the shard is still under way: it will be asked for again
            self._way.remove(under)
            if under.round.rejected and sum(self._rejected) > max(1.0, self.policy.max_rejected * REMEMBERED):
                raise RunStopped(
                    f"{sum(self._rejected)} of the last {len(self._rejected)} shards are not finite (more than "
                    f"{self.policy.max_rejected:.0%} of {REMEMBERED}): {advice(under.round.culprits)}"
                )
        self._drop(version)

    def _take(self, under: _Under) -> None:
        """Put into the buffer what has arrived, if it can still be had."""
        try:
            under.total = self.dispatcher.collect(under.round)
        except Lost as error:
            self._send_back(under, str(error))
        else:
            self._buffer.append(under)

    def _drop(self, version: int) -> None:
        """Send back what is too stale to be used at `version`."""
        for under in [u for u in self._buffer if version - u.version > self.policy.max_staleness]:
            self._buffer.remove(under)
            self._send_back(under, f"staleness {version - under.version}")

    def _send_back(self, under: _Under, reason: str) -> None:
        """Ask for a shard again, at a θ to come; its tasks are counted by family."""
        self._again.append(under.shard)
        for ticket in under.round.tickets:
            self.dispatcher.ledger.drop(ticket, reason)
        families = under.total.rows.get(GROUP) if under.total else None
        self._dropped.update(["all"] if families is None else [self.batch.families[int(g)] for g in families])

    def _forget(self, version: int) -> None:
        """Release versions that nothing under way was computed at."""
        needed = {u.version for u in self._way + self._buffer}
        for old in [v for v in self._published if v not in needed]:
            self.dispatcher.release(self._published.pop(old)[0])


def _scaled(total: Sum, weight: float) -> Sum:
    if weight == 1.0:
        return total
    return Sum(tree.scale(weight, total.total), weight * total.weight, total.rows)


def _plus(left: Sum, right: Sum) -> Sum:
    rows = {k: torch.cat([v, right.rows[k]]) for k, v in left.rows.items()}
    return Sum(tree.add(left.total, right.total), left.weight + right.weight, rows)
