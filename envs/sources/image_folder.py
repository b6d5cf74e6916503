"""Any class-labelled image set, from a folder or zip in one of the layouts of `envs/sources/layouts.py`."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from envs import store
from envs.sources import decoding, layouts
from envs.sources.census import Census
from envs.sources.decoding import SUFFIXES, WHITE, Color
from envs.store import Index, Kept

log = logging.getLogger("metafleet")


@dataclass(frozen=True)
class ImageFolder(Kept):
    """RGB images of a folder or zip, resized to size × size (Lanczos), upright as EXIF says.

    Recognised layouts: `train.csv`, `val.csv`, `test.csv` (columns filename, label) with the files under `images/` or
    beside the csv; folders `train/`, `val/`, `test/`, each with a folder per class; or split files, which name the
    classes of each split, beside a folder per class or CIFAR-100's binary archive. Of equal files in a class one
    counts.
    """

    LATER: ClassVar = ("background", "splits")
    folder: str = ""
    """The folder, zip or (CIFAR-100's) tar that holds the data set."""
    size: int = 84
    """Height and width in pixels."""
    background: Color = WHITE
    """What shows through where an image is transparent."""
    splits: str = ""
    """Folder of the split files: in the data set or its splits/ (of a tar: beside it), or absolute; empty: the only one
    found there.
    """

    def __post_init__(self) -> None:
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background={self.background}: three values from 0 to 255 wanted")
        # once, where the run is configured: workers may have another home and another working directory
        if self.folder:
            object.__setattr__(self, "folder", str(Path(self.folder).expanduser().absolute()))
        object.__setattr__(self, "splits", self.splits and str(Path(self.splits).expanduser()))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    @property
    def _name(self) -> str:
        changed = [str(v) for v, default in ((self.background, WHITE), (self.splits, "")) if v != default]
        key = "\n".join((self.folder, *changed))
        return f"images-{hashlib.sha256(key.encode()).hexdigest()[:12]}-{self.size}"

    @property
    def _remarks(self) -> str:
        return f"{self._name}/remarks.txt"

    def prepare(self) -> None:
        path = Path(self.folder)
        if not self.folder or not path.exists():
            raise FileNotFoundError(
                f"task.source.folder={self.folder!r} does not exist: a folder or a zip of images is wanted"
            )
        fingerprint = decoding.seen(path, *([path.parent / self.splits] if self.splits else []))
        store.write_once(self._name, fingerprint, lambda: self._decode(path, fingerprint))
        # In every run that uses the set, not only in the one that decoded it.
        remarks = store.data_folder() / self._remarks
        for remark in remarks.read_text().splitlines() if remarks.exists() else ():
            log.warning("%s: %s", path, remark)

    def decoded(self, file: Path) -> NDArray[np.uint8]:
        """An image file as the set has its own."""
        return decoding.pixels(file, decoding.read(file), self.size, self.background)

    def _decode(self, path: Path, fingerprint: str) -> tuple[NDArray[np.uint8], Index]:
        found = layouts.find(path, self.splits)
        census = Census()
        names: list[str] = []
        starts, splits = [0], {}
        listed = sum(len(files) for classes in found.splits.values() for files in classes.values())
        images = np.empty((listed, *self.shape), np.uint8)
        for split, classes in found.splits.items():
            splits[split] = list(range(len(names), len(names) + len(classes)))
            for label in sorted(classes):
                if not classes[label]:
                    raise ValueError(
                        f"{path}: class {label} of the {split} split has no image ({', '.join(SUFFIXES)}) directly in "
                        "its folder"
                    )
                end = starts[-1]
                try:
                    for file in classes[label]:
                        content = decoding.read(file)
                        if census.new(split, label, str(file), content):
                            images[end] = decoding.pixels(file, content, self.size, self.background)
                            end += 1
                except ValueError as error:
                    raise ValueError(f"class {label} of the {split} split: {error}") from error
                names.append(label)
                starts.append(end)
        remarks = "".join(f"{r}\n" for r in census.remarks(found))
        store.install(self._remarks, lambda file: file.write_text(remarks))
        return images[: starts[-1]], Index(names, starts, splits, fingerprint)
