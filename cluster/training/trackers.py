"""Experiment trackers as callbacks; each package is an extra, imported where its tracker begins."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.results.curves import Curves
from cluster.training.callbacks import Callback, Evaluated


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'metafleet[{name}]'") from error


def _points(split: str, curves: Curves) -> dict[str, float]:
    return {f"{split}/{k}_step{i}": float(v) for k, values in curves.mean.items() for i, v in enumerate(values)}


@dataclass(frozen=True)
class WandB(Callback):
    """Weights & Biases: the configuration, training metrics, adaptation curves and how the run ended."""

    project: str = "metafleet"
    """Where the run is listed."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """Whether it is sent, kept in files here, or neither."""
    every: int = 10
    """Iterations between training metrics."""
    _run: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def on_begin(self, hparams: Mapping[str, object], earlier: Sequence[Evaluated]) -> None:
        """Open a run of theirs."""
        self._run[:] = [_package("wandb").init(project=self.project, mode=self.mode, config=dict(hparams))]

    def on_step(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Log every few iterations."""
        if iteration % self.every == 0:
            self._run[0].log({**metrics, "iteration": iteration})
        return False

    def on_evaluation(self, iteration: int, split: str, curves: Curves) -> bool:
        """Log a curve; their steps only grow, and an evaluation ends later than it began."""
        self._run[0].log({**_points(split, curves), "iteration": iteration})
        return False

    def on_end(self, state: str) -> None:
        """Close it."""
        for run in self._run:
            run.summary["state"] = state
            run.finish(exit_code=0 if state == "finished" else 1)


@dataclass(frozen=True)
class MLflow(Callback):
    """MLflow: the configuration, training metrics, adaptation curves and how the run ended."""

    uri: str = ""
    """Tracking server or store; empty: MLflow's own setting."""
    experiment: str = "metafleet"
    """Where the run is listed."""
    every: int = 10
    """Iterations between training metrics."""
    _module: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def on_begin(self, hparams: Mapping[str, object], earlier: Sequence[Evaluated]) -> None:
        """Open a run of theirs."""
        mlflow = _package("mlflow")
        if self.uri:
            mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment(self.experiment)
        mlflow.start_run()
        self._module[:] = [mlflow]
        mlflow.log_params(dict(hparams))

    def on_step(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Log every few iterations."""
        if iteration % self.every == 0:
            self._module[0].log_metrics(dict(metrics), step=iteration)
        return False

    def on_evaluation(self, iteration: int, split: str, curves: Curves) -> bool:
        """Log a curve."""
        self._module[0].log_metrics(_points(split, curves), step=iteration)
        return False

    def on_end(self, state: str) -> None:
        """Close it."""
        for mlflow in self._module:
            mlflow.set_tag("state", state)
            mlflow.end_run("FINISHED" if state == "finished" else "FAILED")
