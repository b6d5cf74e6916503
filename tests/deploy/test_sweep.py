"""deploy/sweep.py: a sweep with Ray Tune over a preset, as deploy/README.md says it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.record.checkpoint import Checkpoints
from tests.commands import PATIENCE

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def test_a_sweep_trains_trials_gives_the_worse_up_and_names_the_best(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="ray[tune] is not installed")
    words = ["sinusoid", "--home", "sweep", "--trials", "2", "--iterations", "40", "--measure", "mse", "--mode", "min"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "deploy" / "sweep.py"), *words], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = list((tmp_path / "sweep").iterdir())
    reached = sorted(state.iteration for r in runs if (state := Checkpoints(r / "checkpoints").newest()))
    assert len(runs) == 2
    assert reached[-1] == 40
    assert set(reached) <= {10, 20, 40}
    assert "best mse: " in done.stdout
    assert "--learner.inner-lr " in done.stdout
