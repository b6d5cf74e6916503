"""The commands that use a trained θ: evaluate, adapt, export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.commands.console import console, parsed

FIXED = ("outer", "policy", "checkpoint", "seed", "init_from", "iterations", "meta_batch", "sums", "compression",
         "straggler", "prometheus_port", "gradient_checkpointing")  # fmt: skip
"""Keys of a run that an evaluation has no use for."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation, beside the keys of the run: every key may be another than in training.

    --checkpoint is newest, best (on validation), or the iteration of one that is kept.
    """

    tasks: int = 0
    """Held-out tasks; 0: as the run does."""
    steps: int | None = None
    """Inner steps; default: as the run does."""
    split: Literal["train", "validation", "test"] = "test"
    """Which tasks."""
    norms: tuple[Literal["transductive", "support_plus_one", "support_statistics", "frozen"], ...] = ()
    """Normalisation modes to report; empty: as the run does."""
    inner_lr: float | None = None
    """Rate of the inner loop, a later one (`learner.later_lr`) in proportion; default: the run's."""
    eps: float | None = None
    """Attack support and query within this ball (pixels: [0, 1]); default: as the run does; 0: do not."""
    json: str = ""
    """Write the numbers to this file, or URL."""
    trust: bool = False
    """Import code that the directory names and that is not Metafleet's."""


def evaluate(words: list[str]) -> None:
    """Adapt the θ of the run in DIR to held-out tasks, in this process unless --pool ray, and print mean ± 95 % CI
    after each inner step. Any key may be another than in training: --task.shots 5, --task.source.folder DIR.
    """
    from cluster.commands import flags
    from cluster.operations import conditions
    from cluster.record.storage import place, write_atomically

    checkpoint, words = flags.taken(words, "--checkpoint", "newest")
    here = flags.of_directory(words, {"pool": "local"})
    name, o, run = flags.configured(
        "evaluate", words, EvaluateOptions, evaluate.__doc__ or "", shown="DIR", load=here, hidden=FIXED
    )
    run = conditions.under(run, tasks=o.tasks, steps=o.steps, norms=o.norms, inner_lr=o.inner_lr, eps=o.eps)
    results = conditions.evaluate(place(name), run, split=o.split, checkpoint=checkpoint)
    curves, matrix = results.curves, results.matrix
    title = f"{name}: {curves.tasks} {o.split} tasks, mean ± 95 % CI ({checkpoint} checkpoint, seed {run.seed})"
    for table in [curves.table(title), *(matrix.tables() if matrix else ())]:
        console.print(table)
    if o.json:
        content = curves.as_dict() | ({"robustness": matrix.as_dict()} if matrix else {})
        write_atomically(place(o.json), json.dumps(content, indent=1).encode())


@dataclass(frozen=True)
class Adapt:
    """Adapt the θ of a run to a few examples of one's own, and predict others: a csv, and a picture of images.

    Examples are a folder (of images, in a folder per class where classes are known), an .npz with x and y, or a .csv
    with a column of image files or one per number, and one named label.
    """

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    support: str = ""
    """Examples with their classes (or numbers) to adapt to."""
    predict: str = ""
    """Examples to predict."""
    out: str = "predictions.csv"
    """Where the predictions go: class, probability and the two next ones; the picture beside it, as .png."""
    steps: int | None = None
    """Inner steps; default: as the run's evaluation takes."""
    norm: Literal["", "transductive", "support_plus_one", "support_statistics", "frozen"] = ""
    """What BatchNorm normalises queries by: empty: as the run does. transductive: all of them together."""
    checkpoint: str = "newest"
    """newest, best (on validation), or the iteration of one that is kept."""
    export: str = ""
    """Also write the adapted parameters to this .safetensors file."""
    trust: bool = False
    """Import code that the directory names and that is not Metafleet's."""


def adapt(words: list[str]) -> None:
    """A few examples of one's own in, predictions out."""
    from cluster.operations import examples, trained
    from cluster.operations.predictions import Predictions
    from cluster.record.storage import place
    from cluster.results import drawing
    from envs.images.episodes import Episodes

    o = parsed("adapt", Adapt, words)
    if not o.support or not o.predict:
        raise ValueError("metafleet adapt wants --support and --predict: folders, .npz or .csv files")
    few = trained.load(o.dir, checkpoint=o.checkpoint, trust=o.trust)
    support, queries = (examples.read(Path(p).expanduser(), few.run.task) for p in (o.support, o.predict))
    if support.y is None:
        raise ValueError(f"support={o.support}: examples with classes wanted (a folder for each, or y)")
    fitted = few.adapt(support, steps=o.steps, norm=o.norm)
    found = Predictions.of(fitted, queries)
    found.write(place(o.out))
    kinds = "" if fitted.classes_ is None else f" of {len(fitted.classes_)} classes"
    how = f", BatchNorm: {fitted.norm}" if fitted.norm else ""
    console.print(
        f"adapted to {len(support.x)} examples{kinds} in {fitted.steps} inner steps{how}; {len(queries.x)} queries",
        highlight=False,
    )
    if (accuracy := found.accuracy()) is not None:
        console.print(f"accuracy {accuracy:.4f} (the queries' classes are known)", highlight=False)
    console.print(f"predictions: {o.out}", highlight=False, soft_wrap=True)
    if found.labels is not None and isinstance(few.run.task, Episodes) and len(few.run.task.inputs) == 3:
        picture = Path(o.out).with_suffix(".png")
        drawing.save(found.picture(support, few.run.task), picture)
        console.print(f"picture:     {picture}", highlight=False, soft_wrap=True)
    if o.export:
        fitted.export(o.export)
        console.print(f"parameters:  {o.export}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Export:
    """Write the θ of a run as safetensors, for use with plain torch (learners/README.md shows how)."""

    dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    out: Annotated[str, tyro.conf.Positional]
    """File to write, .safetensors, or its URL."""
    checkpoint: str = "newest"
    """newest, best (on validation), or the iteration of one that is kept."""


def export(words: list[str]) -> None:
    """θ as safetensors."""
    from cluster.operations import existing_run
    from cluster.record import storage

    o = parsed("export", Export, words)
    names = existing_run.export(storage.place(o.dir), storage.place(o.out), o.checkpoint)
    console.print(
        f"{o.out}: {len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})", highlight=False
    )
