"""What a task is: data drawn from a family of tasks by a generator that belongs to the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array: TypeAlias = NDArray[np.generic]
Arrays: TypeAlias = dict[str, Array]
Predict: TypeAlias = Callable[[Array], list[Array]]
Frames: TypeAlias = NDArray[np.uint8]
"""[time, height, width, 3]."""


class Clip(NamedTuple):
    """A film, and what is to be said of each of its frames."""

    frames: Frames
    captions: list[str]
    seconds: float
    """Between two frames."""


HOST = "host/"
"""Arrays under `host/name` choose code, and stay in the memory of the CPU wherever the others go."""
TEACHER = f"{HOST}teacher"
"""Number of the teacher that a task of a data-free run is about."""
SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
TEACHERS, ADVERSARY = "teachers", "adversary"
"""Splits of data-free runs: one task per teacher; fresh episodes to be made harder."""


class TaskDistribution(Protocol):
    """A family of tasks; it travels to the workers, so it must be picklable.

    A task is a pure function of (split, generator): `sample` returns every array of it, and all tasks of a split
    have equal keys, shapes and dtypes, so that they stack. Supervised tasks use the keys `support_x`, `support_y`,
    `query_x`, `query_y`; a task without a query set (Reptile's training) leaves the last two out. Support and query
    sets may differ in size from task to task: those of a shard are padded, and masked in sums and measures. Where ways
    differ, `class_mask` [C] says which of the model's C classes a task has.
    """

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        """One task of `split` ("train", "validation" or "test")."""


class TaskFamily(TaskDistribution, Protocol):
    """A TaskDistribution that a configuration can name: a frozen dataclass that says what model it wants."""

    @property
    def kind(self) -> Literal["regression", "classification", "control"]:
        """What the targets are: numbers, or class labels; or that tasks are lived through, by `rollout`."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""

    @property
    def outputs(self) -> int:
        """Regression: number of targets. Classification: number of ways. Control: dimensions of an action."""

    def prepare(self) -> None:
        """Fetch, check and decode what the tasks are made of. Called once, by the driver; a no-op for most."""


@runtime_checkable
class HasFiles(Protocol):
    """Tasks made of prepared files."""

    def files(self) -> tuple[str, ...]:
        """The files, relative to the data folder, that every worker must be able to map."""


@runtime_checkable
class HasPicture(Protocol):
    """Tasks that can show what adaptation does to them."""

    def picture(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> Figure:
        """`predict[i](x)` gives the outputs of task i after each of `steps`."""


@runtime_checkable
class HasFilm(Protocol):
    """Tasks that can be watched."""

    def film(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> list[list[Clip]]:
        """Per task and number of inner steps, an episode in which `predict` (without noise) acts.

        Raises RuntimeError where nothing can be rendered.
        """

    def title(self, task: Arrays) -> str:
        """What the task is, in a few words."""


@runtime_checkable
class HasFixedTasks(Protocol):
    """Tasks that a protocol fixes one by one, so that results compare with published ones."""

    def fixed(self, split: str, index: int) -> Arrays | None:
        """Task `index` of `split`; None where it is drawn."""


@runtime_checkable
class HasGroups(Protocol):
    """Tasks of a few kinds whose results are also reported apart."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the kinds; () where there are none."""

    def group(self, task: Arrays) -> int:
        """Index into `groups`."""


def check_split(split: str) -> None:
    """Raise ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
