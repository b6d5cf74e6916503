"""What the commands do: a configuration and a directory become a run, a table, a file."""

from __future__ import annotations

import datetime
import json
import os
import signal
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from rich.table import Table

from cluster import assemble, catalog, config, monitor
from cluster.checkpoint import Checkpoints, State
from cluster.config import Run
from cluster.dispatch import Dispatcher
from cluster.driver import Driver, digest
from cluster.journal import Unwritten
from cluster.lease import Lease
from cluster.ledger import Ledger
from cluster.replay import replay as replayed
from cluster.replay import steps
from cluster.report import Results, judge
from cluster.storage import Place, make_folder, place, write_atomically
from cluster.tables import flat, to_table
from cluster.worker import environment, set_up_torch
from envs.data_free import DataFree
from learners.base import HasRates, Learner, Meta, Params
from learners.objectives import NormMode
from learners.purer.outer import Purer

CONFIGURATION = "run.toml"
RESULTS = "evaluation.json"


def new_directory(label: str) -> Path:
    """runs/LABEL-DATE-TIME."""
    return Path("runs") / f"{label}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def configuration(directory: Place) -> Place:
    """The resolved configuration of an existing run."""
    path = directory / CONFIGURATION
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no {CONFIGURATION}: not a run directory, or one of a run made in Python")
    return path


def train(run: Run, directory: Place, *, take_over: bool = False) -> None:
    """Train `run` in `directory`, or go on with it there.

    The first SIGINT or SIGTERM stops it after a checkpoint (KeyboardInterrupt with the signal's number), the second
    ends the process.
    """
    monitor.plain_logging()
    make_folder(directory)
    received: list[int] = []
    try:
        with Lease(directory).held(take_over) as lease:
            run, begun = prepared(run, directory)
            parts, params = assemble.recipe(run)
            with assemble.pool(run, parts) as pool, _signals(received):  # signals last: joining Ray sets handlers of its own
                Driver(
                    parts, params, pool, directory, iterations=run.iterations, meta_batch=run.meta_batch, shard=run.shard,
                    policy=run.policy, checkpoint=run.checkpoint, evaluation=run.evaluation, lease=lease,
                    allow_mixed_fleet=run.allow_mixed_fleet, prometheus_port=run.prometheus_port, interrupted=lambda: bool(received),
                    hparams=flat(to_table(run)), begin=None if begun else _beginning(run, params),
                ).run()  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*received) from None


def train_all(name: str, home: Place, *, seeds: int, keys: dict[str, Any]) -> list[Place]:
    """Train every run of a comparison in HOME/RUN (or HOME/RUN/seed-N), but those that have finished; their directories."""
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: at least 1 wanted")
    directories: list[Place] = []
    home = home.absolute() if isinstance(home, Path) else home  # run.toml names the run that another begins from
    variants, beginnings = config.comparison(name, keys), config.beginnings(name)
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
    old = config.load(str(configuration(directory)))
    config.check_resumable(old, _as_before(run, old))
    return old.iterations == run.iterations


def prepared(run: Run, directory: Place) -> tuple[Run, bool]:
    """`run` with its data fetched and everything resolved, written to the directory, or as it was resolved there; whether it had begun.

    Results of fewer iterations are removed. Raises ValueError where the directory holds another run.
    """
    path = directory / CONFIGURATION
    begun = Checkpoints(directory / "checkpoints").newest()
    if begun:
        if not path.exists():
            raise ValueError(f"{directory} holds a run that was made in Python: another directory is wanted for this one")
        old = config.load(str(path))
        run = _as_before(run, old)
        config.check_resumable(old, run)
        if run.iterations < begun.iteration:
            raise ValueError(f"iterations={run.iterations}: {directory} is at iteration {begun.iteration} already")
        if begun.iteration < run.iterations:
            (directory / RESULTS).unlink(missing_ok=True)
        if begun.best and run.evaluation != old.evaluation:
            monitor.log.warning("evaluation has changed: the best θ so far, of iteration %d, was chosen as before", begun.best["iteration"])
        _warn_of_schedule(run)
        why = f"execution = {run.execution}, as when the run began"
    run.task.prepare()
    if not begun:
        set_up_torch(run.threads, "cpu")
        run, why = assemble.resolved(run)
    monitor.log.info("%s", why)
    if idle := assemble.idle_workers(run):
        monitor.log.warning("%s; a new run could have %s", *idle)
    write_atomically(path, config.to_toml(run, {"environment": environment()}).encode())
    return run, begun is not None


def evaluate(directory: Place, *, tasks: int = 0, steps: int | None = None, split: str = "test", checkpoint: str = "newest",
             norms: tuple[NormMode, ...] = (), pool: str = "", workers: int = 0, device: str = "", inner_lr: float | None = None,
             eps: float | None = None) -> tuple[Run, Results]:  # fmt: skip
    """Adaptation curves of a run's θ, and its accuracy under attacks of `eps`; what is not said is as in the run."""
    run = config.load(str(configuration(directory)))
    tasks, steps = tasks or run.evaluation.tasks, run.evaluation.steps if steps is None else steps
    if pool not in ("", "local", "ray"):
        raise ValueError(f"pool={pool!r} is not one of local, ray")
    how = run.evaluation.robustness if eps is None else replace(run.evaluation.robustness, eps=eps)
    evaluation = replace(run.evaluation, tasks=tasks, steps=steps, norms=norms or run.evaluation.norms, robustness=how)
    workers = workers or run.workers
    run = replace(run, workers=workers, min_workers=min(workers, run.min_workers), evaluation=evaluation, device=device or run.device)
    run = run if inner_lr is None else replace(run, learner=_at_rate(run.learner, inner_lr))
    run = replace(run, pool=cast(Literal["ray", "local"], pool)) if pool else run
    if split == "train" and isinstance(run.task, DataFree):
        raise ValueError("split='train': the training episodes of a data-free run are cut from invented images; validation or test wanted")
    state = chosen(directory, checkpoint)
    run.task.prepare()
    parts, _ = assemble.recipe(run)
    with assemble.pool(run, parts) as fleet:
        dispatcher = Dispatcher(fleet, Ledger(Unwritten()), max_attempts=run.policy.max_attempts)
        return run, judge(parts, dispatcher, state, split, tasks, run.shard)


def _at_rate(learner: Learner, inner_lr: float) -> Learner:
    """The learner with another inner rate, and a later one in proportion."""
    if not hasattr(learner, "inner_lr") or isinstance(learner, HasRates):
        raise ValueError(f"inner_lr={inner_lr}: {type(learner).__name__} has no such rate to set")
    if getattr(learner, "later_lr", 0.0):
        learner = replace(learner, later_lr=learner.later_lr * inner_lr / learner.inner_lr)  # type: ignore[type-var, attr-defined]
    found: Learner = replace(learner, inner_lr=inner_lr)  # type: ignore[type-var]
    return found


def chosen(directory: Place, checkpoint: str) -> State:
    """The newest or the best checkpoint of a run directory, or that of an iteration."""
    checkpoints = Checkpoints(directory / "checkpoints")
    if checkpoint == "newest":
        state = checkpoints.newest()
        if state is None:
            raise FileNotFoundError(f"{directory} has no checkpoint yet")
        return state
    if checkpoint == "best":
        return checkpoints.best()
    if checkpoint.isdigit():
        return checkpoints.at(int(checkpoint))
    raise ValueError(f"checkpoint={checkpoint!r} is neither newest, best nor the iteration of one that is kept")


def replay(directory: Place) -> str:
    """Re-create a run step by step from its journal; a sentence on how it ended. RuntimeError where the bits differ."""
    from rich.progress import track

    run = config.load(str(configuration(directory)))
    run.task.prepare()
    parts, params = assemble.recipe(run)
    set_up_torch(run.threads, run.device)
    applied = steps(directory / "journal")
    if not applied:
        raise ValueError(f"{directory} has a journal without a single step")
    for _, meta in track(replayed(parts, params, run.policy, applied, _beginning(run, params)), "replay", len(applied), transient=True):
        theta = digest(meta)
    checkpoint = chosen(directory, "newest")
    same = checkpoint.iteration != len(applied) or digest(checkpoint.meta) == theta
    if not same:
        raise RuntimeError(f"the journal ends at θ {theta}, the newest checkpoint holds {digest(checkpoint.meta)}")
    late = sum(bool(s) for step in applied for s in step.staleness)
    whole = sum(len(step.shards) for step in applied)
    return f"OK: {len(applied)} steps of {whole} contributions ({late} of them stale) end in the recorded bits, θ {theta}"


def export(directory: Place, out: Place, checkpoint: str) -> list[str]:
    """Write θ (and carried statistics) as safetensors, with the configuration as metadata; returns the names."""
    from safetensors.torch import save

    state = chosen(directory, checkpoint)
    path = directory / CONFIGURATION
    text = path.read_text() if path.exists() else ""
    tensors = {k: v.contiguous() for k, v in (state.meta.params | state.meta.slots).items()}
    make_folder(out.parent)
    write_atomically(out, save(tensors, {"metafleet": text, "iteration": str(state.iteration)}))
    return list(tensors)


def status(directory: Place) -> Table:
    """status.json as a table; says where a run that claims to be running has fallen silent."""
    path = directory / "status.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no status.json: not a run directory, or one that has not begun")
    content: dict[str, Any] = json.loads(path.read_text())
    age = time.time() - content["updated"]
    state = content["state"] + (f" (but silent for {age:.0f} s)" if content["state"] == "running" and age > 60 else "")
    table = Table(title=str(directory), show_header=False)
    rows: dict[str, object] = {
        "state": state,
        "iteration": f"{content['iteration']} of {content['iterations']}",
        "time left": f"{content['eta_s']:.0f} s" if content["state"] == "running" else "",
        "driver": f"process {content['pid']} on {content['host']}, attempt {content['attempt']}",
        "updated": f"{age:.0f} s ago",
        "workers": ", ".join(f"{name} ({where})" for name, where in content["workers"].items()),
        "nodes": ", ".join(content["nodes"].values()),
        "tickets": ", ".join(f"{v} {k}" for k, v in content["counts"].items() if v),
        "best on validation": ", ".join(f"{k} {v:g}" for k, v in content["best"].items()),
    }
    metrics = {k: f"{v:.5g}" for k, v in content["metrics"].items()}
    for key, value in (rows | metrics).items():
        if value != "":
            table.add_row(key, str(value))
    return table


def is_running(directory: Place) -> bool:
    """Whether a run says that it goes on."""
    return bool(json.loads((directory / "status.json").read_text())["state"] == "running")


def listing() -> list[Table]:
    """What there is to choose from."""
    runs = Table(title="presets (metafleet train NAME)", title_justify="left")
    runs.add_column("name", no_wrap=True)
    runs.add_column("what it is")
    for name in config.presets():
        table = tomllib.loads(config.find(name).read_text())
        runs.add_row(name, str(table.get("description", "")))
    parts = Table(title="to choose by --task.name, --learner.name, …", title_justify="left")
    parts.add_column("key", no_wrap=True)
    parts.add_column("name", no_wrap=True)
    parts.add_column("what it is")
    keys = {"task": catalog.TASKS, "task.source": catalog.SOURCES, "model": catalog.MODELS, "learner": catalog.LEARNERS,
            "outer": catalog.OUTERS, "policy": catalog.POLICIES}  # fmt: skip
    for key, choices in keys.items():
        for name, cls in choices.items():
            parts.add_row(key, name, (cls.__doc__ or "").strip().splitlines()[0])
    return [runs, parts]


@contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are put into the list; a second one ends the process at once."""

    def note(number: int, _: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        monitor.log.warning("stopping after a checkpoint; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_before(run: Run, old: Run) -> Run:
    """What "auto" and 0 were resolved to when the run began, and what its teachers said of themselves."""
    if run.execution == "auto":
        run = replace(run, execution=old.execution, chunk=run.chunk or old.chunk)
    if getattr(run.outer, "horizon", None) == 0:
        run = replace(run, outer=replace(run.outer, horizon=getattr(old.outer, "horizon", 0)))  # type: ignore[type-var]
    if isinstance(run.task, DataFree) and isinstance(old.task, DataFree) and not run.task.teachers:
        taught = {k: getattr(old.task, k) for k in ("teachers", "teacher_ways", "kinds", "mean", "std")}
        run = replace(run, task=replace(run.task, **taught))
        if isinstance(run.outer, Purer) and isinstance(old.outer, Purer):
            run = replace(run, outer=replace(run.outer, teachers=old.outer.teachers))
    return run


def _warn_of_schedule(run: Run) -> None:
    horizon = getattr(run.outer, "horizon", 0)
    if getattr(run.outer, "schedule", "constant") != "constant" and run.iterations > horizon:
        final = getattr(run.outer, "final_lr", 0.0)
        monitor.log.warning(
            "the outer rate's schedule ended at iteration %d, as fixed when the run began; from there on it is %g", horizon, final
        )


def _beginning(run: Run, params: Params) -> Meta | None:
    """What the run learned that this one begins from, if it has the names and shapes of `params`; None where it begins anew."""
    if not run.init_from:
        return None
    meta = chosen(place(run.init_from), run.evaluation.checkpoint).meta
    wrong = [k for k, v in params.items() if k not in meta.params or meta.params[k].shape != v.shape]
    if wrong:
        raise ValueError(f"init_from={run.init_from}: its model has no parameter {wrong[0]} of shape {tuple(params[wrong[0]].shape)}")
    return meta
