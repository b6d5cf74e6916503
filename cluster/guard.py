"""The gradient guard: is the meta-gradient of a configuration what it claims to be?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cluster import assemble
from cluster.config import Run
from learners import tree
from learners.base import Data, Learner, Meta, Objective, Params, pack, unpack
from learners.execution import Execution
from learners.models import functional
from learners.objectives import Supervised
from learners.verbs import training_steps

TASKS = 2
TOLERANCE = 1e-5
STEP = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    holds: bool
    sentence: str


def check(run: Run) -> Verdict:
    """Compare a directional derivative of the run's own gradient verb with central differences, in float64.

    Real tasks, the run's learner, objective and execution mode; the model is a smooth copy (softplus for ReLU, average
    for maximum pooling), since differences do not converge across kinks.
    """
    run.task.prepare()
    run, _ = assemble.resolved(replace(run, dtype="float64", device="cpu", pool="local"))
    parts, _ = assemble.recipe(run)
    assert isinstance(parts.objective, Supervised)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = functional(smooth(run.model.build(run.task.inputs, run.task.outputs)).double())
    objective = replace(parts.objective, model=model)
    learner, how = _differentiable(run.learner)
    parts = replace(parts, learner=learner, objective=objective)
    verb = parts.verbs(objective)["gradient"]
    tasks = [parts.tensors(parts.task("train", i, verb)) for i in range(TASKS)]
    stacked = {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}
    meta = learner.init(model.params(), np.random.default_rng(run.seed))
    meta = Meta(meta.params, tree.apply(Tensor.double, objective.slots()) | meta.slots)
    grads = unpack(Execution(parts.execution, parts.chunk).run(verb.run, pack(*meta), {}, stacked).total).params
    generator = torch.Generator().manual_seed(run.seed)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in meta.params.items()}
    direction = tree.scale(1 / tree.norm(direction), direction)
    got = float(tree.dot(grads, direction))
    claims = {
        name: sum(claim(learner, objective, meta, t, direction) for t in tasks)
        for name, claim in CLAIMS.items()
        if (name == DELTA) == (learner.claim() == DELTA)
    }
    errors = {name: abs(got - wanted) / max(abs(wanted), 1e-12) for name, wanted in claims.items()}
    claimed = learner.claim()
    others = "".join(f"; it is {errors[n]:.0e} away from {n}" for n in errors if n != claimed)
    holds = errors[claimed] < TOLERANCE
    sentence = (
        f"{'OK' if holds else 'WRONG'}: the summed gradient of {type(run.learner).__name__}{how} over {TASKS} tasks "
        f"(norm {run.objective.norm}, scale {run.objective.scale}, {parts.execution}, float64) is {claimed}: "
        f"relative error {errors[claimed]:.0e} against finite differences{others}. The outer step takes the mean over tasks."
    )
    return Verdict(holds, sentence)


def smooth(module: nn.Module) -> nn.Module:
    """`module` without kinks, changed in place: softplus for ReLU, average for maximum pooling."""
    for child in list(module.modules()):
        for name, layer in list(child.named_children()):
            if isinstance(layer, nn.ReLU):
                setattr(child, name, nn.Softplus())
            elif isinstance(layer, nn.MaxPool2d):
                setattr(child, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode))
    return module


DELTA = "θ − φ"
Claim = Callable[[Learner, Objective, Meta, Data, Params], float]


def _second_order(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · ∇θ L_Q(φ(θ))."""
    steps = training_steps(learner)
    return _slope(lambda p: objective.query(meta.slots | learner.adapt(Meta(p, meta.slots), objective, data, steps), data), meta.params, d)


def _first_order(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · ∇φ L_Q(φ)."""
    phi = learner.adapt(meta, objective, data, training_steps(learner))
    return _slope(lambda p: objective.query(meta.slots | p, data), phi, d)


def _interpolation(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · (θ − φ) = α Σ_k d · ∇L_S(φ_k) for plain gradient descent inside."""
    phis = list(learner.path(meta, objective, data, training_steps(learner)))[:-1]
    lr = float(getattr(learner, "inner_lr"))  # noqa: B009 - a Learner need not have one; those of this claim do
    slopes = [_slope(lambda p, k=k: objective.support(meta.slots | p, data, k), phi, d) for k, phi in enumerate(phis)]  # type: ignore[misc]
    return lr * sum(slopes)


CLAIMS: dict[str, Claim] = {
    "second order": _second_order,
    "first order": _first_order,
    DELTA: _interpolation,
}


def _differentiable(learner: Learner) -> tuple[Learner, str]:
    """With plain gradient descent inside, for which θ − φ is a sum of gradients."""
    if getattr(learner, "inner_optimizer", "sgd") == "sgd":
        return learner, ""
    return replace(learner, inner_optimizer="sgd"), " (checked with SGD inside)"  # type: ignore[type-var]


def _slope(loss: Callable[[Params], Tensor], at: Params, d: Params) -> float:
    """Derivative along d by Richardson-extrapolated central differences, O(h⁴)."""

    def central(h: float) -> float:
        up, down = (loss(tree.add(at, tree.scale(s * h, d))).detach() for s in (1.0, -1.0))
        return float(up - down) / (2 * h)

    at = tree.apply(Tensor.detach, at)
    return (4 * central(STEP) - central(2 * STEP)) / 3
