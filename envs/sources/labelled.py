"""Labelled examples that are no folder of images: arrays and Datasets in memory, and what files of such have in
common.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import ArrayLike

from envs import store
from envs.base import Array
from envs.sources.classes import collected, plain
from envs.sources.decoding import WHITE, flat, seen
from envs.store import Index, Kept


@dataclass(frozen=True)
class Stored(Kept):
    """Examples in the data folder, as `from_arrays` and `from_datasets` put them there."""

    key: str
    """Folder within the data folder, a hash of the content."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.load().images.shape[1:]

    def prepare(self) -> None:
        self.load()

    @property
    def _name(self) -> str:
        return self.key


class Decoded(Kept):
    """A source that is decoded into the data folder once: a frozen dataclass that says how."""

    path: ClassVar[str]
    """Which of its keys leads to the data."""
    train: float
    validation: float

    @abstractmethod
    def decode(self, path: Path, fingerprint: str) -> tuple[Array, Index]:
        """What is there."""

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
        if not (store.data_folder() / self.files()[1]).exists():  # else as decoded: a run that goes on changes nothing
            self.prepare()
        return self.load().images.shape[1:]

    def prepare(self) -> None:
        given = getattr(self, self.path)
        if given and Path(given).exists():
            fingerprint = seen(Path(given))
            store.write_once(self._name, fingerprint, lambda: self.decode(Path(given), fingerprint))
        elif not (store.data_folder() / self.files()[1]).exists():  # decoded before, where the data were
            raise FileNotFoundError(f"task.source.{self.path}={given!r} does not exist")

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
    if isinstance(x, Mapping) and y is not None:
        raise ValueError("both {split: (x, y)} and y were given; one of them wanted")
    rows: Any = x if isinstance(x, Mapping) else (x, y)
    array, index = collected("the arrays", rows, train, validation, "")
    # Equal bytes may be of other shapes or kinds.
    content = hashlib.sha256(f"{array.dtype} {array.shape} {index}".encode() + array.tobytes()).hexdigest()
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
    for row, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"the Dataset's row {row} is {_brief(pair)}; a pair (example, label) wanted")
        label = plain(pair[1])
        if label.size != 1:
            raise ValueError(f"the Dataset's row {row} has a label of shape {label.shape}; one number or word wanted")
        x.append(decoded(pair[0], size))
        y.append(label.item())
    return x, y


def _brief(value: Any) -> str:
    return f"{type(value).__name__}{f' of {len(value)}' if hasattr(value, '__len__') else ''}"


def decoded(example: Any, size: int) -> Array:
    """An example as an array; a PIL image as bytes [3, size, size]."""
    return flat(example, size, WHITE) if hasattr(example, "getbands") else plain(example)
