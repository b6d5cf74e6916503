"""The gradient guard: is the meta-gradient of a configuration what it claims to be?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cluster.setup import assemble
from cluster.setup.resolve import resolved
from cluster.setup.run import Run
from envs.images.data_free import DataFree
from learners.algorithms.imaml import IMAML
from learners.algorithms.reptile import Reptile
from learners.base import Data, Learner, Meta, Objective, Outer, Params, Reduce, Sum, pack, training_steps, unpack
from learners.engine import tree
from learners.engine.derivative import Kind, Tape
from learners.engine.execution import Execution
from learners.inner import InnerLoop
from learners.modules.functional import Functional, functional
from learners.objectives.control import Control
from learners.objectives.supervised import Supervised

TASKS = 2
TOLERANCE = 1e-5
STEP = 1e-4
SOLVED = 100  # steps after which an implicit learner's two iterations have converged
STIFF = 1000.0  # λ above any curvature of a network with normalisation at its start, so that φ* is one point


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    holds: bool
    sentence: str


def check(run: Run) -> Verdict:
    """Compare a directional derivative of the run's own gradient verb with central differences, in float64.

    Real tasks (RL: episodes recorded at θ), the run's learner, objective and execution mode; the model is a smooth copy
    (softplus for ReLU, average for maximum pooling), since differences do not converge across kinks.
    """
    if isinstance(run.task, DataFree):
        raise ValueError(
            "check wants tasks with data of their own; those of a data-free run come from its teachers as it goes on"
        )
    run, _ = resolved(replace(run, precision="float64", device="cpu", pool="local"))
    parts, _ = assemble.recipe(run)
    model = functional(smooth(run.build()).double())
    objective, of = _smoothed(parts.objective, model)
    learner, how = _checkable(run.learner)
    parts = replace(parts, learner=learner, objective=objective)
    all_verbs = parts.verbs(objective)
    verb = all_verbs["gradient"]
    tasks = [parts.tensors(parts.task("train", i, verb)) for i in range(TASKS)]
    stacked = {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}
    meta = learner.init(model.params(), np.random.default_rng(run.seed))
    meta = Meta(meta.params, tree.apply(Tensor.double, objective.slots() | meta.slots))
    if verb.record:
        stacked = verb.record(pack(*meta), stacked)
        tasks = [{k: v[i] for k, v in stacked.items()} for i in range(TASKS)]
    execution = Execution(parts.execution, parts.chunk)
    if meta.slots:  # as one iteration leaves them: terms that are zero before it are checked too
        meta = Meta(meta.params, unpack(execution.run(verb.run, pack(*meta), {}, stacked).mean()).slots)
    result = execution.run(verb.run, pack(*meta), {}, stacked)
    grads = unpack(result.total).params
    generator = torch.Generator().manual_seed(run.seed)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in meta.params.items()}
    direction = tree.scale(1 / tree.norm(direction), direction)
    got, claimed = float(tree.dot(grads, direction)), learner.claim()
    claims = {
        name: sum(CLAIMS[name](learner, objective, meta, t, direction) for t in tasks) for name in _rivals(claimed)
    }
    errors = {name: abs(got - wanted) / max(abs(wanted), 1e-12) for name, wanted in claims.items()}
    others = "".join(f"; it is {errors[n]:.0e} away from {n}" for n in errors if n != claimed)
    rounds = {name: v.run for name, v in all_verbs.items() if v.record is verb.record}

    def reduce(verb: str, operand: Params | None, *, over: tuple[str, int] | None = None) -> Sum:
        return execution.run(rounds[verb], pack(*meta), operand or {}, stacked)

    reduction = _reduction(run.outer, meta, reduce)
    holds = errors[claimed] < TOLERANCE and reduction == "mean"
    sentence = (
        f"{'OK' if holds else 'WRONG'}: the summed gradient of {type(run.learner).__name__}{how} over {TASKS} tasks "
        f"({of}, {parts.execution}, float64) is {claimed}: "
        f"relative error {errors[claimed]:.0e} against finite differences{others}. The outer step takes the "
        f"{reduction} over tasks."
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


def _smoothed(objective: Objective, model: Functional) -> tuple[Objective, str]:
    """The objective with a smooth model, and what it computes."""
    if isinstance(objective, Supervised):
        return replace(objective, model=model), f"norm {objective.norm}, scale {objective.scale}"
    if isinstance(objective, Control):
        return replace(objective, policy=model), objective.summary()
    raise ValueError(f"check wants a supervised or a policy-gradient objective, not {type(objective).__name__}")


Claim = Callable[[Learner, Objective, Meta, Data, Params], float]


def _through(*constants: Kind) -> Claim:
    """d · ∇ of the learner's own outer loss, with these quantities held at what they are at θ."""

    def claim(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
        assert isinstance(learner, InnerLoop)
        tape = Tape(frozenset(constants))

        def loss(params: Params) -> Tensor:
            with tape.running(), torch.no_grad():
                return learner.outer_loss(Meta(params, meta.slots), objective, data)[0]

        loss(meta.params)  # records
        return _slope(loss, meta.params, d)

    return claim


def _implicit(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · ∇θ L_Q(φ*(θ)), with φ* the end of the inner loop."""
    steps = training_steps(learner)
    return _slope(
        lambda p: objective.query(meta.slots | learner.adapt(Meta(p, meta.slots), objective, data, steps), data),
        meta.params,
        d,
    )


def _interpolation(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · (θ − φ) = α Σ_k d · ∇L_S(φ_k) for plain gradient descent inside."""
    return sum(_step(learner, objective, meta, data, d, k) for k in range(training_steps(learner)))


def _last_step(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params) -> float:
    """d · (φ_{K−1} − φ_K) = α d · ∇L_S(φ_{K−1})."""
    return _step(learner, objective, meta, data, d, training_steps(learner) - 1)


def _step(learner: Learner, objective: Objective, meta: Meta, data: Data, d: Params, k: int) -> float:
    steps = training_steps(learner)
    phi = list(learner.path(meta, objective, data, steps))[k]
    if "last_batch" in data and k == steps - 1:
        data, k = data | {"batches": data["last_batch"]}, 0
    lr = float(getattr(learner, "inner_lr"))  # noqa: B009 - a Learner need not have one; those of this claim do
    return lr * _slope(lambda p: objective.support(meta.slots | p, data, k), phi, d)


CLAIMS: dict[str, Claim] = {
    "second order": _through("attack"),
    "first order": _through("attack", "inner gradient"),
    "implicit": _implicit,
    "θ − φ": _interpolation,
    "φ′ − φ": _last_step,
}


def _rivals(claimed: str) -> list[str]:
    """The claim, and those that it is mistaken for."""
    rivals = {
        "second order": "first order",
        "first order": "second order",
        "implicit": "first order",
        "θ − φ": "φ′ − φ",
        "φ′ − φ": "θ − φ",
    }
    return [claimed, rivals[claimed]]


def _checkable(learner: Learner) -> tuple[Learner, str]:
    """The learner where its claim is a statement about derivatives, and a note on what was changed for that."""
    if isinstance(learner, Reptile) and learner.inner_optimizer != "sgd":
        return replace(learner, inner_optimizer="sgd", moments="reset"), " (checked with SGD inside)"
    if isinstance(learner, IMAML):
        solved = replace(learner, inner_steps=SOLVED, solver_steps=SOLVED, proximal=STIFF, inner_lr=1 / STIFF)
        return solved, f" (checked where the inner problem is convex: proximal {STIFF:g}, solved)"
    return learner, ""


def _reduction(outer: Outer, meta: Meta, reduce: Reduce) -> str:
    """What the step makes of the sums over tasks: the mean if a batch of everything twice moves nothing."""

    def twice(verb: str, operand: Params | None, *, over: tuple[str, int] | None = None) -> Sum:
        once = reduce(verb, operand, over=over)
        return Sum(tree.scale(2.0, once.total), 2 * once.weight, once.rows)

    ends = [outer.step(meta, outer.init(meta), ask) for ask in (reduce, twice)]
    moved = [pack(end.params, state) for end, state, _ in ends]
    return "mean" if all(torch.equal(v, moved[1][k]) for k, v in moved[0].items()) else "sum"


def _slope(loss: Callable[[Params], Tensor], at: Params, d: Params) -> float:
    """Derivative along d by Richardson-extrapolated central differences, O(h⁴)."""

    def central(h: float) -> float:
        up, down = (loss(tree.add(at, tree.scale(s * h, d))).detach() for s in (1.0, -1.0))
        return float(up - down) / (2 * h)

    at = tree.apply(Tensor.detach, at)
    return (4 * central(STEP) - central(2 * STEP)) / 3
