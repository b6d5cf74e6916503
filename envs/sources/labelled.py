"""Labelled examples that are no folder of images: arrays and Datasets in memory, and what files of such have in
common.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from envs import store
from envs.base import SPLITS, Array
from envs.store import ImageSet, Index

log = logging.getLogger("metafleet")

ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
"""What else a validation split is called."""


@dataclass(frozen=True)
class Stored:
    """Examples in the data folder, as `from_arrays` and `from_datasets` put them there."""

    name: str
    """Folder within the data folder, a hash of the content."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.load().images.shape[1:]

    def prepare(self) -> None:
        self.load()

    def files(self) -> tuple[str, ...]:
        return store.files(self.name)

    def load(self) -> ImageSet:
        return store.load(store.data_folder(), self.name)


class Decoded(ABC):
    """A source that is decoded into the data folder once: a frozen dataclass that says how."""

    path: ClassVar[str]
    """Which of its keys leads to the data."""
    train: float
    validation: float

    @abstractmethod
    def decode(self, path: Path) -> tuple[Array, Index]:
        """What is there, with `seen(path)` for a fingerprint."""

    def __post_init__(self) -> None:
        if not (0 < self.train < 1 and 0 < self.validation < 1 - self.train):
            raise ValueError(
                f"train={self.train}, validation={self.validation}: shares above 0 that leave some for test wanted"
            )
        given = getattr(self, self.path)
        if given:  # once, where the run is configured: workers may have another working directory
            object.__setattr__(self, self.path, str(Path(given).expanduser().absolute()))

    @property
    def shape(self) -> tuple[int, ...]:
        self.prepare()
        return self.load().images.shape[1:]

    def prepare(self) -> None:
        given = getattr(self, self.path)
        if given and Path(given).exists():
            store.write_once(self._name, seen(Path(given)), lambda: self.decode(Path(given)))
        elif not (store.data_folder() / self.files()[1]).exists():  # decoded before, where the data were
            raise FileNotFoundError(f"task.source.{self.path}={given!r} does not exist")

    def files(self) -> tuple[str, ...]:
        return store.files(self._name)

    def load(self) -> ImageSet:
        return store.load(store.data_folder(), self._name)

    @property
    def _name(self) -> str:
        return f"{type(self).__name__.lower()}-{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


def from_arrays(
    x: ArrayLike | Mapping[str, tuple[ArrayLike, ArrayLike]], y: ArrayLike | None = None, *, train: float = 0.64,
    validation: float = 0.16,
) -> Stored:  # fmt: skip
    """A source of episodes from examples x [rows, …] with classes y [rows]; or from {split: (x, y)}.

    Images are bytes [rows, channels, height, width], or numbers from 0 to 1; anything else [rows, …] will do for a
    model that takes it. The classes of x and y are divided among train, validation and test. What is given is written
    into the data folder, under a hash of it. Raises ValueError for numbers that are not finite, labels that do not fit
    their rows, and splits without a class.
    """
    rows: Any = x if isinstance(x, Mapping) else (x, y)
    array, index = collected("the arrays", rows, train, validation, "")
    content = hashlib.sha256(array.tobytes() + repr(index).encode()).hexdigest()
    name = f"arrays-{content[:16]}"
    store.write_once(name, content, lambda: (array, Index(index.classes, index.starts, index.splits, content)))
    return Stored(name)


def from_datasets(
    data: Mapping[str, Iterable[tuple[Any, Any]]] | Iterable[tuple[Any, Any]], *, size: int = 84, train: float = 0.64,
    validation: float = 0.16,
) -> Stored:  # fmt: skip
    """The same from a `torch.utils.data.Dataset` that yields (example, label), or {split: Dataset}; each is read once.

    Examples are tensors, arrays, or PIL images, which are resized to size × size.
    """
    if isinstance(data, Mapping):
        return from_arrays({split: _read(part, size) for split, part in data.items()}, train=train,
                           validation=validation)  # fmt: skip
    x, y = _read(data, size)
    return from_arrays(x, y, train=train, validation=validation)


def _read(data: Any, size: int) -> tuple[list[Array], list[Any]]:
    # By index where there is one: a Dataset without an end of its own would be read for ever.
    pairs = (data[i] for i in range(len(data))) if hasattr(data, "__getitem__") and hasattr(data, "__len__") else data
    x, y = [], []
    for example, label in pairs:
        x.append(decoded(example, size))
        y.append(np.asarray(label).item())
    return x, y


def decoded(example: Any, size: int) -> Array:
    """An example as an array; a PIL image as bytes [3, size, size]."""
    if hasattr(example, "getbands"):
        from envs.sources.decoding import flat  # Pillow takes its time to load

        return flat(example, size, (255, 255, 255))
    return np.asarray(example)


def collected(
    what: str, rows: Any, train: float, validation: float, fingerprint: str
) -> tuple[Array, Index]:  # fmt: skip
    """Examples, class by class, and their index: of {split: (x, y)}, or of (x, y), whose classes are divided."""
    if isinstance(rows, Mapping):
        parts: dict[str, Any] = {ALIASES.get(str(split), str(split)): part for split, part in rows.items()}
        labels = {split: {str(v) for v in y} for split, (_, y) in parts.items()}
        shared = {a for s, t in combinations(labels, 2) for a in labels[s] & labels[t]}
        if not shared:
            missing = [s for s in SPLITS if s not in parts]
            if missing:
                raise ValueError(
                    f"{what} has no {missing[0]} split, but {', '.join(parts)}: {', '.join(SPLITS)} wanted"
                )
            return _arranged(what, {s: _grouped(what, *parts[s]) for s in SPLITS}, fingerprint)
        log.info(
            "%s: %d classes are in two splits (%s …): all rows together, classes divided %g to training and %g to "
            "validation", what, len(shared), min(shared), train, validation,
        )  # fmt: skip
        rows = tuple(np.concatenate([np.asarray(part[i]) for part in parts.values()]) for i in range(2))
    groups = _grouped(what, *rows)
    return _arranged(what, divided(what, groups, train, validation), fingerprint)


def divided(
    what: str, groups: Mapping[str, Array], train: float, validation: float
) -> dict[str, dict[str, Array]]:  # fmt: skip
    """Classes by split: always the same ones, in an order that does not follow their names."""
    names = sorted(groups)
    if len(names) < len(SPLITS):
        raise ValueError(f"{what} has {len(names)} classes: at least one for each of {', '.join(SPLITS)} wanted")
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    first = min(max(1, round(train * len(names))), len(names) - 2)
    second = min(max(first + 1, round((train + validation) * len(names))), len(names) - 1)
    return {
        split: {name: groups[name] for name in sorted(part)}
        for split, part in zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True)
    }


def _grouped(what: str, x: Any, y: Any) -> dict[str, Array]:
    """Rows by class. Raises ValueError for what is no rectangle of finite numbers."""
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{what}: examples of unequal shapes; one shape wanted") from error
    y = np.asarray(y)
    if x.dtype.kind not in "uifb" or x.ndim < 2:
        raise ValueError(f"{what}: examples are {x.dtype} {x.shape}; numbers [rows, …] wanted")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{what}: {len(x)} examples and labels of shape {y.shape}; one label for each wanted")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
        if len(wrong):
            raise ValueError(f"{what}: example {wrong[0]} (of {len(wrong)}) holds NaN or infinity")
    names = y.astype(str)
    return {str(name): x[names == name] for name in np.unique(names)}


def _arranged(
    what: str, parts: Mapping[str, Mapping[str, Array]], fingerprint: str
) -> tuple[Array, Index]:  # fmt: skip
    rows: list[Array] = []
    names: list[str] = []
    splits: dict[str, list[int]] = {}
    for split, groups in parts.items():
        splits[split] = list(range(len(names), len(names) + len(groups)))
        names += groups
        rows += groups.values()
    shapes = {r.shape[1:] for r in rows}
    if len(shapes) > 1:
        raise ValueError(f"{what}: examples of shapes {' and '.join(map(str, sorted(shapes)))}; one shape wanted")
    starts = [0, *np.cumsum([len(r) for r in rows]).tolist()]
    return np.concatenate(rows), Index(names, starts, splits, fingerprint)


def seen(path: Path) -> str:
    """Changes with any file's name, size or time."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    listed = "".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    return hashlib.sha256(listed.encode()).hexdigest()
