"""The commands about runs: train, resume, compare, status, replay."""

from __future__ import annotations

import dataclasses
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
class Continuing:
    """Options of whatever goes on with a run that is there."""

    take_over: bool = False
    """Take the directory over from a driver that still seems alive."""
    allow_changed_code: bool = False
    """Go on with code of one's own that is not what it was when the run began."""


@dataclass(frozen=True)
class TrainOptions(Continuing):
    """Options of a training command, beside the keys of the run."""

    dir: str = ""
    """Run directory; an existing one of the same run is resumed. Default: runs/RUN-DATE-TIME."""
    seeds: int = 1
    """Train this many seeds, from `seed` on, each in its own directory DIR/seed-N."""


@dataclass(frozen=True)
class ResumeOptions(Continuing):
    """Options of a resumed run."""

    trust: bool = False
    """Import code that the directory names and that is not Metafleet's."""


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
        launch.train(
            dataclasses.replace(run, seed=seed), home, take_over=options.take_over,
            allow_changed_code=options.allow_changed_code,
        )  # fmt: skip
    if options.seeds > 1:
        seeds = [str(directory / f"seed-{s}") for s in range(run.seed, run.seed + options.seeds)]
        compare([*seeds, "--out", str(_beside(directory))])


def resume(words: list[str]) -> None:
    """Go on with the run in DIR from its last good checkpoint. Keys that the numbers do not depend on may change."""
    from cluster.commands import flags
    from cluster.operations import launch
    from cluster.record import storage

    name, options, run = flags.configured(
        "resume", words, ResumeOptions, resume.__doc__ or "", shown="DIR", load=flags.of_directory(words)
    )
    launch.train(run, storage.place(name), take_over=options.take_over, allow_changed_code=options.allow_changed_code)


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
    trust: bool = False
    """Import code that the directories name and that is not Metafleet's."""


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
    trained = len(o.runs) == 1 and (o.runs[0] in config.presets() or not directories[0].is_dir())
    if trained:
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
    groups = comparison.grouped(directories, trust=o.trust or trained)
    tables = comparison.tables(groups)
    for table in tables:
        console.print(table)
    comparison.plot(groups, out)
    comparison.write(tables, out.with_suffix(".txt"))
    console.print(f"plot: {out}, table: {out.with_suffix('.txt')}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Status:
    """What the run in DIR is doing, or how it ended."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    follow: bool = False
    """Show it anew every two seconds, until the run ends or Ctrl-C."""


def status(words: list[str]) -> None:
    """What a run is doing."""
    from cluster.operations import status as said
    from cluster.record import storage

    o = parsed("status", Status, words)
    directory = storage.place(o.dir)
    if not o.follow:
        console.print(said.status(directory))
        return
    with Live(said.status(directory), console=console, auto_refresh=False) as live:
        while said.is_running(directory):
            time.sleep(2.0)
            live.update(said.status(directory), refresh=True)


@dataclass(frozen=True)
class Replay:
    """Re-create the run in DIR from its journal, in this process: every step must end in the recorded bits."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    trust: bool = False
    """Import code that the directory names and that is not Metafleet's."""


def replay(words: list[str]) -> None:
    """A run again, from its journal."""
    from cluster.operations import existing_run
    from cluster.record import storage

    o = parsed("replay", Replay, words)
    console.print(existing_run.replay(storage.place(o.dir), trust=o.trust), highlight=False, soft_wrap=True)
