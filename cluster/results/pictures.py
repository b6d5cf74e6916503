"""Pictures and films of what adaptation does to test tasks."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cluster.fleet.recipe import Recipe
from cluster.record.storage import write_atomically
from cluster.results import drawing
from envs.base import Array, Arrays, Clip, HasFilm, HasPicture, Predict
from learners.base import Data, Meta, Objective, Params, pack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIP = 8  # pictures in a row of a film-strip


@runtime_checkable
class Predicts(Objective, Protocol):
    """An objective that can say what its model outputs: what a picture is drawn from."""

    def predict(self, params: Params, data: Data, x: Tensor) -> Tensor:
        """Outputs for inputs x, adapted to `data`'s support."""


@dataclass(frozen=True)
class Shown:
    """Some test tasks, and what a model says after some numbers of inner steps."""

    tasks: list[Arrays]
    predict: list[Predict]
    steps: list[int]


def shown(recipe: Recipe, meta: Meta, tasks: int) -> Shown | None:
    """The first `tasks` test tasks, adapted to; None where the objective cannot say what its model outputs."""
    recipe = replace(recipe, device="cpu")  # the driver's θ is there, and it may have nothing else
    objective = recipe.objective
    if not isinstance(objective, Predicts) or not isinstance(recipe.tasks, HasPicture | HasFilm) or not tasks:
        return None
    verb = recipe.verbs(objective)["evaluate"]
    arrays = [recipe.task("test", i, verb) for i in range(tasks)]
    data = [recipe.tensors(a) for a in arrays]
    if verb.record:
        lived = verb.record(pack(*meta), {k: torch.stack([d[k] for d in data]) for k in data[0]})
        data = [{k: v[i] for k, v in lived.items()} for i in range(tasks)]
    steps = sorted({0, min(1, recipe.evaluation_steps), recipe.evaluation_steps})
    return Shown(arrays, [_predictor(recipe, objective, meta, d, steps) for d in data], steps)


def picture(family: object, what: Shown, path: Path) -> list[Path]:
    """Draw the tasks into a PNG; the files written, none where the family draws nothing."""
    if not isinstance(family, HasPicture):
        return []
    return [drawing.save(family.picture(what.tasks, what.predict, what.steps), path, tight=True)]


def film(family: object, what: Shown, path: Path) -> list[Path]:
    """A film-strip of all tasks at `path`, and beside it an animation of each; the files written.

    Raises RuntimeError where frames cannot be rendered.
    """
    if not isinstance(family, HasFilm):
        return []
    films = family.film(what.tasks, what.predict, what.steps)
    titles = [family.title(task) for task in what.tasks]
    return [
        drawing.save(_strip(films, titles, what.steps), path, tight=True),
        *(_animate(f, path.with_name(f"{path.stem}-{i}.gif")) for i, f in enumerate(films)),
    ]


def _strip(films: list[list[Clip]], titles: list[str], steps: list[int]) -> Figure:
    from matplotlib.figure import Figure

    rows = [
        (title, step, clip)
        for film, title in zip(films, titles, strict=True)
        for step, clip in zip(steps, film, strict=True)
    ]
    figure = Figure(figsize=(1.6 * STRIP + 1.5, 1.15 * len(rows)), layout="constrained")
    for axes, (title, step, clip) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        chosen = np.linspace(0, len(clip.frames) - 1, STRIP).round().astype(int)
        axes.imshow(np.concatenate(list(clip.frames[chosen]), 1))
        for k, frame in enumerate(chosen):
            axes.text(
                (k + 0.03) * clip.frames.shape[2], 3, clip.captions[frame], va="top", fontsize="x-small", color="white"
            )
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(
            f"{title}\nafter {step} step{'s' * (step != 1)}", rotation=0, ha="right", va="center", fontsize="small"
        )
    return figure


def _animate(film: list[Clip], path: Path) -> Path:
    """The film of one task: each number of steps beside the others."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in np.concatenate([clip.frames for clip in film], 2)]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=round(1000 * film[0].seconds), loop=0)
    write_atomically(path, file.getvalue())
    return path


def _predictor(recipe: Recipe, objective: Predicts, meta: Meta, data: Data, steps: list[int]) -> Predict:
    with torch.no_grad():
        phis = list(recipe.learner.at_test().path(meta, recipe.objective, data, recipe.evaluation_steps))

    def predict(x: Array) -> list[Array]:
        inputs = recipe.tensors({"x": x})["x"]
        with torch.no_grad():
            return [objective.predict(meta.slots | phis[k], data, inputs).cpu().numpy() for k in steps]

    return predict
