"""Tasks, models and learners by name: ours, one line each; those of installed packages; anyone's by import path."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from learners.importing import imported, is_path


class Choices(Mapping[str, type[Any]]):
    """The classes of one kind by name, each imported when it is asked for.

    A name is one of ours, one that an installed package declares as an entry point of the group `metafleet.GROUP`, or
    an import path, package.module:Class, which is a member without being listed.
    """

    def __init__(self, group: str, interface: str, ours: dict[str, str], least: str = "") -> None:
        """`interface`: path of the Protocol that fields are declared as, and that a class must satisfy, or `least`, a
        smaller one; `ours`: name → path.
        """
        self.group, self.interface, self.ours, self.least = group, interface, ours, least or interface
        self._checked: set[type[Any]] = set()

    @cached_property
    def paths(self) -> dict[str, str]:
        """Name → import path, of all that have a name."""
        declared = {e.name: e.value for e in importlib.metadata.entry_points(group=f"metafleet.{self.group}")}
        return declared | self.ours

    def __contains__(self, name: object) -> bool:
        return name in self.ours or is_path(name) or name in self.paths

    def __getitem__(self, name: str) -> type[Any]:
        """Raises KeyError for a name that there is not, ValueError for one that leads to no class of this kind."""
        path = self.ours.get(name) or (name if is_path(name) else self.paths[name])
        found = imported(path, "name")
        if name not in self.ours and found not in self._checked:
            self._check(name, found)
            self._checked.add(found)
        return found  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, cls: type[Any]) -> str:
        """The name by which `cls` would be found: one that it has, or its import path."""
        path = f"{cls.__module__}:{cls.__qualname__}"
        for names in (self.ours, self.paths):  # installed packages are asked only about what is not ours
            for name, found in names.items():
                if found == path:
                    return name
        return path

    def _check(self, name: str, found: object) -> None:
        wanted = imported(self.least, "interface")
        if not isinstance(found, type):
            raise ValueError(f"name={name!r} is a {type(found).__name__}: a class wanted")
        if not dataclasses.is_dataclass(found) and "__init__" in vars(found):
            raise ValueError(
                f"name={name!r} has an __init__ of its own: a frozen dataclass wanted, whose fields become keys"
            )
        lacking = [m for m in members(wanted) if not hasattr(found, m) and m not in _annotated(found)]
        lacking += sorted(getattr(found, "__abstractmethods__", ()))
        if lacking:
            advice = "; a torch module goes by model.name = constructor, model.target" if lacking == ["build"] else ""
            raise ValueError(
                f"name={name!r} has no {', '.join(lacking)}, which {wanted.__module__}.{wanted.__name__} wants{advice}"
            )
        if not members(wanted) and not issubclass(found, wanted):
            raise ValueError(f"name={name!r} is no subclass of {wanted.__module__}.{wanted.__name__}, which is wanted")


def members(interface: type[Any]) -> list[str]:
    """Names of what a class must have to satisfy a Protocol; of a base class none."""
    bodies = [vars(c) for c in interface.__mro__ if getattr(c, "_is_protocol", False)]
    return [name for body in bodies for name in body if not name.startswith("_")]


def _annotated(cls: type[Any]) -> set[str]:
    return {name for c in cls.__mro__ for name in vars(c).get("__annotations__", {})}


TASKS = Choices("tasks", "envs.base:TaskFamily", {
    "sinusoid": "envs.sinusoid:Sinusoid",
    "episodes": "envs.images.episodes:Episodes",
    "navigation": "envs.control.navigation:Navigation",
    "locomotion": "envs.control.locomotion:Locomotion",
    "data_free": "envs.images.data_free:DataFree",
    "pretraining": "envs.images.pretraining:Pretraining",
}, least="envs.base:TaskDistribution")  # fmt: skip
SOURCES = Choices("sources", "envs.images.episodes:ImageSource", {
    "omniglot": "envs.sources.omniglot:Omniglot",
    "image_folder": "envs.sources.image_folder:ImageFolder",
    "glyphs": "envs.sources.glyphs:Glyphs",
    "npz": "envs.sources.npz:Npz",
    "hugging_face": "envs.sources.hugging_face:HuggingFace",
    "stored": "envs.sources.labelled:Stored",
})  # fmt: skip
MODELS = Choices("models", "learners.models.networks:ModelSpec", {
    "mlp": "learners.models.networks:MLP",
    "conv4": "learners.models.networks:Conv4",
    "resnet": "learners.models.resnet:ResNet",
    "resnet12": "learners.models.resnet12:ResNet12",
    "wide_resnet": "learners.models.wide_resnet:WideResNet",
    "vit": "learners.models.vit:ViT",
    "constructor": "learners.models.constructor:Constructor",
    "gaussian_mlp": "learners.models.networks:GaussianMLP",
    "context_mlp": "learners.models.context:ContextMLP",
    "context_conv4": "learners.models.context:ContextConv4",
    "unit": "learners.models.unit:Unit",
})  # fmt: skip
LEARNERS = Choices("learners", "learners.base:Learner", {
    "maml": "learners.algorithms.maml:MAML",
    "maml_plus_plus": "learners.algorithms.maml_plus_plus:MAMLPlusPlus",
    "meta_sgd": "learners.algorithms.meta_sgd:MetaSGD",
    "meta_curvature": "learners.algorithms.meta_curvature:MetaCurvature",
    "imaml": "learners.algorithms.imaml:IMAML",
    "reptile": "learners.algorithms.reptile:Reptile",
    "adml": "learners.algorithms.adml:ADML",
    "adversarial_querying": "learners.algorithms.adversarial_querying:AdversarialQuerying",
    "proto_net": "learners.algorithms.proto_net:ProtoNet",
    "proto_maml": "learners.algorithms.proto_maml:ProtoMAML",
    "cavia": "learners.algorithms.cavia:CAVIA",
    "linear_probe": "learners.algorithms.linear_probe:LinearProbe",
    "baseline_plus_plus": "learners.algorithms.baseline_plus_plus:BaselinePlusPlus",
    "nearest_centroid": "learners.algorithms.nearest_centroid:NearestCentroid",
    "data_free_maml": "learners.purer.calibration:DataFreeMAML",
})  # fmt: skip
OUTERS = Choices("outers", "learners.base:Outer", {
    "descent": "learners.outer.descent:Descent",
    "trust_region": "learners.outer.trust_region:TrustRegion",
    "promp": "learners.outer.promp:ProMP",
    "purer": "learners.purer.outer:Purer",
})  # fmt: skip
POLICIES = Choices("policies", "cluster.training.policy:Policy", {
    "synchronous": "cluster.training.synchronous:Synchronous",
    "asynchronous": "cluster.training.asynchronous:Asynchronous",
})  # fmt: skip
KEYS = {
    "task": TASKS, "task.source": SOURCES, "model": MODELS, "learner": LEARNERS, "outer": OUTERS, "policy": POLICIES,
}  # fmt: skip
"""Keys of a run whose `name` chooses a class."""
CHOICES = {choices.interface.partition(":")[2]: choices for choices in KEYS.values()}
"""The same by the interface that a field is declared as, and so also for fields within others."""
