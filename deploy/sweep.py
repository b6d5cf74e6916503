"""A sweep over a preset with Ray Tune: every trial is `metafleet train` in one process, somewhere in the cluster.

    pip install --constraint constraints.txt '.[sweep]'
    python deploy/sweep.py omniglot-5way-1shot --home runs/sweep --trials 16 --iterations 2000
    ray job submit --working-dir . -- python deploy/sweep.py omniglot-5way-1shot --home s3://BUCKET/sweep --trials 64

A trial trains to a quarter of its iterations, to half, to the end, each time resuming; after each the worse half is
given up (ASHA). Change SPACE for another question. The best trial's keys are printed; `tensorboard --logdir runs/sweep`
compares all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from cluster.record import storage
from cluster.setup import config

SPACE = {
    "learner.inner_lr": tune.loguniform(1e-3, 1.0),
    "outer.lr": tune.loguniform(1e-4, 1e-2),
}
"""Keys of the run (`metafleet show RUN`) and where to look for them."""


@dataclass(frozen=True)
class Sweep:
    """Search for the keys with the best validation score."""

    run: Annotated[str, tyro.conf.Positional]
    """Preset or TOML file."""
    home: str
    """Folder or URL that all nodes can write; one run directory per trial."""
    trials: int = 16
    """Combinations to try."""
    iterations: int = 1000
    """Meta-iterations of a trial that is never given up."""
    measure: str = "accuracy_transductive"
    """What validation measures, at its last inner step (metrics.jsonl has the names)."""
    mode: str = "max"
    """max or min."""


def trial(keys: dict[str, Any], sweep: Sweep) -> None:
    """One combination, to a quarter, half and all of its iterations."""
    directory = storage.place(sweep.home) / tune.get_context().get_trial_id()
    words = [sys.executable, "-m", "cluster.cli", "train", sweep.run, "--pool", "local", "--dir", str(directory),
             "--evaluation.every", str(max(1, sweep.iterations // 4)), "--evaluation.tasks", "50"]  # fmt: skip
    if hasattr(config.load(sweep.run).outer, "horizon"):  # a schedule of the outer rate is that of a whole trial
        words += ["--outer.horizon", str(sweep.iterations)]
    words += [word for key, value in keys.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    for part in (4, 2, 1):
        subprocess.run([*words, "--iterations", str(sweep.iterations // part)], check=True)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        curve = [line["curve"] for line in lines if line["kind"] == "validation"][-1]
        tune.report({"score": curve[sweep.measure][-1], "part": 4 // part})


def main() -> None:
    """Run it."""
    sweep = tyro.cli(Sweep, description=__doc__)
    if sweep.iterations < 4:
        sys.exit(f"iterations={sweep.iterations}: at least 4 wanted")
    home = storage.place(sweep.home)
    if isinstance(home, Path):  # trials have working directories of their own
        sweep = replace(sweep, home=str(home.resolve()))
    if Path(sweep.run).is_file():
        sweep = replace(sweep, run=str(Path(sweep.run).resolve()))
    scheduler = ASHAScheduler(time_attr="part", max_t=4, grace_period=1, reduction_factor=2)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, sweep=sweep), {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(metric="score", mode=sweep.mode, num_samples=sweep.trials, scheduler=scheduler),
    )
    best = tuner.fit().get_best_result()
    print(f"best {sweep.measure}: {best.metrics['score']:.4f}" if best.metrics else "no trial has finished")
    print(" ".join(f"--{key.replace('_', '-')} {value:.4g}" for key, value in (best.config or {}).items()))


if __name__ == "__main__":
    main()
