"""What workers can be asked to do to a task: the verbs that every run has."""

from __future__ import annotations

import numpy as np
import torch

from envs.base import Arrays
from learners.base import Data, Learner, Objective, Params, Share, Verb, Verbs, pack, unpack
from learners.objectives import Supervised
from learners.robustness import Robustness
from learners.robustness import verb as robust


def standard(learner: Learner, objective: Objective, evaluation_steps: int, robustness: Robustness | None = None) -> Verbs:
    """`gradient`, the learner's contribution to the outer step; `evaluate`, its adaptation curve; `robustness` if asked for."""
    tester = learner.at_test()

    def gradient(at: Params, operand: Params, data: Data) -> Share:
        result = learner.gradient(unpack(at), objective, data)
        return Share(pack(result.grads, result.slots), _one(at), result.metrics)

    def evaluate(at: Params, operand: Params, data: Data) -> Share:
        with torch.no_grad():
            path = tester.path(unpack(at), objective, data, evaluation_steps)
            curve = [objective.measure(unpack(at).slots | phi, data) for phi in path]
        return Share({}, _one(at), {k: torch.stack([m[k] for m in curve]) for k in curve[0]})

    def draw(data: Arrays, rng: np.random.Generator) -> Arrays:
        return learner.draw(data, rng, training_steps(learner))

    def draw_test(data: Arrays, rng: np.random.Generator) -> Arrays:
        return tester.draw(data, rng, evaluation_steps)

    verbs = {"gradient": Verb(gradient, draw), "evaluate": Verb(evaluate, draw_test, light=True)}
    if robustness is not None and isinstance(objective, Supervised):
        verbs["robustness"] = robust(tester, objective, evaluation_steps, robustness, draw_test)
    return verbs


def training_steps(learner: Learner) -> int:
    """Inner steps in meta-training, where the learner has such a field."""
    return int(getattr(learner, "inner_steps", 1))


def _one(at: Params) -> torch.Tensor:
    first = next(iter(at.values()))
    return torch.ones((), dtype=first.dtype, device=first.device)
