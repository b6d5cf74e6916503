"""Losses and measures by name, as torch defines them, each over examples that may be padding.

A loss, or a measure, is any callable `(output, target) → scalar tensor`; `(output, target, mask)`, with `mask` [n] 1
for examples that are there and 0 for padding, where tasks are padded. `output` and `target` are what the model gives
and what the task holds. Those of one's own stand beside these: `Supervised(model, loss=my_loss, measures={…})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.objectives.measures import (
    IGNORED,
    Measure,
    accuracy,
    binary_accuracy,
    f1,
    known,
    labels,
    mean,
    one_tensor,
    same_shape,
)  # fmt: skip


@runtime_checkable
class Loss(Protocol):
    """A loss that says what is measured beside it."""

    name: ClassVar[str]

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        """Mean over the examples that are there."""

    def measures(self) -> Mapping[str, Measure]:
        """By name, in the order of the tables; the first one chooses the best θ."""


@dataclass(frozen=True)
class Regression:
    """Mean of an error per number; outputs and targets of one shape."""

    name: ClassVar[str] = "mse"

    def error(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        """The error of every number, or their mean, as torch has it."""
        return F.mse_loss(output, target, reduction=reduction)

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        output = same_shape(output, target, self.name)  # torch would broadcast, and learn nonsense
        target = target.to(output.dtype)
        return self.error(output, target, "mean") if mask is None else mean(self.error(output, target, "none"), mask)

    def measures(self) -> Mapping[str, Measure]:
        return {self.name: self}


@dataclass(frozen=True)
class MeanSquared(Regression):
    """mean (ŷ − y)²."""


@dataclass(frozen=True)
class L1(Regression):
    """mean |ŷ − y|."""

    name: ClassVar[str] = "l1"

    def error(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.l1_loss(output, target, reduction=reduction)


@dataclass(frozen=True)
class Huber(Regression):
    """½ e² where |e| ≤ δ, else δ (|e| − δ/2) (Huber 1964)."""

    name: ClassVar[str] = "huber"
    delta: float = 1.0
    """δ."""

    def error(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.huber_loss(output, target, reduction=reduction, delta=self.delta)


@dataclass(frozen=True)
class GaussianNLL:
    """mean ½ (log σ² + (y − μ)²/σ²): outputs are a pair (μ, σ²), as torch's loss takes them (σ² at least 10⁻⁶), or one
    tensor whose last axis is μ followed by log σ².
    """

    name: ClassVar[str] = "gaussian_nll"

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        mu, log_variance = self._parts(output)
        if mu.shape != target.shape:
            raise ValueError(f"targets of shape {tuple(target.shape)} do not fit means of shape {tuple(mu.shape)}")
        return mean((log_variance + (target.to(mu.dtype) - mu).square() * torch.exp(-log_variance)) / 2, mask)

    def measures(self) -> Mapping[str, Measure]:
        def mse(output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
            return MeanSquared()(self._parts(output)[0], target, mask)

        return {"nll": self, "mse": mse}

    def _parts(self, output: Any) -> tuple[Tensor, Tensor]:
        if isinstance(output, tuple | list) and len(output) == 2:
            return output[0], output[1].clamp(min=1e-6).log()
        if not isinstance(output, Tensor) or output.shape[-1] % 2:
            raise ValueError("gaussian_nll wants outputs (mean, variance), or one tensor of means and log variances")
        mu, log_variance = output.chunk(2, -1)
        return mu, log_variance


@dataclass(frozen=True)
class CrossEntropy:
    """−log softmax(ŷ)_y, mean over examples and positions; outputs [n, C, …], labels [n, …] of any integer type, or
    probabilities [n, C, …]. Positions labelled −100 do not count.
    """

    name: ClassVar[str] = "cross_entropy"
    label_smoothing: float = 0.0
    """ε: targets (1 − ε) one-hot + ε/C (Szegedy et al. 2016)."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class's examples, as in torch's `weight`; (): all 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: 0 or more, and less than 1, wanted")

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        output = one_tensor(output, self.name)
        target, weight = labels(output, target), self._weight(output)
        if mask is None:
            return F.cross_entropy(output, target, weight, label_smoothing=self.label_smoothing)
        each = F.cross_entropy(output, target, weight, reduction="none", label_smoothing=self.label_smoothing)
        if target.is_floating_point():
            return mean(each, mask)
        counted = (target != IGNORED).to(each.dtype)
        if weight is not None:
            counted = counted * weight[target.clamp(min=0)]
        return torch.div(known(each, mask).sum(), known(counted, mask).sum())

    def summed(self, output: Any, target: Any, shots: float | Tensor, mask: Tensor | None = None) -> Tensor:
        """Σ over examples (each the mean over its positions) divided by shots: cbfinn's scale (`Supervised.scale`)."""
        output = one_tensor(output, self.name)
        target = labels(output, target)
        weight, positions = self._weight(output), output[0, 0].numel()
        how: Literal["sum", "none"] = "sum" if mask is None else "none"
        total = F.cross_entropy(output, target, weight, reduction=how, label_smoothing=self.label_smoothing)
        return torch.div(total if mask is None else known(total, mask).sum(), shots * positions)

    def measures(self) -> Mapping[str, Measure]:
        return {"accuracy": accuracy, "loss": CrossEntropy()}

    def _weight(self, output: Tensor) -> Tensor | None:
        if not self.class_weights:
            return None
        if len(self.class_weights) != output.shape[1]:
            raise ValueError(f"{len(self.class_weights)} class_weights do not fit outputs of {output.shape[1]} classes")
        return output.new_tensor(self.class_weights)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """−y log σ(ŷ) − (1 − y) log(1 − σ(ŷ)), mean over examples and labels: several labels at a time; outputs and targets
    of one shape, targets 0 or 1 (or between).
    """

    name: ClassVar[str] = "binary_cross_entropy"

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        output = same_shape(output, target, self.name)
        return mean(F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none"), mask)

    def measures(self) -> Mapping[str, Measure]:
        return {"accuracy": binary_accuracy, "f1": f1, "loss": self}


LOSSES: dict[str, type] = {
    loss.name: loss for loss in (MeanSquared, L1, Huber, CrossEntropy, BinaryCrossEntropy, GaussianNLL)
}
"""By name."""
