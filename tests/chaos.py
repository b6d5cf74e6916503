"""Faults in a random row upon a run, and what must be true afterwards: python -m tests.chaos --faults 200 --seed 0
--policy synchronous

The cluster is hosts in network namespaces where those are permitted (`tests.hosts`), else nodes of `ray.cluster_utils`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import numpy as np

from cluster.fleet.pool import LocalPool
from cluster.operations.replay import replay, steps
from cluster.record import journal
from cluster.record.checkpoint import Checkpoints
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from cluster.training.ledger import ENDS
from tests import chaos_driver, hosts

PATIENCE = 300.0  # seconds without an iteration are a hang
NODES = (1, 2)
MARK = "METAFLEET_CHAOS"  # in the environment of all processes of a cluster
DISK = 3 << 20  # bytes of the disk that fills up


class Cluster(Protocol):
    """Node 0 is the head, without workers; nodes 1 and 2 have room for some."""

    address: str
    environment: dict[str, str]
    can_cut: bool

    def start(self, host: int) -> None: ...
    def kill(self, host: int) -> None: ...
    def command(self, words: list[str], host: int = 0) -> list[str]: ...
    def close(self) -> None: ...


class Nodes:
    """Raylets side by side in one network, by `ray.cluster_utils`."""

    can_cut = False

    def __init__(self, cpus: int = 2) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        self.environment = dict(os.environ)
        self._cpus = cpus
        self._cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        self._nodes: dict[int, Any] = {}
        for node in NODES:
            self.start(node)

    def start(self, host: int) -> None:
        self._nodes[host] = self._cluster.add_node(num_cpus=self._cpus)

    def kill(self, host: int) -> None:
        self._cluster.remove_node(self._nodes.pop(host), allow_graceful=False)

    def command(self, words: list[str], host: int = 0) -> list[str]:
        return words

    def close(self) -> None:
        self._cluster.shutdown()


@dataclass
class Chaos:
    """A run under faults. `check` says whether it came out as if nothing had happened."""

    cluster: Cluster
    folder: Path
    policy: str
    disk: Path | None
    """A small file system to hold the run directory; None where none could be had."""
    rng: np.random.Generator
    done: Counter[str] = field(default_factory=Counter)
    slowest_stop: float = 0.0
    """Seconds from SIGTERM to the end."""
    _driver: subprocess.Popen[bytes] | None = None
    _seen: tuple[int, float] = (-1, 0.0)

    def faults(self) -> dict[str, Callable[[], None]]:
        """Every kind that can be had here."""
        found = {
            "worker killed": self.kill_worker, "worker frozen": self.freeze_worker, "node killed": self.kill_node,
            "driver killed": self.kill_driver, "driver told to stop": self.stop_driver, "not finite": self.spoil,
        }  # fmt: skip
        if self.disk:
            found["disk full"] = self.fill_disk
        if self.cluster.can_cut:
            found["node cut off"] = self.cut_node
        return found

    def strike(self, kind: str) -> None:
        """One fault, and on until the run has moved again."""
        self.done[kind] += 1
        self.faults()[kind]()
        self.moves()

    def moves(self, iterations: int = 2) -> None:
        """Wait until so many more iterations are done, or TimeoutError."""
        goal, give_up = self._status().get("iteration", 0) + iterations, time.monotonic() + PATIENCE
        while self._status().get("iteration", 0) < goal:
            if time.monotonic() > give_up:
                raise TimeoutError(f"no progress for {PATIENCE:.0f} s; the driver's last words: {self._last_words()}")
            self._keep_running()
            time.sleep(0.05)

    def kill_worker(self) -> None:
        self._signal_worker(signal.SIGKILL)

    def freeze_worker(self) -> None:
        self._signal_worker(signal.SIGSTOP)

    def kill_node(self) -> None:
        node = int(self.rng.choice(NODES))
        self.cluster.kill(node)
        time.sleep(self.rng.uniform(0, 1))
        self.cluster.start(node)

    def cut_node(self) -> None:
        """For so long that Ray gives the node up; it ends itself when it hears of that, and is started again."""
        assert isinstance(self.cluster, hosts.Hosts)
        node = int(self.rng.choice(NODES))
        self.cluster.cut(node)
        self.moves(20)
        time.sleep(12)
        self.cluster.heal(node)
        time.sleep(1)
        self.cluster.kill(node)
        self.cluster.start(node)

    def kill_driver(self) -> None:
        assert self._driver
        self._driver.kill()
        self._driver.wait()

    def stop_driver(self) -> None:
        """SIGTERM: a checkpoint and exit code 143, soon."""
        assert self._driver
        begin = time.monotonic()
        self._driver.terminate()
        code = self._driver.wait(PATIENCE)
        if code != 128 + signal.SIGTERM:
            raise AssertionError(f"exit code {code} after SIGTERM: {self._last_words()}")
        self.slowest_stop = max(self.slowest_stop, time.monotonic() - begin)

    def fill_disk(self) -> None:
        assert self.disk
        hog = self.disk / "hog"
        with contextlib.suppress(OSError), open(hog, "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        time.sleep(self.rng.uniform(0.5, 2.0))
        if self._driver and self._driver.poll() is None:
            self._wait_for_exit()  # a journal that cannot be written stops the run
        hog.unlink()

    def spoil(self) -> None:
        (self.folder / "nan").touch()

    def begin(self) -> None:
        """Start the driver and wait for its first iterations."""
        self._keep_running()
        self.moves(3)

    def end(self) -> None:
        """Stop the driver, and look for processes that it has left behind."""
        self.stop_driver()
        give_up = time.monotonic() + PATIENCE
        while left := _workers(self.cluster.environment[MARK]):
            if time.monotonic() > give_up:
                raise AssertionError(f"{len(left)} workers outlived their driver: {left}")
            time.sleep(0.1)

    def check(self) -> str:
        """AssertionError where θ or the ledger is not what it must be; else a sentence on the run."""
        run = self.folder / "run"
        state = Checkpoints(run / "checkpoints").newest()
        assert state
        recipe = chaos_driver.recipe()
        attempts = balanced(run / "journal")
        ended = sum(self.done[kind] for kind in ("driver killed", "driver told to stop", "disk full"))
        assert attempts == 1 + ended, (
            f"{attempts} drivers, {1 + ended} expected: some died by themselves; {self._last_words()}"
        )
        if self.policy == "synchronous":
            calm = Driver(recipe, chaos_driver.theta(), LocalPool(recipe), self.folder / "calm",
                          iterations=state.iteration, meta_batch=chaos_driver.BATCH, shard=chaos_driver.SHARD,
                          evaluation=Evaluation(every=10**9, validation_tasks=0, tasks=4, steps=1,
                          pictures=0))  # fmt: skip
            assert digest(calm.run()) == digest(state.meta), "θ is not that of an undisturbed run"
        else:
            applied = steps(run / "journal")[: state.iteration]
            for _, meta in replay(recipe, chaos_driver.theta(), chaos_driver.POLICIES[self.policy], applied):
                last = digest(meta)
            assert last == digest(state.meta), "θ is not that of the journal"
            shards = [shard for step in applied for shard in step.shards]
            assert len(shards) == len(set(shards)), "a shard was applied twice"
            missing = {("train", s * chaos_driver.SHARD, (s + 1) * chaos_driver.SHARD) for s in state.work.again}
            everything = {
                ("train", s, s + chaos_driver.SHARD)
                for s in range(0, state.work.following * chaos_driver.SHARD, chaos_driver.SHARD)
            }
            rejected = {
                ("train", r["start"], r["stop"])
                for r in journal.read(run / "journal")
                if r["kind"] in ("reject", "quarantine")
            }
            lost, unknown = everything - set(shards) - missing - rejected, (set(shards) | missing) - everything
            assert not lost, f"{len(lost)} shards were lost, the first is {min(lost)}"
            assert not unknown, f"{len(unknown)} shards were never due, the first is {min(unknown)}"
        assert state.counts["dispatched"] == sum(state.counts[k] for k in ENDS), (
            f"the ledger is not balanced: {state.counts}"
        )
        # Asynchronously a second trap may meet a shard's second attempt: that is a rejection, and on the record.
        assert not state.counts["rejected"] or self.policy == "asynchronous", "good shards were rejected"
        balance = ", ".join(f"{v} {k}" for k, v in state.counts.items() if v)
        return f"{state.iteration} iterations, {attempts} attempts; {balance}"

    def _keep_running(self) -> None:
        if self._driver and self._driver.poll() is None:
            return
        log = open(self.folder / "driver.log", "ab")  # noqa: SIM115
        words = [sys.executable, "-m", "tests.chaos_driver", str(self.folder), self.policy, self.cluster.address]
        self._driver = subprocess.Popen(
            self.cluster.command(words), env=self.cluster.environment, stdout=log, stderr=log
        )

    def _wait_for_exit(self) -> None:
        assert self._driver
        try:
            self._driver.wait(20.0)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the driver goes on although its journal cannot be written: {self._last_words()}"
            ) from None

    def _signal_worker(self, number: int) -> None:
        for _ in range(600):
            places = list(self._status().get("workers", {}).values())
            alive = [p for p in (int(where.rpartition(":")[2]) for where in places) if Path(f"/proc/{p}").exists()]
            if alive:
                os.kill(int(self.rng.choice(alive)), number)
                return
            self._keep_running()
            time.sleep(0.1)
        raise TimeoutError(f"no worker for a minute: {self._last_words()}")

    def _status(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.folder / "run" / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return content

    def _last_words(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")[-3000:]


def balanced(path: Path) -> int:
    """AssertionError unless every ticket of a journal was ended exactly once; how many drivers there were."""
    ended: Counter[int] = Counter()
    dispatched: set[int] = set()
    attempts = 0
    for record in journal.read(path):
        attempts += record["kind"] == "attempt"
        if record["kind"] == "dispatch":
            dispatched.add(record["ticket"])
        elif record["kind"] in ("apply", "abandon"):
            ended.update(record["tickets"])
        elif record["kind"] in ("reject", "drop", "quarantine"):
            ended[record["ticket"]] += 1
    wrong = [t for t in dispatched if ended[t] != 1]
    assert not wrong, f"{len(wrong)} of {len(dispatched)} tickets were not ended exactly once, the first is {wrong[0]}"
    return attempts


def _workers(marker: str) -> list[int]:
    """Actors alive whose environment bears the mark."""
    wanted, found = f"{MARK}={marker}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and b"_Actor" in (entry / "cmdline").read_bytes()
                and wanted in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def visited(policy: str, seed: int) -> Iterator[Chaos]:
    """A run on a cluster of its own, begun."""
    folder = Path(mkdtemp(prefix="chaos-"))
    os.environ[MARK] = folder.name
    reason = hosts.why_not()
    cluster: Cluster = Nodes() if reason else hosts.Hosts(folder / "hosts", 3, cpus=2)
    disk = _small_disk(folder / "run")
    try:
        chaos = Chaos(cluster, folder, policy, disk, np.random.default_rng(seed))
        chaos.begin()
        yield chaos
    finally:
        cluster.close()
        if disk:
            subprocess.run(["umount", "-l", str(disk)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _small_disk(folder: Path) -> Path | None:
    folder.mkdir()
    if os.geteuid() != 0:
        return None
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True)
    return folder if mounted.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", choices=list(chaos_driver.POLICIES), default="synchronous")
    options = parser.parse_args()
    begin = time.monotonic()
    with visited(options.policy, options.seed) as chaos:
        kinds = list(chaos.faults())
        usual = np.array([0.1 if k in ("node cut off", "node killed", "disk full") else 1.0 for k in kinds])
        for i in range(options.faults):
            kind = kinds[i] if i < len(kinds) else str(chaos.rng.choice(kinds, p=usual / usual.sum()))
            chaos.strike(kind)
            print(f"{time.monotonic() - begin:6.1f} s  {i + 1:4d}  {kind}", flush=True)
        chaos.end()
        print(chaos.check())
        print(dict(chaos.done), f"the slowest stop took {chaos.slowest_stop:.1f} s (wanted 10)")
        if chaos.slowest_stop > 10:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
