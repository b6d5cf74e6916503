"""A worker: a pure function of (recipe, assignment, broadcasts). What it remembers is a cache."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cluster import seeds, wire
from cluster.messages import Assignment, Broadcast
from envs import store
from envs.base import HELD_OUT, Arrays, HasFiles, HasFixedTasks, HasGroups, TaskDistribution
from learners import kernels, verbs
from learners.base import GROUP, Data, Fixed, Learner, Objective, Outer, Params, Verb
from learners.execution import Execution, Mode
from learners.outer import Descent
from learners.robustness import Robustness

REMEMBERED_SHARDS = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers, but θ: what a worker is made from, pickled once at its start.

    `compression` is of contributions on the wire.
    """

    tasks: TaskDistribution
    learner: Learner
    objective: Objective
    outer: Outer = field(default_factory=Descent)
    seed: int = 0
    evaluation_seed: int = 0
    evaluation_steps: int = 10
    robustness: Robustness | None = None
    execution: Mode = "loop"
    chunk: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    threads: int = 1
    compression: wire.Compression = "none"

    def summary(self) -> str:
        """One line on what the numbers are of."""
        return f"{self.learner!r}, {self.objective.summary()}, mean over tasks, {self.execution}, {self.dtype}, seed {self.seed}"

    def verbs(self, objective: Objective) -> Mapping[str, Verb]:
        """The verbs every run has, and those of its outer step."""
        standard = verbs.standard(self.learner, objective, self.evaluation_steps, self.robustness)
        own, data = self.outer.verbs(self.learner, objective), standard["gradient"]
        return {**standard, **{k: v if v.draw else replace(v, draw=data.draw, record=data.record) for k, v in own.items()}}

    def groups(self) -> tuple[str, ...]:
        """Names of the kinds of tasks that are reported apart."""
        return self.tasks.groups if isinstance(self.tasks, HasGroups) else ()

    def task(self, split: str, index: int, verb: Verb) -> Arrays:
        """Task `index` of `split`, complete for `verb`. Held-out tasks do not depend on the run's seed."""
        seed = self.evaluation_seed if split in HELD_OUT else self.seed
        fixed = self.tasks.fixed(split, index) if isinstance(self.tasks, HasFixedTasks) else None
        data = self.tasks.sample(split, seeds.generator(seed, split, index, "task")) if fixed is None else dict(fixed)
        if isinstance(self.tasks, HasGroups) and self.groups():
            data = data | {GROUP: np.asarray(self.tasks.group(data))}
        return verb.draw(data, seeds.generator(seed, split, index, "draw")) if verb.draw else data

    def tensors(self, arrays: Arrays) -> Data:
        """Arrays as tensors on the run's device, floating ones in the run's dtype."""
        data = {k: wire.owned(v) for k, v in arrays.items()}
        dtype = getattr(torch, self.dtype)
        return {k: v.to(self.device, dtype if v.is_floating_point() else v.dtype) for k, v in data.items()}


class Worker:
    """Samples the tasks of an assignment, runs its verb over them, and adds up."""

    def __init__(self, recipe: Recipe, name: str, slower: float = 1.0) -> None:
        """`slower`: how many times as long as it needs it takes for everything (by sleeping)."""
        set_up_torch(recipe.threads, recipe.device)
        self.recipe, self.name, self.slower = recipe, name, slower
        self._verbs = recipe.verbs(recipe.objective.to(recipe.device))
        self._run = Execution(recipe.execution, recipe.chunk)
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
        if verb.fix and execution.mode == "loop":
            result = execution.each(self._fixed_at(assignment, verb, theta), beside)
        else:
            result = execution.run(verb.run, theta, beside, self._shard(assignment, verb, theta))
        if self.slower > 1:
            time.sleep((self.slower - 1) * (time.perf_counter() - begin))
        return wire.encode_sum(assignment, self.name, time.perf_counter() - begin, result, self.recipe.compression)

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
        """The data of an assignment; what was lived through at a θ is kept until the next θ comes, for the rounds in between."""
        if verb.record is None:
            return self._drawn(a, verb)
        if verb.light:  # nobody will ask again
            return verb.record(theta, self._drawn(a, verb))
        key = (verb.record, a.at, a.split, a.start, a.stop)
        if key not in self._recorded:
            self._drop(a.at)
            self._recorded[key] = verb.record(theta, self._drawn(a, verb))
        return self._recorded[key]

    def _fixed_at(self, a: Assignment, verb: Verb, theta: Params) -> list[Fixed]:
        """The tasks of an assignment with only the operand left open, kept as long as its data."""
        assert verb.fix
        key = (verb.fix, a.at, a.split, a.start, a.stop)
        if key not in self._fixed:
            data = self._shard(a, verb, theta)
            self._fixed[key] = [verb.fix(theta, {k: v[i] for k, v in data.items()}) for i in range(a.stop - a.start)]
        return self._fixed[key]

    def _drawn(self, a: Assignment, verb: Verb) -> Data:
        key = (verb.draw, a.split, a.start, a.stop)
        if key not in self._shards:
            tasks = [self.recipe.task(a.split, i, verb) for i in range(a.start, a.stop)]
            self._shards[key] = self.recipe.tensors({k: np.stack([t[k] for t in tasks]) for k in tasks[0]})
            if len(self._shards) > REMEMBERED_SHARDS:
                self._shards.popitem(last=False)
        return self._shards[key]


def set_up_torch(threads: int, device: str) -> None:
    """Threads (torch's and numpy's), memory and determinism, the same in the driver and in every worker."""
    torch.set_num_threads(threads)
    threadpool_limits(threads, "blas")  # Ray's workers have few by themselves; processes beside each other would slow each other down
    kernels.keep_freed_memory()
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this torch sees no CUDA device; device='cpu' works everywhere")
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may pick another algorithm each time
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False


def environment() -> dict[str, str]:
    """What must be equal on all machines for equal bits: versions and processor features."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def place() -> str:
    """Host and process, for people who look for a worker."""
    return f"{socket.gethostname()}:{os.getpid()}"


def data_files(tasks: TaskDistribution) -> dict[str, str]:
    """The tasks' data files, with what tells one version from another; "" for one that this node lacks."""
    return {f: store.fingerprint(f) for f in (tasks.files() if isinstance(tasks, HasFiles) else ())}
