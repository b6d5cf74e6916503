"""CIFAR-100's own binary archive (Krizhevsky 2009): 60 000 images of 100 fine classes in 20 coarse ones."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.sources.decoding import Record, Root

ARCHIVE, FOLDER = "cifar-100-binary.tar.gz", "cifar-100-binary"
PARTS = ("train.bin", "test.bin")  # the archive's own division, which few-shot splits do not keep
FINE, COARSE = "fine_label_names.txt", "coarse_label_names.txt"
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE  # coarse label, fine label, then red, green, blue row by row
LARGEST = 1 << 28  # bytes in a part; train.bin has 153 700 000
PICKLED = (
    "is pickled Python, which may run any program when it is read, so it is not; of CIFAR-100 "
    f"{ARCHIVE} is wanted, of other sets the images"
)


@dataclass(frozen=True)
class Cifar:
    """The archive, read."""

    images: dict[str, list[Record]]
    """By fine class, those of train.bin first."""
    coarse: dict[str, set[str]]
    """Fine classes of each coarse one."""

    def classes(self, name: str) -> list[str]:
        """The fine classes that a name stands for: its own, or all of a coarse class; none if it is unknown."""
        return [name] if name in self.images else sorted(self.coarse.get(name, ()))


def found(root: Root) -> Cifar | None:
    """CIFAR-100 in a folder or zip: the archive, or what is in it, there or in its folder."""
    if isinstance(root, Path) and (root / ARCHIVE).is_file():
        return packed(root / ARCHIVE)
    for folder in (root, root / FOLDER):
        if all((folder / name).is_file() for name in (*PARTS, FINE)):
            names = [n for n in (*PARTS, FINE, COARSE) if (folder / n).is_file()]
            return _read(str(folder), {n: (folder / n).read_bytes() for n in names})
    return None


def packed(path: Path) -> Cifar:
    """CIFAR-100 in a tar."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            members = {Path(m.name).name: m for m in archive if m.isfile()}
            for name in (n for n in (*PARTS, FINE, COARSE) if n in members and members[n].size <= LARGEST):
                file = archive.extractfile(members[name])
                contents[name] = file.read() if file else b""
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole archive ({error}); fetch it again") from error
    if {"train", "test", "meta"} <= members.keys():
        raise ValueError(f"{path} {PICKLED}")
    if not {*PARTS, FINE} <= contents.keys():
        raise ValueError(f"{path} is a tar without {', '.join(PARTS)}, {FINE}: unpack it, and give the folder")
    return _read(str(path), contents)


def _read(where: str, contents: dict[str, bytes]) -> Cifar:
    fine, coarse = (contents.get(n, b"").decode().split() for n in (FINE, COARSE))
    images: dict[str, list[Record]] = {name: [] for name in fine}
    groups: dict[str, set[str]] = {name: set() for name in coarse}
    for part in PARTS:
        if len(contents[part]) % RECORD:
            raise ValueError(f"{where}/{part} has {len(contents[part])} bytes, wanted a multiple of {RECORD}")
        rows = np.frombuffer(contents[part], np.uint8).reshape(-1, RECORD)
        for i, row in enumerate(rows):
            group, label = int(row[0]), int(row[1])
            if label >= len(fine) or (coarse and group >= len(coarse)):
                raise ValueError(
                    f"{where}/{part}: record {i} has the labels {group}, {label}, but there are {len(coarse)} coarse "
                    f"and {len(fine)} fine names"
                )
            planes = row[2:].reshape(3, SIDE, SIDE)
            content = f"P6 {SIDE} {SIDE} 255\n".encode() + planes.transpose(1, 2, 0).tobytes()
            images[fine[label]].append(Record(f"{where}/{part}, record {i}", content))
            if coarse:
                groups[coarse[group]].add(fine[label])
    return Cifar(images, groups)
