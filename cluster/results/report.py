"""What a finished run says: the curve on test tasks, the table under attack, pictures, files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.fleet.recipe import Recipe
from cluster.record.checkpoint import State
from cluster.record.mirror import Mirror
from cluster.record.storage import write_atomically
from cluster.results import attacked, pictures
from cluster.results.attacked import Matrix
from cluster.results.curves import Curves
from cluster.results.monitor import Monitor

log = logging.getLogger("metafleet")

RESULTS = "evaluation.json"
"""File of a run directory that a finished run's results are in."""


@dataclass(frozen=True)
class Results:
    """Of one θ on test tasks."""

    curves: Curves
    matrix: Matrix | None
    """Where the evaluation attacks."""


@dataclass(frozen=True)
class Report:
    """Makes the results of a run known."""

    recipe: Recipe
    monitor: Monitor
    mirror: Mirror
    """Of the run directory."""
    pictures: int
    """Test tasks to draw."""

    def publish(self, state: State, results: Results, hparams: Mapping[str, object]) -> None:
        """Write evaluation.json, pictures and TensorBoard's last entries, and print the tables."""
        curves, matrix = results.curves, results.matrix
        self.monitor.curve(state.iteration, "test", curves.mean)
        content = {"iteration": state.iteration, "seed": self.recipe.seed, **curves.as_dict()}
        if matrix:
            content["robustness"] = matrix.as_dict()
            self.monitor.values(state.iteration, "test", {f"test/{k}": v for k, v in matrix.mean.items()})
        write_atomically(self.mirror.local / RESULTS, json.dumps(content, indent=1).encode())
        title = f"Held-out test tasks: {curves.tasks} tasks, mean ± 95 % CI, after {state.iteration} meta-iterations"
        for table in [curves.table(title), *(matrix.tables() if matrix else ())]:
            self.monitor.console.print(table)
        self.monitor.message(self.recipe.summary())
        self._draw(state)
        self.monitor.hparams(hparams, {f"{k}_{i}": float(v[i]) for k, v in curves.mean.items() for i in (0, -1)})
        self.monitor.message(f"tensorboard: {self.mirror.home / 'tensorboard'}")

    def _draw(self, state: State) -> None:
        what = pictures.shown(self.recipe, state.used, self.pictures)
        if what:
            self._picture(state, "adaptation", lambda path: pictures.picture(self.recipe.tasks, what, path))
            self._picture(state, "film", lambda path: pictures.film(self.recipe.tasks, what, path))
        self._picture(state, "adversarial", lambda path: attacked.picture(self.recipe, state.used, path))

    def _picture(self, state: State, name: str, draw: Callable[[Path], list[Path]]) -> None:
        try:
            for path in draw(self.mirror.local / f"{name}.png"):
                self.monitor.picture(state.iteration, f"test/{path.stem}", path)
                self.monitor.message(f"picture:     {self.mirror.home / path.name}")
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("no picture %s.png: %s", name, error)
