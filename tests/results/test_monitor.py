"""What a run writes and shows while it goes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.results import monitor
from cluster.results.history import rows
from cluster.results.monitor import Monitor
from tests.fakes import quadratic_recipe
from tests.training.test_driver import run


def test_every_iteration_has_a_row_through_an_interruption_and_a_resume(tmp_path: Path) -> None:
    recipe, asked = quadratic_recipe(), iter(range(10**6))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, iterations=50_000, interrupted=lambda: next(asked) >= 300)
    before = [row for row in rows(tmp_path) if row["kind"] == "train"]
    assert [row["iteration"] for row in before] == list(range(1, len(before) + 1))
    assert len(before) % 50  # the interruption fell within a window of TensorBoard's
    run(recipe, tmp_path, iterations=len(before) + 20)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["iteration"] for x in lines if x["kind"] == "train"] == list(range(1, len(before) + 21))


def test_the_window_that_is_open_at_the_end_is_shown_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = Monitor(tmp_path, 0, 1000, every=10)
    for iteration in range(1, 16):
        watch.scalars(iteration, {"train/loss": float(iteration)})
    watch.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 5.5), (15, 13.0)]


def test_the_time_left_leaves_out_the_first_iteration_and_what_is_long_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    watch = Monitor(tmp_path, 0, 1000)
    left = []
    for iteration in range(1, 201):
        now[0] += 600 if iteration == 1 else 5 if iteration <= 100 else 2
        watch.scalars(iteration, {"train/loss": 1.0})
        watch.status("running", iteration, now=True)
        left.append(json.loads((tmp_path / "status.json").read_text())["eta_s"])
    watch.close()
    assert np.isnan(left[:3]).all()
    assert left[9] == 5 * 990
    assert left[199] == 2 * 800


def test_the_line_of_a_run_shows_validation_and_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "PLAIN_EVERY", 0.0)
    said = io.StringIO()
    watch = Monitor(tmp_path, 0, 10, console=Console(file=said, width=200))
    watch.curve(1, "validation", {"accuracy": np.array([0.25, 0.5])})
    watch.best = {"iteration": 1, "score": 0.75}
    watch.scalars(2, {"train/query_loss": 3.0, "train/query_accuracy": 0.125})
    watch.close()
    assert "query_loss 3  query_accuracy 0.125  validation accuracy 0.5 (best 0.75)" in said.getvalue()
    assert "ETA" not in said.getvalue()


@pytest.mark.parametrize("command", [True, False])
def test_what_a_stopped_run_says_of_going_on_is_true(tmp_path: Path, capsys, command: bool) -> None:
    if command:
        (tmp_path / "run.toml").write_text("")
    asked = iter(range(10**6))
    with pytest.raises(KeyboardInterrupt):
        run(quadratic_recipe(), tmp_path, interrupted=lambda: next(asked) >= 10)
    wanted = "`metafleet resume` goes on" if command else "the same program, run again, goes on"
    assert wanted in capsys.readouterr().err
