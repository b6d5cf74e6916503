"""Where people put images: which files are of which split and class, found from what a folder or zip holds."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from envs.sources import cifar
from envs.sources.decoding import SUFFIXES, File, Root

Classes: TypeAlias = dict[str, list[File]]

NAMES = {"train": ("train", "base"), "validation": ("val", "validation", "valid"), "test": ("test", "novel")}
"""What folders, csv files and split files of a split are called."""
SPLIT_FILES = "train.txt, val.txt, test.txt or base.json, val.json, novel.json"
DEEPEST = 4  # folders with nothing beside them that a data set may lie in


@dataclass(frozen=True)
class Found:
    """A data set, before anything is decoded."""

    splits: dict[str, Classes]
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many files of a (split, suffix) are no images that are read."""


def find(path: Path, splits: str = "") -> Found:
    """The files of each split and class; `splits` as in ImageFolder. Raises ValueError where no layout is known."""
    archive = cifar.packed(path) if path.is_file() and tarfile.is_tarfile(path) else None
    top = root = path.parent if archive else opened(path)
    lists = _split_files(root, str(root / splits)) if archive and splits else {}
    for _ in range(DEEPEST):
        if not archive:  # else it is a tar, and what lies around it is somebody's downloads
            lists, archive = lists or _split_files(root, splits), cifar.found(root)
        found = (None if splits or archive else _listed(root) or _foldered(root)) or _named(root, archive, lists)
        if found:
            return found
        inner = [f for f in folders(root) if f.name not in ("splits", splits.partition("/")[0])]
        if archive or len(inner) != 1:
            break
        root = inner[0]
    raise ValueError(_unknown(path, top, splits, lists, archive))


def _unknown(path: Path, top: Root, splits: str, lists: dict[str, Root], archive: cifar.Cifar | None) -> str:
    if splits and not lists:
        return f"splits={splits!r} is no folder with {SPLIT_FILES}, absolute, in {path} or its splits/"
    if archive:
        return f"{path} is CIFAR-100, which has no few-shot splits: splits= a folder with {SPLIT_FILES} wanted"
    if lists:
        return f"{path} has a folder for none of the classes that {lists['train']} names, in images/, data/ or itself"
    names = sorted(f.name for f in top.iterdir() if visible(f))
    pickles = [n for n in names if n.endswith((".pkl", ".pickle")) or n.startswith("cifar-100-python")]
    if pickles or {"train", "test", "meta"} <= set(names):
        return f"{top / (pickles or ['train'])[0]} {cifar.PICKLED}"
    return (
        f"{path} has neither train.csv, val.csv, test.csv nor folders train/, val/, test/ nor split files "
        f"({SPLIT_FILES}) beside a folder per class: it holds {', '.join(names[:10]) or 'nothing'}"
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


def _split_files(root: Root, splits: str) -> dict[str, Root]:
    """The split files that a data set has, or that `splits` leads to."""
    inside = root / "splits"
    if splits:
        places: list[Root] = [Path(splits)] if Path(splits).is_absolute() else [root / splits, inside / splits]
    else:
        places = [inside, root, *(folders(inside) if inside.is_dir() else ())]
    there = [files for place in places if (files := three(place, ".txt") or three(place, ".json"))]
    if len(there) > 1 and not splits:
        named = ", ".join(str(files["train"]) for files in there)
        raise ValueError(f"{root} has several splits ({named}): splits= the folder of one of them wanted")
    return there[0] if there else {}


def _named(root: Root, archive: cifar.Cifar | None, lists: dict[str, Root]) -> Found | None:
    """A folder per class, in images/ (CUB-200-2011), data/ (CIFAR-FS) or beside the split files, which divide them; or
    CIFAR-100, divided by fine or coarse classes (CIFAR-FS, FC100).
    """
    named = {split: _classes(file) for split, file in lists.items()}
    if archive:
        return Found({s: _recorded(archive, names, lists[s]) for s, names in named.items()}) if lists else None
    everything = [name for names in named.values() for name in names]
    parents = (p for p in (root / "images", root / "data", root) if any((p / name).is_dir() for name in everything))
    parent = next(parents, None)
    if parent is None:
        return None
    found = Found({})
    for split, names in named.items():
        found.splits[split] = {}
        for name, files in names.items():
            if not (parent / name).is_dir():
                raise ValueError(f"{lists[split]} names class {name}, which has no folder in {parent}")
            found.splits[split][name] = (
                [parent / name / f for f in files] if files else images(parent / name, split, found.skipped)
            )
    return found


def _recorded(archive: cifar.Cifar, names: dict[str, list[str]], file: Root) -> Classes:
    for name in names:
        if not archive.classes(name):
            raise ValueError(f"{file} names class {name}, which is no fine or coarse class of CIFAR-100")
    return {fine: list(archive.images[fine]) for name in names for fine in archive.classes(name)}


def _classes(file: Root) -> dict[str, list[str]]:
    """The classes that a split file names, and which files of them; none: all.

    A text file has a class a line; json a list of classes, the last of a pair [coarse, fine], or an object whose
    `image_names` lists …/class/file.
    """
    if not file.name.endswith(".json"):
        return {line.strip(): [] for line in text(file).splitlines() if line.strip()}
    try:
        table = json.loads(text(file))
        if isinstance(table, list):
            return {str(name if isinstance(name, str) else name[-1]): [] for name in table}
        classes: dict[str, list[str]] = {}
        for name in table["image_names"]:
            _, folder, image = f"/{name}".rsplit("/", 2)
            classes.setdefault(folder, []).append(image)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} is neither a list of classes nor an object with image_names …/class/file ({error!r})"
        ) from error
    return classes
