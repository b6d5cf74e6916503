"""A trained θ under other conditions than those of its training: evaluated there, and made to fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from cluster.fleet.recipe import Recipe
from cluster.operations.existing_run import chosen
from cluster.record.checkpoint import State
from cluster.record.journal import Unwritten
from cluster.record.storage import Place
from cluster.results.report import Results
from cluster.setup import assemble, families
from cluster.setup.run import Run
from cluster.training.dispatch import Dispatcher
from cluster.training.evaluation import judge
from cluster.training.identity import initial
from cluster.training.ledger import Ledger
from envs.images.data_free import DataFree
from learners.base import HasRates, Learner, Meta, Params
from learners.objectives.supervised import NormMode


def under(run: Run, *, tasks: int = 0, steps: int | None = None, norms: tuple[NormMode, ...] = (),
          inner_lr: float | None = None, eps: float | None = None) -> Run:  # fmt: skip
    """`run` as it is evaluated: so many tasks and inner steps, normalisation modes, the inner rate, attacks of `eps`;
    what is not said is as in the run.
    """
    e = run.evaluation
    how = e.robustness if eps is None else replace(e.robustness, eps=eps)
    evaluation = replace(
        e, tasks=tasks or e.tasks, steps=e.steps if steps is None else steps, norms=norms or e.norms, robustness=how
    )
    learner = run.learner if inner_lr is None else _at_rate(run.learner, inner_lr)
    return replace(run, evaluation=evaluation, learner=learner)


def evaluate(directory: Place, run: Run, *, split: str = "test", checkpoint: str = "newest") -> Results:
    """Adaptation curves of the θ in `directory` on the tasks of `run`, and its accuracy under attack where `run` asks
    for it.
    """
    if split == "train" and isinstance(run.task, DataFree):
        raise ValueError(
            "split='train': the training episodes of a data-free run are cut from invented images; validation or test "
            "wanted"
        )
    state = chosen(directory, checkpoint)
    families.prepare(run.task)
    parts, params = assemble.recipe(run)
    state = fitting(state, parts, params)
    with assemble.pool(run, parts) as fleet:
        dispatcher = Dispatcher(fleet, Ledger(Unwritten()), max_attempts=run.policy.max_attempts)
        return judge(parts, dispatcher, state, split, run.evaluation.tasks, run.shard)


def fitting(state: State, parts: Recipe, params: Params) -> State:
    """The θ of a checkpoint for another recipe's model, learner and number of classes.

    A head for another number of classes has for each of them the mean of the trained rows: in training labels are
    drawn anew for every task, so that no row means a class (Ye & Chao, UNICORN-MAML, ICLR 2022, whose initial head is
    one vector for all classes). What the recipe has no use for is left out; raises ValueError for what θ lacks.
    """
    wanted, _ = initial(parts, params)
    used = state.used
    meta = Meta(_taken(wanted.params, used.params), _taken(wanted.slots, used.slots))
    return replace(state, meta=meta, outer={})


def _taken(wanted: Params, found: Params) -> Params:
    return {name: _fit(name, like, found) for name, like in wanted.items()}


def _fit(name: str, like: torch.Tensor, found: Params) -> torch.Tensor:
    value = found.get(name)
    if value is not None and value.shape == like.shape:
        return value.to(like.dtype)
    if value is None or not value.ndim or value.ndim != like.ndim or value.shape[1:] != like.shape[1:]:
        seen = "none" if value is None else f"one of {tuple(value.shape)}"
        raise ValueError(f"the trained θ has no {name} of shape {tuple(like.shape)}, as these keys want it ({seen})")
    return value.to(like.dtype).mean(0, keepdim=True).expand(like.shape).contiguous()


def _at_rate(learner: Learner, inner_lr: float) -> Learner:
    """The learner with another inner rate, and a later one in proportion."""
    if not hasattr(learner, "inner_lr") or isinstance(learner, HasRates):
        raise ValueError(f"inner_lr={inner_lr}: {type(learner).__name__} has no such rate to set")
    if getattr(learner, "later_lr", 0.0) and learner.inner_lr:
        later = learner.later_lr * inner_lr / learner.inner_lr  # type: ignore[attr-defined]
        learner = replace(learner, later_lr=later)  # type: ignore[type-var]
    found: Learner = replace(learner, inner_lr=inner_lr)  # type: ignore[type-var]
    return found
