"""Episode inversion: images that a classifier takes for its classes, from its weights and BatchNorm statistics alone
(PURER, §3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.base import Metrics, Params
from learners.engine.derivative import root
from learners.modules.functional import Functional
from learners.modules.normalisation import Statistics

FROZEN = Statistics("frozen")


@dataclass(frozen=True)
class Teacher:
    """A pre-trained classifier: its function, its parameters with its BatchNorm layers' running statistics, its number
    of classes.
    """

    model: Functional
    params: Params
    ways: int
    scale: tuple[float, ...] = ()
    """Per channel: the teacher's units are scale · x + offset, x in the units of D; empty: they are the same."""
    offset: tuple[float, ...] = ()
    """Per channel."""

    def inspect(self, images: Tensor) -> tuple[Tensor, Params]:
        """Logits, and mean and biased variance of what reaches each BatchNorm layer, for images in the units of D."""
        if self.scale:
            scale, offset = (images.new_tensor(v)[:, None, None] for v in (self.scale, self.offset))
            images = scale * images + offset
        return self.model.inspect(self.params, images, FROZEN)

    def to(self, device: str) -> Teacher:
        """The same on another device."""
        return replace(self, model=self.model.to(device), params={k: v.to(device) for k, v in self.params.items()})


@dataclass(frozen=True)
class Inversion:
    """L_EI(x̂) = CE(M(roll x̂), y) + tv·R_TV(x̂) + l2·‖x̂‖₂ + features·R_feature(x̂), and the rate at which Adam
    descends it.

    Norms are not squared and of the whole batch tensor, so the prior weakens with its size like 1/√n. Constants are
    those of the official code, which come from DeepInversion's for ImageNet (Hu et al. 2023; Yin et al. 2020).
    """

    tv: float = 1e-4
    """Weight of total variation."""
    l2: float = 1e-5
    """Weight of the norm."""
    features: float = 1e-2
    """Weight of the distance to the teacher's BatchNorm statistics."""
    lr: float = 0.25
    """Adam's rate, for images in normalised units."""
    jitter: int = 2
    """Images are rolled by up to so many pixels along each axis, anew at every step."""

    def __post_init__(self) -> None:
        if min(self.tv, self.l2, self.features, self.lr, self.jitter) < 0:
            raise ValueError(f"{self}: numbers of 0 or more wanted")

    def loss(self, teacher: Teacher, images: Tensor, labels: Tensor, shift: Tensor) -> tuple[Tensor, Metrics]:
        """L_EI of images [n, c, h, w] with labels [n], rolled by `shift` [2] pixels; and its terms, unweighted."""
        rolled = roll(images, shift)
        logits, seen = teacher.inspect(rolled)
        terms = {
            "classification": F.cross_entropy(logits, labels), "total_variation": total_variation(rolled),
            "norm": norm(rolled), "features": feature_distance(seen, teacher.params),
        }  # fmt: skip
        loss = (
            terms["classification"]
            + self.tv * terms["total_variation"]
            + self.l2 * terms["norm"]
            + self.features * terms["features"]
        )
        return loss, terms


def roll(images: Tensor, shift: Tensor) -> Tensor:
    """Images moved by shift [2] pixels (down, right); what leaves at one side comes in at the other."""
    height, width = images.shape[-2:]
    down = (torch.arange(height, device=images.device) - shift[0]) % height
    right = (torch.arange(width, device=images.device) - shift[1]) % width
    return images[..., down, :][..., right]


def total_variation(images: Tensor) -> Tensor:
    """‖∂→‖₂ + ‖∂↓‖₂ + ‖∂↘‖₂ + ‖∂↙‖₂ of the whole batch [n, c, h, w]."""
    x = images
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    falling, rising = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
    return norm(across) + norm(down) + norm(falling) + norm(rising)


def feature_distance(seen: Params, running: Params) -> Tensor:
    """Σ over BatchNorm layers of ‖μ(x̂) − μ̂‖₂ + ‖σ²(x̂) − σ̂²‖₂: per channel over batch and space, the variance
    biased.
    """
    each = [norm(value - running[name]) for name, value in seen.items()]
    return torch.stack(each).sum() if each else next(iter(running.values())).new_zeros(())


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ over all entries, with gradient 0 where x = 0."""
    return root(x.square().sum())
