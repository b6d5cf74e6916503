"""What of an evaluation the recipe decides."""

from __future__ import annotations

from dataclasses import replace

from cluster.training.evaluation import Evaluation, overruled
from learners.objectives.robustness import Robustness
from tests.fakes import quadratic_recipe


def test_what_the_recipe_overrules_is_said() -> None:
    recipe = replace(quadratic_recipe(), evaluation_steps=2)
    assert overruled(Evaluation(steps=2), recipe) == overruled(Evaluation(), recipe) == []
    (steps,) = overruled(Evaluation(steps=5), recipe)
    assert steps == "evaluation.steps=5 has no effect: the recipe's evaluation_steps=2 rules"
    several = overruled(Evaluation(seed=4, norms=("carried",), robustness=Robustness(eps=0.5)), recipe)
    assert [s.partition("=")[0] for s in several] == ["evaluation.seed", "evaluation.robustness", "evaluation.norms"]
