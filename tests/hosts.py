"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge, a Ray node in each.

Needs root and iproute2. A host is killed with all its processes, or cut off: its packets vanish while its processes
live.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.commands import PATIENCE

NETWORK = "10.93.0"
PORT = 6379
RAY = (sys.executable, "-m", "ray.scripts.scripts")
NERVOUS = {  # the head's health checks: a lost node is noticed in some ten seconds instead of a minute
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


def why_not() -> str:
    """Why there can be no hosts here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if not shutil.which("ip"):
        return "iproute2 (the command ip) is not installed"
    tried = subprocess.run(["ip", "netns", "add", "mf-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "mf-try"], capture_output=True)
    return "" if tried.returncode == 0 else f"network namespaces are not permitted ({tried.stderr.strip()})"


class Hosts:
    """Host 0 is the head; `command` runs there, in `environment`."""

    can_cut = True

    def __init__(self, folder: Path, hosts: int, cpus: int = 1, dashboard: bool = False) -> None:
        """`dashboard`: on the head, at port 8265, where jobs are submitted."""
        self.folder, self.cpus, self.dashboard = folder, cpus, dashboard
        self._starts = 0
        self.environment = os.environ | NERVOUS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.address = f"{NETWORK}.10:{PORT}"
        self.close()  # what an earlier run that was killed has left
        _ip("link", "add", "mf-bridge", "type", "bridge")
        _ip("link", "set", "mf-bridge", "up")
        for i in range(hosts):
            self._wire(i)
        self.start(0)
        for i in range(1, hosts):
            self.start(i)

    def start(self, host: int) -> None:
        """(Re)start the Ray node of a host."""
        self._starts += 1
        folder = self.folder / f"n{self._starts}"
        folder.mkdir(parents=True)
        head = ["--head", f"--port={PORT}", f"--include-dashboard={str(self.dashboard).lower()}"]
        role = head if host == 0 else [f"--address={self.address}"]
        command = [*RAY, "start", *role, f"--node-ip-address={NETWORK}.{10 + host}",
                   f"--num-cpus={0 if host == 0 else self.cpus}", "--object-store-memory=100000000",
                   "--disable-usage-stats", "--block"]  # fmt: skip
        if host == 0:
            command += [f"--temp-dir={folder}", "--dashboard-host=0.0.0.0"]
        log = open(folder / "log", "wb")  # noqa: SIM115
        subprocess.Popen(self.command(command, host), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                         start_new_session=True, env=self.environment)  # fmt: skip
        give_up = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (folder / "log").read_text(errors="replace"):
            if time.monotonic() > give_up:
                raise TimeoutError(f"host {host} did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def command(self, words: list[str], host: int = 0) -> list[str]:
        """`words` as a command that runs on a host."""
        return ["ip", "netns", "exec", _name(host), *words]

    def kill(self, host: int) -> None:
        """Power loss: every process of the host dies at once."""
        while pids := self._pids(host):
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self, host: int) -> None:
        """Packets to and from the host vanish."""
        _ip("link", "set", f"mf-v{host}", "down")

    def heal(self, host: int) -> None:
        """The network is back; a node that Ray has given up ends itself, hence is started again."""
        _ip("link", "set", f"mf-v{host}", "up")

    def close(self) -> None:
        for name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
            if name.startswith("mf-"):
                host = int(name.split()[0].removeprefix("mf-"))
                self.kill(host)
                subprocess.run(["ip", "link", "del", f"mf-v{host}"], capture_output=True)
                _ip("netns", "del", _name(host))
        subprocess.run(["ip", "link", "del", "mf-bridge"], capture_output=True)

    def _wire(self, host: int) -> None:
        name, link = _name(host), f"mf-v{host}"
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", "mf-bridge", "up")
        _ip("-n", name, "addr", "add", f"{NETWORK}.{10 + host}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        # Ray finds its own address by a route outwards
        _ip("-n", name, "route", "add", "default", "via", f"{NETWORK}.1")

    def _pids(self, host: int) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", _name(host)], capture_output=True, text=True)
        return [int(p) for p in found.stdout.split()]


def _name(host: int) -> str:
    return f"mf-{host}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
