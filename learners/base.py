"""The vocabulary of learning: what a task, a learner and an objective are.

Everything here is written for ONE task. `learners.engine.execution` decides whether the same lines run in a loop,
under `torch.vmap`, or compiled; `cluster` decides on which machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from envs.base import Arrays

Params: TypeAlias = dict[str, Tensor]
Data: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]


CARRIED = "carry/"
"""Prefix of rows that an outer step makes use of: they must be finite, and are not logged."""

GROUP = "group"
"""Name of the array and the row that say of which kind a task is."""

SEED = "rollout/seed"
"""Name of the array that an RL task's random numbers follow from; tasks' own arrays are named otherwise."""


class Meta(NamedTuple):
    """θ and what travels beside it.

    `params` are descended by the outer step; `slots` are carried along and replaced by the tasks' mean
    (statistics of a frozen normalisation, moments of an inner optimiser). The two never share a name.
    """

    params: Params
    slots: Params


class Gradient(NamedTuple):
    """What one task asks of θ: `grads` is what the outer optimiser descends (∇θ L, or θ − φ for Reptile)."""

    grads: Params
    slots: Params
    metrics: Metrics


class Share(NamedTuple):
    """One task's part of a sum: `total` and `weight` (scalar tensor) add up over tasks, `row` is kept per task."""

    total: Params
    weight: Tensor
    row: Metrics


class Sum(NamedTuple):
    """Shares of many tasks: added totals and weights; `rows[name]` is [tasks, …] in task order."""

    total: Params
    weight: float
    rows: Metrics

    def mean(self) -> Params:
        """The total divided by the weight."""
        return {k: (1 / self.weight) * v for k, v in self.total.items()}


class Objective(Protocol):
    """Model, loss, normalisation mode and loss scale of a run. Pure; draws nothing."""

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        """Scalar loss that inner step number `step` descends."""

    def query(self, params: Params, data: Data) -> Tensor:
        """Scalar loss after adaptation, the one the outer loop is about."""

    def measure(self, params: Params, data: Data) -> Metrics:
        """Scalars reported in evaluation (accuracy, mse, return …)."""

    def slots(self) -> Params:
        """Initial values of what the objective carries from meta-iteration to meta-iteration; often {}."""

    def track(self, params: Params, data: Data) -> Params:
        """This task's new values of `slots()`; {} where there are none."""

    def to(self, device: str) -> Objective:
        """The same objective on another device."""

    def summary(self) -> str:
        """A few words on what is computed, for the table at the end of a run."""


class Learner(Protocol):
    """A frozen dataclass: its fields are its hyper-parameters, its defaults the paper's."""

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        """Meta-parameters from a model's initial parameters (Meta-SGD adds its rates)."""

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        """`data` with all randomness that `steps` inner steps will need, drawn on the host."""

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Params]:
        """φ₀ = θ, φ₁, …, φ_steps."""

    def adapt(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Params:
        """φ_steps, the last of `path`."""

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        """This task's contribution to the outer step."""

    def claim(self) -> str:
        """What `gradient` gives: "second order", "first order", "implicit", "θ − φ" or "φ′ − φ"; the gradient guard
        holds it to that.
        """

    def passes(self) -> int:
        """Backward passes that `gradient` takes over a support or query set: what equal budgets are counted in."""

    def at_test(self) -> Learner:
        """The learner as it adapts at meta-test (another minibatch, other rates); usually itself."""


@runtime_checkable
class Records(Protocol):
    """An objective whose tasks become data by being lived through (RL)."""

    def record(self, learner: Learner, meta: Meta, tasks: Data, steps: int, *, testing: bool = False) -> Data:
        """The stacked data of a shard's tasks: what φ₀ … φ_steps met, each index sampled by its own φ."""

    def curve(self, data: Data) -> Metrics:
        """A task's scores [steps + 1], as φ₀ … φ_steps met them."""

    def facts(self, data: Data) -> Metrics:
        """Scalars to log of a task that was lived through."""


@runtime_checkable
class Explores(Protocol):
    """An objective whose outer loss depends on θ directly too, by what θ has sampled."""

    def exploration_loss(self, theta: Params, data: Data) -> Tensor:
        """Scalar added to the loss after adaptation."""


@runtime_checkable
class HasRates(Protocol):
    """A learner that learns its inner rates."""

    def rates(self, params: Params) -> Params:
        """The rates by parameter, to look at."""


VerbFunction: TypeAlias = Callable[[Params, Params, Data], Share]
Fixed: TypeAlias = Callable[[Params], Share]


@dataclass(frozen=True)
class Verb:
    """Something a worker can do to one task: `run(at, operand, data)`, after `draw` completed the task's data.

    `at` is a packed Meta; `operand` whatever the outer step broadcast beside it ({} if nothing). Where tasks must be
    lived through, `record(at, data)` makes the stacked data of a shard what they are at this θ. Without `draw` a verb
    works on the data of `gradient`. A `light` verb runs too seldom to be worth compiling. `fix(at, data)` is `run` with
    only the operand left open: where a verb is asked again and again at the same θ, a worker may keep what it returns.
    """

    run: VerbFunction
    draw: Callable[[Arrays, np.random.Generator], Arrays] | None = None
    light: bool = False
    record: Callable[[Params, Data], Data] | None = None
    fix: Callable[[Params, Data], Fixed] | None = None


Verbs: TypeAlias = Mapping[str, Verb]


class Reduce(Protocol):
    """`reduce(verb, operand)` runs a verb over this meta-iteration's tasks at this θ and returns their sum."""

    def __call__(self, verb: str, operand: Params | None, *, over: tuple[str, int] | None = None) -> Sum:
        """With `over` = (split, n): over the next n tasks of another split instead, one to a shard."""


class Outer(Protocol):
    """One outer step, over as many rounds of `reduce(verb, operand)` as it needs.

    State is a flat Params, so that it can be checkpointed without knowing what it means.
    """

    def init(self, meta: Meta) -> Params:
        """State before the first step."""

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        """Verbs this step needs beyond `gradient` and `evaluate`."""

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        """The next θ and state, and scalars to log."""


AVERAGED = "averaged"
"""Under `averaged/name` an outer step's state may hold a running mean of θ, which is used in θ's stead."""


@runtime_checkable
class Shows(Protocol):
    """An outer step with something to look at in its state."""

    def shown(self, state: Params) -> Params:
        """Images [n, c, h, w] by name, each to be stretched to its own range."""


@runtime_checkable
class OneRound(Outer, Protocol):
    """An outer step that needs the mean gradient only: what an asynchronous policy accepts."""

    def apply(self, meta: Meta, state: Params, mean: Params, lr_scale: float) -> tuple[Meta, Params, dict[str, float]]:
        """Descend the packed mean contribution with the step's rate multiplied by `lr_scale`."""


def pack(params: Params, slots: Params) -> Params:
    """One flat dictionary of both, by prefix: how a Meta or a Gradient is broadcast and summed."""
    return {f"params/{k}": v for k, v in params.items()} | {f"slots/{k}": v for k, v in slots.items()}


def unpack(packed: Params) -> Meta:
    """Inverse of `pack`."""
    parts: dict[str, Params] = {"params": {}, "slots": {}}
    for name, value in packed.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = value
    return Meta(parts["params"], parts["slots"])


def check_inner_loop(inner_lr: float, inner_steps: int) -> None:
    """Raise ValueError for a negative rate or number of steps."""
    if inner_lr < 0:
        raise ValueError(f"inner_lr={inner_lr}: 0 or more wanted")
    if inner_steps < 0:
        raise ValueError(f"inner_steps={inner_steps}: 0 or more wanted")


def training_steps(learner: Learner) -> int:
    """Inner steps in meta-training, where the learner has such a field."""
    return int(getattr(learner, "inner_steps", 1))
