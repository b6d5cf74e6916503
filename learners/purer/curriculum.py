"""When pseudo-episodes should become harder (PURER's gradient switch, §3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learners.base import Params


@dataclass(frozen=True)
class Switch:
    """Fires once the meta-learner has mastered what there is, then begins anew.

    plateau: the mean query accuracy of the pseudo-episodes did not strictly exceed its best for `patience`
    meta-iterations in a row (the official code). rising: the sum of their outer losses rose `patience` times in a row
    (the paper's sentence taken literally, which has the sign the other way round). off: never; D then descends L_EI
    only (EI instead of ECI).
    """

    kind: Literal["plateau", "rising", "off"] = "plateau"
    """What it waits for."""
    patience: int = 6
    """For how many meta-iterations in a row."""
    warmup: int = 4000
    """Meta-iterations before it may fire (the official 4000 belong to 60 000)."""

    def __post_init__(self) -> None:
        if self.patience < 1 or self.warmup < 0:
            raise ValueError(f"patience={self.patience}, warmup={self.warmup}: at least 1 and 0 wanted")

    def init(self) -> Params:
        """State before the first value."""
        return {"reference": _scalar(-torch.inf), "count": _scalar(0)}

    def update(self, state: Params, iteration: int, accuracy: float, loss: float) -> tuple[Params, bool]:
        """(the next state, whether it fires) after an iteration, counted from 0, with this mean query accuracy and
        summed outer loss.
        """
        if self.kind == "off" or iteration < self.warmup:
            return state, False
        reference, count = float(state["reference"]), int(state["count"])
        if self.kind == "plateau":
            better = accuracy > reference
            reference, count = (accuracy, 0) if better else (reference, count + 1)
        else:
            count = count + 1 if loss > reference > -torch.inf else 0
            reference = loss
        if count >= self.patience:
            return self.init(), True
        return {"reference": _scalar(reference), "count": _scalar(count)}, False


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
