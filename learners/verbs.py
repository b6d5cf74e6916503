"""What workers can be asked to do to a task: the verbs that every run has."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from envs.base import Arrays
from learners.base import (
    GROUP,
    SEED,
    Data,
    Learner,
    Metrics,
    Objective,
    Params,
    Records,
    Share,
    Verb,
    Verbs,
    pack,
    training_steps,
    unpack,
)
from learners.objectives.robustness import Robustness
from learners.objectives.robustness import verb as robust
from learners.objectives.supervised import Supervised


@runtime_checkable
class DrawsToo(Protocol):
    """An objective that draws for a task in training, after the learner."""

    def draw(self, data: Arrays, rng: np.random.Generator) -> Arrays:
        """`data` with all randomness that the objective will need. Raises ValueError for data that do not fit."""


class RecordingObjective(Records, Objective, Protocol):
    """Both."""


def common_verbs(
    learner: Learner, objective: Objective, evaluation_steps: int, robustness: Robustness | None = None
) -> Verbs:
    """`gradient`, the learner's contribution to the outer step; `evaluate`, its adaptation curve; `robustness` if asked
    for.
    """
    tester = learner.at_test()

    if isinstance(objective, Records):
        return _recorded(learner, objective, evaluation_steps)

    def gradient(at: Params, operand: Params, data: Data) -> Share:
        result = learner.gradient(unpack(at), objective, data)
        return Share(pack(result.grads, result.slots), _one(at), result.metrics)

    def evaluate(at: Params, operand: Params, data: Data) -> Share:
        with torch.no_grad():
            path = tester.path(unpack(at), objective, data, evaluation_steps)
            curve = [objective.measure(unpack(at).slots | phi, data) for phi in path]
        return Share({}, _one(at), {k: torch.stack([m[k] for m in curve]) for k in curve[0]})

    def draw(data: Arrays, rng: np.random.Generator) -> Arrays:
        data = learner.draw(data, rng, training_steps(learner))
        return objective.draw(data, rng) if isinstance(objective, DrawsToo) else data

    def draw_test(data: Arrays, rng: np.random.Generator) -> Arrays:
        return tester.draw(data, rng, evaluation_steps)

    verbs = {"gradient": Verb(gradient, draw), "evaluate": Verb(evaluate, draw_test, light=True)}
    if robustness is not None and isinstance(objective, Supervised):
        verbs["robustness"] = robust(tester, objective, evaluation_steps, robustness, draw_test)
    return verbs


def _recorded(learner: Learner, objective: RecordingObjective, evaluation_steps: int) -> Verbs:
    """The same two verbs for tasks that are lived through first."""

    def of(acting: Learner, steps: int, testing: bool) -> dict[str, Any]:
        def draw(data: Arrays, rng: np.random.Generator) -> Arrays:
            return acting.draw(data, rng, steps) | {SEED: np.asarray(rng.integers(2**62))}

        def record(at: Params, data: Data) -> Data:
            return objective.record(acting, unpack(at), data, steps, testing=testing)

        return {"draw": draw, "record": record}

    def gradient(at: Params, operand: Params, data: Data) -> Share:
        result = learner.gradient(unpack(at), objective, data)
        curve = {f"{name}_step{k}": v for name, values in objective.curve(data).items() for k, v in enumerate(values)}
        return Share(
            pack(result.grads, result.slots), _one(at), curve | objective.facts(data) | result.metrics | _kind(data)
        )

    def evaluate(at: Params, operand: Params, data: Data) -> Share:
        return Share({}, _one(at), objective.curve(data) | _kind(data))

    return {
        "gradient": Verb(gradient, **of(learner, training_steps(learner), False)),
        "evaluate": Verb(evaluate, light=True, **of(learner.at_test(), evaluation_steps, True)),
    }


def _kind(data: Data) -> Metrics:
    return {GROUP: data[GROUP]} if GROUP in data else {}


def _one(at: Params) -> torch.Tensor:
    first = next(iter(at.values()))
    return torch.ones((), dtype=first.dtype, device=first.device)
