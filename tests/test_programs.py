"""The programs on the pages, as they stand there, each in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PATIENCE
from tests.test_pages import PROGRAMS, RUN


def run(name: str, folder: Path, change: dict[str, str] | None = None) -> str:
    """What a page's program prints, in an empty folder."""
    program = PROGRAMS[name][1]
    for old, new in (change or {}).items():
        assert old in program
        program = program.replace(old, new)
    (folder / name).write_text(program)
    done = subprocess.run(
        [sys.executable, name], cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def final_error(output: str, step: int) -> float:
    """A cell of the table that a run ends with."""
    found = re.search(rf"│ +{step} │ +([0-9.]+) ±", output)
    assert found, output
    return float(found[1])


def lines(text: str) -> int:
    """Lines with something on them."""
    return len([line for line in text.splitlines() if line.strip()])


def test_the_examples_are_as_short_as_promised() -> None:
    assert lines(PROGRAMS["own.py"][1]) <= 25
    assert lines(PROGRAMS["use.py"][1].partition("\n\n")[2]) <= 10


def test_ones_own_model_and_tasks_learn_locally(tmp_path: Path) -> None:
    output = run("own.py", tmp_path)
    assert "replaced BatchNorm layers 1" in output
    assert final_error(output, 3) < 0.5 * final_error(output, 0)


@pytest.mark.ray
def test_ones_own_model_and_tasks_learn_on_ray_to_the_same_numbers(tmp_path: Path) -> None:
    shorter = {
        "iterations=200, meta_batch=16, shard=8": "iterations=4, meta_batch=100, shard=50",
        "from torch import nn": "from torch import nn\n\ntorch.manual_seed(0)",
    }
    on_ray = {
        "from cluster.fleet.pool import LocalPool": "from cluster.fleet.ray_pool import RayPool",
        "LocalPool(recipe) ": "RayPool(recipe, workers=2) ",
        "runs/parabolas": "runs/on-ray",
    }
    run("own.py", tmp_path, shorter)
    run("own.py", tmp_path, on_ray | shorter)
    results = [(tmp_path / "runs" / name / "evaluation.json").read_text() for name in ("parabolas", "on-ray")]
    assert results[0] == results[1]


def test_a_gymnasium_environment_becomes_tasks(tmp_path: Path) -> None:
    output = run("pendulums.py", tmp_path)
    assert re.search(r"│ +2 │ +-[0-9.]+ ±", output)
    assert (tmp_path / "runs" / "pendulums" / "evaluation.json").exists()


def test_exported_theta_adapts_in_plain_torch(tmp_path: Path) -> None:
    train = f"train sinusoid {RUN} --evaluation.pictures 0 --iterations 500 --meta-batch 50 --shard 25 --dir run"
    for words in (train, "export run theta.safetensors"):
        command = [sys.executable, "-m", "cluster.cli", *words.split()]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE)
    predicted, wanted = (float(v) for v in re.findall(r"-?\d+\.\d+", run("use.py", tmp_path)))
    assert abs(predicted - wanted) < 1.0  # θ alone, unadapted, is about 1.4 off


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"own.py", "pendulums.py", "use.py"}))
def test_every_other_program_runs(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
