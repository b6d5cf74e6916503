"""The supervised objective: model, loss, measures, normalisation mode and loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from envs.base import Arrays
from learners.base import Data, Metrics, Params
from learners.engine import tree
from learners.modules.draws import QUERY, Draws
from learners.modules.functional import Functional, Inputs
from learners.modules.normalisation import BATCH, Statistics
from learners.objectives.arrays import (
    and_more,
    check_probabilities,
    given,
    holds,
    joined,
    of_classes,
    rows_of,
    shots,
)  # fmt: skip
from learners.objectives.losses import LOSSES, CrossEntropy, Loss
from learners.objectives.measures import Measure, called, scalar

NormMode = Literal["transductive", "support_plus_one", "support_statistics", "frozen"]

ROWS_AT_ONCE = 1024  # examples in one forward pass of support_plus_one: bounds memory, not results
KEY = "draws"
"""Name of the array that the random numbers of a task's model follow from; without it the model does not draw."""


@dataclass(frozen=True)
class Supervised:
    """A loss on a support and a query set.

    A task's arrays are `support_x` [n, …] or, for a model of several inputs, `support_x/name` for each keyword
    argument; `support_y` (or `support_y/name`: the loss gets a dictionary); the same for the query. Optional:
    `support_mask`, `query_mask` [n], 1 for examples that are there and 0 for padding; `class_mask` [C], 1 for classes
    that the task has: the others' logits are −∞.

    loss: a name of `objectives.losses.LOSSES`, one of its classes with keys (`CrossEntropy(label_smoothing=0.1)`), or
    any callable (output, target) → scalar tensor, which takes (output, target, mask) where tasks are padded.
    measures: what evaluation reports beside the loss, callables alike; None: what the loss's name stands for. The first
    one chooses the best θ: the highest, where its name begins with accuracy, f1, return or score, else the lowest.

    norm: what BatchNorm's statistics are taken from when the *query* is predicted —
      transductive        the whole query batch (MAML's published numbers),
      support_plus_one    the support set and that one query example (Reptile's non-transductive evaluation),
      support_statistics  the support set alone,
      frozen              running statistics carried in the slots, for the support too; they follow the tasks with
                          `momentum`.
    In the first three the support is normalised by itself.

    scale: "mean" over examples, or "sum_over_shots", cbfinn's: Σ/K for K shots, which for a whole support set of N
    ways is N times the mean; MAML's published inner rates are for that one.
    """

    model: Functional
    loss: str | Measure
    norm: NormMode = "transductive"
    scale: Literal["mean", "sum_over_shots"] = "mean"
    report: tuple[NormMode, ...] = ()
    """Modes in which `measure` evaluates; empty: the mode of training."""
    momentum: float = 0.1
    """Rate at which frozen statistics follow those of the tasks."""
    measures: Mapping[str, Measure] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not one of {', '.join(LOSSES)}, nor a callable (output, target)")
        if not callable(self.criterion):
            raise ValueError(f"loss={self.loss!r}: a name, or a callable (output, target) → scalar tensor, wanted")
        if self.scale == "sum_over_shots" and not isinstance(self.criterion, CrossEntropy):
            raise ValueError("scale='sum_over_shots' is a scale of the cross-entropy; another loss wants scale='mean'")
        for mode in (self.norm, *self.report):
            if mode not in get_args(NormMode):
                raise ValueError(f"norm mode {mode!r} is not one of {', '.join(get_args(NormMode))}")
        if "frozen" in self.report and self.norm != "frozen":
            raise ValueError(
                f"norm mode 'frozen' cannot be reported: this run trains with {self.norm!r} and carries no statistics"
            )

    @property
    def criterion(self) -> Measure:
        """The loss as a callable."""
        if not isinstance(self.loss, str):
            return self.loss
        loss: Measure = LOSSES[self.loss]()
        return loss

    @property
    def classifies(self) -> bool:
        """Whether targets are one class each."""
        return isinstance(self.criterion, CrossEntropy)

    @property
    def channels_last(self) -> bool:
        """Whether the model keeps images in that memory format."""
        return self.model.channels_last

    def draw(self, data: Arrays, rng: np.random.Generator) -> Arrays:
        """`data` with the key of the model's random numbers, where it draws any. Raises ValueError for targets that
        are no classes where classes are wanted.
        """
        if self.classifies:
            for name in ("support_y", "query_y"):
                check_probabilities(name, data.get(name))
        return data | {KEY: np.asarray(rng.integers(2**62))} if self.model.draws else data

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        x, y, mask = given(data, "support_x"), given(data, "support_y"), data.get("support_mask")
        if "batches" in data:
            rows = data["batches"][step]
            x, y = tree.mapped(lambda v: v[rows], (x, y))
            mask = None if mask is None else mask[rows]
        output = self.model(params, x, self.own(), draws=self._draws(data, step), real=mask)
        return self._loss(output, y, data, mask)

    def query(self, params: Params, data: Data) -> Tensor:
        if not holds(data, "query_x") or not holds(data, "query_y"):
            raise ValueError(f"a task with query_x and query_y is wanted here, this one has {', '.join(data)}")
        output = self._predicted(params, data, given(data, "query_x"), self._draws(data, QUERY), data.get("query_mask"))
        return self.query_loss(output, data)

    def query_loss(self, output: Any, data: Data) -> Tensor:
        """The loss of predictions [n, …] for the query set."""
        return self._loss(output, given(data, "query_y"), data, data.get("query_mask"))

    def measure(self, params: Params, data: Data) -> Metrics:
        return {name: value for view in self.views() for name, value in view._scores(params, data).items()}

    def views(self) -> list[Supervised]:
        """This objective once for each mode that `measure` reports, in that mode."""
        if not self.model.normalises:
            return [self]
        return [replace(self, norm=mode, report=(mode,)) for mode in self.report or (self.norm,)]

    def predict(self, params: Params, data: Data, x: Inputs) -> Any:
        """Outputs [n, …] of the model adapted to `data`'s support, in this objective's normalisation mode; the model in
        evaluation mode.
        """
        return self._predicted(params, data, x, None, None)

    def features(self, params: Params, data: Data, part: str = "support") -> Tensor:
        """What reaches the model's head for the support set, normalised by itself; or for the query set, by the support
        where the mode says so.
        """
        draws = self._draws(data, QUERY if part == "query" else 0)
        x = given(data, f"{part}_x")
        return self.model.features(params, x, self.own(), draws=draws, real=data.get(f"{part}_mask"))

    def own(self) -> Statistics:
        """What a support set is normalised by."""
        return Statistics("frozen") if self.norm == "frozen" else BATCH

    def slots(self) -> Params:
        return self.model.running() if self.norm == "frozen" else {}

    def track(self, params: Params, data: Data) -> Params:
        if self.norm != "frozen":
            return {}
        with torch.no_grad():
            x, real = given(data, "support_x"), data.get("support_mask")
            seen = self.model.observe(params, x, Statistics("frozen"), real)
        return {k: torch.lerp(params[k], v, self.momentum).detach() for k, v in seen.items()}

    def to(self, device: str) -> Supervised:
        """The same objective on another device."""
        return replace(self, model=self.model.to(device))

    def summary(self) -> str:
        """Loss and measures, the normalisation mode where there is one, and the model's constants."""
        said = [f"{called(self.loss)} ({self.scale})"]
        if self.measures is not None:
            said.append(f"measures {', '.join(f'{k} {called(v)}' for k, v in self.measures.items())}")
        if self.model.normalises:
            said.append(f"norm {self.norm}")
        return ", ".join(s for s in (*said, self.model.summary()) if s)

    def _draws(self, data: Data, step: int) -> Draws | None:
        return Draws(data[KEY], step) if KEY in data else None

    def _predicted(self, params: Params, data: Data, x: Inputs, draws: Draws | None, real: Tensor | None) -> Any:
        if not self.model.normalises or self.norm == "transductive":
            return self.model(params, x, BATCH, draws=draws, real=real)
        if self.norm == "frozen":
            return self.model(params, x, Statistics("frozen"), draws=draws)
        context, known = given(data, "support_x"), data.get("support_mask")
        size, count = len(tree.leaves(context)[0]), len(tree.leaves(x)[0])
        if self.norm == "support_statistics":
            both, how = joined(context, x), Statistics("first", reference=size)
            y = self.model(params, both, how, draws=draws, real=and_more(known, count))
            return tree.mapped(lambda v: v[size:], y)
        at_once = max(1, ROWS_AT_ONCE // (size + 1))
        parts = [
            self._one_by_one(params, context, rows_of(x, i, i + at_once), draws, known)
            for i in range(0, count, at_once)
        ]
        return tree.joined(parts)

    def _one_by_one(self, params: Params, context: Inputs, x: Inputs, draws: Draws | None, known: Tensor | None) -> Any:
        n, size = len(tree.leaves(x)[0]), len(tree.leaves(context)[0]) + 1
        known = and_more(known, 1)
        real = None if known is None else known.expand(n, size).flatten()
        groups = joined(
            tree.mapped(lambda v: v.expand(n, *v.shape), context), tree.mapped(lambda v: v.unsqueeze(1), x), 1
        )  # [n, |S|+1, …]
        flat = tree.mapped(lambda v: v.flatten(0, 1), groups)
        y = self.model(params, flat, Statistics(groups=n), draws=draws, real=real)
        return tree.mapped(lambda v: v.view(n, size, *v.shape[1:])[:, -1], y)

    def _loss(self, output: Any, target: Any, data: Data, mask: Tensor | None) -> Tensor:
        criterion = self.criterion
        output = of_classes(output, data, criterion)
        if self.scale == "sum_over_shots" and isinstance(criterion, CrossEntropy):
            return criterion.summed(output, target, shots(output, data), mask)
        return scalar(criterion, output, target, mask, "loss")

    def _scores(self, params: Params, data: Data) -> Metrics:
        x, target, mask = given(data, "query_x"), given(data, "query_y"), data.get("query_mask")
        criterion = self.criterion
        output = of_classes(self._predicted(params, data, x, None, mask), data, criterion)
        mode = f"_{self.norm}" if self.model.normalises else ""
        measures: Mapping[str, Measure] = criterion.measures() if isinstance(criterion, Loss) else {"loss": criterion}
        if self.measures is not None:
            measures = {**self.measures, "loss": criterion}
        return {f"{name}{mode}": scalar(m, output, target, mask, name) for name, m in measures.items()}
