"""Metafleet's public names: `from metafleet import Run, launch, load`.

Each is imported from where it is defined when it is first asked for, so that what needs no torch loads none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.fleet.pool import LocalPool as LocalPool
    from cluster.fleet.ray_pool import RayPool as RayPool
    from cluster.fleet.recipe import Recipe as Recipe
    from cluster.operations.launch import launch as launch
    from cluster.operations.trained import Fitted as Fitted
    from cluster.operations.trained import Trained as Trained
    from cluster.operations.trained import load as load
    from cluster.record.checkpoint import Checkpointing as Checkpointing
    from cluster.setup.run import ControlKeys as ControlKeys
    from cluster.setup.run import ObjectiveKeys as ObjectiveKeys
    from cluster.setup.run import Run as Run
    from cluster.training.asynchronous import Asynchronous as Asynchronous
    from cluster.training.driver import Driver as Driver
    from cluster.training.evaluation import Evaluation as Evaluation
    from cluster.training.synchronous import Synchronous as Synchronous
    from envs.images.episodes import Episodes as Episodes
    from envs.sources.labelled import from_arrays as from_arrays
    from envs.sources.labelled import from_datasets as from_datasets
    from learners.algorithms.maml import MAML as MAML
    from learners.algorithms.proto_net import ProtoNet as ProtoNet
    from learners.algorithms.reptile import Reptile as Reptile
    from learners.modules.functional import functional as functional
    from learners.objectives.supervised import Supervised as Supervised
    from learners.outer.descent import Descent as Descent

NAMES = {
    "Run": "cluster.setup.run",
    "ObjectiveKeys": "cluster.setup.run",
    "ControlKeys": "cluster.setup.run",
    "launch": "cluster.operations.launch",
    "load": "cluster.operations.trained",
    "Trained": "cluster.operations.trained",
    "Fitted": "cluster.operations.trained",
    "MAML": "learners.algorithms.maml",
    "Reptile": "learners.algorithms.reptile",
    "ProtoNet": "learners.algorithms.proto_net",
    "Descent": "learners.outer.descent",
    "functional": "learners.modules.functional",
    "Supervised": "learners.objectives.supervised",
    "Episodes": "envs.images.episodes",
    "from_arrays": "envs.sources.labelled",
    "from_datasets": "envs.sources.labelled",
    "Synchronous": "cluster.training.synchronous",
    "Asynchronous": "cluster.training.asynchronous",
    "Evaluation": "cluster.training.evaluation",
    "Checkpointing": "cluster.record.checkpoint",
    "Recipe": "cluster.fleet.recipe",
    "Driver": "cluster.training.driver",
    "LocalPool": "cluster.fleet.pool",
    "RayPool": "cluster.fleet.ray_pool",
}
"""Public name → the module that defines it. Everything else may change from one version to the next."""

__all__ = list(NAMES)


def __getattr__(name: str) -> object:
    if name not in NAMES:
        raise AttributeError(f"module 'metafleet' has no attribute {name!r}", name=name)
    return getattr(import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(NAMES)
