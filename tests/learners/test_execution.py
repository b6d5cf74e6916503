"""Loop, vmap and compiled agree; the rule that picks one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from cluster.fleet.worker import Worker
from cluster.setup import assemble, config
from cluster.setup.run import Run
from learners.base import pack
from learners.engine import execution
from learners.engine.derivative import transforms
from learners.engine.execution import Execution, choose

pytestmark = pytest.mark.kernels

LEARNERS = ["maml", "reptile"]


def stacked(run: Run, tasks: int):
    parts, params = assemble.recipe(replace(run, execution="loop", precision="float64"))
    verb = parts.verbs(parts.objective)["gradient"]
    data = [parts.tensors(parts.task("train", i, verb)) for i in range(tasks)]
    at = pack({k: v.double() for k, v in params.items()}, {})
    return verb.run, at, {k: torch.stack([d[k] for d in data]) for k in data[0]}


@pytest.mark.parametrize("preset", ["sinusoid", "sinusoid-reptile", "glyphs"])
def test_modes_agree_in_float64(preset: str, data_folder: Path) -> None:
    run = config.load(preset)
    run.task.prepare()
    task, at, data = stacked(run, 3)
    reference = Execution("loop").run(task, at, {}, data)
    for other in (Execution("vmap"), Execution("vmap", chunk=2), Execution("compiled", backend="aot_eager")):
        got = other.run(task, at, {}, data)
        assert got.weight == reference.weight == 3
        for k, v in reference.total.items():
            torch.testing.assert_close(got.total[k], v, rtol=1e-9, atol=1e-9 * float(v.abs().max() + 1e-3))
        for k, v in reference.rows.items():
            torch.testing.assert_close(got.rows[k], v, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_the_full_compiler_agrees(learner: str) -> None:
    if not execution.has_compiler():
        pytest.skip("no C++ compiler found (install g++, or set CXX)")
    task, at, data = stacked(config.load("sinusoid", {"learner.name": learner}), 3)
    reference = Execution("loop").run(task, at, {}, data)
    got = Execution("compiled").run(task, at, {}, data)
    for k, v in reference.total.items():
        torch.testing.assert_close(got.total[k], v, rtol=1e-9, atol=1e-9 * float(v.abs().max()))


def test_a_light_verb_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(execution, "_compile", lambda batched, backend, *inputs: compiled.append(inputs) or batched)
    parts, params = assemble.recipe(replace(config.load("sinusoid"), execution="compiled"))
    worker = Worker(parts, "w")
    at = wire.broadcast(pack(params, {}))
    for ticket, (verb, count) in enumerate((("evaluate", 0), ("gradient", 1), ("gradient", 1))):
        with transforms():  # `batched` itself stands in for the compiled graph
            worker.run(wire.encode_assignment(Assignment(ticket, 0, verb, 1, None, "train", 0, 2, 0)), at, None)
        assert len(compiled) == count


SMALL = {"activation_bytes": 1600, "device": "cpu", "inner_steps": 1, "tasks_per_call": 25, "compiler": True}


@pytest.mark.parametrize(
    ("changes", "mode", "why"),
    [
        ({"calls": 100}, "vmap", "compiling costs"),
        ({"calls": 100_000}, "compiled", "compiling costs"),
        ({"calls": 100_000, "compiler": False}, "vmap", "no C\\+\\+ compiler is found"),
        ({"calls": 100_000, "activation_bytes": 250_000}, "loop", "244 KiB of activations"),
        (
            {"calls": 100, "activation_bytes": 10**8, "device": "cuda"},
            "vmap",
            "on cuda tasks run together, 1 at a time",
        ),
    ],
)
def test_the_rule_picks_by_size_device_and_pay_off(changes, mode, why) -> None:
    got, chunk, reason = choose(**(SMALL | changes))
    assert got == mode
    assert re.search(why, reason)
    assert chunk == (1 if "cuda" in changes.values() else 0)


def test_the_compiler_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not execution.has_compiler()
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert execution.has_compiler()
