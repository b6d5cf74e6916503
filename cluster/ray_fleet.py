"""Joining a Ray cluster, or starting one of our own; its nodes; vectors that stay on them."""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from cluster import wire
from cluster.messages import Lost, Vector

log = logging.getLogger("metafleet")

CONNECT_SECONDS = 5.0
FETCH_SECONDS = 120.0  # what has not arrived after this long never will


def join(address: str, cpus: float, gpus: float) -> bool:
    """Connect to Ray; True where this process started it and must shut it down.

    "local" starts a Ray of our own with `cpus` CPUs, unless the process is connected already; "auto" joins the one
    of $RAY_ADDRESS or of this machine; anything else is host:port. Raises ConnectionError where nobody answers.
    """
    if ray.is_initialized():
        return False
    if address == "local":
        address = os.environ.get("RAY_ADDRESS", "local")  # inside a Ray job the cluster is given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if address == "local":
            _start(cpus, gpus)
            return True
        _check(address)
        try:
            ray.init(address=address, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConnectionError(f"no Ray cluster could be joined at address={address!r} ({str(error).splitlines()[0]})") from error
    return True


def resources() -> dict[str, float]:
    """What the cluster has in all."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {k: v for k, v in found.items() if k in ("CPU", "GPU")}


def nodes() -> dict[str, str]:
    """Living nodes: id → address."""
    found = ray.nodes()  # type: ignore[no-untyped-call]
    return {n["NodeID"]: n["NodeManagerAddress"] for n in found if n["Alive"]}


@dataclass(frozen=True)
class Remote:
    """A vector in the object store of the node that made it."""

    ref: Any

    def plus(self, other: Remote) -> Remote:
        """Added by a task that Ray runs where most of the bytes are."""
        return Remote(_added().remote(self.ref, other.ref))

    def fetch(self) -> Vector:
        """The vector. Raises Lost where its node is gone."""
        try:
            return wire.restored(ray.get(self.ref, timeout=FETCH_SECONDS))
        except (RayError, TimeoutError) as error:
            raise Lost(f"a sum that stayed on its node is lost ({cause(error)})") from error


@cache
def _added() -> Any:
    def added(left: NDArray[Any], right: NDArray[Any]) -> Vector:
        return np.add(wire.restored(left), wire.restored(right))

    return ray.remote(num_cpus=0, max_retries=0)(added)


def cause(error: Exception) -> str:
    """The last line of a remote traceback: what went wrong, in one sentence."""
    inner = getattr(error, "cause", None)
    if inner is not None:
        return f"{type(inner).__name__}: {inner}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _start(cpus: float, gpus: float) -> None:
    # The raylet's own lines (autoscaler, dashboards that are off) say nothing to someone who wants to meta-train.
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    ray.init(
        address="local",
        num_cpus=max(1, math.ceil(cpus)),
        include_dashboard=False,
        logging_level=logging.ERROR,
        num_gpus=math.ceil(gpus) or None,
    )


def _check(address: str) -> None:
    """Fail at once where host:port refuses; Ray itself would try for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at address={address!r} ({error})") from error
