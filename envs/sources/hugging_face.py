"""A Hugging Face `datasets` directory as a source of episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from envs.base import Array
from envs.sources.classes import collected
from envs.sources.labelled import Decoded, decoded
from envs.store import Index


@dataclass(frozen=True)
class HuggingFace(Decoded):
    """A `datasets` directory (`save_to_disk`), read once; labels say the class.

    Splits named train, validation and test are taken as they are where no two share a class; where some do, or there
    is one split alone, all rows are put together, and classes are divided by `train` and `validation`, since few-shot
    tasks at test are of classes that training has not seen. The log says which.
    """

    path: ClassVar[str] = "folder"
    folder: str = ""
    """The directory."""
    image: str = ""
    """Column of the examples; empty: the only one of images."""
    label: str = ""
    """Column of the classes; empty: the only one of class labels."""
    size: int = 84
    """Images are resized to size × size; columns of numbers are as they are."""
    train: float = 0.64
    """Where classes are divided: the share that is for training."""
    validation: float = 0.16
    """Share for validation; the rest is for test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size={self.size}: at least 1 wanted")

    def decode(self, path: Path, fingerprint: str) -> tuple[Array, Index]:
        try:
            from datasets import Dataset, load_from_disk
        except ModuleNotFoundError as error:
            raise ValueError(
                "a Hugging Face directory wants the package datasets: pip install 'metafleet[hf]'"
            ) from error
        try:
            found = load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a directory of save_to_disk ({error})") from error
        parts = {"": found} if isinstance(found, Dataset) else dict(found)
        rows = {split: self._rows(f"{path}, {split}" if split else str(path), part) for split, part in parts.items()}
        return collected(str(path), rows.get("", rows), self.train, self.validation, fingerprint)

    def _rows(self, what: str, part: Any) -> tuple[list[Array], list[Any]]:
        from datasets import ClassLabel, Image

        image = self.image or self._only(what, part, "Image", "image")
        label = self.label or self._only(what, part, "ClassLabel", "label")
        for key, column in (("image", image), ("label", label)):
            if column not in part.features:
                raise ValueError(f"{key}={column!r} is not a column of {what}: {', '.join(part.features)}")
        pixels, classes = isinstance(part.features[image], Image), part.features[label]
        # A directory remembers what its rows were to come as (arrays, undecoded); here they come as they are.
        part = part.with_format(None)
        if pixels:
            part = part.cast_column(image, Image())
        x, y = [], list(part[label])
        for row, value in enumerate(part[image]):
            if value is None:
                raise ValueError(f"{what}: row {row} of {image} is empty")
            x.append(decoded(value, self.size) if pixels else np.asarray(value, _dtype(part.features[image])))
        if isinstance(classes, ClassLabel):
            bare = [i for i, v in enumerate(y) if v in (None, -1)]  # −1: how many publish a test split
            if bare:
                raise ValueError(f"{what}: row {bare[0]} of {label} is {y[bare[0]]}; a class for each wanted")
            y = classes.int2str(y)
        return x, y

    def _only(self, what: str, part: Any, kind: str, key: str) -> str:
        columns = [name for name, feature in part.features.items() if type(feature).__name__ == kind]
        if len(columns) != 1:
            raise ValueError(
                f"{what} has {len(columns)} columns of {kind}: --task.source.{key} wanted, one of "
                f"{', '.join(part.features)}"
            )
        return str(columns[0])


def _dtype(feature: Any) -> np.dtype[Any] | None:
    """Of the numbers in a column of lists; None where they are no numbers."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    try:
        kind: np.dtype[Any] = np.dtype(feature.dtype)
    except (AttributeError, TypeError):
        return None
    return kind
