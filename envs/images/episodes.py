"""N-way K-shot episodes over any class-indexed image array."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from envs.base import SPLITS, Array, Arrays, Predict, check_split
from envs.images.augmentation import Augmentation, Images
from envs.store import ImageSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ImageSource(Protocol):
    """Where images come from: a frozen dataclass that can decode itself into the data folder, once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of images; of other examples any."""

    def prepare(self) -> None:
        """Fetch, check and decode. Raises ValueError or OSError with the file and what is wrong with it."""

    def files(self) -> tuple[str, ...]:
        """The decoded files, relative to the data folder."""

    def load(self) -> ImageSet:
        """The decoded images, mapped."""


@dataclass(frozen=True)
class Episodes:
    """N classes drawn without replacement, K support and Q query images of each; labels 0 … N−1 in drawn order.

    Pixels are float32 in [0, 1], channels first. Examples stand class by class. Tasks may differ in way and shot
    (`min_ways`, `min_shots`), as in Meta-Dataset (Triantafillou et al. 2020); a `class_mask` then says which of N
    classes a task has.
    """

    LATER: ClassVar = ("min_ways", "min_shots", "augment")
    source: ImageSource
    ways: int = 5
    """Classes per task (N)."""
    shots: int = 1
    """Support images per class (K)."""
    queries: int = 15
    """Query images per class in training."""
    test_queries: int = 15
    """Query images per class in validation and test."""
    train_shots: int = 0
    """If positive, training tasks are this many images per class and no query set (Reptile)."""
    rotations: Literal["none", "train", "all"] = "none"
    """Turn each class of a task by 0, 90, 180 or 270°: in training, or in every split (MAML's Omniglot)."""
    min_ways: int = 0
    """Each task has this many to `ways` classes, all alike; 0: `ways`."""
    min_shots: int = 0
    """Each class of a task has this many to `shots` support images, all alike; 0: `shots`."""
    augment: Augmentation = field(default_factory=Augmentation)
    """What happens to the images of training tasks."""

    def __post_init__(self) -> None:
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("test_queries", 1), ("train_shots", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} wanted")
        for name, most, least in (("min_ways", self.ways, 2), ("min_shots", self.shots, 1)):
            value = getattr(self, name)
            if value and not least <= value <= most:
                raise ValueError(f"{name}={value}: a number from {least} to {most}, or 0, wanted")

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def outputs(self) -> int:
        return self.ways

    def prepare(self) -> None:
        """Decode the source, and check that every split can fill an episode."""
        self.source.prepare()
        self.check(SPLITS)

    def check(self, splits: tuple[str, ...]) -> None:
        """Raise ValueError where one of the splits has too few classes or images."""
        images = self.source.load()
        if len(self.source.shape) != 3 and (self.rotations != "none" or self.augment != Augmentation()):
            raise ValueError(
                f"rotations and augment are of images (channels, height, width); the source's examples are "
                f"{self.source.shape}"
            )
        for split in splits:
            classes = images.classes(split)
            if self.ways > len(classes):
                raise ValueError(f"ways={self.ways} exceeds the {len(classes)} classes of the {split} split")
            wanted, fewest = sum(self._counts(split)), min(len(images.rows(c)) for c in classes)
            if wanted > fewest:
                raise ValueError(
                    f"{wanted} images per class wanted in the {split} split (shots + queries), but a class has only "
                    f"{fewest}"
                )

    def files(self) -> tuple[str, ...]:
        return self.source.files()

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        images = self.source.load()
        shots, queries = self._counts(split)
        ways = int(rng.integers(self.min_ways, self.ways + 1)) if self.min_ways else self.ways
        classes = rng.choice(images.classes(split), ways, replace=False)
        turns = rng.integers(0, 4, ways) if self.rotations == "all" or self.rotations == split else np.zeros(ways, int)
        drawn = []  # ways × [shots + queries, c, h, w]
        for label, turn in zip(classes, turns, strict=True):
            rows = images.rows(label)
            picked = rows.start + rng.choice(len(rows), shots + queries, replace=False)
            values = images.values(picked)
            drawn.append(np.rot90(values, turn, axes=(-2, -1)) if turn else values)
        x: Images = np.stack(drawn)
        support, y = _flat(x[:, :shots]), np.arange(ways).repeat(shots)
        if self.min_shots and queries:
            kept = np.arange(shots) < rng.integers(self.min_shots, shots + 1, (ways, 1))
            support, y = support[kept.reshape(-1)], y[kept.reshape(-1)]
        query = _flat(x[:, shots:])
        if split == "train":
            support = self.augment.mixed(self.augment.applied(support, rng), y, rng)
            query = self.augment.applied(query, rng)
        task: Arrays = {"support_x": support, "support_y": y}
        if queries:
            task |= {"query_x": query, "query_y": np.arange(ways).repeat(queries)}
        return task | {"class_mask": np.arange(self.ways) < ways} if self.min_ways else task

    def _counts(self, split: str) -> tuple[int, int]:
        if split == "train" and self.train_shots:
            return self.train_shots, 0
        return self.shots, self.queries if split == "train" else self.test_queries

    def picture(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> Figure:
        if len(self.source.shape) != 3:
            raise ValueError(f"examples of shape {self.source.shape} are no images")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.1 * self.ways * len(tasks)), layout="constrained")
        for part, task, outputs in zip(
            figure.subfigures(len(tasks), 1, squeeze=False)[:, 0], tasks, predict, strict=True
        ):
            guesses = np.stack([o.argmax(-1) for o in outputs(task["query_x"])])  # [steps, queries]
            right = (guesses == task["query_y"]).mean(1)
            named = ", ".join(f"{r:.0%} after {s} step{'s' * (s != 1)}" for s, r in zip(steps, right, strict=True))
            part.suptitle(
                f"Held-out task: support image, then queries (frame: green right, red wrong, after {steps[-1]} steps). "
                f"{named}",
                fontsize=8,
            )
            self._grid(part, task, guesses[-1])
        return figure

    def _grid(self, part: Figure, task: Arrays, guesses: Array) -> None:
        ways = int(task["support_y"].max()) + 1
        shown = min(8, len(task["query_y"]) // ways)
        axes = part.subplots(ways, shown + 1, squeeze=False)
        for label in range(ways):
            support = task["support_x"][task["support_y"] == label][0]
            rows = np.flatnonzero(task["query_y"] == label)[:shown]
            for axis, image, color in [(axes[label, 0], support, "black")] + [
                (axes[label, 1 + i], task["query_x"][row], "green" if guesses[row] == label else "red")
                for i, row in enumerate(rows)
            ]:
                show(axis, self.pixels(image), color)

    def pixels(self, images: Array) -> Array:
        """Images [..., c, h, w] in the units of a task's as pixels in [0, 1], to be looked at."""
        return images

    def from_pixels(self, images: Array) -> Array:
        """The other way: pixels as a task has them."""
        return images


def beside(
    clean: Array, attacked: Array, truth: Array, before: Array, after: Array, *, title: str, shown: int = 10
) -> Figure:
    """Clean images, attacked ones and their difference in three rows; frames green where predicted right, else red.

    `before` and `after` are predictions for the clean and the attacked images. Images are spread over the classes.
    """
    from matplotlib.figure import Figure

    picked = np.linspace(0, len(truth) - 1, min(shown, len(truth))).round().astype(int)
    figure = Figure(figsize=(1.1 * len(picked), 3.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(3, len(picked), squeeze=False)
    rows = [
        ("clean", clean, before),
        ("attacked", attacked, after),
        ("difference", np.subtract(attacked, clean, dtype=np.float64), None),
    ]
    for line, (name, images, guesses) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        limit = max(float(np.abs(images).max()), 1e-12)
        for axis, i in zip(line, picked, strict=True):
            if guesses is None:
                axis.imshow(images[i].mean(0), cmap="bwr", vmin=-limit, vmax=limit)
            else:
                show(axis, images[i], "green" if guesses[i] == truth[i] else "red")
            axis.set(xticks=[], yticks=[])
    return figure


def show(axis: Axes, image: Array, color: str, title: str = "") -> None:
    """Draw an image [c, h, w] in a frame of a color, the title in that color too."""
    axis.set_axis_on()
    axis.set_title(title, fontsize=10, color=color)
    axis.imshow(image.squeeze(0) if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    for edge in axis.spines.values():
        edge.set(color=color, linewidth=2)


def _flat(x: Images) -> Images:
    return np.ascontiguousarray(x.reshape(-1, *x.shape[2:]))
