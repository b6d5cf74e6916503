"""A run directory that is there: its configuration, its θ, its journal."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cluster.fleet.machine import set_up_torch
from cluster.operations.replay import replay as replayed
from cluster.operations.replay import steps
from cluster.record.checkpoint import Checkpoints, State
from cluster.record.storage import Place, make_folder, place, read, write_atomically
from cluster.setup import assemble, code, config, families, teachers
from cluster.setup.run import Run
from cluster.setup.tables import Table, to_table
from cluster.training.identity import digest
from learners.base import Meta, Params

log = logging.getLogger("metafleet")

CONFIGURATION = "run.toml"


def configuration(directory: Place) -> Place:
    """The resolved configuration of an existing run."""
    path = directory / CONFIGURATION
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no {CONFIGURATION}: not a run directory, or one that a Driver of one's own made"
        )
    return path


@dataclass(frozen=True)
class Begun:
    """A run that has a checkpoint: as it was resolved when it began, and where it stands."""

    run: Run
    state: State


def begun(directory: Place, like: Run) -> Begun | None:
    """What a directory holds; None where nothing has begun. What `like` names or holds itself is trusted.

    Raises ValueError for a run of Driver's own.
    """
    state = Checkpoints(directory / "checkpoints").newest()
    if state is None:
        return None
    if not (directory / CONFIGURATION).exists():
        raise ValueError(
            f"{directory} holds a run that a Driver of one's own made: another directory is wanted for this one"
        )
    return Begun(run_of(directory, like=like), state)


def run_of(directory: Place, *, trust: bool = False, like: Run | None = None, overrides: dict[str, str] | None = None,
           changes: Table | None = None) -> Run:  # fmt: skip
    """The run of a directory, with other choices and keys where they are given.

    Code that it names and that is not ours is imported where `trust` says so, or `like`, a run that its user has named
    or made, names it too; else PermissionError.
    """
    path = configuration(directory)
    if not trust:
        known = set(code.foreign(to_table(like)).values()) if like else set()
        code.check_trusted(config.read(str(path)), directory, known)
    run = config.load(str(path), overrides, changes, like)
    if like is None:  # whoever has one looks for himself
        for name in changed_code(run, directory):
            log.warning("%s: the source of %s has changed since this run began", directory, name)
    return run


def changed_code(run: Run, directory: Place) -> list[str]:
    """Import paths in `run` whose source is not what it was when the run in the directory began."""
    return code.changed(config.note(directory / CONFIGURATION, "code"), code.fingerprints(to_table(run)))


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
    meta = _found(place(run.init_from), run.evaluation.checkpoint)
    wrong = [k for k, v in params.items() if k not in meta.params or meta.params[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"init_from={run.init_from}: its model has no parameter {wrong[0]} of shape {tuple(params[wrong[0]].shape)}"
        )
    return meta


def _found(at: Place, checkpoint: str) -> Meta:
    """θ of a run directory; or of a file, one of `metafleet export` or anyone's state dict."""
    if at.suffix in (".safetensors", ".pt", ".pth"):
        return Meta(teachers.tensors(read(at), at), {})
    return chosen(at, checkpoint).used


def replay(directory: Place, *, trust: bool = False) -> str:
    """Re-create a run step by step from its journal; a sentence on how it ended. RuntimeError where the bits differ."""
    from rich.progress import track

    run = run_of(directory, trust=trust)
    families.prepare(run.task)
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
    state = chosen(directory, checkpoint)
    path = directory / CONFIGURATION
    text = path.read_text() if path.exists() else ""
    tensors = state.used.params | state.used.slots
    write_tensors(out, tensors, {"metafleet": text, "iteration": str(state.iteration)})
    return list(tensors)


def write_tensors(out: Place, tensors: Params, notes: dict[str, str]) -> None:
    """Write tensors as safetensors, with notes as metadata."""
    from safetensors.torch import save

    make_folder(out.parent)
    write_atomically(out, save({k: v.detach().contiguous() for k, v in tensors.items()}, notes))
