"""Training images that differ each time they are drawn: cropped, flipped, recoloured, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Images: TypeAlias = NDArray[np.float32]
"""[n, c, h, w] in [0, 1]."""

GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma of red, green and blue (ITU-R BT.601)."""


@dataclass(frozen=True)
class Augmentation:
    """What happens to the images of a training task, support and query alike; the others are as they are.

    Usual for few-shot networks (Lee et al. 2019): crop = 4 at 32 × 32 (8 at 84), flip = 0.5, jitter = 0.4. All draws
    are the task's, and come after those that choose its classes and images, which are the same with and without.
    """

    crop: int = 0
    """Every image is a crop, of its own size, of itself with so many black pixels around it."""
    flip: float = 0.0
    """Probability that left and right are exchanged (not for characters)."""
    jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by factors between 1 − jitter and 1 + jitter."""
    mix: float = 0.0
    """α: a support image x becomes λ x + (1 − λ) x′ with x′ another support image of its class and λ of Beta(α, α),
    at least ½ (mixup, Zhang et al. 2018, within a class, so that labels stay what they are)."""

    def __post_init__(self) -> None:
        if self.crop < 0 or self.mix < 0:
            raise ValueError(f"crop={self.crop}, mix={self.mix}: 0 or more wanted")
        for name in ("flip", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number from 0 to 1 wanted")

    def applied(self, x: Images, rng: np.random.Generator) -> Images:
        """Images that are cropped, flipped and recoloured, each by draws of its own."""
        if self.crop:
            x = cropped(x, rng.integers(0, 2 * self.crop + 1, (len(x), 2)), self.crop)
        if self.flip:
            turned = rng.random(len(x)) < self.flip
            x = np.where(turned[:, None, None, None], x[..., ::-1], x)
        if self.jitter:
            factors = rng.uniform(1 - self.jitter, 1 + self.jitter, (3, len(x), 1, 1, 1)).astype(np.float32)
            x = recoloured(x, *factors)
        return x

    def mixed(self, x: Images, y: NDArray[np.integer], rng: np.random.Generator) -> Images:
        """Support images of classes y [n], each with another of its class."""
        if not self.mix:
            return x
        order = rng.permutation(len(y))
        partner = np.arange(len(y))
        for label in np.unique(y):
            rows = order[y[order] == label]
            partner[rows] = np.roll(rows, 1)
        drawn = rng.beta(self.mix, self.mix, len(y))
        share: Images = np.maximum(drawn, 1 - drawn).astype(np.float32)[:, None, None, None]
        return share * x + (1 - share) * x[partner]


def cropped(x: Images, corner: NDArray[np.integer], border: int) -> Images:
    """Windows of the images' own size out of the images with a black border, by their upper left corners [n, 2]."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
    down, right = corner[:, :1] + np.arange(h), corner[:, 1:] + np.arange(w)
    image, channel = np.arange(n)[:, None, None, None], np.arange(c)[:, None, None]
    window: Images = padded[image, channel, down[:, None, :, None], right[:, None, None, :]]
    return window


def recoloured(x: Images, brightness: Images, contrast: Images, saturation: Images) -> Images:
    """b x, then away from the mean grey by c, then (of three channels) away from grey by s, within [0, 1]."""
    x = _within(brightness * x)
    x = _away(x, _grey(x).mean((2, 3), keepdims=True), contrast)
    return _away(x, _grey(x), saturation) if x.shape[1] == len(GREY) else x


def _away(x: Images, grey: Images, factor: Images) -> Images:
    """grey + factor (x − grey), in the memory of x."""
    x -= grey
    x *= factor
    x += grey
    return _within(x)


def _within(x: Images) -> Images:
    inside: Images = np.clip(x, 0, 1, out=x)
    return inside


def _grey(x: Images) -> Images:
    """[n, 1, h, w]."""
    if x.shape[1] != len(GREY):
        return np.asarray(x.mean(1, keepdims=True))
    grey: Images = np.asarray(np.einsum("nchw,c->nhw", x, GREY))[:, None]
    return grey
