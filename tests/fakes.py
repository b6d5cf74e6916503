"""Small parts that satisfy the interfaces: a pool that misbehaves on order, an outer step of several rounds."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.fleet import wire
from cluster.fleet.messages import Assignment, Broadcast, Contribution, Event, Failure
from cluster.fleet.pool import LocalPool
from cluster.fleet.recipe import Recipe
from cluster.fleet.worker import Worker
from learners.algorithms.maml import MAML
from learners.base import Data, Learner, Meta, Objective, Params, Reduce, Share, Verb, Verbs, unpack
from learners.engine import tree
from learners.outer.descent import Descent
from tests.quadratics import Quadratic, QuadraticTasks


class ScriptedPool(LocalPool):
    """A LocalPool whose answers pass through `script(contribution) -> events`."""

    def __init__(self, recipe: Recipe, script: Callable[[Contribution], list[Event]]) -> None:
        super().__init__(recipe)
        self.script = script

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        for event in super().poll(timeout):
            events += self.script(event) if isinstance(event, Contribution) else [event]
        return events


class SleepyPool:
    """Workers in threads of this process that take a given time for every shard, nearly all of it asleep."""

    def __init__(self, recipe: Recipe, seconds: list[float]) -> None:
        self._values: dict[int, Broadcast] = {}
        self._last = 0
        self._events: queue.Queue[Event] = queue.Queue()
        self._inboxes: list[queue.Queue[tuple[Assignment, Broadcast] | None]] = [queue.Queue() for _ in seconds]
        self._under_way = [0] * len(seconds)
        self._asked: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(Worker(recipe, f"w{i}"), inbox, s), daemon=True)
            for i, (inbox, s) in enumerate(zip(self._inboxes, seconds, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def publish(self, value: Params) -> int:
        self._last += 1
        self._values[self._last] = wire.broadcast(value)
        return self._last

    def release(self, handle: int) -> None:
        del self._values[handle]

    def free(self) -> int:
        return sum(2 - n for n in self._under_way)

    def submit(self, assignment: Assignment) -> None:
        able = [i for i, n in enumerate(self._under_way) if n < 2 and self._asked.get(assignment.ticket) != i]
        chosen = min(able, key=lambda i: self._under_way[i])
        self._under_way[chosen] += 1
        self._asked[assignment.ticket] = chosen
        self._inboxes[chosen].put((assignment, self._values[assignment.at]))

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, Contribution):
                self._under_way[int(event.worker[1:])] -= 1
        return events

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, worker: Worker, inbox: queue.Queue[tuple[Assignment, Broadcast] | None], seconds: float) -> None:
        while (job := inbox.get()) is not None:
            begin = time.perf_counter()
            answer = wire.decode_sum(*worker.run(wire.encode_assignment(job[0]), job[1], None))
            time.sleep(max(0.0, seconds - (time.perf_counter() - begin)))
            self._events.put(answer)


def shuffled(seed: int) -> Callable[[Contribution], list[Event]]:
    """A script that holds answers back and lets them out in random order."""
    rng, held = np.random.default_rng(seed), deque[Event]()

    def script(contribution: Contribution) -> list[Event]:
        held.append(contribution)
        if len(held) < 2 and rng.random() < 0.5:
            return [Failure(contribution.ticket, contribution.attempt, "flaky", "died", "scripted")]
        out = list(held)
        held.clear()
        rng.shuffle(out)
        return out

    return script


@dataclass(frozen=True)
class Newton:
    """A toy outer step of several rounds: θ ← θ − (mean B)⁻¹ mean ∇L_Q(θ), solved by conjugate gradient.

    On quadratic tasks without adaptation one step leads to the minimum of the mean query loss, which has a closed form.
    """

    rounds: int = 3

    def init(self, meta: Meta) -> Params:
        return {"steps": torch.zeros((), dtype=torch.float64)}

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        def curvature(at: Params, operand: Params, data: Data) -> Share:
            """B v."""
            return Share({"theta": data["B"] @ operand["theta"]}, torch.ones((), dtype=torch.float64), {})

        return {"curvature": Verb(curvature, lambda data, rng: learner.draw(data, rng, 1))}

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        total, weight, _ = reduce("gradient", None)
        r = unpack(tree.scale(1 / weight, total)).params
        p, x, rr = r, tree.zeros_like(r), tree.dot(r, r)
        for _ in range(self.rounds):
            total, weight, _ = reduce("curvature", p)
            bp = tree.scale(1 / weight, total)
            step = rr / tree.dot(p, bp)
            x, r = tree.add(x, tree.scale(step, p)), tree.sub(r, tree.scale(step, bp))
            rr, before = tree.dot(r, r), rr
            p = tree.add(r, tree.scale(rr / before, p))
        return Meta(tree.sub(meta.params, x), meta.slots), {"steps": state["steps"] + 1}, {"residual": float(rr)}


@dataclass(frozen=True)
class Noisy:
    """A toy learner that draws randomness and carries a slot: g = ∇L_Q(θ) + noise;  slot ← mean over tasks of (slot/2 +
    mean noise).
    """

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(params, {"trace": torch.zeros((), dtype=torch.float64)})

    def draw(self, data, rng: np.random.Generator, steps: int):
        return data | {"noise": rng.normal(size=data["b"].shape)}

    def path(self, meta, objective, data, steps):
        return MAML(0.0, 1).path(meta, objective, data, steps)

    def adapt(self, meta, objective, data, steps):
        return MAML(0.0, 1).adapt(meta, objective, data, steps)

    def gradient(self, meta, objective, data):
        plain = MAML(0.0, 1).gradient(Meta(meta.params, {}), objective, data)
        return replace_slots(
            plain,
            {"theta": plain.grads["theta"] + data["noise"]},
            {"trace": meta.slots["trace"] / 2 + data["noise"].mean()},
        )

    def claim(self):
        return "first order"

    def passes(self):
        return 1

    def at_test(self):
        return self


def replace_slots(gradient, grads, slots):
    return gradient._replace(grads=grads, slots=slots)


def quadratic_recipe(**changes) -> Recipe:
    """Three-dimensional random quadratics in float64."""
    return replace(
        Recipe(QuadraticTasks(3), MAML(0.05, 1), Quadratic(), Descent(), dtype="float64", evaluation_steps=2), **changes
    )


def start() -> Params:
    return {"theta": torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)}
