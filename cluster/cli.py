"""The `metafleet` command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from cluster.storage import Place

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)

USAGE = """metafleet — distributed meta-training on Ray

  metafleet train RUN [--dir DIR] [--seeds N] [--key value ...]   meta-train; RUN is a preset or a TOML file
  metafleet resume DIR [--key value ...]                          go on from the last good checkpoint
  metafleet evaluate DIR [--tasks 600] [--steps 10]               adaptation curve on held-out tasks
  metafleet compare DIR [DIR ...] | RUN                           table and plot across runs; RUN: train its runs first
  metafleet export DIR OUT.safetensors                            θ for use with plain torch
  metafleet teachers RUN [--dir DIR] [--count 8]                  train (or import) a pool of classifiers for data-free runs
  metafleet list                                                  presets, tasks, models, learners
  metafleet show RUN [--key value ...]                            the resolved configuration as TOML
  metafleet check RUN [--key value ...]                           is the meta-gradient what it claims to be?
  metafleet scale RUN --workers 1,2,4 [--policy sync,async]       throughput, efficiency, time-to-loss over fleet sizes
  metafleet doctor [RUN] [--key value ...]                        is this machine or cluster fit for it?
  metafleet status DIR [--follow]                                 what a run is doing
  metafleet replay DIR                                            a run again from its journal, to the same bits

`metafleet COMMAND --help` explains a command and lists every key; `--debug` shows tracebacks.
Try: metafleet train sinusoid"""


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training command, beside the keys of the run."""

    dir: str = ""
    """Run directory; an existing one of the same run is resumed. Default: runs/RUN-DATE-TIME."""
    seeds: int = 1
    """Train this many seeds, from `seed` on, each in its own directory DIR/seed-N."""
    take_over: bool = False
    """Take the directory over from a driver that still seems alive."""
    init_from: str = ""
    """Start from the θ of this finished or interrupted run."""


@dataclass(frozen=True)
class ResumeOptions:
    """Options of a resumed run."""

    take_over: bool = False
    """Take the directory over from a driver that still seems alive."""


@dataclass(frozen=True)
class NoOptions:
    """Nothing beside the keys of the run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of the user become one sentence, and exit code 1 (2 for wrong usage)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    if not words or words[0] in ("-h", "--help", "help") or words[0] not in COMMANDS:
        unknown = bool(words) and not words[0].endswith(("-h", "help"))
        (errors if unknown else console).print(f"no command {words[0]!r}\n\n{USAGE}" if unknown else USAGE, highlight=False, markup=False)
        sys.exit(2 if unknown else 0)
    try:
        _one_place()
        COMMANDS[words[0]](words[1:])
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except Exception as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/] {_sentence(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def train(words: list[str]) -> None:
    """Meta-train RUN, a preset's name (`metafleet list`) or a TOML file."""
    from cluster import flags, session, storage

    name, options, run = flags.configured("train", words, TrainOptions, train.__doc__ or "")
    label = re.sub(r"\W+", "-", Path(name).stem)
    directory = storage.place(options.dir or session.new_directory(label))
    if options.seeds < 1:
        raise ValueError(f"seeds={options.seeds}: at least 1 wanted")
    for seed in range(run.seed, run.seed + options.seeds):
        home = directory / f"seed-{seed}" if options.seeds > 1 else directory
        session.train(dataclasses.replace(run, seed=seed), home, init_from=options.init_from, take_over=options.take_over)
    if options.seeds > 1:
        seeds = [str(directory / f"seed-{s}") for s in range(run.seed, run.seed + options.seeds)]
        compare([*seeds, "--out", str(_beside(directory))])


def resume(words: list[str]) -> None:
    """Go on with the run in DIR from its last good checkpoint. Keys that the numbers do not depend on may change."""
    from cluster import flags, session, storage

    directory, rest = flags.leading(words)
    path = session.configuration(storage.place(directory)) if directory else None
    _, options, run = flags.configured("resume", [str(path), *rest] if path else rest, ResumeOptions, resume.__doc__ or "", shown="DIR")
    session.train(run, storage.place(directory), take_over=options.take_over)


@dataclass(frozen=True)
class Evaluate:
    """Adapt the θ of a run to held-out tasks and print mean ± 95 % CI after each inner step."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    tasks: int = 600
    """Held-out tasks."""
    steps: int = 10
    """Inner steps."""
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
    inner_lr: float | None = None
    """Rate of the inner loop; default: the run's."""
    eps: float | None = None
    """Attack support and query within this ball (pixels: [0, 1]); default: as the run does; 0: do not."""
    json: Path | None = None
    """Write the numbers to this file."""


def evaluate(words: list[str]) -> None:
    """Adaptation curves of a run on held-out tasks."""
    from cluster import session
    from cluster.storage import place, write_atomically

    o = _parsed("evaluate", Evaluate, words)
    run, results = session.evaluate(place(o.dir), tasks=o.tasks, steps=o.steps, split=o.split, checkpoint=o.checkpoint,
                                   norms=o.norms, pool=o.pool, workers=o.workers, inner_lr=o.inner_lr, eps=o.eps)  # fmt: skip
    curves, matrix = results.curves, results.matrix
    console.print(curves.table(f"{o.dir}: {curves.tasks} {o.split} tasks, mean ± 95 % CI ({o.checkpoint} checkpoint, seed {run.seed})"))
    for table in matrix.tables() if matrix else ():
        console.print(table)
    if o.json:
        content = curves.as_dict() | ({"robustness": matrix.as_dict()} if matrix else {})
        write_atomically(o.json, json.dumps(content, indent=1).encode())


def _beside(home: Place) -> Path:
    """Where the picture of several runs goes: among them, or here where they are in an object store."""
    return home / "comparison.png" if isinstance(home, Path) else Path("comparison.png")


@dataclass(frozen=True)
class Compare:
    """Table and plot of several runs; runs that differ in their seed only are averaged."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories; or one comparison (a preset or TOML file), whose runs are trained first, at equal budget."""
    out: Path | None = None
    """Where the plot goes, and beside it the table as text. Default: comparison.png, in DIR for a comparison."""
    dir: str = ""
    """Of a comparison: where its runs go; those that are there already are not trained again. Default: runs/RUN-DATE-TIME."""
    seeds: int = 1
    """Of a comparison: seeds per run."""
    pool: Literal["ray", "local"] = "ray"
    """Of a comparison: where tasks run."""
    workers: int = 2
    """Of a comparison: Ray actors."""


def compare(words: list[str]) -> None:
    """Table and plot of several runs."""
    from cluster import comparison, session, storage

    o = _parsed("compare", Compare, words)
    directories, out = [storage.place(d) for d in o.runs], o.out or Path("comparison.png")
    if len(o.runs) == 1 and not directories[0].is_dir():
        home = storage.place(o.dir or session.new_directory(directories[0].stem))
        directories = session.train_all(o.runs[0], home, seeds=o.seeds, keys={"pool": o.pool, "workers": o.workers})
        out = o.out or _beside(home)
    groups = comparison.grouped(directories)
    tables = comparison.tables(groups)
    for table in tables:
        console.print(table)
    comparison.plot(groups, out)
    comparison.write(tables, out.with_suffix(".txt"))
    console.print(f"plot: {out}, table: {out.with_suffix('.txt')}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Export:
    """Write the θ of a run as safetensors, for use with plain torch (README shows how)."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    out: Annotated[Path, tyro.conf.Positional]
    """File to write."""
    checkpoint: str = "newest"
    """newest, or best (on validation)."""


def export(words: list[str]) -> None:
    """θ as safetensors."""
    from cluster import session, storage

    o = _parsed("export", Export, words)
    names = session.export(storage.place(o.dir), o.out, o.checkpoint)
    console.print(f"{o.out}: {len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})", highlight=False)


@dataclass(frozen=True)
class Status:
    """What the run in DIR is doing, or how it ended."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    follow: bool = False
    """Show it anew every two seconds, until the run ends or Ctrl-C."""


def status(words: list[str]) -> None:
    """What a run is doing."""
    from cluster import session, storage

    o = _parsed("status", Status, words)
    directory = storage.place(o.dir)
    if not o.follow:
        console.print(session.status(directory))
        return
    with Live(session.status(directory), console=console, auto_refresh=False) as live:
        while session.is_running(directory):
            time.sleep(2.0)
            live.update(session.status(directory), refresh=True)


def list_(words: list[str]) -> None:
    """Presets, tasks, models and learners."""
    from cluster import session

    tyro.cli(NoOptions, args=words, prog="metafleet list", description=list_.__doc__)
    for table in session.listing():
        console.print(table)


def show(words: list[str]) -> None:
    """Print the resolved configuration of RUN as TOML: every key, defaults included."""
    from cluster import config, flags

    _, _, run = flags.configured("show", words, NoOptions, show.__doc__ or "")
    sys.stdout.write(config.to_toml(run))


def check(words: list[str]) -> None:
    """Is RUN's meta-gradient what it claims to be? A few real tasks, in float64, against finite differences."""
    from cluster import flags, guard

    _, _, run = flags.configured("check", words, NoOptions, check.__doc__ or "")
    verdict = guard.check(run)
    console.print(verdict.sentence, highlight=False)
    if not verdict.holds:
        sys.exit(1)


@dataclass(frozen=True)
class Replay:
    """Re-create the run in DIR from its journal, in this process: every step must end in the recorded bits."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""


def replay(words: list[str]) -> None:
    """A run again, from its journal."""
    from cluster import session, storage

    o = _parsed("replay", Replay, words)
    console.print(session.replay(storage.place(o.dir)), highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ScaleOptions:
    """Options of a scaling experiment, beside the keys of the run.

    --workers takes several numbers (1,2,4), --policy sync, async or both (sync,async).
    """

    dir: str = ""
    """Folder (or URL) for runs and report. Default: runs/scale-RUN-DATE-TIME."""
    scaling: Literal["strong", "weak", "both"] = "strong"
    """The same meta-batch on more workers, or one that grows with them."""
    measure: int = 60
    """Meta-iterations of each run."""
    warmup: int = 5
    """Of these, how many at the beginning are not measured."""
    repeats: int = 1
    """How often each size is run; the median counts."""
    independent: bool = True
    """Also run as many processes that each train alone, without Ray, on this machine: what the fleet could reach."""
    resize: str = ""
    """A command that gives the cluster {workers} workers, run before each size."""


def scale(words: list[str]) -> None:
    """Run RUN on fleets of several sizes; where does the time go, and what does a worker more bring?"""
    from cluster import flags, monitor, scale_report, session, storage
    from cluster.scale import Experiment, conduct
    from cluster.worker import environment

    sizes, words = flags.taken(words, "--workers", "1,2")
    policies, words = flags.taken(words, "--policy", "sync")
    name, o, run = flags.configured("scale", words, ScaleOptions, scale.__doc__ or "")
    experiment = Experiment(
        flags.numbers("workers", sizes), flags.among("policy", policies, ("sync", "async")),
        ("strong", "weak") if o.scaling == "both" else (o.scaling,), o.measure, o.warmup, o.repeats, o.independent, o.resize,
    )  # fmt: skip
    label = re.sub(r"\W+", "-", Path(name).stem)
    home = storage.place(o.dir or session.new_directory(f"scale-{label}"))
    monitor.plain_logging()
    points = []
    for point in conduct(run, experiment, home):
        points.append(point)
        seen = {"run": name, "command": f"metafleet {' '.join(sys.argv[1:])}", "processors": len(os.sched_getaffinity(0))}
        facts = seen | {"seed": run.seed, "straggler": run.straggler} | environment()
        scale_report.write(points, experiment, facts, home)  # what has been measured is kept, whatever comes
    console.print(scale_report.table(points, f"scaling of {name}"))
    console.print(f"report: {home / 'scale.md'}, plot: {home / 'scale.png'}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TeacherOptions:
    """Options of a pool of teachers, beside the keys of the run whose images and fleet it uses."""

    dir: str = ""
    """Folder for the pool. Default: teachers/RUN."""
    count: int = 8
    """Teachers."""
    known: int = 5
    """Classes that each knows."""
    overlapping: bool = False
    """Teachers may share classes; otherwise no two do."""
    architectures: tuple[Literal["conv4", "resnet10", "resnet18"], ...] = ("conv4",)
    """Taken in turn."""
    conv_width: int = 32
    """Channels of Conv4."""
    resnet_width: int = 64
    """Channels of a ResNet's first stage."""
    epochs: int = 60
    """Passes over a teacher's images."""


def teachers(words: list[str]) -> None:
    """Train a pool of classifiers on the training classes of RUN's images; or import one that a TOML file with [[teacher]] describes."""
    from cluster import flags, monitor, school, teachers
    from cluster.catalog import MODELS
    from learners.purer.schooling import Schooling

    name, rest = flags.leading(words)
    if teachers.describes(name):
        folder = Path(_parsed("teachers FILE.toml", Import, rest).dir or f"teachers/{Path(name).stem}")
        found = [(n, float("nan")) for n in teachers.imported(Path(name), folder)]
    else:
        _, o, run = flags.configured("teachers", words, TeacherOptions, teachers_help)
        folder = Path(o.dir or f"teachers/{Path(name).stem}")
        specs = {
            "conv4": MODELS["conv4"](width=o.conv_width, halving="pool", features="flat", norm_scale=True),
            "resnet10": MODELS["resnet"](10, o.resnet_width), "resnet18": MODELS["resnet"](18, o.resnet_width),
        }  # fmt: skip
        monitor.plain_logging()
        plan = school.Plan(o.count, o.known, o.overlapping, tuple(specs[a] for a in o.architectures), Schooling(epochs=o.epochs))
        found = school.train(run, plan, folder)
    table = Table(title=f"{folder}: {len(found)} teachers")
    for heading in ("teacher", "architecture", "accuracy on images held back"):
        table.add_column(heading)
    for i, (architecture, accuracy) in enumerate(found):
        table.add_row(str(i), architecture, f"{accuracy:.3f}" if accuracy == accuracy else "as imported")
    console.print(table)


teachers_help = teachers.__doc__ or ""


@dataclass(frozen=True)
class Import:
    """Take over models that a TOML file describes: shape, ways, mean, std, and for each [[teacher]] file and architecture."""

    dir: str = ""
    """Folder for the pool. Default: teachers/FILE."""


@dataclass(frozen=True)
class DoctorOptions:
    """Options of an examination, beside the keys of the run that it is for."""

    dir: str = "runs"
    """Where the run would be."""


def doctor(words: list[str]) -> None:
    """Is this machine or cluster fit for RUN? One line for each thing that has been known to be wrong, with a hint where it is."""
    from cluster import doctor as doctors
    from cluster import flags, storage

    words = words if words and not words[0].startswith("-") else ["sinusoid", *words]
    _, options, run = flags.configured("doctor", words, DoctorOptions, doctor.__doc__ or "")
    colours, wrong = {"ok": "green", "warning": "yellow", "wrong": "bold red"}, False
    for finding in doctors.examine(run, storage.place(options.dir)):
        wrong = wrong or finding.verdict == "wrong"
        hint = f" — {finding.hint}" if finding.hint and finding.verdict != "ok" else ""
        line = (finding.what + hint).replace("[", r"\[")
        console.print(f"[{colours[finding.verdict]}]{finding.verdict:8s}[/]{line}", highlight=False, soft_wrap=True)
    if wrong:
        sys.exit(1)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "resume": resume, "evaluate": evaluate, "compare": compare, "export": export,
    "list": list_, "show": show, "check": check, "status": status, "replay": replay, "teachers": teachers, "doctor": doctor, "scale": scale,
}  # fmt: skip


def _parsed(command: str, cls: type[T], words: list[str]) -> T:
    return tyro.cli(cls, args=words, prog=f"metafleet {command}")


def _one_place() -> None:
    """A user's own folder named `envs` or `learners` in front of ours would be imported instead."""
    import envs
    import learners

    homes = {str(Path(m.__path__[0]).parent) for m in (envs, learners)} | {str(Path(__file__).parents[1])}
    if len(homes) > 1:
        raise RuntimeError(
            f"the packages cluster, learners and envs come from different places ({', '.join(sorted(homes))}); start from another folder"
        )


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | RuntimeError):  # nothing that we foresaw
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
