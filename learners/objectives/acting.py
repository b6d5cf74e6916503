"""Many policies of one network acting at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from learners.base import Params
from learners.modules.functional import Functional

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Act: TypeAlias = Callable[[Array, Array, Array], Array]
"""(which policies [t], observations [t, k, o], noise [t, k, a]) → actions [t, k, a]."""

TRACED = 4  # shapes


@dataclass(frozen=True)
class Actors:
    """The policy with the parameters of several tasks, by a graph that is traced once.

    What vmap and modules do in Python at every call takes longer than a small policy's arithmetic. Only the first few
    shapes are traced, which full waves have; where episodes end early there are many more.
    """

    policy: Functional
    _graphs: dict[object, Callable[..., Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, phis: list[Params]) -> Act:
        """How policies with these parameters act: a = μ_φ(o) + σ_φ · noise."""
        stacked = {k: torch.stack([phi[k] for phi in phis]) for k in phis[0]}

        def act(which: Array, observations: Array, noise: Array) -> Array:
            weights = (
                stacked if len(which) == len(phis) else {k: v[torch.from_numpy(which)] for k, v in stacked.items()}
            )
            like = next(iter(weights.values()))
            x = _like(observations, like)
            with torch.no_grad():
                mean, log_std = self._batched(weights, x).chunk(2, -1)
                actions = mean + torch.exp(log_std) * _like(noise, like)
            result: Array = actions.cpu().numpy()
            return result

        return act

    def _batched(self, weights: Params, x: Tensor) -> Tensor:
        """The policy with weights [t, …] on x [t, k, o]."""

        def one(weights: Params, x: Tensor) -> Tensor:
            outputs: Tensor = self.policy(weights, x)
            return outputs

        key = (x.shape, x.dtype, x.device)
        if key not in self._graphs and len(self._graphs) < TRACED:
            self._graphs[key] = make_fx(torch.func.vmap(one))(weights, x)
        acting: Callable[..., Tensor] = self._graphs.get(key) or torch.func.vmap(one)
        return acting(weights, x)


def _like(array: Array, like: Tensor) -> Tensor:
    """In torch's own memory: alignment decides bits."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like, copy=True)
