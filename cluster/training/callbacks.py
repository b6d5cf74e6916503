"""What watches a run in Python and may ask it to stop. It sees numbers, never θ."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.fleet.messages import RunStopped
from cluster.results.curves import HIGHER_IS_BETTER, Curves

log = logging.getLogger("metafleet")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on validation tasks: per measure, its mean at inner steps 0 … k."""

    iteration: int
    mean: Mapping[str, Sequence[float]]


class Callback(Protocol):
    """A watcher; what it does not define does nothing."""

    def on_begin(self, hparams: Mapping[str, object], earlier: Sequence[Evaluated]) -> None:
        """An attempt at the run begins; `earlier`: the validations of those before it, up to its checkpoint."""

    def on_step(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """After each outer step; True asks the run to stop."""
        return False

    def on_evaluation(self, iteration: int, split: str, curves: Curves) -> bool:
        """After each evaluation; True asks the run to stop."""
        return False

    def on_end(self, state: str) -> None:
        """The attempt ends; `state` as in status.json."""


@dataclass(frozen=True)
class EarlyStopping(Callback):
    """Stops where validation has not become better for a while."""

    patience: int = 5
    """Evaluations without a better one."""
    min_delta: float = 0.0
    """By how much a better one is better."""
    measure: str = ""
    """What is compared, at the last inner step; empty: the first measure."""
    _scores: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.patience < 1 or not self.min_delta >= 0:
            raise ValueError(f"patience={self.patience}, min_delta={self.min_delta}: at least 1 and 0 wanted")

    def on_begin(self, hparams: Mapping[str, object], earlier: Sequence[Evaluated]) -> None:
        """Remember what validation has said so far."""
        self._scores[:] = [self._score({k: v[-1] for k, v in e.mean.items()}) for e in earlier]

    def on_evaluation(self, iteration: int, split: str, curves: Curves) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        if split != "validation":
            return False
        self._scores.append(self._score({k: float(v[-1]) for k, v in curves.mean.items()}))
        best, waited = -math.inf, 0
        for score in self._scores:
            better = score > best + self.min_delta
            best, waited = (score, 0) if better else (best, waited + 1)
        return waited >= self.patience

    def _score(self, last: Mapping[str, float]) -> float:
        """Larger is better; what is not finite is worst."""
        name = self.measure or next(iter(last))
        if name not in last:
            raise ValueError(f"measure={name!r} is not among those of this run: {', '.join(last)}")
        score = last[name] if name.startswith(HIGHER_IS_BETTER) else -last[name]
        return score if math.isfinite(score) else -math.inf


@dataclass(frozen=True)
class Callbacks:
    """All those of a run, asked in their order."""

    members: tuple[Callback, ...] = ()

    def begin(self, hparams: Mapping[str, object], earlier: Sequence[Evaluated]) -> None:
        """Raises RunStopped, naming it, where one fails; so do the others."""
        self._asked("on_begin", lambda c: c.on_begin(hparams, earlier))

    def step(self, iteration: int, metrics: Mapping[str, float]) -> str:
        """Who asks to stop; "" for nobody."""
        return self._asked("on_step", lambda c: c.on_step(iteration, dict(metrics)))

    def evaluation(self, iteration: int, split: str, curves: Curves) -> str:
        """Who asks to stop; "" for nobody."""
        return self._asked("on_evaluation", lambda c: c.on_evaluation(iteration, split, curves))

    def end(self, state: str) -> None:
        """A failure here is a warning: the run has ended."""
        for callback in self.members:
            try:
                callback.on_end(state)
            except Exception as error:
                log.warning("%s", _failed(callback, "on_end", error))

    def _asked(self, where: str, ask: Callable[[Callback], bool | None]) -> str:
        asking = ""
        for callback in self.members:
            try:
                stop = ask(callback)
            except Exception as error:
                raise _failed(callback, where, error) from error
            asking = asking or (repr(callback) if stop else "")
        return asking


def _failed(callback: Callback, where: str, error: Exception) -> RunStopped:
    return RunStopped(f"callback {type(callback).__name__} failed in {where}: {type(error).__name__}: {error}")
