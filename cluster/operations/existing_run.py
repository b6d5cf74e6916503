"""A run directory that is there: its θ evaluated, replayed, exported, looked at."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from rich.table import Table

from cluster.fleet.machine import set_up_torch
from cluster.operations.replay import replay as replayed
from cluster.operations.replay import steps
from cluster.record.checkpoint import Checkpoints, State
from cluster.record.journal import Unwritten
from cluster.record.storage import Place, make_folder, place, write_atomically
from cluster.results.report import Results
from cluster.setup import assemble, config
from cluster.setup.run import Run
from cluster.training.dispatch import Dispatcher
from cluster.training.evaluation import judge
from cluster.training.identity import digest
from cluster.training.ledger import Ledger
from envs.images.data_free import DataFree
from learners.base import HasRates, Learner, Meta, Params
from learners.objectives.supervised import NormMode

CONFIGURATION = "run.toml"


def configuration(directory: Place) -> Place:
    """The resolved configuration of an existing run."""
    path = directory / CONFIGURATION
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no {CONFIGURATION}: not a run directory, or one of a run made in Python"
        )
    return path


@dataclass(frozen=True)
class Begun:
    """A run that has a checkpoint: as it was resolved when it began, and where it stands."""

    run: Run
    state: State


def begun(directory: Place) -> Begun | None:
    """What a directory holds; None where nothing has begun. Raises ValueError for a run that was made in Python."""
    state = Checkpoints(directory / "checkpoints").newest()
    if state is None:
        return None
    if not (directory / CONFIGURATION).exists():
        raise ValueError(f"{directory} holds a run that was made in Python: another directory is wanted for this one")
    return Begun(config.load(str(directory / CONFIGURATION)), state)


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


def beginning(run: Run, params: Params) -> Meta | None:
    """What the run learned that this one begins from, if it has the names and shapes of `params`; None where it begins
    anew.
    """
    if not run.init_from:
        return None
    meta = chosen(place(run.init_from), run.evaluation.checkpoint).used
    wrong = [k for k, v in params.items() if k not in meta.params or meta.params[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"init_from={run.init_from}: its model has no parameter {wrong[0]} of shape {tuple(params[wrong[0]].shape)}"
        )
    return meta


def evaluate(directory: Place, *, tasks: int = 0, steps: int | None = None, split: str = "test",
             checkpoint: str = "newest", norms: tuple[NormMode, ...] = (), pool: str = "", workers: int = 0,
             device: str = "", inner_lr: float | None = None, eps: float | None = None) -> tuple[Run,
             Results]:  # fmt: skip
    """Adaptation curves of a run's θ, and its accuracy under attacks of `eps`; what is not said is as in the run."""
    run = config.load(str(configuration(directory)))
    tasks, steps = tasks or run.evaluation.tasks, run.evaluation.steps if steps is None else steps
    if pool not in ("", "local", "ray"):
        raise ValueError(f"pool={pool!r} is not one of local, ray")
    how = run.evaluation.robustness if eps is None else replace(run.evaluation.robustness, eps=eps)
    evaluation = replace(run.evaluation, tasks=tasks, steps=steps, norms=norms or run.evaluation.norms, robustness=how)
    workers = workers or run.workers
    run = replace(
        run,
        workers=workers,
        min_workers=min(workers, run.min_workers),
        evaluation=evaluation,
        device=device or run.device,
    )
    run = run if inner_lr is None else replace(run, learner=_at_rate(run.learner, inner_lr))
    run = replace(run, pool=cast(Literal["ray", "local"], pool)) if pool else run
    if split == "train" and isinstance(run.task, DataFree):
        raise ValueError(
            "split='train': the training episodes of a data-free run are cut from invented images; validation or test "
            "wanted"
        )
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
    if getattr(learner, "later_lr", 0.0) and learner.inner_lr:
        later = learner.later_lr * inner_lr / learner.inner_lr  # type: ignore[attr-defined]
        learner = replace(learner, later_lr=later)  # type: ignore[type-var]
    found: Learner = replace(learner, inner_lr=inner_lr)  # type: ignore[type-var]
    return found


def replay(directory: Place) -> str:
    """Re-create a run step by step from its journal; a sentence on how it ended. RuntimeError where the bits differ."""
    from rich.progress import track

    run = config.load(str(configuration(directory)))
    run.task.prepare()
    parts, params = assemble.recipe(run)
    set_up_torch(run.threads, run.device, run.deterministic)
    applied = steps(directory / "journal")
    if not applied:
        raise ValueError(f"{directory} has a journal without a single step")
    for _, meta in track(
        replayed(parts, params, run.policy, applied, beginning(run, params)), "replay", len(applied), transient=True
    ):
        theta = digest(meta)
    checkpoint = chosen(directory, "newest")
    same = checkpoint.iteration != len(applied) or digest(checkpoint.meta) == theta
    if not same:
        raise RuntimeError(f"the journal ends at θ {theta}, the newest checkpoint holds {digest(checkpoint.meta)}")
    late = sum(bool(s) for step in applied for s in step.staleness)
    whole = sum(shard is not None for step in applied for shard in step.shards)
    return (
        f"OK: {len(applied)} steps of {whole} contributions ({late} of them stale) end in the recorded bits, θ {theta}"
    )


def export(directory: Place, out: Place, checkpoint: str) -> list[str]:
    """Write θ (and carried statistics) as safetensors, with the configuration as metadata; returns the names."""
    from safetensors.torch import save

    state = chosen(directory, checkpoint)
    path = directory / CONFIGURATION
    text = path.read_text() if path.exists() else ""
    tensors = {k: v.contiguous() for k, v in (state.used.params | state.used.slots).items()}
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
