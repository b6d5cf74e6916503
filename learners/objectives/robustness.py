"""How an adapted model stands up to attack: support and query, each as it is and attacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from envs.base import Arrays
from learners.base import Data, Learner, Metrics, Params, Share, Verb, unpack
from learners.objectives.attack import Attack, SupportAttacked, attacked_query
from learners.objectives.supervised import Supervised

SUPPORTS = ("clean", "fgsm")


@dataclass(frozen=True)
class Robustness:
    """Attacks of evaluation, white-box: against the very parameters, and in the normalisation mode, that are judged."""

    eps: float = 0.0
    """ε in units of the inputs (pixels: [0, 1]); 0: no attacked evaluation."""
    steps: int = 20
    """Steps of PGD."""
    step_size: float = 0.0
    """Step of PGD; 0: ε/8."""
    low: float = 0.0
    """Smallest valid input; −inf where there is none."""
    high: float = 1.0
    """Largest valid input."""

    def __post_init__(self) -> None:
        self.queries()

    def fgsm(self) -> Attack:
        """One step of ε."""
        return Attack(self.eps, low=self.low, high=self.high)

    def queries(self) -> dict[str, Attack]:
        """Attacks on the query set, by name."""
        pgd = Attack(self.eps, self.steps, self.step_size or self.eps / 8, low=self.low, high=self.high)
        return {"fgsm": self.fgsm(), f"pgd-{self.steps}": pgd}


def verb(
    tester: Learner,
    objective: Supervised,
    steps: int,
    how: Robustness,
    draw: Callable[[Arrays, np.random.Generator], Arrays],
) -> Verb:
    """Rows "support/query/measure" after `steps` inner steps, for each kind of support and of query set.

    An attacked support set is attacked at each inner step, at the parameters there.
    """

    def run(at: Params, operand: Params, data: Data) -> Share:
        meta = unpack(at)
        rows: Metrics = {}
        with torch.no_grad():
            for support in SUPPORTS:
                seen = objective if support == "clean" else SupportAttacked(objective, how.fgsm())
                phi = meta.slots | tester.adapt(meta, seen, data, steps)
                for view in objective.views():
                    versions = {"clean": data} | {
                        name: attacked_query(a, view, phi, data) for name, a in how.queries().items()
                    }
                    for query, version in versions.items():
                        rows |= {
                            f"{support}/{query}/{name}": value for name, value in view.measure(phi, version).items()
                        }
        return Share({}, torch.ones_like(next(iter(rows.values()))), rows)

    return Verb(run, draw, light=True)
