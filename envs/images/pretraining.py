"""Batches of all training classes with their class numbers, to pre-train on; episodes to be judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.base import Arrays
from envs.images.episodes import Episodes


@dataclass(frozen=True)
class Pretraining(Episodes):
    """A training task is a batch of images from anywhere in the training split, labelled by class number: supervised
    pre-training (Chen et al. 2019). Tasks of the other splits are episodes, labelled 0 … N−1.

    The model has an output for each training class; of an episode's outputs the first N are used, so that adaptation
    must make a new head. Support and query set of a training task are the same batch, rows drawn with replacement.
    """

    classes: int = 64
    """Training classes of the source (MiniImagenet 64), hence outputs."""
    batch: int = 16
    """Images of a training task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 2:
            raise ValueError(f"batch={self.batch}: at least 2 wanted")
        if self.ways > self.classes:
            raise ValueError(f"ways={self.ways} exceeds classes={self.classes}, the outputs that there are")

    @property
    def outputs(self) -> int:
        return self.classes

    def check(self, splits: tuple[str, ...]) -> None:
        """Raise ValueError where the source has another number of classes, or a split too few for an episode."""
        there = len(self.source.load().classes("train"))
        if there != self.classes:
            raise ValueError(f"classes={self.classes}, but the training split has {there}")
        super().check(tuple(s for s in splits if s != "train"))

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        if split != "train":
            return super().sample(split, rng)
        images = self.source.load()
        known = images.classes("train")
        sizes = np.asarray([len(images.rows(c)) for c in known])
        drawn = rng.integers(sizes.sum(), size=self.batch)  # every image alike
        y = np.searchsorted(sizes.cumsum(), drawn, side="right")
        rows = drawn - (sizes.cumsum() - sizes)[y] + np.asarray([images.rows(c).start for c in known])[y]
        x = self.augment.applied(images.values(rows), rng)
        return {"support_x": x, "support_y": y, "query_x": x, "query_y": y}
