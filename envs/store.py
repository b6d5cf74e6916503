"""The data folder: image sets, or other labelled examples, as plain arrays that every process of a node maps."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray


def data_folder() -> Path:
    """$METAFLEET_DATA, or ~/.cache/metafleet."""
    return Path(os.environ.get("METAFLEET_DATA") or Path.home() / ".cache" / "metafleet")


@dataclass(frozen=True)
class Index:
    """Images of class c are rows starts[c] : starts[c+1]; `splits` lists the classes of each split."""

    classes: list[str]
    starts: list[int]
    splits: dict[str, list[int]]
    fingerprint: str = ""
    """What the source looked like when it was decoded; another one means decode again."""


@dataclass(frozen=True)
class ImageSet:
    """A class-indexed array of examples, mapped read-only: images [n, channels, height, width] as bytes, or any numbers
    [n, …].
    """

    images: NDArray[Any]
    index: Index

    def classes(self, split: str) -> list[int]:
        """Class numbers of a split."""
        return self.index.splits[split]

    def rows(self, label: int) -> range:
        """Row numbers of a class's images."""
        return range(self.index.starts[label], self.index.starts[label + 1])

    def values(self, rows: Any) -> NDArray[np.float32]:
        """Examples as float32: bytes as numbers from 0 to 1, others as they are."""
        picked = self.images[rows]
        if picked.dtype == np.uint8:
            return np.asarray(np.divide(picked, 255, dtype=np.float32))
        return np.asarray(picked, np.float32)


class Kept(ABC):
    """A source of examples that stand in the data folder under a name."""

    @property
    @abstractmethod
    def _name(self) -> str:
        """Folder within the data folder: whatever changes the examples changes it."""

    def files(self) -> tuple[str, ...]:
        """The decoded files, relative to the data folder."""
        return files(self._name)

    def load(self) -> ImageSet:
        """The decoded examples, mapped."""
        return load(data_folder(), self._name)


def files(name: str) -> tuple[str, ...]:
    """Paths of a stored set, relative to the data folder."""
    return (f"{name}/images.npy", f"{name}/index.json")


def write_once(name: str, fingerprint: str, decode: Callable[[], tuple[NDArray[Any], Index]]) -> None:
    """Store what `decode` returns as set `name`, unless it is there already; one process at a time."""
    images_path, index_path = (data_folder() / f for f in files(name))
    images_path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(images_path.parent / "lock"):
        if index_path.exists() and images_path.exists() and _read_index(index_path).fingerprint == fingerprint:
            return
        images, index = decode()
        index_path.unlink(missing_ok=True)
        install(files(name)[0], lambda path: _save_array(path, images))
        # The index comes last: where it stands, the set is complete.
        install(files(name)[1], lambda path: path.write_text(json.dumps(asdict(index))))
        load.cache_clear()


def install(relative: str, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `relative` in the data folder, then move it there in one step."""
    path = data_folder() / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=4)
def load(folder: Path, name: str) -> ImageSet:
    """Map a stored set. Raises FileNotFoundError where it has not been prepared."""
    images_path, index_path = (folder / f for f in files(name))
    if not index_path.exists():
        raise FileNotFoundError(f"{index_path} does not exist: the data set was not prepared (METAFLEET_DATA={folder})")
    images = np.load(images_path, mmap_mode="r", allow_pickle=False)
    index = _read_index(index_path)
    if images.dtype not in (np.uint8, np.float32) or images.ndim < 2 or index.starts[-1] != len(images):
        raise ValueError(
            f"{images_path} holds {images.dtype} {images.shape}, wanted uint8 or float32 [{index.starts[-1]}, …]; "
            "delete it to decode again"
        )
    return ImageSet(images, index)


def fingerprint(relative: str) -> str:
    """Size of a file of the data folder, and for an index its hash too; "" where it does not exist."""
    path = data_folder() / relative
    if not path.exists():
        return ""
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".json" else ""
    return f"{path.stat().st_size} {content}"


def _read_index(path: Path) -> Index:
    return Index(**json.loads(path.read_text()))


def _save_array(path: Path, images: NDArray[Any]) -> None:
    with open(path, "wb") as f:
        np.save(f, images, allow_pickle=False)
