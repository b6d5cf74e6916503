"""The supervised objective: model, loss, normalisation mode and loss scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.base import Data, Metrics, Params
from learners.models.functional import Functional
from learners.models.normalisation import BATCH, Statistics

NormMode = Literal["transductive", "support_plus_one", "support_statistics", "frozen"]

ROWS_AT_ONCE = 1024  # examples in one forward pass of support_plus_one: bounds memory, not results


@dataclass(frozen=True)
class Supervised:
    """Regression (mean squared error) or classification (cross-entropy) on a support and a query set.

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
    loss: Literal["mse", "cross_entropy"]
    norm: NormMode = "transductive"
    scale: Literal["mean", "sum_over_shots"] = "mean"
    report: tuple[NormMode, ...] = ()
    """Modes in which `measure` evaluates; empty: the mode of training."""
    momentum: float = 0.1
    """Rate at which frozen statistics follow those of the tasks."""

    def __post_init__(self) -> None:
        if self.scale == "sum_over_shots" and self.loss != "cross_entropy":
            raise ValueError("scale='sum_over_shots' is a scale of the cross-entropy; regression wants scale='mean'")
        for mode in (self.norm, *self.report):
            if mode not in get_args(NormMode):
                raise ValueError(f"norm mode {mode!r} is not one of {', '.join(get_args(NormMode))}")
        if "frozen" in self.report and self.norm != "frozen":
            raise ValueError(
                f"norm mode 'frozen' cannot be reported: this run trains with {self.norm!r} and carries no statistics"
            )

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        x, y = data["support_x"], data["support_y"]
        if "batches" in data:
            rows = data["batches"][step]
            x, y = x[rows], y[rows]
        return self._loss(self.model(params, x, self.own()), y, data)

    def query(self, params: Params, data: Data) -> Tensor:
        if "query_x" not in data or "query_y" not in data:
            raise ValueError(f"a task with query_x and query_y is wanted here, this one has {', '.join(data)}")
        return self.query_loss(self.predict(params, data, data["query_x"]), data)

    def query_loss(self, output: Tensor, data: Data) -> Tensor:
        """The loss of predictions [n, …] for the query set."""
        return self._loss(output, data["query_y"], data)

    def measure(self, params: Params, data: Data) -> Metrics:
        return {name: value for view in self.views() for name, value in view._scores(params, data).items()}

    def views(self) -> list[Supervised]:
        """This objective once for each mode that `measure` reports, in that mode."""
        if not self.model.normalises:
            return [self]
        return [replace(self, norm=mode, report=(mode,)) for mode in self.report or (self.norm,)]

    def predict(self, params: Params, data: Data, x: Tensor) -> Tensor:
        """Outputs [n, …] of the model adapted to `data`'s support, in this objective's normalisation mode."""
        if not self.model.normalises or self.norm == "transductive":
            return self.model(params, x, BATCH)
        if self.norm == "frozen":
            return self.model(params, x, Statistics("frozen"))
        context = data["support_x"]
        if self.norm == "support_statistics":
            both = torch.cat([context, x])
            return self.model(params, both, Statistics("first", reference=len(context)))[len(context) :]
        return torch.cat(
            [
                self._one_by_one(params, context, part)
                for part in torch.split(x, max(1, ROWS_AT_ONCE // (len(context) + 1)))
            ]
        )

    def own(self) -> Statistics:
        """What a support set is normalised by."""
        return Statistics("frozen") if self.norm == "frozen" else BATCH

    def slots(self) -> Params:
        return self.model.running() if self.norm == "frozen" else {}

    def track(self, params: Params, data: Data) -> Params:
        if self.norm != "frozen":
            return {}
        with torch.no_grad():
            seen = self.model.observe(params, data["support_x"], Statistics("frozen"))
        return {k: torch.lerp(params[k], v, self.momentum).detach() for k, v in seen.items()}

    def to(self, device: str) -> Supervised:
        """The same objective on another device."""
        return replace(self, model=self.model.to(device))

    def summary(self) -> str:
        """Loss, and the normalisation mode where there is one."""
        norm = f", norm {self.norm}" if self.model.normalises else ""
        return f"{self.loss} ({self.scale}){norm}"

    def _one_by_one(self, params: Params, context: Tensor, x: Tensor) -> Tensor:
        n, size = len(x), len(context) + 1
        groups = torch.cat([context.expand(n, *context.shape), x.unsqueeze(1)], 1)  # [n, |S|+1, …]
        y = self.model(params, groups.flatten(0, 1), Statistics(groups=n))
        return y.view(n, size, *y.shape[1:])[:, -1]

    def _loss(self, output: Tensor, target: Tensor, data: Data) -> Tensor:
        if self.loss == "mse":
            if output.shape != target.shape:  # torch would broadcast, and learn nonsense
                raise ValueError(
                    f"targets of shape {tuple(target.shape)} do not fit outputs of shape {tuple(output.shape)}"
                )
            return F.mse_loss(output, target)
        if self.scale == "mean":
            return F.cross_entropy(output, target)
        shots = len(data["support_x"]) / output.shape[-1]
        return F.cross_entropy(output, target, reduction="sum") / shots

    def _scores(self, params: Params, data: Data) -> Metrics:
        output, target = self.predict(params, data, data["query_x"]), data["query_y"]
        mode = f"_{self.norm}" if self.model.normalises else ""
        if self.loss == "mse":
            return {f"mse{mode}": F.mse_loss(output, target)}
        right = (output.argmax(-1) == target).to(output.dtype)
        return {f"accuracy{mode}": right.mean(), f"loss{mode}": F.cross_entropy(output, target)}
