"""Training a pool of teachers on the fleet, one teacher to a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cluster import assemble, seeds
from cluster.config import Run
from cluster.dispatch import Dispatcher, Shards
from cluster.journal import Unwritten
from cluster.ledger import Ledger
from cluster.policies import Deadlines, Synchronous
from cluster.teachers import write_index, written
from cluster.worker import Recipe, set_up_torch
from envs.base import TEACHERS
from envs.data_free import Lessons
from envs.images import Episodes
from learners.base import pack
from learners.maml import MAML
from learners.models import Conv4, Functional, ModelSpec, functional
from learners.objectives import Supervised
from learners.purer.schooling import School, Schooling
from learners.resnet import ResNet

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
    """Train a pool on the image set of `run`, on its fleet, and write it to `folder`; (architecture, accuracy) of each."""
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
    recipe = Recipe(lessons, MAML(), Supervised(models[0], "cross_entropy"), school, seed=run.seed, execution="loop", device=run.device,
                    threads=run.threads)  # fmt: skip
    set_up_torch(run.threads, "cpu")
    run = replace(run, policy=Synchronous(deadlines=Deadlines(floor=LONGEST, first=LONGEST)))  # one shard is one teacher, start to end
    names, entries = source.load().index.classes, []
    folder.mkdir(parents=True, exist_ok=True)
    with assemble.pool(run, recipe) as fleet:
        dispatcher = Dispatcher(fleet, Ledger(Unwritten()), max_attempts=run.policy.max_attempts)
        handle = dispatcher.publish(pack(models[0].params(), {}))
        rounds = [dispatcher.start("school", handle, None, Shards(TEACHERS, i, 1, 1)) for i in range(plan.count)]
        for i, (spec, round_, classes) in enumerate(zip(specs, rounds, lessons.classes(), strict=True)):
            result = dispatcher.finish(round_)
            accuracy = float(result.rows["accuracy"])
            entries.append(written(folder, i, spec, result.total) | {"accuracy": accuracy, "classes": [names[c] for c in classes]})
            log.info("teacher %d of %d (%s): accuracy %.3f", i + 1, plan.count, entries[-1]["architecture"]["name"], accuracy)
    write_index(folder, source.shape, plan.ways, mean, std, entries)
    return [(e["architecture"]["name"], e["accuracy"]) for e in entries]


def _built(spec: ModelSpec, run: Run, ways: int, number: int) -> Functional:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generator(run.seed, TEACHERS, number, "init").integers(2**62)))
        return functional(spec.build(run.task.inputs, ways))
