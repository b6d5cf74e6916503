"""What an adapted θ says of queries: a csv, a picture."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.operations.examples import Examples
from cluster.operations.trained import Fitted
from cluster.record.storage import Place, make_folder, write_atomically
from envs.base import Array
from envs.images.episodes import Episodes, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOP = 3
"""Classes named for each query."""
COLUMNS, ROWS = 6, 8
"""Of the picture, at most."""


@dataclass(frozen=True)
class Predictions:
    """Of queries: classes by falling probability with their probabilities [n, top], or numbers [n, targets]."""

    queries: Examples
    labels: Array | None
    values: Array

    @classmethod
    def of(cls, fitted: Fitted, queries: Examples) -> Predictions:
        """The `TOP` most probable classes of each query, or its numbers."""
        if fitted.classes_ is None:
            return cls(queries, None, fitted.predict(queries))
        probabilities = fitted.predict_proba(queries)
        best = np.argsort(-probabilities.astype(np.float64), 1, kind="stable")[:, :TOP]
        return cls(queries, fitted.classes_[best], np.take_along_axis(probabilities, best, 1))

    def accuracy(self) -> float | None:
        """Share of right predictions where the queries' labels are known."""
        if self.labels is None or self.queries.y is None:
            return None
        return float((self.labels[:, 0].astype(str) == self.queries.y.astype(str)).mean())

    def write(self, out: Place) -> None:
        """A line per query: its name, the prediction and its probability, then the next ones; or its numbers."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        if self.labels is None:
            lines.writerow(["query", *(f"y{i}" for i in range(self.values.shape[1]))])
        else:
            further = [f"{kind}_{i}" for i in range(2, self.labels.shape[1] + 1) for kind in ("class", "probability")]
            lines.writerow(["query", "class", "probability", *further])
        for i, name in enumerate(self.queries.names):
            values = [f"{v:.6g}" for v in self.values[i].ravel()]
            if self.labels is not None:
                pairs = zip(self.labels[i], values, strict=True)
                values = [str(v) for pair in pairs for v in pair]
            lines.writerow([name, *values])
        make_folder(out.parent)
        write_atomically(out, text.getvalue().encode())

    def picture(self, support: Examples, tasks: Episodes) -> Figure:
        """The support set class by class; beneath, the first queries with what is said of them, in red where it is
        known to be wrong.
        """
        from matplotlib.figure import Figure

        assert self.labels is not None
        assert support.y is not None
        shown = min(len(self.queries.x), COLUMNS * ROWS)
        classes = np.unique(support.y)
        columns = max(COLUMNS, min(len(classes), 10))
        above, below = -(-len(classes) // columns), -(-shown // columns)
        figure = Figure(figsize=(1.35 * columns, 1.6 * (above + below) + 0.8), layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[above, below])[:, 0]
        top.suptitle("support: one example of each class", fontsize=12)
        bottom.suptitle("queries: prediction, probability", fontsize=12)
        pixels = tasks.pixels(support.x)
        for axis, label in zip(_axes(top, above, columns), classes, strict=False):
            show(axis, pixels[np.flatnonzero(support.y == label)[0]], "black", _short(label))
        pixels, truth = tasks.pixels(self.queries.x), self.queries.y
        for i, axis in zip(range(shown), _axes(bottom, below, columns), strict=False):
            said = str(self.labels[i, 0])
            color = "black" if truth is None else "green" if said == str(truth[i]) else "red"
            show(axis, pixels[i], color, f"{_short(said)}, {self.values[i, 0]:.0%}")
        return figure


def _axes(part: Figure, rows: int, columns: int) -> list[Axes]:
    axes = list(part.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.set_axis_off()
    return axes


def _short(label: object) -> str:
    text = str(label)
    return text if len(text) <= 14 else f"{text[:6]}…{text[-7:]}"
