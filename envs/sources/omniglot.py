"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1623 handwritten characters, 20 drawings of each."""

from __future__ import annotations

import hashlib
import io
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from envs import store
from envs.sources import decoding
from envs.store import ImageSet, Index, Kept

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
ARCHIVES = {  # name: (published MD5, characters)
    "images_background.zip": ("68d2efa1b9178cc56df9314c21c6e718", 964),
    "images_evaluation.zip": ("6b91aef0f799c5bb55b94e3f2daec811", 659),
}
DRAWINGS = 20
LARGEST = 64 << 20  # bytes; the archives are 10 and 7 MB


@dataclass(frozen=True)
class Omniglot(Kept):
    """Characters of both archives as grey images, ink 1 on paper 0, Lanczos-resized.

    The 1623 characters, sorted by alphabet and name, are shuffled once with a fixed seed; the first `train` are for
    training, the next `validation` for validation, the rest for test (MAML: 1200 and the rest; its code: 1100, 100
    and the rest). With `validation = 0` validation episodes are drawn from the training characters.
    """

    folder: str = ""
    """Folder with the two zips, or their unpacked folders; empty: download them."""
    size: int = 28
    """Height and width in pixels."""
    train: int = 1200
    """Characters for training."""
    validation: int = 0
    """Characters for validation."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, self.size, self.size)

    @property
    def _name(self) -> str:
        return f"omniglot-{self.size}"

    def prepare(self) -> None:
        total = sum(count for _, count in ARCHIVES.values())
        if not 0 < self.train + self.validation < total:
            raise ValueError(
                f"train={self.train} + validation={self.validation} characters leave none of the {total} for test"
            )
        if self.folder:  # decoded before or not: a folder that is named must be one
            for archive in ARCHIVES:
                self._given(archive)
        store.write_once(self._name, "1", self._decode)

    def decoded(self, file: Path) -> NDArray[np.uint8]:
        """An image file as the set has its drawings."""
        return decoding.ink(file, self.size)

    def load(self) -> ImageSet:
        stored = super().load()
        return ImageSet(
            stored.images, Index(stored.index.classes, stored.index.starts, self._splits(len(stored.index.classes)))
        )

    def _splits(self, classes: int) -> dict[str, list[int]]:
        return _partition(classes, self.train, self.validation)

    def _decode(self) -> tuple[NDArray[np.uint8], Index]:
        characters: dict[str, list[bytes]] = {}
        for archive, (_, wanted) in ARCHIVES.items():
            root = self._given(archive) if self.folder else _fetch(archive)
            found = _characters(root)
            if len(found) != wanted or any(len(d) != DRAWINGS for d in found.values()):
                raise ValueError(f"{root} holds {len(found)} characters, wanted {wanted} with {DRAWINGS} drawings each")
            characters |= found
        names = sorted(characters)
        images = np.stack([_image(name, drawing, self.size) for name in names for drawing in characters[name]])
        return images[:, None], Index(names, list(range(0, len(images) + 1, DRAWINGS)), {}, "1")

    def _given(self, archive: str) -> Path:
        folder = Path(self.folder).expanduser()
        for path in (folder / archive, folder / archive.removesuffix(".zip")):
            if path.exists():
                return path
        raise FileNotFoundError(f"{folder} holds neither {archive} nor its unpacked folder")


_PARTITIONS: dict[tuple[int, int, int], dict[str, list[int]]] = {}


def _partition(classes: int, train: int, validation: int) -> dict[str, list[int]]:
    key = (classes, train, validation)
    if key not in _PARTITIONS:
        order = np.random.default_rng(0).permutation(classes).tolist()
        held = order[train : train + validation] or order[:train]
        _PARTITIONS[key] = {"train": order[:train], "validation": held, "test": order[train + validation :]}
    return _PARTITIONS[key]


def _characters(root: Path) -> dict[str, list[bytes]]:
    """Drawings of each character, "alphabet/character" → PNG files in name order."""
    found: dict[str, dict[str, bytes]] = {}
    for path, content in _pngs(root):
        alphabet, character, drawing = path.split("/")[-3:]
        found.setdefault(f"{alphabet}/{character}", {})[drawing] = content
    return {name: [drawings[d] for d in sorted(drawings)] for name, drawings in found.items()}


def _pngs(root: Path) -> list[tuple[str, bytes]]:
    if root.is_dir():
        return [(p.as_posix(), p.read_bytes()) for p in sorted(root.rglob("*.png"))]
    try:
        with zipfile.ZipFile(root) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".png")]
            if sum(m.file_size for m in members) > 2 * LARGEST:
                raise ValueError(f"{root} unpacks to more than {2 * LARGEST} bytes: not Omniglot")
            return [(m.filename, archive.read(m)) for m in members]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{root} is not a whole zip archive ({error}); fetch it again") from error


def _image(name: str, png: bytes, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(png)) as image:
            grey = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"a drawing of {name} is not a readable image ({error})") from error
    return 255 - np.asarray(grey, dtype=np.uint8)


def _fetch(archive: str) -> Path:
    """The official archive, downloaded once into the data folder and checked against its published MD5."""
    wanted, _ = ARCHIVES[archive]
    relative = f"downloads/{archive}"
    path = store.data_folder() / relative
    if not path.exists():
        content = _download(URL + archive)
        seen = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if seen != wanted:
            raise ValueError(f"{URL}{archive} has MD5 {seen}, wanted {wanted}; give a copy with --task.source.folder")
        store.install(relative, lambda partial: partial.write_bytes(content))
    return path


@retry(retry=retry_if_exception_type(OSError), stop=stop_after_attempt(3), wait=wait_exponential(max=5), reraise=True)
def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content: bytes = response.read(LARGEST + 1)
    except OSError as error:
        raise OSError(f"cannot fetch {url} ({error}); give a local copy with --task.source.folder") from error
    if len(content) > LARGEST:
        raise ValueError(f"{url} is larger than {LARGEST} bytes: not Omniglot")
    return content
