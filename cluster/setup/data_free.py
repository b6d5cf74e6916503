"""What a data-free run takes from its teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.setup import teachers
from cluster.setup.run import Run
from cluster.setup.teachers import TeacherPool
from envs.images.data_free import DataFree
from learners.base import Objective
from learners.models.functional import Functional
from learners.purer.objective import DataFree as DataFreeObjective
from learners.purer.outer import Purer


def teacher_pool(task: DataFree) -> TeacherPool:
    """The teachers of a data-free task."""
    if not task.pools:
        raise ValueError("task.pools is empty: a folder of teachers wanted (`metafleet teachers` makes one)")
    return teachers.together([teachers.load(Path(folder).expanduser()) for folder in task.pools])


def _data_free(run: Run, network: Functional, pool: TeacherPool) -> Objective:
    task = run.task
    assert isinstance(task, DataFree)
    if pool.shape != task.inputs:
        raise ValueError(f"the teachers take images of shape {pool.shape}, task.source gives {task.inputs}")
    if run.dtype != "float32":
        raise ValueError(f"dtype={run.dtype!r}: teachers are float32, and so are runs that learn from them")
    if task.ways > len(set(pool.names)):
        raise ValueError(f"ways={task.ways} exceeds the {len(set(pool.names))} classes that the teachers know")
    if not isinstance(run.outer, Purer):
        raise ValueError(f"a data-free task wants the outer step of PURER (--outer.name purer), not {type(run.outer).__name__}")
    if run.execution != "loop":
        raise ValueError(f"execution={run.execution!r}: teachers differ from each other, so that tasks run in a loop")
    return DataFreeObjective(
        network, "cross_entropy", run.objective.norm, run.objective.scale, run.evaluation.norms, run.objective.momentum,
        pool.teachers, task.per_class, pool.shape,
    )  # fmt: skip


def _as_taught(run: Run, task: DataFree) -> Run:
    """With what the teachers say of themselves."""
    found = teacher_pool(task)
    kinds = {name: i for i, name in enumerate(dict.fromkeys(found.names))}
    shared = tuple(kinds[name] for name in found.names) if len(kinds) < len(found.names) else ()
    return taught(run, replace(task, teachers=len(found.teachers), teacher_ways=found.ways, kinds=shared, mean=found.mean, std=found.std))


def taught(run: Run, of: DataFree) -> Run:
    """The data-free run with what the teachers of the task `of` say of themselves."""
    said = {k: getattr(of, k) for k in ("teachers", "teacher_ways", "kinds", "mean", "std")}
    outer = replace(run.outer, teachers=of.teachers) if isinstance(run.outer, Purer) else run.outer
    return replace(run, task=replace(run.task, **said), outer=outer)  # type: ignore[type-var]
