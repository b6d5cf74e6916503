"""A picture of finished data-free runs: what was inverted from each teacher, and how hard the pseudo-episodes were to
the learner.

python tests/bench/pseudo_images.py OUT.png RUN-DIR [RUN-DIR …]      (images of the first run; a curve for each)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.operations import existing_run
from cluster.setup import config
from cluster.setup.data_free import teacher_pool
from envs.images.data_free import DataFree

SMOOTHED = 100  # lines of metrics


def pixels(directory: Path) -> tuple[np.ndarray, list[str]]:
    """One image of every class of D [teachers, classes, h, w, c] in [0, 1], cut off there; and the teachers'
    architectures.
    """
    task = config.load(str(directory / "run.toml")).task
    if not isinstance(task, DataFree):
        raise ValueError(f"{directory} is not a data-free run")
    found = existing_run.chosen(directory, "newest").outer["images"][:, :, 0].double().numpy()
    return np.moveaxis(task.pixels(found), -3, -1), [type(spec).__name__ for spec in teacher_pool(task).specs]


def mosaic(axes: Axes, images: np.ndarray, names: list[str]) -> None:
    """A row for each teacher, a column for each of its classes."""
    teachers, classes, height, width, channels = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    whole = framed.transpose(0, 2, 1, 3, 4).reshape(teachers * (height + 2), classes * (width + 2), channels)
    axes.imshow(whole.squeeze(-1) if channels == 1 else whole, cmap="gray_r", vmin=0, vmax=1)
    axes.set(
        xticks=[],
        yticks=[(i + 0.5) * (height + 2) for i in range(teachers)],
        title="pseudo-images, a row for each teacher",
    )
    axes.set_yticklabels([f"{i}: {name}" for i, name in enumerate(names)])


def curve(axes: Axes, directory: Path) -> None:
    """1 − query accuracy of the pseudo-episodes over meta-iterations."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    train = [(line["iteration"], line["purer/difficulty"]) for line in lines if line["kind"] == "train"]
    iterations, difficulty = np.array(train).T
    mean = np.convolve(difficulty, np.ones(SMOOTHED) / SMOOTHED, "valid")
    axes.plot(iterations[SMOOTHED - 1 :], mean, label="/".join(directory.parts[-3:]))


def main() -> None:
    out, *directories = map(Path, sys.argv[1:])
    figure = Figure(figsize=(11, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    mosaic(left, *pixels(directories[0]))
    for directory in directories:
        curve(right, directory)
    right.set(
        xlabel="meta-iterations", ylabel=f"difficulty: 1 − query accuracy, mean of {SMOOTHED} lines", ylim=(0, None)
    )
    right.legend(fontsize="small")
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main()
