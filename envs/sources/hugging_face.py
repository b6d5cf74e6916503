"""A Hugging Face `datasets` directory as a source of episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from envs.base import Array
from envs.sources.labelled import Decoded, collected, decoded, seen
from envs.store import Index


@dataclass(frozen=True)
class HuggingFace(Decoded):
    """A `datasets` directory (`save_to_disk`), read once; labels say the class.

    Splits named train, validation and test are taken as they are where no two share a class; otherwise all rows are
    put together, and classes are divided by `train` and `validation`, since few-shot tasks at test are of classes
    that training has not seen. The log says which.
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

    def decode(self, path: Path) -> tuple[Array, Index]:
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
        rows = {split: self._rows(path, part) for split, part in parts.items()}
        return collected(str(path), rows.get("", rows), self.train, self.validation, seen(path))

    def _rows(self, path: Path, part: Any) -> tuple[list[Any], list[Any]]:
        image = self.image or self._only(path, part, "Image", "image")
        label = self.label or self._only(path, part, "ClassLabel", "label")
        for key, column in (("image", image), ("label", label)):
            if column not in part.features:
                raise ValueError(f"{key}={column!r} is not a column of {path}: {', '.join(part.features)}")
        names = getattr(part.features[label], "int2str", str)
        x = [decoded(v, self.size) for v in part[image]]
        return x, [names(v) for v in part[label]]

    def _only(self, path: Path, part: Any, kind: str, key: str) -> str:
        columns = [name for name, feature in part.features.items() if type(feature).__name__ == kind]
        if len(columns) != 1:
            raise ValueError(
                f"{path} has {len(columns)} columns of {kind}: --task.source.{key} wanted, one of "
                f"{', '.join(part.features)}"
            )
        return str(columns[0])
