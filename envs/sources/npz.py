"""Arrays of an .npz file as a source of episodes."""

from __future__ import annotations

import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from envs.base import SPLITS, Array, Arrays
from envs.sources.classes import collected, names_of
from envs.sources.labelled import Decoded
from envs.store import Index

log = logging.getLogger("metafleet")

Pair: TypeAlias = tuple[Array, Array]
"""Examples and their labels."""


@dataclass(frozen=True)
class Npz(Decoded):
    """Arrays of an .npz file: `train_x`, `train_y`, `validation_x` … `test_y`; or `x` and `y`, whose classes are those
    of the arrays `train_classes`, `validation_classes` and `test_classes`, or are divided by `train` and `validation`.

    x is [rows, …], images as bytes [rows, channels, height, width], y [rows] numbers or words.
    """

    path: ClassVar[str] = "file"
    file: str = ""
    """The .npz file."""
    train: float = 0.64
    """Of `x` and `y`: share of the classes that are for training."""
    validation: float = 0.16
    """Share for validation; the rest is for test."""

    def decode(self, path: Path, fingerprint: str) -> tuple[Array, Index]:
        content = content_of(path)
        pairs = {k[:-1] for k in content if k[-2:] in ("x", "y", "_x", "_y")}  # "" or "train_" …
        halves = [f"{k}{end}" for k in sorted(pairs) for end in "xy" if f"{k}{end}" not in content]
        if not pairs or halves or ("" in pairs and len(pairs) > 1):
            raise ValueError(
                f"{path} holds {', '.join(content) or 'nothing'}{f' and no {halves[0]}' if halves else ''}: x and y "
                "wanted, or train_x, train_y, validation_x, validation_y, test_x, test_y"
            )
        rows: Pair | dict[str, Pair] = {k[:-1]: (content[f"{k}x"], content[f"{k}y"]) for k in sorted(pairs)}
        if "" in pairs:
            rows = _listed(path, content) or (content["x"], content["y"])
        return collected(str(path), rows, self.train, self.validation, fingerprint)


def content_of(path: Path) -> Arrays:
    """The arrays of an .npz file by name. Raises ValueError for another file, and for one that holds objects."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file of plain arrays (no zip, or cut short)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays ({error})") from error


def _listed(path: Path, content: Arrays) -> dict[str, Pair]:
    """Rows of x and y by split, where the file lists classes; {} where it does not."""
    names = names_of(str(path), content["y"])
    keys = [f"{split}_classes" for split in SPLITS]
    lists = {s: names_of(f"{path}, {k}", content[k]) for s, k in zip(SPLITS, keys, strict=True) if k in content}
    if lists and len(lists) < len(SPLITS):
        raise ValueError(f"{path} lists classes for {', '.join(lists)}: {', '.join(keys)} wanted, or none")
    every = [name for part in lists.values() for name in part.tolist()]
    for name in every:
        if every.count(name) > 1 or name not in names:
            where = "in two places of its lists" if every.count(name) > 1 else "in its lists, and not in y"
            raise ValueError(f"{path} has the class {name} {where}; classes of y, each once, wanted")
    if lists and len(left := np.setdiff1d(names, every)):
        log.info("%s: %d classes are in no list (%s …), and left out", path, len(left), left[0])
    of = {split: np.isin(names, part) for split, part in lists.items()}
    return {split: (content["x"][rows], content["y"][rows]) for split, rows in of.items()}
