"""Scaling experiments: the same work on fleets of several sizes, beside as many processes that know nothing of each
other.

Everything measured is read from the runs' own metrics.jsonl, so that any run directory can be measured the same way.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from cluster.operations import launch
from cluster.record import storage
from cluster.record.storage import Place
from cluster.results import history
from cluster.setup import config
from cluster.setup.run import Run
from cluster.training.asynchronous import Asynchronous
from cluster.training.evaluation import Evaluation
from cluster.training.synchronous import Synchronous

log = logging.getLogger("metafleet")

Scaling = Literal["strong", "weak"]
PATIENCE = 60.0  # seconds that independent processes get to end after SIGTERM


@dataclass(frozen=True)
class Experiment:
    """What to run and how to look at it."""

    sizes: tuple[int, ...] = (1, 2)
    """Numbers of workers."""
    policies: tuple[Literal["sync", "async"], ...] = ("sync",)
    """How the outer step waits."""
    scalings: tuple[Scaling, ...] = ("strong",)
    """strong: the same meta-batch on more workers; weak: a meta-batch that grows with them."""
    iterations: int = 60
    """Meta-iterations of each run."""
    warmup: int = 5
    """Of these, how many at the beginning are not measured."""
    repeats: int = 1
    """How often everything is done, in turn; the median counts."""
    independent: bool = True
    """Whether to run as many independent processes beside each fleet (on this machine)."""
    resize: str = ""
    """A command that gives the cluster {workers} workers, run before each run of a fleet."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"workers={','.join(map(str, self.sizes))}: different numbers of 1 or more wanted")
        if not self.policies or not self.scalings:
            raise ValueError("a policy (sync, async) and a kind of scaling (strong, weak) wanted")
        if not max(1, self.iterations // 1000) <= self.warmup <= self.iterations // 2 or self.repeats < 1:
            raise ValueError(
                f"warmup={self.warmup}, iterations={self.iterations}, repeats={self.repeats}: "
                "a warm-up of 1 to half of the iterations (and a thousandth of them at least), and 1 or more repeats "
                "wanted"
            )
        if self.resize and "{workers}" not in self.resize:
            raise ValueError(f"resize={self.resize!r}: a command with {{workers}} in it wanted")


@dataclass(frozen=True)
class Measured:
    """A run after its warm-up. Times in seconds; compute, waiting and communication are shares of the workers' time and
    add up to 1.
    """

    seconds: float
    tasks_per_s: float
    compute: float
    waiting: float
    """Until the busiest worker of a round was done."""
    communication: float
    """All the rest: messages, and the driver's own work, in which nobody computes."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the warm-up ended, training loss or negative return)."""


@dataclass(frozen=True)
class Point:
    """A fleet of one size, medians over repeats."""

    scaling: Scaling
    policy: str
    workers: int
    meta_batch: int
    startup_s: float
    """From asking for the fleet to the end of the first meta-iteration."""
    run: Measured
    independent_tasks_per_s: float = 0.0
    """What as many independent processes reach together; 0: not tried."""
    of_independent: float = float("nan")
    """The fleet's throughput as a share of theirs just before and after it."""


def measure(lines: list[dict[str, Any]], tasks: int, warmup: int) -> Measured:
    """What metrics.jsonl says of the meta-iterations after the first `warmup`, of `tasks` tasks each."""
    train = [line for line in lines if line["kind"] == "train"]
    before = max((i for i, line in enumerate(train) if line["iteration"] <= warmup), default=None)
    if before is None or before + 1 >= len(train):
        raise ValueError(f"{len(train)} lines of metrics: at least one after the warm-up of {warmup} iterations wanted")
    begin, rest = train[before], train[before + 1 :]
    seconds, iterations = rest[-1]["time"] - begin["time"], rest[-1]["iteration"] - begin["iteration"]
    every = iterations / len(rest)
    workers = statistics.median(line["fleet/workers"] for line in rest)
    whole = workers * seconds
    compute, waiting = (every * sum(line[f"perf/{k}_s"] for line in rest) / whole for k in ("compute", "waiting"))
    name, sign = _goal(begin)
    curve = [(line["time"] - begin["time"], sign * line[name]) for line in rest]
    return Measured(seconds, tasks * iterations / seconds, compute, waiting, 1 - compute - waiting, curve)


def _goal(line: dict[str, Any]) -> tuple[str, float]:
    """What training lowers: minus the return after adaptation, else the query loss."""
    returns = sorted((k for k in line if k.startswith("train/return_step")), key=lambda k: int(k.rpartition("step")[2]))
    return (returns[-1], -1.0) if returns else ("train/query_loss", 1.0)


def smoothed(curve: list[tuple[float, float]], window: int = 5) -> tuple[list[float], list[float]]:
    """Times, and the mean of the `window` (or all) values up to each."""
    window = min(window, len(curve))
    ends = range(window, len(curve) + 1)
    return [curve[i - 1][0] for i in ends], [statistics.fmean(v for _, v in curve[i - window : i]) for i in ends]


def time_to(curve: list[tuple[float, float]], target: float) -> float:
    """Seconds until the smoothed curve is at most `target`; nan where it never is."""
    return next((t for t, v in zip(*smoothed(curve), strict=True) if v <= target), float("nan"))


def conduct(run: Run, experiment: Experiment, home: Place) -> Iterator[Point]:
    """Every point, as it is measured; the runs are in HOME/SCALING-POLICY-WORKERS/REPEAT. Raises ValueError where HOME
    has some already.
    """
    if storage.children(home):
        raise ValueError(
            f"{home} is not empty: another experiment needs another folder, or would measure these runs again"
        )
    series = [
        (s, p, _sized(run, experiment, s, p, n))
        for s in experiment.scalings
        for p in experiment.policies
        for n in experiment.sizes
    ]
    for scaling, policy, sized in series:
        yield _point(sized, experiment, home, scaling, policy)


def _sized(run: Run, experiment: Experiment, scaling: Scaling, policy: str, workers: int) -> Run:
    """The run as it is on so many workers; all of them are there when it begins."""
    wanted = Asynchronous if policy == "async" else Synchronous
    meta_batch = run.meta_batch * (workers if scaling == "weak" else 1)
    if policy == "sync" and meta_batch // run.shard < workers:
        raise ValueError(
            f"a meta-batch of {meta_batch} in shards of {run.shard} keeps no more than {meta_batch // run.shard} "
            "workers busy, "
            f"{workers} are wanted: --shard {max(1, meta_batch // (2 * workers))} or a larger --meta-batch"
        )
    if policy == "async" and isinstance(run.policy, Asynchronous) and run.policy.buffer:
        raise ValueError("policy.buffer is to be 0 here: a step of one meta-batch, whatever the size of the fleet")
    return replace(
        run, pool="ray", workers=workers, min_workers=workers, iterations=experiment.iterations,
        meta_batch=meta_batch,
        policy=run.policy if isinstance(run.policy, wanted) else wanted(),
        evaluation=Evaluation(every=run.evaluation.every, validation_tasks=0, tasks=2,
        steps=min(1, run.evaluation.steps), pictures=0),
    )  # fmt: skip


def _point(run: Run, experiment: Experiment, home: Place, scaling: Scaling, policy: str) -> Point:
    """Each run of the fleet stands between two of the independent processes: machines get faster and slower while one
    measures.
    """
    folder = home / f"{scaling}-{policy}-{run.workers}"
    startups, runs, alone = [], [], []
    for repeat in range(experiment.repeats):
        log.info(
            "%s scaling, %s, %d workers, repeat %d of %d", scaling, policy, run.workers, repeat + 1, experiment.repeats
        )
        if experiment.independent:
            alone.append(_independent(run, experiment.warmup))
        if experiment.resize:
            _resize(experiment.resize.replace("{workers}", str(run.workers)))
        begin = time.time()
        launch.train(run, folder / str(repeat))
        lines = history.lines(folder / str(repeat))
        startups.append(next(line["time"] for line in lines if line["kind"] == "train") - begin)
        runs.append(measure(lines, run.meta_batch, experiment.warmup))
    if alone:
        alone.append(_independent(run, experiment.warmup))
    typical = sorted(runs, key=lambda m: m.tasks_per_s)[(len(runs) - 1) // 2]
    around = [statistics.fmean(pair) for pair in pairwise(alone)]
    shares = [m.tasks_per_s / both for m, both in zip(runs, around, strict=bool(alone))]
    return Point(scaling, policy, run.workers, run.meta_batch, statistics.median(startups), typical,
                 statistics.median(around) if alone else 0.0,
                 statistics.median(shares) if alone else float("nan"))  # fmt: skip


def _resize(command: str) -> None:
    done = subprocess.run(shlex.split(command), check=False)
    if done.returncode:
        raise RuntimeError(f"{command!r} failed with exit code {done.returncode}")


def _independent(run: Run, warmup: int) -> float:
    """Tasks/s that as many processes as there are workers, each with a whole run of its own, reach together while all
    of them work.
    """
    alone = replace(run, pool="local", policy=Synchronous(), workers=1, min_workers=1, prometheus_port=0)
    with TemporaryDirectory() as home:
        directories = [Path(home) / str(i) for i in range(run.workers)]
        with ExitStack() as stack:
            processes = [
                stack.enter_context(_process(replace(alone, iterations=100 * run.iterations), d)) for d in directories
            ]
            while min(map(_done, directories)) < run.iterations:
                for process, directory in zip(processes, directories, strict=True):
                    if process.poll() is not None:
                        raise RuntimeError(
                            f"an independent process ended: {(directory / 'said').read_text(errors='replace')[-500:]}"
                        )
                time.sleep(0.2)
            for process in processes:  # all at once, so that none works alone
                process.send_signal(signal.SIGTERM)
        lines = [
            [line for line in history.lines(d) if line["kind"] == "train" and line["iteration"] >= warmup]
            for d in directories
        ]
    return run.meta_batch * together(lines)


@contextmanager
def _process(run: Run, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains `run` in `directory`, ended on the way out."""
    directory.mkdir()
    wanted = directory / "wanted.toml"
    wanted.write_text(config.to_toml(run))
    words = [sys.executable, "-m", "cluster.cli", "train", str(wanted), "--dir", str(directory)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(directory / "said", "wb") as said:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | {"PYTHONPATH": paths}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _done(directory: Path) -> int:
    """Iterations that a run under way says it has done."""
    path = directory / history.METRICS
    lines = path.read_bytes().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


def together(runs: list[list[dict[str, Any]]]) -> float:
    """Iterations per second of several runs, added up, while all of them were at work."""
    begin, end = max(lines[0]["time"] for lines in runs), min(lines[-1]["time"] for lines in runs)
    rates = []
    for lines in runs:
        within = [line for line in lines if begin <= line["time"] <= end]
        rates.append((within[-1]["iteration"] - within[0]["iteration"]) / (within[-1]["time"] - within[0]["time"]))
    return float(sum(rates))


def rows(points: list[Point]) -> list[dict[str, Any]]:
    """The points as rows of a table; efficiency is throughput per worker over that of the smallest fleet of the
    series.
    """
    found = []
    for point in points:
        series = [p for p in points if (p.scaling, p.policy) == (point.scaling, point.policy)]
        first = min(series, key=lambda p: p.workers)
        target = max(min(smoothed(p.run.curve)[1]) for p in series)
        content = {k: v for k, v in asdict(point).items() if k != "run"} | {
            k: v for k, v in asdict(point.run).items() if k != "curve"
        }
        found.append(content | {
            "speedup": point.run.tasks_per_s / first.run.tasks_per_s,
            "efficiency": point.run.tasks_per_s / first.run.tasks_per_s * first.workers / point.workers,
            "target": target, "time_to_target_s": time_to(point.run.curve, target),
        })  # fmt: skip
    return found
