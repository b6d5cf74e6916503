"""Joining a Ray cluster, or starting one of our own; its nodes; vectors that stay on them."""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.fleet import wire
from cluster.fleet.messages import Lost, Vector

log = logging.getLogger("metafleet")

T = TypeVar("T")

CONNECT_SECONDS = 5.0
FETCH_SECONDS = 120.0  # what has not arrived after this long never will


def join(address: str, cpus: float, gpus: float) -> bool:
    """Connect to Ray; True where this process started it and must shut it down.

    "local" starts a Ray of our own with `cpus` CPUs, unless the process is connected already or $RAY_ADDRESS names a
    cluster (as in a Ray job); "auto" joins the one of $RAY_ADDRESS or of this machine; anything else is host:port.
    Raises ConnectionError where nobody answers.
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
            raise ConnectionError(
                f"no Ray cluster could be joined at address={address!r} ({str(error).splitlines()[0]})"
            ) from error
    return True


def resources() -> dict[str, float]:
    """What the cluster has in all."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {k: v for k, v in found.items() if k in ("CPU", "GPU")}


def nodes() -> dict[str, str]:
    """Living nodes: id → address."""
    found = ray.nodes()  # type: ignore[no-untyped-call]
    return {n["NodeID"]: n["NodeManagerAddress"] for n in found if n["Alive"]}


Bracket: TypeAlias = "int | tuple[Bracket, Bracket]"
"""How to add: the number of an operand, or two such things."""


def version() -> str:
    """Ray's."""
    return str(ray.__version__)


def leave() -> None:
    """End the Ray that `join` started."""
    ray.shutdown()


def on_every_node(function: Callable[..., T], *arguments: Any, seconds: float = 60.0) -> list[T]:
    """What `function(*arguments)` returns on each living node."""
    refs = []
    for node in nodes():
        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        refs.append(
            ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there).remote(*arguments)
        )
    found: list[T] = ray.get(refs, timeout=seconds)
    return found


class _Adder:
    """Adds on its node."""

    def add(self, bracket: Bracket, *operands: NDArray[Any]) -> Vector:
        return added(bracket, operands)


class Adders:
    """One actor per living node that adds there, for one pool."""

    def __init__(self) -> None:
        self._by_node: dict[str, Any] = {}

    def everywhere(self) -> list[Any]:
        """Those of all living nodes; new ones where nodes have come."""
        living = nodes()
        for node in self._by_node.keys() - living.keys():
            del self._by_node[node]
        for node in living.keys() - self._by_node.keys():
            there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            self._by_node[node] = (
                ray.remote(num_cpus=0, max_restarts=0)(_Adder).options(scheduling_strategy=there).remote()
            )
        return list(self._by_node.values())

    def renew(self) -> None:
        """One of them failed: new ones next time."""
        self._by_node.clear()

    def close(self) -> None:
        """Let them go."""
        for adder in self._by_node.values():
            ray.kill(adder)
        self._by_node.clear()


@dataclass(frozen=True)
class Remote:
    """A sum of vectors in the object stores of the nodes that made them, as the brackets in which they are to be added.

    Nothing is added before `fetch`. It has every node add an aligned part of about equal size, and adds these parts
    itself: what travels to the driver grows with nodes, not with workers, and the brackets are the tree's.
    """

    refs: tuple[Any, ...]
    adders: Adders
    bracket: Bracket = 0

    def plus(self, other: Remote) -> Remote:
        """Both, in one more pair of brackets."""
        return Remote(self.refs + other.refs, self.adders, (self.bracket, _moved(other.bracket, len(self.refs))))

    def fetch(self) -> Vector:
        """The sum. Raises Lost where a node is gone."""
        adders = self.adders.everywhere()
        parts: list[Any] = []

        def split(bracket: Bracket) -> Bracket:
            used = _operands(bracket)
            if isinstance(bracket, tuple) and len(used) > -(-len(self.refs) // len(adders)):
                return split(bracket[0]), split(bracket[1])
            if isinstance(bracket, tuple):
                adder = adders[len(parts) % len(adders)]
                parts.append(adder.add.remote(_moved(bracket, -used[0]), *(self.refs[i] for i in used)))
            else:
                parts.append(self.refs[bracket])
            return len(parts) - 1

        try:
            outer = split(self.bracket)
            return added(outer, ray.get(parts, timeout=FETCH_SECONDS))
        except (RayError, TimeoutError) as error:
            self.adders.renew()
            raise Lost(f"a sum that stayed on its node is lost ({cause(error)})") from error


def added(bracket: Bracket, operands: Sequence[NDArray[Any]]) -> Vector:
    """The sum of vectors as they travelled, in these brackets."""
    if isinstance(bracket, tuple):
        return np.add(added(bracket[0], operands), added(bracket[1], operands))
    return wire.restored(operands[bracket])


def _operands(bracket: Bracket) -> list[int]:
    return _operands(bracket[0]) + _operands(bracket[1]) if isinstance(bracket, tuple) else [bracket]


def _moved(bracket: Bracket, by: int) -> Bracket:
    return (_moved(bracket[0], by), _moved(bracket[1], by)) if isinstance(bracket, tuple) else bracket + by


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
