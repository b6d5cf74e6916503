"""Glyphs: characters drawn procedurally from a seed, so that few-shot classification needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs import store
from envs.sources import decoding
from envs.store import Index, Kept

CURVE = 60  # points along a stroke
VERSION = "2"  # of the drawing: another one means draw again


@dataclass(frozen=True)
class Glyphs(Kept):
    """Each class is two to four cubic Bézier strokes; each drawing of it wobbles, turns and shifts them a little."""

    characters: int = 200
    """Classes in all; 60 % train, 20 % validation, 20 % test."""
    drawings: int = 20
    """Images per class."""
    size: int = 28
    """Height and width in pixels."""
    wobble: float = 0.06
    """Standard deviation of a drawing's control points, in units of the image size."""
    seed: int = 0
    """Seed of the alphabet."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, self.size, self.size)

    @property
    def _name(self) -> str:
        return f"glyphs-{self.characters}-{self.drawings}-{self.size}-{self.wobble:g}-{self.seed}"

    def prepare(self) -> None:
        store.write_once(self._name, VERSION, self._draw)

    def decoded(self, file: Path) -> NDArray[np.uint8]:
        """An image file, dark on light, as the set has its drawings."""
        return decoding.ink(file, self.size)

    def _draw(self) -> tuple[NDArray[np.uint8], Index]:
        images = np.concatenate([self._character(i) for i in range(self.characters)])
        first, second = round(0.6 * self.characters), round(0.8 * self.characters)
        splits = {
            "train": list(range(first)),
            "validation": list(range(first, second)),
            "test": list(range(second, self.characters)),
        }
        starts = list(range(0, len(images) + 1, self.drawings))
        return images[:, None], Index([f"glyph {i}" for i in range(self.characters)], starts, splits, VERSION)

    def _character(self, number: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng([self.seed, number])
        strokes = rng.uniform(0.15, 0.85, (rng.integers(2, 5), 4, 2))
        return np.stack([_raster(self._redrawn(strokes, rng), self.size) for _ in range(self.drawings)])

    def _redrawn(self, strokes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Points [n, 2] of one drawing in the unit square."""
        control = strokes + rng.normal(0, self.wobble, strokes.shape)
        angle, shift = rng.normal(0, 0.12), rng.normal(0, 0.03, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        t = np.linspace(0, 1, CURVE)[:, None]
        bernstein = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])  # [CURVE, 4]
        points = (bernstein @ control).reshape(-1, 2)
        return np.asarray((points - 0.5) @ turn.T + 0.5 + shift)


def _raster(points: NDArray[np.float64], size: int, pen: float = 0.035) -> NDArray[np.uint8]:
    """Ink where a pixel's centre is near a point: 255 · exp(−(d/pen)²/2), the nearest point's d."""
    centres = (np.arange(size) + 0.5) / size
    dx2 = (centres[None, :] - points[:, :1]) ** 2  # [n, size]
    dy2 = (centres[None, :] - points[:, 1:]) ** 2
    nearest = (dy2[:, :, None] + dx2[:, None, :]).min(0)  # [size, size]
    return np.asarray(255 * np.exp(-nearest / (2 * pen**2)), dtype=np.uint8)
