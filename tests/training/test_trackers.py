"""Trackers on minimal stand-ins that record calls; and against the packages themselves where they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.fleet.messages import RunStopped
from cluster.training.trackers import MLflow, WandB
from tests.fakes import quadratic_recipe
from tests.training.test_driver import run


def test_wandb_is_told_of_steps_curves_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []
    ends: list[int] = []
    theirs = SimpleNamespace(log=told.append, summary={}, finish=lambda exit_code: ends.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: theirs))
    run(quadratic_recipe(), tmp_path, callbacks=[WandB(mode="offline", every=3)])
    assert [t["iteration"] for t in told if "train/query_loss" in t] == [3, 6]
    assert [t["iteration"] for t in told if any(k.startswith("test/") for k in t)] == [6]
    assert (theirs.summary, ends) == ({"state": "finished"}, [0])


@pytest.mark.parametrize(("tracker", "name"), [(WandB(), "wandb"), (MLflow(), "mlflow")])
def test_a_tracker_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunStopped, match=rf"{name} is not installed: pip install 'metafleet\[{name}\]'"):
        run(quadratic_recipe(), tmp_path, callbacks=[tracker])


def test_mlflow_keeps_a_run_in_its_own_store(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    run(quadratic_recipe(), tmp_path / "run", callbacks=[MLflow(uri=uri, every=3)], hparams={"seed": 0})
    (kept,) = mlflow.search_runs(experiment_names=["metafleet"], output_format="list")
    assert kept.data.params == {"seed": "0"}
    assert kept.data.tags["state"] == "finished"
    history = mlflow.MlflowClient(uri).get_metric_history(kept.info.run_id, "train/query_loss")
    assert [m.step for m in history] == [3, 6]
