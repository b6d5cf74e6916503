"""One task's function over a shard of tasks: in a loop, under vmap, or compiled; and the rule that picks.

The three compute the same sum and differ in the last bits. Tasks are added in order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from learners.base import Data, Fixed, Params, Share, Sum, VerbFunction
from learners.engine.derivative import transforms
from learners.engine.memory import recomputing

Mode = Literal["loop", "vmap", "compiled"]
Stacked = tuple[Params, Tensor, Params]


@dataclass(frozen=True)
class Execution:
    """How a verb runs over the tasks of a shard. `chunk` tasks at a time under vmap (0: all); `checkpointing`: inner
    steps are computed again rather than kept (`memory.recomputed`), in a loop only.
    """

    mode: Mode
    chunk: int = 0
    checkpointing: bool = False
    backend: str = "inductor"
    _compiled: dict[object, Callable[..., Stacked]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.checkpointing and self.mode != "loop":
            raise ValueError(f"gradient_checkpointing is for execution='loop', not {self.mode!r}")

    def run(self, task: VerbFunction, at: Params, operand: Params, data: Data) -> Sum:
        """Σ over the stacked tasks of `data`, whose tensors are [tasks, …]."""
        tasks = len(next(iter(data.values())))
        if self.mode == "loop":
            each = ({k: v[i] for k, v in data.items()} for i in range(tasks))
            return self.each([partial(_of_one, task, at, one) for one in each], operand)
        size = self.chunk or tasks
        chunks = [{k: v[i : i + size] for k, v in data.items()} for i in range(0, tasks, size)]
        return _added(self._batch(task, at, operand, chunk) for chunk in chunks)

    def each(self, tasks: list[Fixed], operand: Params) -> Sum:
        """Σ over tasks of which only the operand was left open."""
        with recomputing(self.checkpointing):
            return _added(_stacked(task(operand)) for task in tasks)

    def _batch(self, task: VerbFunction, at: Params, operand: Params, data: Data) -> Stacked:
        batched = _over_tasks(task)
        if self.mode == "vmap":
            with transforms(), _explained():
                return batched(at, operand, data)
        key = (task, *((k, v.shape, v.dtype) for part in (at, operand, data) for k, v in part.items()))
        if key not in self._compiled:
            self._compiled[key] = _compile(batched, self.backend, at, operand, data)
        return self._compiled[key](at, operand, data)


def _of_one(task: VerbFunction, at: Params, data: Data, operand: Params) -> Share:
    return task(at, operand, data)


def _stacked(share: Share) -> Stacked:
    return share.total, share.weight, {k: v.unsqueeze(0) for k, v in share.row.items()}


def _over_tasks(task: VerbFunction) -> Callable[[Params, Params, Data], Stacked]:
    def batched(at: Params, operand: Params, data: Data) -> Stacked:
        def one(data: Data) -> Share:
            return task(at, operand, data)

        share = torch.vmap(one)(data)
        return {k: v.sum(0) for k, v in share.total.items()}, share.weight.sum(0), share.row

    return batched


@contextmanager
def _explained() -> Iterator[None]:
    """Torch's words for what its transforms do not take, in one sentence with the way out."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not any(word in said for word in ("vmap", "functorch", "torch.func", "batching rule", "being transformed")):
            raise
        raise ValueError(
            f"the model does not run under torch.vmap ({said.split('. ')[0].rstrip('.')}): execution = 'loop' wanted, "
            "which takes tasks one by one"
        ) from error


def _compile(
    batched: Callable[..., Stacked], backend: str, at: Params, operand: Params, data: Data
) -> Callable[..., Stacked]:
    # Traced by us into one flat graph, derivatives included, so that the compiler sees neither Python nor autograd.
    with transforms(), _explained():
        graph = make_fx(batched)(at, operand, data)
    return torch.compile(graph, backend=backend, fullgraph=True, dynamic=False)


def _added(parts: Iterable[Stacked]) -> Sum:
    total: Params = {}
    weights: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {}
    for part_total, part_weight, part_rows in parts:
        # In place on what the first part owns: no one else holds it, and one copy of θ is enough.
        total = (
            {k: total[k].add_(v) for k, v in part_total.items()}
            if total
            else {k: v.clone() for k, v in part_total.items()}
        )
        weights.append(part_weight)
        for k, v in part_rows.items():
            rows.setdefault(k, []).append(v)
    # One look at the device, not one for every task.
    return Sum(total, float(torch.stack(weights).double().sum()), {k: torch.cat(v) for k, v in rows.items()})


BATCHED_UP_TO = 64 << 10  # bytes of activations per task; above, a CPU is faster task by task
GPU_BYTES = 4 << 30  # memory that a chunk of tasks may take there; not measured


def choose(
    *, activation_bytes: int, device: str, inner_steps: int, tasks_per_call: int, calls: int, compiler: bool
) -> tuple[Mode, int, str]:
    """(the mode of least total time, the chunk that memory allows, why), by rule.

    On a CPU batching wins while a task's activations are small (then overhead counts) and loses where they are large
    (then memory does). Compilation is chosen where it pays for itself over `calls` shards. The constants are
    measurements (tests/bench/bench_execution_rule.py holds them against the machine at hand); they are never taken at
    run time, so that the same command gives the same bits twice.
    """
    if device != "cpu":
        # Forward, backward and their derivatives keep some tens of intermediate results of a step.
        chunk = max(1, GPU_BYTES // (32 * activation_bytes * (inner_steps + 1)))
        return (
            "vmap",
            chunk if chunk < tasks_per_call else 0,
            f"execution = vmap: on {device} tasks run together, {chunk} at a time at most",
        )
    if activation_bytes > BATCHED_UP_TO:
        return (
            "loop",
            0,
            f"execution = loop: {activation_bytes >> 10} KiB of activations per task, more than {BATCHED_UP_TO >> 10}",
        )
    compile_s = compile_seconds(inner_steps)
    saved_s = calls * saved_seconds(inner_steps, tasks_per_call)
    reason = f"compiling costs {compile_s:.0f} s and would save {saved_s:.0f} s over {calls} shards"
    if saved_s <= compile_s:
        return "vmap", 0, f"execution = vmap: {reason}"
    if not compiler:
        return "vmap", 0, f"execution = vmap: {reason}, but no C++ compiler is found (install g++, or set CXX)"
    return "compiled", 0, f"execution = compiled: {reason}"


def compile_seconds(inner_steps: int) -> float:
    """What compiling a gradient costs, cold, on one core."""
    return 20.0 + 3.0 * inner_steps


def saved_seconds(inner_steps: int, tasks: int) -> float:
    """What a compiled gradient of `tasks` small tasks saves over vmap."""
    return 1e-3 * inner_steps * (1.8 + 0.02 * tasks)


def has_compiler() -> bool:
    """Whether the C++ compiler that torch's inductor would call is there."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
