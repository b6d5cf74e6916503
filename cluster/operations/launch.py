"""A configuration and a directory become a run."""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.fleet.machine import environment, set_up_torch
from cluster.operations.existing_run import CONFIGURATION, Begun, beginning, begun, changed_code, run_of
from cluster.operations.trained import Trained, load
from cluster.record.lease import Lease
from cluster.record.storage import Place, make_folder, place, write_atomically
from cluster.results import monitor
from cluster.results.report import RESULTS
from cluster.setup import assemble, code, config, equal_budget, families, resolve
from cluster.setup.run import Run
from cluster.setup.tables import flat, to_table
from cluster.training.driver import Driver


def new_directory(label: str) -> Path:
    """runs/LABEL-DATE-TIME."""
    return Path("runs") / f"{label}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def launch(run: Run, directory: str | Path | Place = "", *, take_over: bool = False,
           allow_changed_code: bool = False) -> Trained:  # fmt: skip
    """Train a run from Python, in `directory` (or URL; default runs/TASK-DATE-TIME), or go on with it there; what it
    has learned.

    What the run is made of is recorded there as by the command line, by import path where there is one, so that
    `metafleet evaluate`, `compare`, `resume` and the others take the directory (with --trust). Of objects that no path
    names, such as a torch module, only their class is recorded: `load(directory, run)` opens such a run, and the same
    call of `launch` goes on with it. Further arguments, signals and errors: see `train` and `Driver.run`.
    """
    at = place(directory or new_directory(type(run.task).__name__.lower()))
    train(run, at, take_over=take_over, allow_changed_code=allow_changed_code)
    return load(at, run)


def train(run: Run, directory: Place, *, take_over: bool = False, allow_changed_code: bool = False) -> None:
    """Train `run` in `directory`, or go on with it there.

    `take_over`: from a driver that still seems alive. `allow_changed_code`: go on although what the run names outside
    of Metafleet is another source than when it began. The first SIGINT or SIGTERM stops it after a checkpoint
    (KeyboardInterrupt with the signal's number), the second ends the process.
    """
    monitor.plain_logging()
    make_folder(directory)
    received: list[int] = []
    try:
        with Lease(directory).held(take_over) as lease:
            earlier = begun(directory, run)
            if earlier and not allow_changed_code:
                _check_code(run, directory)
            run = prepared(run, directory, earlier)
            parts, params = assemble.recipe(run)
            # signals last: joining Ray sets handlers of its own
            with assemble.pool(run, parts) as pool, _signals(received):
                Driver(
                    parts, params, pool, directory, iterations=run.iterations, meta_batch=run.meta_batch,
                    shard=run.shard, policy=run.policy, checkpoint=run.checkpoint, evaluation=run.evaluation,
                    lease=lease, allow_mixed_fleet=run.allow_mixed_fleet, prometheus_port=run.prometheus_port,
                    interrupted=lambda: bool(received), hparams=flat(to_table(run)),
                    begin=None if earlier else beginning(run, params),
                ).run()  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*received) from None


def train_all(name: str, home: Place, *, seeds: int, keys: dict[str, Any]) -> list[Place]:
    """Train every run of a comparison in HOME/RUN (or HOME/RUN/seed-N), but those that have finished; their
    directories.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: at least 1 wanted")
    directories: list[Place] = []
    home = home.absolute() if isinstance(home, Path) else home  # run.toml names the run that another begins from
    variants, beginnings = equal_budget.comparison(name, keys), equal_budget.beginnings(name)
    for variant, run in variants.items():
        for seed in range(run.seed, run.seed + seeds):
            suffix = f"seed-{seed}" if seeds > 1 else ""
            begin = str(home / beginnings[variant] / suffix) if variant in beginnings else run.init_from
            run = replace(run, seed=seed, init_from=begin)
            directories.append(home / variant / suffix)
            if _finished(run, directories[-1]):
                monitor.log.info("%s has finished", directories[-1])
            else:
                train(run, directories[-1])
    return directories


def _finished(run: Run, directory: Place) -> bool:
    """Whether there are results of all its iterations. Raises ValueError where they are of another run."""
    if not (directory / RESULTS).exists():
        return False
    old = run_of(directory, like=run)
    resolve.resolved(run, old)
    return old.iterations == run.iterations


def prepared(run: Run, directory: Place, earlier: Begun | None) -> Run:
    """`run` with its data fetched and nothing left open, written to the directory.

    Raises ValueError where the directory holds another run.
    """
    set_up_torch(run.threads, "cpu")
    run, why = resolve.resolved(run, earlier.run if earlier else None)
    if earlier:
        _check_continues(run, earlier, directory)
        families.prepare(run.task)
    monitor.log.info("%s", why)
    if idle := resolve.idle_workers(run):
        monitor.log.warning("%s; a new run could have %s", *idle)
    notes = {"environment": environment(), "code": code.fingerprints(to_table(run))}
    write_atomically(directory / CONFIGURATION, config.to_toml(run, {k: v for k, v in notes.items() if v}).encode())
    return run


def _check_code(run: Run, directory: Place) -> None:
    """Raise ValueError where code that the run names is not what it was."""
    for name in changed_code(run, directory):
        raise ValueError(
            f"the source of {name} is not what it was when the run in {directory} began: --allow-changed-code goes on "
            "with it as it is now; use another directory for another run"
        )


def _check_continues(run: Run, earlier: Begun, directory: Place) -> None:
    """Raise ValueError where a run has gone further already; results of fewer iterations are removed."""
    iteration, best = earlier.state.iteration, earlier.state.best
    if run.iterations < iteration:
        raise ValueError(f"iterations={run.iterations}: {directory} is at iteration {iteration} already")
    if iteration < run.iterations:
        (directory / RESULTS).unlink(missing_ok=True)
    if best and run.evaluation != earlier.run.evaluation:
        monitor.log.warning(
            "evaluation has changed: the best θ so far, of iteration %d, was chosen as before", best["iteration"]
        )
    horizon = getattr(run.outer, "horizon", 0)
    if getattr(run.outer, "schedule", "constant") != "constant" and run.iterations > horizon:
        final = getattr(run.outer, "final_lr", 0.0)
        monitor.log.warning(
            "the outer rate's schedule ended at iteration %d, as fixed when the run began; from there on it is %g",
            horizon,
            final,
        )


@contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are put into the list; a second one ends the process at once."""

    def note(number: int, _: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        monitor.log.warning("stopping after a checkpoint; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in that one only
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
