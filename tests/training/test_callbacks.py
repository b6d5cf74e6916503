"""Watching a run from Python, and asking it to stop."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cluster.fleet.messages import RunStopped
from cluster.record import journal
from cluster.record.checkpoint import Checkpoints
from cluster.results.curves import Curves
from cluster.training.callbacks import Callback, EarlyStopping, Evaluated
from cluster.training.identity import digest
from tests.fakes import quadratic_recipe
from tests.training.test_driver import run


@dataclass
class Watcher(Callback):
    stop_at: int = 0
    seen: list[object] = field(default_factory=list)

    def on_step(self, iteration, metrics) -> bool:
        self.seen.append(iteration)
        metrics.clear()
        return iteration == self.stop_at

    def on_evaluation(self, iteration, split, curves) -> bool:
        self.seen.append((split, iteration))
        return False

    def on_end(self, state) -> None:
        self.seen.append(state)


def test_a_watcher_sees_all_in_order_and_changes_no_bit(tmp_path: Path) -> None:
    watcher = Watcher()
    watched = run(quadratic_recipe(), tmp_path / "w", callbacks=[watcher])
    assert digest(watched) == digest(run(quadratic_recipe(), tmp_path / "alone"))
    assert [s for s in watcher.seen if isinstance(s, int)] == [1, 2, 3, 4, 5, 6]
    assert {s for s in watcher.seen if isinstance(s, tuple)} == {("validation", 4), ("test", 6)}
    assert watcher.seen[-1] == "finished"


def test_a_run_asked_to_stop_finishes_there_and_stays_finished(tmp_path: Path) -> None:
    run(quadratic_recipe(), tmp_path, callbacks=[Watcher(stop_at=3)])
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("finished", 3)
    assert "Watcher" in status["stopped_by"]
    assert [r["iteration"] for r in journal.read(tmp_path / "journal") if r["kind"] == "stop"] == [3]
    assert json.loads((tmp_path / "evaluation.json").read_text())["iteration"] == 3
    again = Watcher(stop_at=3)
    run(quadratic_recipe(), tmp_path, callbacks=[again])
    assert again.seen == [("test", 3), "finished"]
    assert digest(run(quadratic_recipe(), tmp_path, iterations=8)) == digest(
        run(quadratic_recipe(), tmp_path / "whole", iterations=8)
    )


def test_a_callback_that_fails_ends_the_run_after_a_checkpoint_and_is_named(tmp_path: Path) -> None:
    class Faulty(Callback):
        def on_step(self, iteration, metrics) -> bool:
            raise KeyError("gone")

    with pytest.raises(RunStopped, match="callback Faulty failed in on_step: KeyError"):
        run(quadratic_recipe(), tmp_path, callbacks=[Faulty()])
    assert Checkpoints(tmp_path / "checkpoints").newest().iteration == 1


def curves(measure: str, value: float) -> Curves:
    return Curves(2, {measure: np.array([9.0, value])}, {measure: np.zeros(2)})


@pytest.mark.parametrize(("measure", "sign"), [("loss", 1), ("accuracy", -1)])
def test_early_stopping_waits_for_its_patience_also_across_a_resume(measure: str, sign: int) -> None:
    values = [5.0, 3.0, 2.95, 2.0, 1.95, 2.5, 1.0]  # steps smaller than 0.1 are none: two in a row end at the sixth
    whole = EarlyStopping(patience=2, min_delta=0.1)
    whole.on_begin({}, [])
    asked = [whole.on_evaluation(i, "validation", curves(measure, sign * v)) for i, v in enumerate(values[:6])]
    assert asked == [False] * 5 + [True]
    for cut in range(6):
        resumed = EarlyStopping(patience=2, min_delta=0.1)
        resumed.on_begin({}, [Evaluated(i, {measure: [9.0, sign * v]}) for i, v in enumerate(values[:cut])])
        rest = [resumed.on_evaluation(i, "validation", curves(measure, sign * values[i])) for i in range(cut, 6)]
        assert rest == asked[cut:]


def test_early_stopping_on_a_measure_that_is_not_there_says_which_are() -> None:
    with pytest.raises(ValueError, match=r"measure='f1' is not among .*loss"):
        EarlyStopping(measure="f1").on_evaluation(1, "validation", curves("loss", 1.0))
