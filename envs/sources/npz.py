"""Arrays of an .npz file as a source of episodes."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from envs.base import SPLITS, Array
from envs.sources.labelled import ALIASES, Decoded, collected, seen
from envs.store import Index


@dataclass(frozen=True)
class Npz(Decoded):
    """Arrays of an .npz file: `train_x`, `train_y`, `validation_x` … `test_y`; or `x` and `y` alone, whose classes are
    divided among the splits by `train` and `validation`.

    x is [rows, …], images as bytes [rows, channels, height, width], y [rows] numbers or words.
    """

    path: ClassVar[str] = "file"
    file: str = ""
    """The .npz file."""
    train: float = 0.64
    """Of `x` and `y`: share of the classes that are for training."""
    validation: float = 0.16
    """Share for validation; the rest is for test."""

    def decode(self, path: Path) -> tuple[Array, Index]:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                content = {k: arrays[k] for k in arrays.files}
        except (ValueError, OSError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an .npz file of plain arrays ({error})") from error
        names = {k.removesuffix("_x") for k in content if k.endswith("_x")}
        parts = {s: (content[f"{s}_x"], content[f"{s}_y"]) for s in sorted(names) if f"{s}_y" in content}
        if {ALIASES.get(s, s) for s in parts} >= set(SPLITS):
            return collected(str(path), parts, self.train, self.validation, seen(path))
        if not {"x", "y"} <= content.keys():
            raise ValueError(
                f"{path} holds {', '.join(content) or 'nothing'}: x and y wanted, or train_x, train_y, validation_x, "
                "validation_y, test_x, test_y"
            )
        return collected(str(path), (content["x"], content["y"]), self.train, self.validation, seen(path))
