"""Accuracy under attack, in a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from cluster.fleet.recipe import Recipe
from cluster.results import drawing, interval
from envs.images.episodes import beside
from learners.base import Meta
from learners.objectives.attack import attacked_query
from learners.objectives.robustness import Robustness
from learners.objectives.supervised import Supervised


@dataclass(frozen=True)
class Matrix:
    """Mean over tasks and half-width of the 95 % interval by "support/query/measure"."""

    tasks: int
    steps: int
    how: Robustness
    mean: dict[str, float]
    ci95: dict[str, float]

    @classmethod
    def of(cls, rows: dict[str, NDArray[np.float64]], steps: int, how: Robustness) -> Matrix:
        """From per-task values [tasks]."""
        tasks = len(next(iter(rows.values())))
        half = {k: float(interval.over_tasks(v)) for k, v in rows.items()}
        return cls(tasks, steps, how, {k: float(v.mean()) for k, v in rows.items()}, half)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"tasks": self.tasks, "steps": self.steps, "eps": self.how.eps, "mean": self.mean, "ci95": self.ci95}

    def tables(self) -> list[Table]:
        """Per measure that is not a loss: a row per kind of support set, a column per kind of query set."""
        keys = [k.split("/") for k in self.mean]
        measures = dict.fromkeys(m for _, _, m in keys if not m.startswith("loss"))
        return [self._table(m, dict.fromkeys(q for _, q, n in keys if n == m)) for m in measures]

    def _table(self, measure: str, queries: dict[str, None]) -> Table:
        table = Table(
            title=f"{measure.replace('_', ' ', 1)} under attack, ε = {self.how.eps:g}, "
            f"after {self.steps} inner steps ({self.tasks} tasks, mean ± 95 % CI)"
        )
        table.add_column("support")
        for query in queries:
            table.add_column(f"{query} query", justify="right")
        for support in dict.fromkeys(k.split("/")[0] for k in self.mean):
            keys = [f"{support}/{query}/{measure}" for query in queries]
            table.add_row(support, *(f"{self.mean[k]:.4f} ± {self.ci95[k]:.4f}" for k in keys))
        return table


def picture(recipe: Recipe, meta: Meta, path: Path) -> list[Path]:
    """Draw queries of the first test task, clean and under PGD; the files written, none where there is nothing to
    draw.
    """
    recipe = replace(recipe, device="cpu")  # the driver's θ is there, and it may have nothing else
    objective, how = recipe.objective, recipe.robustness
    if not isinstance(objective, Supervised) or how is None or len(getattr(recipe.tasks, "inputs", ())) != 3:
        return []
    verb = recipe.verbs(objective)["robustness"]
    data = recipe.tensors(recipe.task("test", 0, verb))
    with torch.no_grad():
        phi = meta.slots | recipe.learner.at_test().adapt(meta, objective, data, recipe.evaluation_steps)
    view, (name, attack) = objective.views()[0], list(how.queries().items())[-1]
    attacked = attacked_query(attack, view, phi, data)
    with torch.no_grad():
        guesses = [view.predict(phi, d, d["query_x"]).argmax(-1).cpu().numpy() for d in (data, attacked)]
    figure = beside(
        data["query_x"].cpu().numpy(), attacked["query_x"].cpu().numpy(), data["query_y"].cpu().numpy(), *guesses,
        title=f"Queries of a held-out task, clean and under {name}, ε = {how.eps:g}; normalisation {view.norm}",
    )  # fmt: skip
    return [drawing.save(figure, path)]
