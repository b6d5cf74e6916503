"""README's examples, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- test: (\S+) -->\n```python\n(.*?)```", README, re.S))


def run(program: str, folder: Path) -> str:
    (folder / "program.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, capture_output=True, text=True, timeout=170, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def final_error(output: str, step: int) -> float:
    return float(re.search(rf"│ +{step} │ +([0-9.]+) ±", output)[1])


def lines(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip()])


def test_the_examples_are_as_short_as_promised() -> None:
    assert lines(EXAMPLES["own.py"]) <= 25
    assert lines(EXAMPLES["use.py"].partition("\n\n")[2]) <= 10


def test_ones_own_model_and_tasks_learn_locally(tmp_path: Path) -> None:
    output = run(EXAMPLES["own.py"], tmp_path)
    assert "replaced BatchNorm layers 1" in output
    assert final_error(output, 3) < 0.5 * final_error(output, 0)


def test_a_gymnasium_environment_becomes_tasks(tmp_path: Path) -> None:
    output = run(EXAMPLES["pendulums.py"], tmp_path)
    assert re.search(r"│ +2 │ +-[0-9.]+ ±", output)
    assert (tmp_path / "runs" / "pendulums" / "evaluation.json").exists()


@pytest.mark.ray
def test_ones_own_model_and_tasks_learn_on_ray_to_the_same_numbers(tmp_path: Path) -> None:
    shorter = EXAMPLES["own.py"].replace("iterations=200", "iterations=20")
    on_ray = shorter.replace("from cluster.fleet.pool import LocalPool", "from cluster.fleet.ray_pool import RayPool")
    on_ray = on_ray.replace("LocalPool(recipe) ", "RayPool(recipe, workers=2) ").replace(
        "runs/parabolas", "runs/on-ray"
    )
    for name, program in (("local", shorter), ("ray", on_ray)):
        seeded = program.replace("from torch import nn", "import torch\nfrom torch import nn\ntorch.manual_seed(0)")
        assert ("pool = RayPool(" in seeded) == (name == "ray")
        run(seeded, tmp_path)
    results = [(tmp_path / "runs" / name / "evaluation.json").read_text() for name in ("parabolas", "on-ray")]
    assert results[0] == results[1]


def test_exported_theta_adapts_in_plain_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli"]
    train = [
        "train",
        "sinusoid",
        "--pool",
        "local",
        "--iterations",
        "1500",
        "--meta-batch",
        "50",
        "--dir",
        "run",
        "--evaluation.pictures",
        "0",
    ]
    for words in (train, ["export", "run", "theta.safetensors"]):
        subprocess.run([*command, *words], cwd=tmp_path, check=True, capture_output=True, timeout=170)
    predicted, wanted = (float(v) for v in re.findall(r"-?\d+\.\d+", run(EXAMPLES["use.py"], tmp_path)))
    assert abs(predicted - wanted) < 1.0  # θ alone, unadapted, is about 1.4 off


def test_every_file_of_the_map_exists() -> None:
    tree = README.partition("envs/       what")[2].partition("```")[0]
    root = Path(__file__).parents[1]
    for name in re.findall(r"(\w+\.py)", tree):
        assert list(root.rglob(name)), name
