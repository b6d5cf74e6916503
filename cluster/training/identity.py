"""Where a run begins, and what makes it this run."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import torch

from cluster.fleet import seeds, wire
from cluster.fleet.recipe import Recipe
from learners.base import Meta, Params, pack
from learners.engine import tree

log = logging.getLogger("metafleet")


def initial(recipe: Recipe, params: Params, begin: Meta | None = None) -> tuple[Meta, Params]:
    """θ₀ and the outer step's first state, from a model's initial parameters; or as far as names and shapes agree with
    what another run learned, `begin`: its θ, rates and running statistics, but not the learner's own slots (clocks,
    moments).
    """
    cast = getattr(torch, recipe.dtype)
    params = tree.apply(lambda v: v.detach().to("cpu", cast), params)
    meta = recipe.learner.init(params, seeds.generator(recipe.seed, "none", 0, "init"))
    slots = tree.apply(lambda v: v.to("cpu", cast), recipe.objective.slots())
    if begin:
        slots = _taken(slots, begin.slots)
        meta = Meta(_taken(meta.params, begin.params), meta.slots)
    meta = Meta(meta.params, slots | meta.slots)
    return meta, recipe.outer.init(meta)


def _taken(ours: Params, theirs: Params) -> Params:
    return {
        k: theirs[k].to("cpu", v.dtype) if k in theirs and theirs[k].shape == v.shape else v for k, v in ours.items()
    }


def identity(recipe: Recipe, meta: Meta, meta_batch: int, shard: int) -> dict[str, Any]:
    """What makes a run this run, beside the fleet: if any of it differs, so do the numbers."""
    return {
        "tasks": told(recipe.tasks) if is_dataclass(recipe.tasks) else type(recipe.tasks).__name__,
        "objective": recipe.objective.summary(), "learner": told(recipe.learner), "outer": told(recipe.outer),
        "seed": recipe.seed, "dtype": recipe.dtype,
        "meta_batch": meta_batch, "shard": shard, "execution": recipe.execution, "chunk": recipe.chunk,
        "threads": recipe.threads, "compression": recipe.compression,
        "parameters": {k: list(v.shape) for k, v in pack(*meta).items()},
    }  # fmt: skip


def told(value: Any) -> str:
    """`repr`, but that a dataclass names those of its fields that are in its `LATER` only where they are not at their
    defaults: runs that began before there were such fields go on.
    """
    if not is_dataclass(value):
        return repr(value)
    later = getattr(value, "LATER", ())
    shown = [f for f in fields(value) if f.name not in later or getattr(value, f.name) != _default(f)]
    return f"{type(value).__qualname__}({', '.join(f'{f.name}={told(getattr(value, f.name))}' for f in shown)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def digest(meta: Meta) -> str:
    """A short hash of every bit of θ and its slots."""
    _, vector = wire.flatten(pack(*meta))
    return hashlib.blake2b(vector.tobytes(), digest_size=16).hexdigest()
