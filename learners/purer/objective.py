"""The objective of a data-free run: real episodes as ever, pseudo-episodes cut from D, and the teachers that D is
inverted from.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learners.base import Data
from learners.objectives.supervised import Supervised
from learners.purer.inversion import Teacher


@dataclass(frozen=True)
class DataFree(Supervised):
    """Supervised, with a pool of teachers. D is [teachers, ways, images per class, c, h, w], in normalised pixels."""

    teachers: tuple[Teacher, ...] = ()
    per_class: int = 20
    """Images of D per class of a teacher."""
    shape: tuple[int, int, int] = (3, 32, 32)
    """(channels, height, width) of an image."""

    def summary(self) -> str:
        """Loss and normalisation, and which teachers they are: a hash of all their layers, units and weights."""
        seen = hashlib.sha256()
        for teacher in self.teachers:
            seen.update(f"{teacher.model.module} {teacher.scale} {teacher.offset}".encode())
            for value in teacher.params.values():
                seen.update(value.detach().cpu().contiguous().numpy().tobytes())
        return f"{super().summary()}, {len(self.teachers)} teachers {seen.hexdigest()[:12]}"

    def to(self, device: str) -> DataFree:
        """The same objective on another device."""
        return replace(self, model=self.model.to(device), teachers=tuple(t.to(device) for t in self.teachers))


def episode(images: Tensor, data: Data) -> Data:
    """A pseudo-episode: `support_rows` [ways, shots] and `query_rows` [ways, queries] say which images of D, flattened
    over its first three axes; labels are 0 … ways − 1 in the order of the rows.
    """
    flat = images.flatten(0, 2)
    found: Data = {}
    for part in ("support", "query"):
        rows = data[f"{part}_rows"]
        found[f"{part}_x"] = flat[rows.flatten()]
        found[f"{part}_y"] = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(rows.shape[1])
    return found
