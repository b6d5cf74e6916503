"""`ray job submit --working-dir .` of a real run, on two hosts with token authentication; refused without the token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cluster.record.checkpoint import Checkpoints
from tests import hosts
from tests.commands import PATIENCE

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> Iterator[hosts.Hosts]:
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with TemporaryDirectory(prefix="job-") as folder:  # sockets stand in it, whose paths must be short
        found = hosts.Hosts(Path(folder), 2, cpus=2, dashboard=True)
        yield found
        found.close()


def submit(
    cluster: hosts.Hosts, environment: dict[str, str], words: list[str], module: str = "cluster.train"
) -> subprocess.CompletedProcess[str]:
    excludes = json.dumps({"excludes": [".git", ".venv", "runs", "teachers"]})
    command = [*hosts.RAY, "job", "submit", "--address", "http://10.93.0.10:8265", "--working-dir", ".",
               "--runtime-env-json", excludes, "--", sys.executable, "-m", module, *words]  # fmt: skip
    return subprocess.run(
        cluster.command(command), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def test_a_job_trains_on_the_cluster_and_the_same_command_finds_it_finished(
    tmp_path: Path, cluster: hosts.Hosts
) -> None:
    words = ["sinusoid", "--workers", "2", "--iterations", "20", "--evaluation.tasks", "8",
             "--evaluation.validation-tasks", "0", "--execution", "vmap", "--dir", str(tmp_path / "run")]  # fmt: skip
    without = {k: v for k, v in cluster.environment.items() if k not in ("RAY_AUTH_TOKEN",)} | {
        "RAY_AUTH_TOKEN": "0" * 32
    }
    refused = submit(cluster, without, words)
    assert refused.returncode != 0
    assert "uthenti" in refused.stderr + refused.stdout or "401" in refused.stderr + refused.stdout
    assert not (tmp_path / "run").exists()

    done = submit(cluster, cluster.environment, words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Held-out test tasks" in done.stdout
    assert "succeeded" in done.stdout
    state = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert state
    assert state.iteration == 20
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    workers = json.loads((tmp_path / "run" / "status.json").read_text())["workers"]
    assert len(workers) == 2

    few = ["--measure", "8", "--warmup", "2", "--execution", "vmap", "--no-independent"]
    words = ["scale", "sinusoid", "--workers", "1,2", *few, "--address", "auto", "--dir", str(tmp_path / "scale")]
    done = submit(cluster, cluster.environment, words, "cluster.cli")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "scale" / "scale.md").read_text().count("| strong | sync |") == 2
