"""The commands about runs: train, resume, evaluate, compare, export, status, replay."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.live import Live

from cluster.commands.console import console, parsed

if TYPE_CHECKING:
    from cluster.record.storage import Place


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training command, beside the keys of the run."""

    dir: str = ""
    """Run directory; an existing one of the same run is resumed. Default: runs/RUN-DATE-TIME."""
    seeds: int = 1
    """Train this many seeds, from `seed` on, each in its own directory DIR/seed-N."""
    take_over: bool = False
    """Take the directory over from a driver that still seems alive."""


@dataclass(frozen=True)
class ResumeOptions:
    """Options of a resumed run."""

    take_over: bool = False
    """Take the directory over from a driver that still seems alive."""


def train(words: list[str]) -> None:
    """Meta-train RUN, a preset's name (`metafleet list`) or a TOML file."""
    from cluster.commands import flags
    from cluster.operations import launch
    from cluster.record import storage

    name, options, run = flags.configured("train", words, TrainOptions, train.__doc__ or "")
    label = re.sub(r"\W+", "-", Path(name).stem)
    directory = storage.place(options.dir or launch.new_directory(label))
    if options.seeds < 1:
        raise ValueError(f"seeds={options.seeds}: at least 1 wanted")
    for seed in range(run.seed, run.seed + options.seeds):
        home = directory / f"seed-{seed}" if options.seeds > 1 else directory
        launch.train(dataclasses.replace(run, seed=seed), home, take_over=options.take_over)
    if options.seeds > 1:
        seeds = [str(directory / f"seed-{s}") for s in range(run.seed, run.seed + options.seeds)]
        compare([*seeds, "--out", str(_beside(directory))])


def resume(words: list[str]) -> None:
    """Go on with the run in DIR from its last good checkpoint. Keys that the numbers do not depend on may change."""
    from cluster.commands import flags
    from cluster.operations import existing_run, launch
    from cluster.record import storage

    directory, rest = flags.leading(words)
    path = existing_run.configuration(storage.place(directory)) if directory else None
    _, options, run = flags.configured(
        "resume", [str(path), *rest] if path else rest, ResumeOptions, resume.__doc__ or "", shown="DIR"
    )
    launch.train(run, storage.place(directory), take_over=options.take_over)


@dataclass(frozen=True)
class Evaluate:
    """Adapt the θ of a run to held-out tasks and print mean ± 95 % CI after each inner step."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    tasks: int = 0
    """Held-out tasks; 0: as the run does."""
    steps: int | None = None
    """Inner steps; default: as the run does."""
    split: Literal["train", "validation", "test"] = "test"
    """Which tasks."""
    checkpoint: str = "newest"
    """newest, best (on validation), or the iteration of one that is kept."""
    norms: tuple[Literal["transductive", "support_plus_one", "support_statistics", "frozen"], ...] = ()
    """Normalisation modes to report; empty: as the run does."""
    pool: str = ""
    """local or ray; empty: as the run did."""
    workers: int = 0
    """Ray actors; 0: as the run did."""
    device: str = ""
    """cpu or cuda; empty: as the run did."""
    inner_lr: float | None = None
    """Rate of the inner loop, a later one (`learner.later_lr`) in proportion; default: the run's."""
    eps: float | None = None
    """Attack support and query within this ball (pixels: [0, 1]); default: as the run does; 0: do not."""
    json: str = ""
    """Write the numbers to this file, or URL."""


def evaluate(words: list[str]) -> None:
    """Adaptation curves of a run on held-out tasks."""
    from cluster.operations import existing_run
    from cluster.record.storage import place, write_atomically

    o = parsed("evaluate", Evaluate, words)
    run, results = existing_run.evaluate(place(o.dir), tasks=o.tasks, steps=o.steps, split=o.split,
    checkpoint=o.checkpoint, norms=o.norms,
                                   pool=o.pool, workers=o.workers, device=o.device, inner_lr=o.inner_lr,
                                   eps=o.eps)  # fmt: skip
    curves, matrix = results.curves, results.matrix
    console.print(
        curves.table(
            f"{o.dir}: {curves.tasks} {o.split} tasks, mean ± 95 % CI ({o.checkpoint} checkpoint, seed {run.seed})"
        )
    )
    for table in matrix.tables() if matrix else ():
        console.print(table)
    if o.json:
        content = curves.as_dict() | ({"robustness": matrix.as_dict()} if matrix else {})
        write_atomically(place(o.json), json.dumps(content, indent=1).encode())


def _beside(home: Place) -> Path:
    """Where the picture of several runs goes: among them, or here where they are in an object store."""
    return home / "comparison.png" if isinstance(home, Path) else Path("comparison.png")


@dataclass(frozen=True)
class Compare:
    """Table and plot of several runs; runs that differ in their seed only are averaged."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories; or one comparison (a preset or TOML file), whose runs are trained first, at equal budget."""
    out: str = ""
    """Where the plot goes, and beside it the table as text. Default: comparison.png, in DIR for a comparison."""
    dir: str = ""
    """Of a comparison: where its runs go; those that are there already are not trained again. Default:
    runs/RUN-DATE-TIME."""
    seeds: int | None = None
    """Of a comparison: seeds per run. Default: 1."""
    pool: Literal["ray", "local"] | None = None
    """Of a comparison: where tasks run. Default: as it says."""
    workers: int | None = None
    """Of a comparison: Ray actors. Default: as it says."""


def compare(words: list[str]) -> None:
    """Table and plot of several runs."""
    from cluster.operations import comparison, launch
    from cluster.record import storage
    from cluster.setup import config

    o = parsed("compare", Compare, words)
    if not o.runs:
        raise ValueError("metafleet compare wants run directories, or one comparison")
    directories, out = [storage.place(d) for d in o.runs], storage.place(o.out or "comparison.png")
    if not isinstance(out, Path):
        raise ValueError(f"out={o.out}: a file on this machine wanted")
    if len(o.runs) == 1 and (o.runs[0] in config.presets() or not directories[0].is_dir()):
        home = storage.place(o.dir or launch.new_directory(directories[0].stem))
        keys = {k: v for k, v in (("pool", o.pool), ("workers", o.workers)) if v is not None}
        directories = launch.train_all(o.runs[0], home, seeds=1 if o.seeds is None else o.seeds, keys=keys)
        out = out if o.out else _beside(home)
    else:
        for key in ("dir", "seeds", "pool", "workers"):
            if value := getattr(o, key):
                raise ValueError(
                    f"{key}={value}: of a comparison that is to be trained; these are runs that have finished"
                )
    groups = comparison.grouped(directories)
    tables = comparison.tables(groups)
    for table in tables:
        console.print(table)
    comparison.plot(groups, out)
    comparison.write(tables, out.with_suffix(".txt"))
    console.print(f"plot: {out}, table: {out.with_suffix('.txt')}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Export:
    """Write the θ of a run as safetensors, for use with plain torch (learners/README.md shows how)."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    out: Annotated[str, tyro.conf.Positional]
    """File to write, or its URL."""
    checkpoint: str = "newest"
    """newest, best (on validation), or the iteration of one that is kept."""


def export(words: list[str]) -> None:
    """θ as safetensors."""
    from cluster.operations import existing_run
    from cluster.record import storage

    o = parsed("export", Export, words)
    names = existing_run.export(storage.place(o.dir), storage.place(o.out), o.checkpoint)
    console.print(
        f"{o.out}: {len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})", highlight=False
    )


@dataclass(frozen=True)
class Status:
    """What the run in DIR is doing, or how it ended."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    follow: bool = False
    """Show it anew every two seconds, until the run ends or Ctrl-C."""


def status(words: list[str]) -> None:
    """What a run is doing."""
    from cluster.operations import existing_run
    from cluster.record import storage

    o = parsed("status", Status, words)
    directory = storage.place(o.dir)
    if not o.follow:
        console.print(existing_run.status(directory))
        return
    with Live(existing_run.status(directory), console=console, auto_refresh=False) as live:
        while existing_run.is_running(directory):
            time.sleep(2.0)
            live.update(existing_run.status(directory), refresh=True)


@dataclass(frozen=True)
class Replay:
    """Re-create the run in DIR from its journal, in this process: every step must end in the recorded bits."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""


def replay(words: list[str]) -> None:
    """A run again, from its journal."""
    from cluster.operations import existing_run
    from cluster.record import storage

    o = parsed("replay", Replay, words)
    console.print(existing_run.replay(storage.place(o.dir)), highlight=False, soft_wrap=True)
