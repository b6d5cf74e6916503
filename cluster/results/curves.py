"""Adaptation curves: mean and interval after each inner step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from cluster.results import interval
from learners.base import GROUP

log = logging.getLogger("metafleet")


HIGHER_IS_BETTER = ("accuracy", "f1", "return", "score")


@dataclass(frozen=True)
class Curves:
    """Per measure: mean over tasks and half-width of the 95 % interval, 1.96 · s/√n, at inner steps 0 … k."""

    tasks: int
    mean: dict[str, NDArray[np.float64]]
    ci95: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, rows: dict[str, NDArray[np.float64]], groups: tuple[str, ...] = ()) -> Curves:
        """From per-task values [tasks, steps + 1]; where tasks are of several `groups`, the row of that name says
        which, and their means are there beside the mean over all.
        """
        rows = dict(rows)
        kind = rows.pop(GROUP, None)
        curves = cls._over(rows)
        for index, name in enumerate(groups if kind is not None else ()):
            members = np.flatnonzero(kind == index)
            if members.size:
                of_kind = cls._over({f"{k}_{name}": v[members] for k, v in rows.items()})
                curves = replace(curves, mean=curves.mean | of_kind.mean, ci95=curves.ci95 | of_kind.ci95)
        return curves

    @classmethod
    def _over(cls, rows: dict[str, NDArray[np.float64]]) -> Curves:
        tasks = len(next(iter(rows.values())))
        if not all(np.isfinite(v).all() for v in rows.values()):
            log.warning("adaptation diverged on some held-out tasks: their values are not finite")
        with np.errstate(all="ignore"):
            return cls._of(tasks, rows)

    @classmethod
    def _of(cls, tasks: int, rows: dict[str, NDArray[np.float64]]) -> Curves:
        return cls(tasks, {k: v.mean(0) for k, v in rows.items()}, {k: interval.over_tasks(v) for k, v in rows.items()})

    def score(self) -> float:
        """The first measure at the last step: what the best θ is chosen by."""
        return float(next(iter(self.mean.values()))[-1])

    def beats(self, score: float | None) -> bool:
        """Whether this is finite, and better than an earlier score."""
        if score is None or not np.isfinite(self.score()):
            return bool(np.isfinite(self.score()))
        higher = next(iter(self.mean)).startswith(HIGHER_IS_BETTER)
        return self.score() > score if higher else self.score() < score

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tasks": self.tasks,
            "mean": {k: v.tolist() for k, v in self.mean.items()},
            "ci95": {k: v.tolist() for k, v in self.ci95.items()},
        }

    def table(self, title: str) -> Table:
        """One row per inner step."""
        table = Table(title=title)
        table.add_column("inner steps", justify="right")
        for name in self.mean:
            table.add_column(name.replace("_", " ", 1), justify="right")
        for step in range(len(next(iter(self.mean.values())))):
            table.add_row(
                str(step), *(f"{_number(self.mean[k][step])} ± {_number(self.ci95[k][step])}" for k in self.mean)
            )
        return table


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.2e}"
