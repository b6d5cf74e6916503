"""Is this cluster fit for a run? One line for each thing that has been known to be wrong, and what to do about it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.fleet.machine import data_files, environment, whereabouts
from cluster.record.storage import Place, create, make_folder, write_atomically
from cluster.setup import families
from cluster.setup.resolve import idle_workers
from cluster.setup.run import Run
from envs.base import TaskDistribution

SKEW = 2.0  # seconds between clocks; leases are fresh for thirty
Verdict = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line."""

    verdict: Verdict
    what: str
    hint: str = ""
    """What to do, where it is not ok."""


@dataclass(frozen=True)
class Node:
    """What a node says of itself."""

    where: str
    environment: dict[str, str]
    files: dict[str, str]
    clock: float
    """Seconds since the epoch."""
    omp: str
    """$OMP_NUM_THREADS."""


def look(tasks: TaskDistribution) -> Node:
    """Run on each node."""
    return Node(whereabouts(), environment(), data_files(tasks), time.time(), os.environ.get("OMP_NUM_THREADS", ""))


def examine(run: Run, directory: Place) -> Iterator[Finding]:
    """All findings, as they are made."""
    yield _directory(directory)
    yield _threads(run)
    yield from _shards(run)
    yield _screen()
    yield from _data(run)
    if run.pool == "local":
        yield Finding("ok", "pool = local: everything runs in this process")
        return
    from cluster.fleet import ray_fleet

    try:
        started = ray_fleet.join(run.address, run.workers * run.cpus_per_worker, run.workers * run.gpus_per_worker)
    except (ConnectionError, OSError) as error:
        yield Finding("wrong", f"Ray: {error}", "start a head (`ray start --head`), or leave --address out")
        return
    try:
        began = time.time()
        try:
            nodes = ray_fleet.on_every_node(look, run.task)
        except Exception as error:  # whatever a node's Python may raise
            yield Finding(
                "wrong",
                f"a node cannot run our code ({ray_fleet.cause(error)})",
                "the same installation or image on every node",
            )
            return
        yield from fleet(run, ray_fleet.version(), ray_fleet.resources(), nodes, (began, time.time()))
    finally:
        if started:
            ray_fleet.leave()


def _directory(directory: Place) -> Finding:
    """Writable, replaces in one step, creates exclusively: what checkpoints and leases rely on."""
    probe, lease = (directory / f".doctor-{os.getpid()}-{name}" for name in ("probe", "lease"))
    try:
        make_folder(directory)
        try:
            write_atomically(probe, b"one")
            write_atomically(probe, b"two")
            fit = probe.read_bytes() == b"two" and _exclusive(lease)
        finally:
            for left in (probe, lease):
                left.unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            "wrong",
            f"{directory} cannot be written ({error.strerror or error})",
            "--dir another place, or its permissions",
        )
    if not fit:
        return Finding(
            "wrong", f"{directory}: files are not replaced and created as they should be", "use another file system"
        )
    return Finding("ok", f"{directory} is writable, replaces files in one step and creates exclusively")


def _exclusive(lease: Place) -> bool:
    """Whether a file can be created once only."""
    create(lease, b"")
    try:
        create(lease, b"")
    except FileExistsError:
        return True
    return False


def _threads(run: Run) -> Finding:
    cores = os.cpu_count() or 1
    said = f"threads = {run.threads} per worker, {cores} processors here"
    if run.pool == "ray" and run.address == "local" and run.workers * run.threads > cores:
        most = max(1, cores // run.threads)
        return Finding("warning", f"{said} for {run.workers} workers", f"--workers {most} would not share processors")
    return Finding("ok", said)


def _shards(run: Run) -> Iterator[Finding]:
    if idle := idle_workers(run):
        yield Finding("warning", *idle)


def _screen() -> Finding:
    from envs.control import rendering
    from envs.control.bodies import BODIES, load

    model = load(BODIES["half_cheetah_v5"])
    try:
        rendering.frames(model, model.qpos0[None, :], 4.0)
    except RuntimeError as error:
        return Finding("warning", "no films of robots", str(error))
    return Finding("ok", "films of robots can be rendered")


def _data(run: Run) -> Iterator[Finding]:
    try:
        families.prepare(run.task)
    except (OSError, ValueError) as error:
        yield Finding("wrong", "the task's data", str(error))
    else:
        files = data_files(run.task)
        yield Finding("ok", f"the task's data: {', '.join(files) if files else 'made on the spot'}")


def fleet(
    run: Run, version: str, resources: dict[str, float], nodes: list[Node], asked: tuple[float, float]
) -> Iterator[Finding]:
    """Of a cluster whose nodes were asked between two moments."""
    yield Finding("ok", f"Ray {version}, {len(nodes)} node{'s' * (len(nodes) != 1)}, {resources}")
    for name, each in (("CPU", run.cpus_per_worker), ("GPU", run.gpus_per_worker)):
        if each:
            room = int(resources.get(name, 0) / each)
            fine = room >= run.workers
            said = f"{run.workers} workers of {each:g} {name}s: room for {room}"
            yield Finding(
                "ok" if fine else "wrong" if room < run.min_workers else "warning",
                said,
                "fewer --workers, or more nodes",
            )
    mine = environment() | {"gpu": ""}
    for key, own in mine.items():
        able = [n for n in nodes if key != "gpu" or not run.gpus_per_worker or n.environment["gpu"] != "none"]
        seen = Counter(node.environment[key] for node in able)
        if len(seen) > 1 or (key != "gpu" and set(seen) != {own}):
            told = ", ".join(f"{value!r} on {n}" for value, n in seen.items())
            yield Finding("wrong", f"{key}: {told} nodes, {own!r} here: bits would depend on who computes what",
                          "the same image everywhere, or --allow-mixed-fleet")  # fmt: skip
    wanted = data_files(run.task)
    for node in nodes:
        lacking = [f for f, version in wanted.items() if node.files.get(f) != version]
        if lacking:
            yield Finding(
                "warning",
                f"{node.where} lacks {', '.join(lacking)}",
                "the driver will send it when a worker starts there",
            )
        off = min(0.0, node.clock - asked[0]) + max(0.0, node.clock - asked[1])
        if abs(off) > SKEW:
            yield Finding("warning", f"the clock of {node.where} is {off:+.1f} s off", "run NTP: leases compare clocks")
        if node.omp not in ("", str(run.threads)):
            yield Finding("ok", f"{node.where} has OMP_NUM_THREADS={node.omp}; workers set {run.threads} themselves")
