"""Examples of one's own, to adapt to and to predict: class folders of images, .npz, .csv; as tasks have theirs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.setup import families
from envs.base import Array, TaskDistribution
from envs.images.episodes import Episodes
from envs.sources import decoding, layouts, npz
from envs.sources.decoding import SUFFIXES

LABELS = ("label", "class", "target", "y")
"""Names of a csv's column of targets."""
FILES = ("filename", "file", "path", "image")
"""Names of a csv's column of image files."""


@dataclass(frozen=True)
class Examples:
    """Rows x [n, …] in the units that the tasks are in, what each is called, and its target where it is known."""

    x: Array
    names: list[str]
    y: Array | None


def read(path: Path, tasks: TaskDistribution) -> Examples:
    """The examples of a folder, an .npz (`x`, and `y`) or a .csv (a column of image files, or one per number).

    A folder holds images, or a folder of images per class. Raises ValueError or FileNotFoundError, beginning with the
    file, for what cannot be read or has another shape than the tasks' inputs.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return _folder(path, tasks)
    if path.suffix == ".npz":
        return _npz(path, tasks)
    if path.suffix == ".csv":
        return _csv(path, tasks)
    raise ValueError(f"{path}: a folder of images, an .npz or a .csv wanted")


def as_inputs(x: Any, tasks: TaskDistribution, what: str) -> Array:
    """x [n, …] as the tasks have their inputs: bytes of images become numbers from 0 to 1, flat rows their shape.

    Raises ValueError, beginning with `what`, for other shapes and for numbers that are not finite.
    """
    x, shape = np.asarray(x), families.inputs(tasks)
    if x.dtype.kind not in "buif" or x.ndim < 1:
        raise ValueError(f"{what}: {x.dtype} {x.shape} is no array of numbers [n, {_said(shape)}]")
    values = x.astype(np.float32) / (255 if x.dtype == np.uint8 and isinstance(tasks, Episodes) else 1)
    if x.shape[1:] != shape:
        if x.shape[1:] != (int(np.prod(shape)),):
            last = len(shape) == 3 and x.shape[1:] == (*shape[1:], shape[0])
            hint = "; channels come first" if last else ""
            raise ValueError(f"{what} has shape {x.shape}: [n, {_said(shape)}] wanted, as in training{hint}")
        values = values.reshape(len(x), *shape)
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has numbers that are not finite")
    return tasks.from_pixels(values) if isinstance(tasks, Episodes) else values


def _said(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _folder(path: Path, tasks: TaskDistribution) -> Examples:
    classes = [f for f in sorted(path.iterdir()) if f.is_dir() and layouts.visible(f)]
    groups = [(f.name, _images(f)) for f in classes] or [("", _images(path))]
    files = [(file, label) for label, found in groups for file in found]
    if not files:
        raise ValueError(f"{path} has no image ({', '.join(SUFFIXES)}) in it, nor in a folder per class")
    y = np.array([label for _, label in files]) if classes else None
    return Examples(_decoded([f for f, _ in files], tasks), [str(f.relative_to(path)) for f, _ in files], y)


def _images(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.name.lower().endswith(SUFFIXES) and layouts.visible(f)]


def _decoded(files: list[Path], tasks: TaskDistribution) -> Array:
    shape = families.inputs(tasks)
    if len(shape) != 3:
        raise ValueError(
            f"{files[0]} is an image, and this run's inputs are numbers [{_said(shape)}]: .npz or .csv wanted"
        )
    source = getattr(tasks, "source", None)
    decode: Callable[[Path], Array] = getattr(source, "decoded", None) or (lambda f: decoding.like(f, shape))
    return as_inputs(np.stack([decode(f) for f in files]), tasks, str(files[0].parent))


def _npz(path: Path, tasks: TaskDistribution) -> Examples:
    content = npz.content_of(path)
    if "x" not in content:
        raise ValueError(f"{path} holds {', '.join(content) or 'nothing'}: x wanted, and y where targets are known")
    x, y = as_inputs(content["x"], tasks, f"{path}, x"), content.get("y")
    if y is not None and len(y) != len(x):
        raise ValueError(f"{path} has {len(x)} rows of x and {len(y)} of y")
    return Examples(x, [f"row {i}" for i in range(len(x))], y)


def _csv(path: Path, tasks: TaskDistribution) -> Examples:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} lines: a header and at least one row wanted")
    header, body = [h.strip() for h in rows[0]], [row for row in rows[1:] if row]
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number} has {len(row)} fields, its header {len(header)}")
    target = next((i for i, name in enumerate(header) if name.lower() in LABELS), None)
    image = next((i for i, name in enumerate(header) if name.lower() in FILES), None)
    y = None if target is None else _targets([row[target] for row in body])
    if image is not None:
        files = [path.parent / row[image] for row in body]
        return Examples(_decoded(files, tasks), [row[image] for row in body], y)
    numbers = [[_number(v, path, line) for i, v in enumerate(row) if i != target] for line, row in enumerate(body, 2)]
    return Examples(as_inputs(numbers, tasks, str(path)), [f"row {i}" for i in range(len(body))], y)


def _targets(texts: list[str]) -> Array:
    """Numbers where all of them are."""
    try:
        return np.array([int(t) for t in texts])
    except ValueError:
        pass
    try:
        return np.array([float(t) for t in texts])
    except ValueError:
        return np.array(texts)


def _number(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {text!r} is no number") from error
