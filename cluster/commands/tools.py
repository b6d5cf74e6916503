"""The commands beside runs: what there is, whether it holds, what it costs; teachers for data-free runs."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from cluster.commands.console import console, parsed


@dataclass(frozen=True)
class NoOptions:
    """Nothing beside the keys of the run."""


def list_(words: list[str]) -> None:
    """Presets, tasks, models and learners."""
    from cluster.setup.listing import listing

    tyro.cli(NoOptions, args=words, prog="metafleet list", description=list_.__doc__)
    for table in listing():
        console.print(table)


def show(words: list[str]) -> None:
    """Print the configuration of RUN as TOML: every key, defaults included. What is "auto" or 0 is decided when a run
    begins.
    """
    from cluster.commands import flags
    from cluster.setup import config

    _, _, run = flags.configured("show", words, NoOptions, show.__doc__ or "")
    sys.stdout.write(config.to_toml(run))


def check(words: list[str]) -> None:
    """Is RUN's meta-gradient what it claims to be? A few real tasks, in float64, against finite differences."""
    from cluster.commands import flags
    from cluster.operations import gradient_guard

    _, _, run = flags.configured("check", words, NoOptions, check.__doc__ or "")
    verdict = gradient_guard.check(run)
    console.print(verdict.sentence, highlight=False)
    if not verdict.holds:
        sys.exit(1)


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
    """A command that gives the cluster {workers} workers, run before each run of a fleet."""


def scale(words: list[str]) -> None:
    """Run RUN on fleets of several sizes; where does the time go, and what does a worker more bring?"""
    from cluster.commands import flags
    from cluster.fleet.machine import environment
    from cluster.operations import launch, scale_report
    from cluster.operations.scale import Experiment, conduct
    from cluster.record import storage
    from cluster.results import monitor

    sizes, words = flags.taken(words, "--workers", "1,2")
    policies, words = flags.taken(words, "--policy", "sync")
    for key, why in (
        ("iterations", "--measure says how many"),
        ("min-workers", "all --workers take part"),
        ("pool", "it is Ray's"),
    ):
        if value := flags.taken(words, f"--{key}", "")[0]:
            raise ValueError(f"{key}={value}: not a key of an experiment, where {why}")
    name, o, run = flags.configured("scale", words, ScaleOptions, scale.__doc__ or "")
    experiment = Experiment(
        tuple(sorted(flags.numbers("workers", sizes))), flags.among("policy", policies, ("sync", "async")),
        ("strong", "weak") if o.scaling == "both" else (o.scaling,), o.measure, o.warmup, o.repeats, o.independent,
        o.resize,
    )  # fmt: skip
    label = re.sub(r"\W+", "-", Path(name).stem)
    home = storage.place(o.dir or launch.new_directory(f"scale-{label}"))
    monitor.plain_logging()
    facts = {
        "run": name, "command": f"metafleet {' '.join(sys.argv[1:])}", "processors": len(os.sched_getaffinity(0)),
        "seed": run.seed, "straggler": run.straggler,
    } | environment()  # fmt: skip
    points = []
    for point in conduct(run, experiment, home):
        points.append(point)
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


def _folder(given: str, name: str) -> Path:
    from cluster.record import storage

    folder = storage.place(given or f"teachers/{Path(name).stem}")
    if not isinstance(folder, Path):
        raise ValueError(f"dir={given}: a folder on this machine wanted, which every run reads its teachers from")
    return folder


def teachers(words: list[str]) -> None:
    """Train a pool of classifiers on the training classes of RUN's images; or import one that a TOML file with
    [[teacher]] describes.
    """
    from cluster.commands import flags
    from cluster.operations import school
    from cluster.results import monitor
    from cluster.setup import teachers as pools
    from learners.purer.schooling import Schooling

    name, rest = flags.leading(words)
    if pools.describes(name):
        folder = _folder(parsed("teachers FILE.toml", Import, rest).dir, name)
        found = [(n, float("nan")) for n in pools.imported(Path(name), folder)]
    else:
        _, o, run = flags.configured("teachers", words, TeacherOptions, teachers.__doc__ or "")
        folder = _folder(o.dir, name)
        monitor.plain_logging()
        specs = school.architectures(o.architectures, o.conv_width, o.resnet_width)
        plan = school.Plan(o.count, o.known, o.overlapping, specs, Schooling(epochs=o.epochs))
        found = school.train(run, plan, folder)
    table = Table(title=f"{folder}: {len(found)} teachers")
    for heading in ("teacher", "architecture", "accuracy on images held back"):
        table.add_column(heading)
    for i, (architecture, accuracy) in enumerate(found):
        table.add_row(str(i), architecture, f"{accuracy:.3f}" if accuracy == accuracy else "as imported")
    console.print(table)


@dataclass(frozen=True)
class Import:
    """Take over models that a TOML file describes: shape, ways, mean, std, and for each [[teacher]] file and
    architecture.
    """

    dir: str = ""
    """Folder for the pool. Default: teachers/FILE."""


@dataclass(frozen=True)
class DoctorOptions:
    """Options of an examination, beside the keys of the run that it is for."""

    dir: str = "runs"
    """Where the run would be."""


def doctor(words: list[str]) -> None:
    """Is this machine or cluster fit for RUN? One line for each thing that has been known to be wrong, with a hint
    where it is.
    """
    from cluster.commands import flags
    from cluster.operations import doctor as doctors
    from cluster.record import storage

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
