"""Training a pool of teachers on the fleet, one teacher to a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cluster.fleet import seeds
from cluster.fleet.deadlines import Deadlines
from cluster.fleet.machine import set_up_torch
from cluster.fleet.recipe import Recipe
from cluster.record.journal import Unwritten
from cluster.setup import assemble
from cluster.setup.run import Run
from cluster.setup.teachers import write_index, written
from cluster.training.dispatch import Dispatcher, Shards
from cluster.training.ledger import Ledger
from cluster.training.synchronous import Synchronous
from envs.base import TEACHERS
from envs.images.data_free import Lessons
from envs.images.episodes import Episodes
from learners.algorithms.maml import MAML
from learners.base import pack
from learners.models.networks import Conv4, ModelSpec
from learners.models.resnet import ResNet
from learners.modules.functional import Functional, functional
from learners.objectives.supervised import Supervised
from learners.purer.schooling import School, Schooling

log = logging.getLogger("metafleet")

LONGEST = 86_400.0  # seconds that a teacher may take


def architectures(names: Sequence[str], conv_width: int = 32, resnet_width: int = 64) -> tuple[ModelSpec, ...]:
    """Those of teachers by name: conv4 (as in PURER's experiments), resnet10, resnet18."""
    known: dict[str, ModelSpec] = {
        "conv4": Conv4(width=conv_width, halving="pool", features="flat", norm_scale=True),
        "resnet10": ResNet(10, resnet_width), "resnet18": ResNet(18, resnet_width),
    }  # fmt: skip
    return tuple(known[name] for name in names)


@dataclass(frozen=True)
class Plan:
    """What pool to train."""

    count: int = 8
    """Teachers."""
    ways: int = 5
    """Classes of each."""
    overlapping: bool = False
    """Teachers may share classes."""
    architectures: tuple[ModelSpec, ...] = field(default_factory=lambda: architectures(("conv4",)))
    """Taken in turn."""
    schooling: Schooling = field(default_factory=Schooling)


def train(run: Run, plan: Plan, folder: Path) -> list[tuple[str, float]]:
    """Train a pool on the image set of `run`, on its fleet, and write it to `folder`; (architecture, accuracy) of
    each.
    """
    if not isinstance(run.task, Episodes):
        raise ValueError(f"teachers are trained on images; {type(run.task).__name__} has none")
    source = run.task.source
    source.prepare()
    lessons = Lessons(source, plan.count, plan.ways, plan.overlapping, seed=run.seed)
    mean, std = lessons.statistics()
    lessons = replace(lessons, mean=mean, std=std)
    specs = [plan.architectures[i % len(plan.architectures)] for i in range(plan.count)]
    models = [_built(spec, run, plan.ways, i) for i, spec in enumerate(specs)]
    school = School(tuple(models), tuple(isinstance(s, ResNet) for s in specs), plan.schooling)
    recipe = Recipe(lessons, MAML(), Supervised(models[0], "cross_entropy"), school, seed=run.seed, execution="loop",
                    device=run.device, threads=run.threads)  # fmt: skip
    set_up_torch(run.threads, "cpu")
    # one shard is one teacher, start to end
    run = replace(run, policy=Synchronous(deadlines=Deadlines(floor=LONGEST, first=LONGEST)))
    names, entries = source.load().index.classes, []
    folder.mkdir(parents=True, exist_ok=True)
    with assemble.pool(run, recipe) as fleet:
        dispatcher = Dispatcher(fleet, Ledger(Unwritten()), max_attempts=run.policy.max_attempts)
        handle = dispatcher.publish(pack(models[0].params(), {}))
        rounds = [dispatcher.start("school", handle, None, Shards(TEACHERS, i, 1, 1)) for i in range(plan.count)]
        for i, (spec, round_, classes) in enumerate(zip(specs, rounds, lessons.classes(), strict=True)):
            result = dispatcher.finish(round_)
            accuracy = float(result.rows["accuracy"])
            entries.append(
                written(folder, i, spec, result.total) | {"accuracy": accuracy, "classes": [names[c] for c in classes]}
            )
            log.info(
                "teacher %d of %d (%s): accuracy %.3f", i + 1, plan.count, entries[-1]["architecture"]["name"], accuracy
            )
    write_index(folder, source.shape, plan.ways, mean, std, entries)
    return [(e["architecture"]["name"], e["accuracy"]) for e in entries]


def _built(spec: ModelSpec, run: Run, ways: int, number: int) -> Functional:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generator(run.seed, TEACHERS, number, "init").integers(2**62)))
        return functional(spec.build(run.task.inputs, ways), torch.zeros(2, *run.task.inputs))
