"""MAML++ (Antoniou, Edwards, Storkey 2019): how to train your MAML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learners.base import Data, Meta, Metrics, Objective, Params, check_inner_loop
from learners.engine import tree
from learners.engine.derivative import transformed
from learners.inner import Direction, InnerLoop, partition, support_losses

RATE = "rate"
CLOCK = "clock"
LEAST_WEIGHT = 0.03


@dataclass(frozen=True)
class MAMLPlusPlus(InnerLoop):
    """φ_{k+1} = φ_k − α_{k,l} ∇_l L_S(φ_k) for each layer l;  outer loss Σ_k w_k L_Q(φ_k), k = 1 … K.

    Multi-step loss (§4): w begins uniform and moves to the last step within `multi_step_epochs`; from then on only
    L_Q(φ_K) counts.  Rates α are learned per layer (tensor) and step; beyond the trained steps the last one's are
    used.  Derivative-order annealing: first order before epoch `second_order_from`.  The cosine outer rate is the
    outer step's `schedule = "cosine"`.  An epoch is `epoch` meta-iterations, counted in a slot.

    Left out: normalisation parameters per step. Their running statistics are without effect in the published code,
    which always normalises by the batch.
    """

    inner_lr: float = 0.1
    """Every α at the start."""
    inner_steps: int = 5
    """K, inner steps in meta-training."""
    epoch: int = 500
    """Meta-iterations in an epoch."""
    multi_step_epochs: int = 15
    """E, epochs over which the multi-step loss fades; 0: the last step's loss from the start."""
    second_order_from: int = 0
    """Epoch from which on the inner loop is differentiated through."""
    learn_rates: bool = True
    """Whether α is learned."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)
        for name, least in (("inner_steps", 1), ("epoch", 1), ("multi_step_epochs", 0), ("second_order_from", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} wanted")

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        moving, _ = partition(params, self.adapts)
        rates = {
            k: torch.full((self.inner_steps,), self.inner_lr, dtype=v.dtype, device=v.device) for k, v in moving.items()
        }
        clock = next(iter(params.values())).new_zeros(())
        return Meta(params | tree.with_prefix(RATE, rates), {CLOCK: clock})

    def again(self, meta: Meta) -> bool:
        return not self._branches(meta) or bool(self._second(meta))

    def direction(self, meta: Meta) -> Direction:
        rates, second = self.rates(meta.params), self._second(meta)
        # Where nothing may branch on a number, the two orders are blended.
        blend = not self._branches(meta) and self.second_order_from > 0

        def scaled(grads: Params, step: int) -> Params:
            if blend:
                grads = tree.apply(lambda g: g.detach() + second * (g - g.detach()), grads)
            return {k: rates[k][min(step, self.inner_steps - 1)] * g for k, g in grads.items()}

        return scaled

    def outer_loss(self, meta: Meta, objective: Objective, data: Data) -> tuple[Tensor, Metrics]:
        points = list(self.points(meta, objective, data, self.inner_steps))
        weights = self.weights(meta)
        # Zero weights cost a forward and a backward pass each.
        used = [k for k in range(self.inner_steps) if not self._branches(meta) or float(weights[k])]
        losses = {k: objective.query(meta.slots | points[k + 1].params, data) for k in used}
        weighted = torch.stack([weights[k] * loss for k, loss in losses.items()]).sum()
        return weighted, {"last_step_loss": losses[self.inner_steps - 1]} | support_losses(points[-1])

    def slots(self, meta: Meta, objective: Objective, data: Data) -> Params:
        # Rounded, so that means of equal counts do not drift.
        return super().slots(meta, objective, data) | {CLOCK: meta.slots[CLOCK].round() + 1}

    def weights(self, meta: Meta) -> Tensor:
        """w₁ … w_K at this point of the run."""
        clock = meta.slots[CLOCK]
        final = torch.eye(self.inner_steps, dtype=clock.dtype, device=clock.device)[-1]
        if not self.multi_step_epochs:
            return final
        epoch = self._epoch(meta)
        return torch.where(
            epoch < self.multi_step_epochs, multi_step_weights(self.inner_steps, self.multi_step_epochs, epoch), final
        )

    def rates(self, params: Params) -> Params:
        """α [K] by parameter."""
        rates = tree.under(RATE, params)
        return rates if self.learn_rates else tree.apply(Tensor.detach, rates)

    def passes(self) -> int:
        """While the multi-step loss lasts: K inner gradients, as many more to differentiate through them, and K
        queries'.
        """
        return 3 * self.inner_steps if self.multi_step_epochs else 2 * self.inner_steps + 1

    def claim(self) -> str:
        return "second order" if self.second_order_from == 0 else "first order"

    def _branches(self, meta: Meta) -> bool:
        """Whether what is without effect may be left out: a graph cannot branch on a number, and a GPU would have to be
        waited for.
        """
        return not transformed() and meta.slots[CLOCK].device.type == "cpu"

    def _second(self, meta: Meta) -> Tensor:
        """1 from the epoch on in which the inner loop is differentiated through, 0 before."""
        return (self._epoch(meta) >= self.second_order_from).to(meta.slots[CLOCK].dtype)

    def _epoch(self, meta: Meta) -> Tensor:
        return torch.floor(meta.slots[CLOCK].round() / self.epoch)


def multi_step_weights(steps: int, epochs: int, epoch: Tensor) -> Tensor:
    """w_k = max(1/K − e/(K E), 0.03/K) for k < K;  w_K = min(1/K + e (K − 1)/(K E), 1 − (K − 1) 0.03/K)."""
    early = (1 / steps - epoch / (steps * epochs)).clamp(min=LEAST_WEIGHT / steps)
    final = (1 / steps + epoch * (steps - 1) / (steps * epochs)).clamp(max=1 - (steps - 1) * LEAST_WEIGHT / steps)
    return torch.cat([early.expand(steps - 1), final.expand(1)])
