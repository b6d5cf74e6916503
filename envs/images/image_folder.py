"""Any class-labelled image set: csv files beside images (MiniImagenet's layout), or train, val and test with a folder
per class.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from envs import store
from envs.store import ImageSet, Index

Root: TypeAlias = Path | zipfile.Path
CSV = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LARGEST_IMAGE = 64 << 20  # bytes in the file; and pixels, by Pillow's own limit


@dataclass(frozen=True)
class ImageFolder:
    """RGB images of a folder or zip, resized to size × size (Lanczos).

    Recognised layouts: `train.csv`, `val.csv`, `test.csv` (columns filename, label) with the files under `images/` or
    beside the csv; or folders `train/`, `val/`, `test/`, each with a folder per class.
    """

    folder: str = ""
    """The folder, or the zip, that holds the data set."""
    size: int = 84
    """Height and width in pixels."""

    def __post_init__(self) -> None:
        # once, where the run is configured: workers may have another home and another working directory
        if self.folder:
            object.__setattr__(self, "folder", str(Path(self.folder).expanduser().absolute()))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    @property
    def _name(self) -> str:
        return f"images-{hashlib.sha256(self.folder.encode()).hexdigest()[:12]}-{self.size}"

    def prepare(self) -> None:
        path = Path(self.folder)
        if not self.folder or not path.exists():
            raise FileNotFoundError(
                f"task.source.folder={self.folder!r} does not exist: a folder or a zip of images is wanted"
            )
        fingerprint = _fingerprint(path)
        store.write_once(self._name, fingerprint, lambda: self._decode(path, fingerprint))

    def files(self) -> tuple[str, ...]:
        return store.files(self._name)

    def load(self) -> ImageSet:
        return store.load(store.data_folder(), self._name)

    def _decode(self, path: Path, fingerprint: str) -> tuple[NDArray[np.uint8], Index]:
        try:
            root: Root = zipfile.Path(path) if path.is_file() else path
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a whole zip archive ({error}); fetch it again") from error
        by_split = _listed(root) or _foldered(root)
        if not by_split:
            raise ValueError(f"{path} has neither train.csv, val.csv, test.csv nor folders train/, val/, test/")
        names: list[str] = []
        starts, splits = [0], {}
        images: list[NDArray[np.uint8]] = []
        for split, classes in by_split.items():
            splits[split] = list(range(len(names), len(names) + len(classes)))
            for label in sorted(classes):
                if not classes[label]:
                    raise ValueError(
                        f"{path}: class {label} of the {split} split has no image ({', '.join(SUFFIXES)}) directly in "
                        "its folder"
                    )
                images += [_image(file, self.size) for file in classes[label]]
                names.append(label)
                starts.append(len(images))
        return np.stack(images), Index(names, starts, splits, fingerprint)


def _fingerprint(path: Path) -> str:
    """Changes with any file's name, size or time."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    seen = "".join(f"{f.relative_to(path.parent)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    return hashlib.sha256(seen.encode()).hexdigest()


def _listed(root: Root) -> dict[str, dict[str, list[Root]]]:
    if not all((root / file).exists() for file in CSV.values()):
        return {}
    images = root / "images" if (root / "images").exists() else root
    found: dict[str, dict[str, list[Root]]] = {}
    for split, file in CSV.items():
        classes: dict[str, list[Root]] = {}
        for row in csv.DictReader(io.StringIO(_text(root / file))):
            if not row.get("filename") or not row.get("label"):
                raise ValueError(f"{root / file} has the columns {', '.join(row)}, wanted filename,label")
            classes.setdefault(row["label"], []).append(images / row["filename"])
        found[split] = classes
    return found


def _text(file: Root) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable ({error})") from error


def _foldered(root: Root) -> dict[str, dict[str, list[Root]]]:
    found: dict[str, dict[str, list[Root]]] = {}
    for split, names in FOLDERS.items():
        for folder in (root / name for name in names if (root / name).is_dir()):
            found[split] = {
                c.name: sorted((f for f in c.iterdir() if f.name.lower().endswith(SUFFIXES)), key=lambda f: f.name)
                for c in folder.iterdir() if c.is_dir()
            }  # fmt: skip
    return found if len(found) == len(FOLDERS) else {}


def _image(file: Root, size: int) -> NDArray[np.uint8]:
    try:
        with file.open("rb") as f:
            content = f.read(LARGEST_IMAGE + 1)
        if len(content) > LARGEST_IMAGE:
            raise ValueError(f"{file} is larger than {LARGEST_IMAGE} bytes")
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):  # converting would cut values off at 255
                raise ValueError(f"{file} has pixels of mode {image.mode}: 8 bits per channel wanted")
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        OSError,
    ) as error:
        raise ValueError(f"{file} is not a readable image ({error})") from error
    return pixels.transpose(2, 0, 1)
