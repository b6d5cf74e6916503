"""What a data-free run takes from its teachers: facts about them when it is resolved, objective and θ₀ when it is
assembled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.setup import teachers
from cluster.setup.run import Run
from cluster.setup.teachers import TeacherPool
from envs.base import TaskFamily
from envs.images.data_free import DataFree
from learners.base import Objective, Params
from learners.modules.functional import Functional
from learners.purer.objective import DataFree as DataFreeObjective
from learners.purer.outer import Purer


def teacher_pool(task: DataFree) -> TeacherPool:
    """The teachers of a data-free task."""
    if not task.pools:
        raise ValueError("task.pools is empty: a folder of teachers wanted (`metafleet teachers` makes one)")
    return teachers.together([teachers.load(Path(folder).expanduser()) for folder in task.pools])


def taught(run: Run, task: DataFree, before: TaskFamily | None) -> Run:
    """`run` with what its teachers say of themselves: now, or as they did when its task was `before`."""
    if not isinstance(before, DataFree):
        found = teacher_pool(task)
        kinds = {name: i for i, name in enumerate(dict.fromkeys(found.names))}
        shared = tuple(kinds[name] for name in found.names) if len(kinds) < len(found.names) else ()
        before = replace(
            task, teachers=len(found.teachers), teacher_ways=found.ways, kinds=shared, mean=found.mean, std=found.std
        )
    elif task.teachers:
        return run  # it says so itself
    said = {k: getattr(before, k) for k in ("teachers", "teacher_ways", "kinds", "mean", "std")}
    outer = replace(run.outer, teachers=before.teachers) if isinstance(run.outer, Purer) else run.outer
    return replace(run, task=replace(task, **said), outer=outer)


def assembled(run: Run, task: DataFree, network: Functional) -> tuple[Objective, Params]:
    """Objective and initial parameters. Raises ValueError where teachers and run do not fit."""
    pool = teacher_pool(task)
    if pool.shape != task.inputs:
        raise ValueError(f"the teachers take images of shape {pool.shape}, task.source gives {task.inputs}")
    if run.precision != "float32":
        raise ValueError(f"precision={run.precision!r}: teachers are float32, and so are runs that learn from them")
    if task.ways > len(set(pool.names)):
        raise ValueError(f"ways={task.ways} exceeds the {len(set(pool.names))} classes that the teachers know")
    if not isinstance(run.outer, Purer):
        raise ValueError(
            f"a data-free task wants the outer step of PURER (--outer.name purer), not {type(run.outer).__name__}"
        )
    if run.execution != "loop":
        raise ValueError(f"execution={run.execution!r}: teachers differ from each other, so that tasks run in a loop")
    objective = DataFreeObjective(
        network, "cross_entropy", run.objective.norm, run.objective.scale, run.evaluation.norms, run.objective.momentum,
        teachers=pool.teachers, per_class=task.per_class, shape=pool.shape,
    )  # fmt: skip
    return objective, teachers.beginning(pool, run.model, network.params(), run.outer.start)
