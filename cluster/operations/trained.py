"""A trained θ as a thing one uses: adapted to examples of one's own, it predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cluster.fleet import seeds
from cluster.fleet.machine import set_up_torch
from cluster.fleet.recipe import Recipe
from cluster.operations import conditions
from cluster.operations.examples import Examples, as_inputs
from cluster.operations.existing_run import chosen, run_of, write_tensors
from cluster.record.checkpoint import State
from cluster.record.storage import Place, place
from cluster.results.report import Results
from cluster.setup import assemble, families
from cluster.setup.run import Run
from envs.base import Array, TaskDistribution
from learners.base import Data, Params
from learners.objectives.arrays import of_classes
from learners.objectives.supervised import Supervised

AT_ONCE = 1024
"""Queries in one forward pass where the normalisation does not look at the others."""


def load(directory: str | Path | Place, run: Run | None = None, *, checkpoint: str = "newest",
         trust: bool = False) -> Trained:  # fmt: skip
    """The run of a directory (or URL) with its θ: the newest, the best on validation, or that of an iteration.

    `run`: the run as it was launched, where it was of objects that no import path names. Raises FileNotFoundError for a
    folder that is no run, PermissionError where the run names code that is not Metafleet's and neither `run` nor
    `trust` says that it may be imported.
    """
    at = place(directory)
    return Trained(at, run_of(at, trust=trust, like=run), chosen(at, checkpoint))


@dataclass(frozen=True)
class Trained:
    """A run and the θ that it has learned."""

    directory: Place
    run: Run
    state: State

    @property
    def params(self) -> Params:
        """θ by name."""
        return self.state.used.params

    def adapt(
        self, x: ArrayLike | Examples, y: ArrayLike | None = None, *, steps: int | None = None, norm: str = ""
    ) -> Fitted:
        """θ adapted to a support set: x [n, …] in the units of training (bytes of images will do), y [n] labels of any
        kind, or numbers [n] or [n, targets]; or examples that were read (`examples.read`).

        `steps`: inner steps; None: as the run's evaluation takes. `norm`: what BatchNorm normalises queries by; "": as
        the run does. More classes than in training are allowed, and begin with the mean of the trained head's rows
        (`conditions.fitting`); fewer leave the others out. Raises ValueError for shapes that do not fit, and for runs
        of reinforcement learning.
        """
        if self.run.kind == "control":
            raise ValueError("a policy adapts to episodes, not to examples: metafleet play")
        inputs = _inputs(x, self.run.task)
        targets = np.asarray(x.y if isinstance(x, Examples) else y)
        if len(targets) != len(inputs) or not len(inputs):
            raise ValueError(f"{len(inputs)} examples and {len(targets)} targets: equally many wanted, at least one")
        classes, ways = None, 0
        if self.run.kind == "classification":
            labels = targets.astype(str) if targets.dtype == object else targets
            classes, targets = np.unique(labels, return_inverse=True)
            ways = len(classes)
        else:
            targets = targets.astype(np.float32).reshape(len(targets), -1)
        run = self._conditions(ways, steps, norm)
        parts, params = assemble.recipe(run)
        set_up_torch(run.threads, run.device, run.deterministic)
        state = conditions.fitting(self.state, parts, params)
        return _fitted(parts, state, inputs, targets, classes)

    def evaluate(self, *, split: str = "test", checkpoint: str = "newest", **keys: Any) -> Results:
        """Adaptation curves on held-out tasks, in this process; `keys`: see `conditions.under`."""
        run = conditions.under(replace(self.run, pool="local"), **keys)
        return conditions.evaluate(self.directory, run, split=split, checkpoint=checkpoint)

    def _conditions(self, ways: int, steps: int | None, norm: str) -> Run:
        run = replace(self.run, device="cpu", execution="loop")
        run = conditions.under(run, steps=steps, norms=(norm,) if norm else ())  # type: ignore[arg-type]
        if ways > families.outputs(run.task) and hasattr(run.task, "ways"):
            run = replace(run, task=replace(run.task, ways=ways))  # type: ignore[type-var]
        if ways > families.outputs(run.task):
            raise ValueError(f"{ways} classes, and the run's tasks have {families.outputs(run.task)}")
        return run


@dataclass(frozen=True)
class Fitted:
    """φ: θ adapted to one support set."""

    parts: Recipe
    params: Params
    """φ and the slots beside it, by name."""
    data: Data
    """The support set as tensors, which some normalisation modes look at."""
    classes_: Array | None
    """The labels, sorted; None for regression."""
    steps: int

    @cached_property
    def objective(self) -> Supervised:
        """In the first normalisation mode that is reported."""
        objective = self.parts.objective
        if not isinstance(objective, Supervised):
            raise ValueError(f"{type(objective).__name__} predicts nothing: Supervised wanted")
        return objective.views()[0]

    @property
    def norm(self) -> str:
        """What BatchNorm normalises queries by; "" where there is none."""
        return self.objective.norm if self.objective.model.normalises else ""

    def outputs(self, x: ArrayLike | Examples) -> Array:
        """The model's outputs [n, …] for queries x; classes that the support does not show are at −∞."""
        inputs = _inputs(x, self.parts.tasks)
        if not len(inputs):
            raise ValueError("x has no row: at least one query wanted")
        at_once = len(inputs) if self.norm == "transductive" else AT_ONCE
        rows = [inputs[i : i + at_once] for i in range(0, len(inputs), at_once)]
        return np.concatenate([self._outputs(part) for part in rows])

    def predict_proba(self, x: ArrayLike | Examples) -> Array:
        """Probabilities [n, classes], the softmax of the outputs, in the order of `classes_`."""
        if self.classes_ is None:
            raise ValueError("predict_proba is of classes, and this run predicts numbers: predict wanted")
        outputs = torch.from_numpy(self.outputs(x)).double()
        return outputs[:, : len(self.classes_)].softmax(1).numpy()

    def predict(self, x: ArrayLike | Examples) -> Array:
        """The most probable label of each query, or its numbers."""
        if self.classes_ is None:
            return self.outputs(x)
        return np.asarray(self.classes_[self.predict_proba(x).argmax(1)])

    def score(self, x: ArrayLike, y: ArrayLike) -> float:
        """Accuracy on queries with known labels; of numbers R², as scikit-learn has it."""
        truth, said = np.asarray(y), self.predict(x)
        if self.classes_ is not None:
            return float((said == truth).mean())
        truth = truth.reshape(said.shape)
        return float(1 - ((truth - said) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())

    def export(self, out: str | Path) -> None:
        """Write φ as safetensors, with the labels in its metadata."""
        labels = {} if self.classes_ is None else {"classes": "\n".join(map(str, self.classes_))}
        write_tensors(place(out), self.params, {"steps": str(self.steps), **labels})

    def _outputs(self, x: Array) -> Array:
        with torch.no_grad():
            y = self.objective.predict(self.params, self.data, self.parts.tensors({"x": x})["x"])
            shown: Tensor = of_classes(y, self.data, self.objective.criterion)
        return np.asarray(shown.cpu().numpy())


def _inputs(x: ArrayLike | Examples, tasks: TaskDistribution) -> Array:
    return x.x if isinstance(x, Examples) else as_inputs(x, tasks, "x")


def _fitted(parts: Recipe, state: State, x: Array, y: Array, classes: Array | None) -> Fitted:
    arrays: dict[str, Array] = {"support_x": x, "support_y": y}
    if classes is not None:
        there = np.arange(families.outputs(parts.tasks)) < len(classes)
        arrays |= {} if there.all() else {"class_mask": there}
    draw = parts.verbs(parts.objective)["evaluate"].draw
    generator = seeds.generator(parts.evaluation_seed, "test", 0, "draw")
    data = parts.tensors(draw(arrays, generator) if draw else arrays)
    meta = state.used
    with torch.no_grad():
        phi = parts.learner.at_test().adapt(meta, parts.objective, data, parts.evaluation_steps)
    return Fitted(parts, meta.slots | phi, data, classes, parts.evaluation_steps)
