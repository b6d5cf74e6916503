"""Joining a Ray cluster, or starting one of our own."""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings

import ray

log = logging.getLogger("metafleet")

CONNECT_SECONDS = 5.0


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
