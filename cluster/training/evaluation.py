"""Adaptation curves on held-out tasks, with confidence intervals: evaluation is a verb like any other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.fleet.recipe import Recipe
from cluster.record.checkpoint import State
from cluster.results.attacked import Matrix
from cluster.results.curves import Curves
from cluster.results.report import Results
from cluster.training.dispatch import Dispatcher, Shards
from envs.base import check_split
from learners.base import pack
from learners.objectives.robustness import Robustness
from learners.objectives.supervised import NormMode

log = logging.getLogger("metafleet")


@dataclass(frozen=True)
class Evaluation:
    """When and how much a run evaluates."""

    every: int = 0
    """Meta-iterations between evaluations on validation tasks; 0: twenty in a run."""
    validation_tasks: int = 100
    """Tasks of each evaluation on validation; 0: none."""
    tasks: int = 600
    """Test tasks of the final evaluation."""
    steps: int = 10
    """Inner steps of the adaptation curve."""
    checkpoint: Literal["newest", "best"] = "newest"
    """The θ of the final evaluation: the last, or the best on validation tasks."""
    norms: tuple[NormMode, ...] = ()
    """Normalisation modes to report; empty: the mode of training."""
    robustness: Robustness = field(default_factory=Robustness)
    """Attacks on the test tasks of the final evaluation."""
    seed: int = 0
    """Seed of the held-out tasks, independent of the run's, so that runs compare."""
    pictures: int = 3
    """Test tasks drawn in the final picture; 0: no picture."""

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 0),
            ("validation_tasks", 0),
            ("tasks", 1),
            ("steps", 0),
            ("seed", 0),
            ("pictures", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} wanted")


def overruled(evaluation: Evaluation, recipe: Recipe) -> list[str]:
    """What is asked of an evaluation and decided by the recipe, from which the workers are made already: a sentence for
    each difference.
    """
    asked, usual = evaluation, Evaluation()
    pairs: list[tuple[str, object, object, str]] = [
        ("steps", asked.steps, recipe.evaluation_steps, "evaluation_steps"),
        ("seed", asked.seed, recipe.evaluation_seed, "evaluation_seed"),
        ("robustness", asked.robustness, recipe.robustness, "robustness"),
        ("norms", asked.norms, getattr(recipe.objective, "report", ()), "objective.report"),
    ]
    return [
        f"evaluation.{name}={seen!r} has no effect: the recipe's {key}={rules!r} rules"
        for name, seen, rules, key in pairs
        if seen not in (rules, getattr(usual, name))
    ]


class Pending:
    """An evaluation under way in the background of a run."""

    def __init__(self, dispatcher: Dispatcher, state: State, split: str, tasks: int, shard: int, verb: str = "evaluate",
                 groups: tuple[str, ...] = ()) -> None:  # fmt: skip
        """`groups`: names of the kinds of tasks that are reported apart."""
        check_split(split)
        self._groups = groups
        self.state, self.tasks = state, tasks
        self._dispatcher = dispatcher
        self._at = dispatcher.publish(pack(*state.used))
        # Equal shards throughout: the last one may hold tasks beyond the wanted number, dropped again below.
        shards = Shards(split, 0, -(-tasks // shard), shard)
        self._round = dispatcher.start(verb, self._at, None, shards, background=True)

    @property
    def done(self) -> bool:
        """Whether every shard was answered."""
        return self._round.done

    def result(self) -> Curves:
        """The curves; waits for them."""
        return Curves.of(self.rows(), self._groups)

    def rows(self) -> dict[str, NDArray[np.float64]]:
        """Per-task values [tasks, …] of the verb; waits for them."""
        rows = self._dispatcher.finish(self._round).rows
        self._dispatcher.release(self._at)
        return {k: v[: self.tasks].double().numpy() for k, v in rows.items()}


def judge(recipe: Recipe, dispatcher: Dispatcher, state: State, split: str, tasks: int, shard: int) -> Results:
    """Adaptation curves, and accuracy under attack where the recipe asks for it."""
    curves = Pending(dispatcher, state, split, tasks, shard, groups=recipe.groups()).result()
    if recipe.robustness is None:
        return Results(curves, None)
    rows = Pending(dispatcher, state, split, tasks, shard, "robustness").rows()
    return Results(curves, Matrix.of(rows, recipe.evaluation_steps, recipe.robustness))
