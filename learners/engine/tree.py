"""Arithmetic on dictionaries of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learners.base import Params


def add(a: Params, b: Params) -> Params:
    """a + b, key by key."""
    return {k: v + b[k] for k, v in a.items()}


def sub(a: Params, b: Params) -> Params:
    """a − b, key by key."""
    return {k: v - b[k] for k, v in a.items()}


def scale(factor: float | Tensor, a: Params) -> Params:
    """factor · a."""
    return {k: factor * v for k, v in a.items()}


def multiply(a: Params, b: Params) -> Params:
    """a ∘ b, entry by entry."""
    return {k: v * b[k] for k, v in a.items()}


def apply(function: Callable[[Tensor], Tensor], a: Params) -> Params:
    """function(a), key by key."""
    return {k: function(v) for k, v in a.items()}


def zeros_like(a: Params) -> Params:
    """0 in the shape of a."""
    return apply(torch.zeros_like, a)


def dot(a: Params, b: Params) -> Tensor:
    """⟨a, b⟩ over all entries."""
    return torch.stack([(v * b[k]).sum() for k, v in a.items()]).sum()


def norm(a: Params) -> Tensor:
    """‖a‖₂ over all entries; 0 for an empty dictionary."""
    return dot(a, a).sqrt() if a else torch.zeros(())


def flatten(a: Params) -> Tensor:
    """All entries as one vector, in the order of the keys."""
    return torch.cat([v.reshape(-1) for v in a.values()]) if a else torch.zeros(0)


def with_prefix(prefix: str, a: Params) -> Params:
    """The entries of a under `prefix/name`."""
    return {f"{prefix}/{k}": v for k, v in a.items()}


def under(prefix: str, a: Params) -> Params:
    """The entries of a that stand under `prefix/`, without it: the inverse of `with_prefix`."""
    start = len(prefix) + 1
    return {k[start:]: v for k, v in a.items() if k.startswith(f"{prefix}/")}


def mapped(function: Callable[[Tensor], Any], nested: Any) -> Any:
    """function of every tensor in dictionaries, tuples and lists; the rest as it is."""
    return pytree.tree_map_only(Tensor, function, nested)


def leaves(nested: Any) -> list[Tensor]:
    """Every tensor in dictionaries, tuples and lists."""
    return [v for v in pytree.tree_leaves(nested) if isinstance(v, Tensor)]


def joined(parts: list[Any]) -> Any:
    """Equal structures of tensors, concatenated along the first axis."""
    flat = [pytree.tree_flatten(part) for part in parts]
    columns = zip(*(values for values, _ in flat), strict=True)
    return pytree.tree_unflatten([torch.cat(column) for column in columns], flat[0][1])
