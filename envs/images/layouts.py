"""Where people put images: which files are of which split and class, found from what a folder or zip holds."""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from envs.images.decoding import SUFFIXES, File

Root: TypeAlias = Path | zipfile.Path
Classes: TypeAlias = dict[str, list[File]]

NAMES = {"train": ("train", "base"), "validation": ("val", "validation", "valid"), "test": ("test", "novel")}
"""What folders, csv files and split files of a split are called."""
DEEPEST = 4  # folders with nothing beside them that a data set may lie in


@dataclass(frozen=True)
class Found:
    """A data set, before anything is decoded."""

    splits: dict[str, Classes]
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many files of a (split, suffix) are no images that are read."""


def find(path: Path) -> Found:
    """The files of each split and class. Raises ValueError where the layout is none that is known."""
    top = root = opened(path)
    for _ in range(DEEPEST):
        found = _listed(root) or _foldered(root)
        if found:
            return found
        inner = folders(root)
        if len(inner) != 1:
            break
        root = inner[0]
    seen = ", ".join(sorted(f.name for f in top.iterdir() if visible(f))[:10]) or "nothing"
    raise ValueError(
        f"{path} has neither train.csv, val.csv, test.csv nor folders train/, val/, test/: it holds {seen}"
    )


def opened(path: Path) -> Root:
    """A folder, or a zip as one."""
    try:
        return zipfile.Path(path) if path.is_file() else path
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip archive ({error}); fetch it again") from error


def visible(file: Root) -> bool:
    """Whether it is somebody's, and not left there by a file manager or notebook."""
    return not file.name.startswith(".") and file.name != "__MACOSX"


def folders(root: Root) -> list[Root]:
    """Folders directly in a folder, in the order of their names."""
    return sorted((f for f in root.iterdir() if visible(f) and f.is_dir()), key=lambda f: f.name)


def text(file: Root) -> str:
    """What a text file holds. Raises ValueError with its name."""
    try:
        return file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable ({error})") from error


def three(root: Root, suffix: str) -> dict[str, Root]:
    """The file or folder of each split, by its name; nothing where one lacks."""
    found = {}
    for split, names in NAMES.items():
        there = [root / f"{name}{suffix}" for name in names if (root / f"{name}{suffix}").exists()]
        if there:
            found[split] = there[0]
    return found if len(found) == len(NAMES) else {}


def images(folder: Root, split: str, skipped: Counter[tuple[str, str]]) -> list[File]:
    """Image files directly in a folder, in the order of their names; the others are counted."""
    kept: list[File] = []
    for file in filter(visible, folder.iterdir()):
        if file.name.lower().endswith(SUFFIXES):
            kept.append(file)
        else:
            skipped[split, "folder" if file.is_dir() else Path(file.name).suffix.lower() or "no suffix"] += 1
    return sorted(kept, key=lambda f: f.name)


def _listed(root: Root) -> Found | None:
    """MiniImagenet's: a csv per split with the columns filename, label; files under images/ or beside it."""
    inside = root / "images" if (root / "images").exists() else root
    found: dict[str, Classes] = {}
    for split, file in three(root, ".csv").items():
        classes: Classes = {}
        rows = csv.DictReader(io.StringIO(text(file)))
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} has the columns {', '.join(rows.fieldnames or ())}, wanted filename,label")
        for row in rows:
            if not row["filename"] or not row["label"]:
                raise ValueError(f"{file}, line {rows.line_num}: {row}, wanted a filename and a label")
            classes.setdefault(row["label"], []).append(inside / row["filename"])
        found[split] = classes
    return Found(found) if found else None


def _foldered(root: Root) -> Found | None:
    """A folder per split with a folder per class (also tieredImageNet's)."""
    found = Found({})
    for split, folder in three(root, "").items():
        if not folder.is_dir():
            return None
        found.splits[split] = {c.name: images(c, split, found.skipped) for c in folders(folder)}
    return found if found.splits else None
