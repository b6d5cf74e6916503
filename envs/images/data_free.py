"""Episodes without data: in training, which invented images to take; at test, real episodes of held-out classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.base import ADVERSARY, TEACHER, TEACHERS, Array, Arrays, check_split
from envs.images.augmentation import Augmentation
from envs.images.episodes import Episodes, ImageSource


@dataclass(frozen=True)
class DataFree(Episodes):
    """N-way K-shot; training episodes are cut from images D that are inverted from a pool of teachers, and no training
    image is read.

    The classes of an episode are drawn from all classes of all teachers, so that an episode mixes teachers; one that
    several teachers know is at most once in it. Real episodes are normalised as the teachers' training images were.
    """

    pools: tuple[str, ...] = ()
    """Folders of teachers (`metafleet teachers`), of equal image sizes and numbers of classes."""
    teachers: int = 0
    """How many there are; 0: as the folders have it when the run begins."""
    teacher_ways: int = 0
    """Classes of each; 0: likewise."""
    kinds: tuple[int, ...] = ()
    """Which of the teachers' classes are the same, by equal numbers, where some are; empty: likewise."""
    mean: tuple[float, ...] = ()
    """Per channel, of the teachers' images; empty: likewise."""
    std: tuple[float, ...] = ()
    """Per channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_shots:
            raise ValueError(f"train_shots={self.train_shots}: pseudo-episodes have a query set")
        if self.min_ways or self.min_shots or self.augment != Augmentation():
            raise ValueError(
                "min_ways, min_shots, augment: pseudo-episodes are of one way and shot, of invented images"
            )

    @property
    def per_class(self) -> int:
        """Images of D per class: an episode uses all of them, in a random order."""
        return self.shots + self.queries

    def prepare(self) -> None:
        """Decode the source; check that held-out splits can fill an episode, and that none of their classes is a
        training class.
        """
        self.source.prepare()
        self.check(("validation", "test"))
        images = self.source.load()
        shared = {c for split in ("validation", "test") for c in images.classes(split)} & set(
            images.index.splits.get("train", ())
        )
        if shared:
            raise ValueError(
                f"{len(shared)} held-out classes are training classes, of which a data-free run reads no image; "
                "--task.source.validation 100 sets Omniglot's apart"
            )

    def fixed(self, split: str, index: int) -> Arrays | None:
        """The teacher that a task of the teachers' round is about."""
        return {TEACHER: np.asarray(index % max(1, self.teachers))} if split == TEACHERS else None

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        if split in ("train", ADVERSARY):
            return self._rows(rng)
        check_split(split)
        task = super().sample(split, rng)
        return task | {k: self.from_pixels(task[k]) for k in ("support_x", "query_x")}

    def pixels(self, images: Array) -> Array:
        if not self.mean:
            return images
        mean, std = (np.asarray(v)[:, None, None] for v in (self.mean, self.std))
        return np.asarray(np.clip(std * images + mean, 0, 1))  # there and back is off by a rounding

    def from_pixels(self, images: Array) -> Array:
        return _normalised(images, self.mean, self.std) if self.mean else images

    def _rows(self, rng: np.random.Generator) -> Arrays:
        """Which images of D, flattened over teachers, classes and images."""
        total = self.teachers * self.teacher_ways
        classes = (
            self._unlike(rng.permutation(total))[: self.ways]
            if self.kinds
            else rng.choice(total, self.ways, replace=False)
        )
        rows = np.stack([c * self.per_class + rng.permutation(self.per_class) for c in classes])
        return {"support_rows": rows[:, : self.shots], "query_rows": rows[:, self.shots :]}

    def _unlike(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first of each kind, in order."""
        first = np.unique(np.asarray(self.kinds)[classes], return_index=True)[1]
        return classes[np.sort(first)]


@dataclass(frozen=True)
class Lessons:
    """What each teacher of a pool is trained on: all images of a few training classes, some of them held back."""

    source: ImageSource
    teachers: int = 8
    ways: int = 5
    overlapping: bool = False
    """Each teacher draws its classes from all; otherwise no two teachers share one."""
    held_back: float = 0.2
    """Share of each class's images that measures accuracy and is not trained on."""
    seed: int = 0
    """Of the choice of classes."""
    mean: tuple[float, ...] = ()
    """Per channel: `statistics`, computed once."""
    std: tuple[float, ...] = ()
    """Per channel."""

    def __post_init__(self) -> None:
        if self.teachers < 1 or self.ways < 2 or not 0 < self.held_back < 1:
            raise ValueError(
                f"teachers={self.teachers}, ways={self.ways}, held_back={self.held_back}: at least 1, 2 and a share "
                "wanted"
            )

    def classes(self) -> list[list[int]]:
        """Class numbers by teacher."""
        known, rng = self.source.load().classes("train"), np.random.default_rng([self.seed, self.teachers, self.ways])
        if self.overlapping:
            if self.ways > len(known):
                raise ValueError(f"ways={self.ways} exceeds the {len(known)} training classes")
            return [sorted(rng.choice(known, self.ways, replace=False).tolist()) for _ in range(self.teachers)]
        if self.teachers * self.ways > len(known):
            raise ValueError(
                f"{self.teachers} teachers of {self.ways} classes exceed the {len(known)} training classes; "
                "overlapping ones share"
            )
        chosen = rng.choice(known, self.teachers * self.ways, replace=False).tolist()
        return [sorted(chosen[i * self.ways : (i + 1) * self.ways]) for i in range(self.teachers)]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, over all images that teachers are trained on; class by class, for
        memory's sake.
        """
        count, total, square = 0, np.zeros(self.source.shape[0]), np.zeros(self.source.shape[0])
        for label in (c for classes in self.classes() for c in classes):
            x = self._images(label)[0].astype(np.float64)
            count += x[:, 0].size
            total += x.sum((0, 2, 3))
            square += (x**2).sum((0, 2, 3))
        mean = total / count
        return tuple(map(float, mean)), tuple(map(float, np.sqrt(square / count - mean**2)))

    def files(self) -> tuple[str, ...]:
        return self.source.files()

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        raise ValueError("lessons are fixed, one per teacher")

    def fixed(self, split: str, index: int) -> Arrays:
        """The lesson of teacher `index`."""
        parts = [self._images(c) for c in self.classes()[index]]
        counts = [len(train) for train, _ in parts], [len(held) for _, held in parts]
        x, held = (_normalised(np.concatenate([part[i] for part in parts]), self.mean, self.std) for i in (0, 1))
        y, held_y = (np.arange(self.ways).repeat(c) for c in counts)
        return {"x": x, "y": y, "held_x": held, "held_y": held_y, TEACHER: np.asarray(index)}

    def _images(self, label: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(to train on, held back) of a class, in [0, 1]."""
        images = self.source.load()
        rows = images.rows(label)
        x = images.values(slice(rows.start, rows.stop))
        held = max(1, round(self.held_back * len(x)))
        return x[held:].astype(np.float32), x[:held].astype(np.float32)


def _normalised(x: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x − mean)/std per channel, for images [n, c, h, w]."""
    m, s = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))
    return np.asarray((x.astype(np.float32) - m) / s, np.float32)
