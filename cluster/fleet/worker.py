"""A worker: a pure function of (recipe, assignment, broadcasts). What it remembers is a cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

from cluster.fleet import wire
from cluster.fleet.culprit import culprit
from cluster.fleet.machine import set_up_torch
from cluster.fleet.messages import Assignment, Broadcast
from cluster.fleet.padding import stacked
from cluster.fleet.recipe import Recipe
from learners.base import Data, Fixed, Params, Verb
from learners.engine.execution import Execution

REMEMBERED_SHARDS = 4


class Worker:
    """Samples the tasks of an assignment, runs its verb over them, and adds up."""

    def __init__(self, recipe: Recipe, name: str, slower: float = 1.0) -> None:
        """`slower`: how many times as long as it needs it takes for everything (by sleeping)."""
        set_up_torch(recipe.threads, recipe.device, recipe.deterministic)
        self.recipe, self.name, self.slower = recipe, name, slower
        self._verbs = recipe.verbs(recipe.objective.to(recipe.device))
        self._run = Execution(recipe.execution, recipe.chunk, recipe.gradient_checkpointing)
        # A verb that runs a few times is not worth compiling.
        self._light = Execution("vmap", recipe.chunk) if recipe.execution == "compiled" else self._run
        self._values: dict[int, Params] = {}
        self._shards: OrderedDict[tuple[object, ...], Data] = OrderedDict()
        self._recorded: dict[tuple[object, int, str, int, int], Data] = {}
        self._fixed: dict[tuple[object, int, str, int, int], list[Fixed]] = {}

    def run(self, message: bytes, at: Broadcast | None, operand: Broadcast | None) -> tuple[bytes, NDArray[Any]]:
        """The encoded sum of an encoded assignment; `at` and `operand` are the broadcasts that it names.

        One that this worker was sent before may be left out.
        """
        begin = time.perf_counter()
        assignment = wire.decode_assignment(message)
        if assignment.verb not in self._verbs:
            raise ValueError(f"verb {assignment.verb!r} is not one of {', '.join(self._verbs)}")
        verb = self._verbs[assignment.verb]
        self._forget(assignment.oldest)
        theta = self._value(assignment.at, at)
        beside = self._value(assignment.operand, operand) if assignment.operand is not None else {}
        execution = self._light if verb.light else self._run
        data = self._shard(assignment, verb, theta)
        if verb.fix and execution.mode == "loop":
            result = execution.each(self._fixed_at(assignment, verb, theta, data), beside)
        else:
            result = execution.run(verb.run, theta, beside, data)
        if self.slower > 1:
            time.sleep((self.slower - 1) * (time.perf_counter() - begin))
        return wire.encode_sum(
            assignment, self.name, time.perf_counter() - begin, result, self.recipe.compression,
            lambda: culprit(theta | beside, data, result, assignment.start),
        )  # fmt: skip

    def _value(self, handle: int, message: Broadcast | None) -> Params:
        if message is not None and handle not in self._values:
            self._values[handle] = wire.received(message, self.recipe.device)
        return self._values[handle]

    def _forget(self, oldest: int) -> None:
        for handle in [h for h in self._values if h < oldest]:
            del self._values[handle]
        self._drop(oldest)

    def _drop(self, oldest: int) -> None:
        """Forget what was lived through, and built on it, at older θ."""
        for kept in (self._recorded, self._fixed):
            for key in [k for k in kept if k[1] < oldest]:
                del kept[key]

    def _shard(self, a: Assignment, verb: Verb, theta: Params) -> Data:
        """The data of an assignment; what was lived through at a θ is kept until the next θ comes, for the rounds in
        between.
        """
        if verb.record is None:
            return self._drawn(a, verb)
        if verb.light:  # nobody will ask again
            return verb.record(theta, self._drawn(a, verb))
        key = (verb.record, a.at, a.split, a.start, a.stop)
        if key not in self._recorded:
            self._drop(a.at)
            self._recorded[key] = verb.record(theta, self._drawn(a, verb))
        return self._recorded[key]

    def _fixed_at(self, a: Assignment, verb: Verb, theta: Params, data: Data) -> list[Fixed]:
        """The tasks of an assignment with only the operand left open, kept as long as its data."""
        assert verb.fix
        key = (verb.fix, a.at, a.split, a.start, a.stop)
        if key not in self._fixed:
            self._fixed[key] = [verb.fix(theta, {k: v[i] for k, v in data.items()}) for i in range(a.stop - a.start)]
        return self._fixed[key]

    def _drawn(self, a: Assignment, verb: Verb) -> Data:
        key = (verb.draw, a.split, a.start, a.stop)
        if key not in self._shards:
            tasks = [self.recipe.task(a.split, i, verb) for i in range(a.start, a.stop)]
            self._shards[key] = self.recipe.tensors(stacked(tasks))
            if len(self._shards) > REMEMBERED_SHARDS:
                self._shards.popitem(last=False)
        return self._shards[key]
