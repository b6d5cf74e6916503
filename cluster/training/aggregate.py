"""Adding contributions up, in an order fixed by index. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.fleet import wire
from cluster.fleet.messages import Contribution, Elsewhere, Layout, Vector
from learners.base import CARRIED, Sum

T = TypeVar("T")

Node: TypeAlias = tuple[Vector | Elsewhere, float, bool]
"""Total and weight of a subtree, and whether the total is ours to overwrite."""


class Bracket(Generic[T]):
    """Σ over places 0 … n−1, bracketed as a binary tree over their numbers; None where there is nothing to add.

    Floats are not associative, so the bracketing may not depend on who answered first: node [a, b) of a level is
    its left half plus its right half, whenever both are there. An empty half leaves the other as it is.
    """

    def __init__(self, places: int, plus: Callable[[T, T], T]) -> None:
        self.places, self._plus = places, plus
        self._nodes: dict[tuple[int, int], T | None] = {}  # (level, position) → sum
        self._top = (places - 1).bit_length()
        self.missing = places

    def place(self, index: int, value: T | None) -> None:
        """What stands at a place; adds whatever can be added now."""
        self.missing -= 1
        level, position = 0, index
        self._nodes[0, index] = value
        while level < self._top:
            left, right = (level, position & ~1), (level, position | 1)
            if left not in self._nodes or (right not in self._nodes and right[1] << level < self.places):
                return
            a, b = self._nodes.pop(left), self._nodes.pop(right, None)
            level, position = level + 1, position >> 1
            self._nodes[level, position] = (
                self._plus(a, b) if a is not None and b is not None else (b if a is None else a)
            )

    def total(self) -> T | None:
        """The sum of all places; None where all are empty. Raises ValueError while some are missing."""
        if self.missing:
            raise ValueError(f"{self.missing} of {self.places} shards are missing")
        return self._nodes[self._top, 0]


def bracketed(values: Sequence[T | None], plus: Callable[[T, T], T]) -> T | None:
    """The sum of values that are all there, in the same brackets."""
    bracket = Bracket(len(values), plus)
    for index, value in enumerate(values):
        bracket.place(index, value)
    return bracket.total()


class Tree:
    """Σ over the contributions of shards 0 … n−1. A rejected shard leaves its place empty.

    Vectors that are elsewhere are added there, in the same brackets, once the total is asked for.
    """

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.layout: Layout | None = None
        self._bracket = Bracket(shards, _plus)
        self._rows: dict[int, dict[str, NDArray[np.floating]]] = {}

    @property
    def done(self) -> bool:
        """Whether every shard was added or rejected."""
        return self._bracket.missing == 0

    def add(self, index: int, contribution: Contribution) -> None:
        """Add the contribution of shard `index`."""
        if self.layout is None:
            self.layout = contribution.layout
        elif self.layout != contribution.layout:
            raise ValueError(f"shard {index} answered with other parameters than the shards before it")
        self._rows[index] = contribution.rows
        self._bracket.place(index, (contribution.vector, contribution.weight, False))

    def reject(self, index: int) -> None:
        """Go on without shard `index`."""
        self._bracket.place(index, None)

    def total(self) -> Sum:
        """The sum over all shards. Raises ValueError where every one was rejected, Lost where one that was elsewhere is
        gone.
        """
        root = self._bracket.total()
        if root is None or self.layout is None:
            raise ValueError(f"all {self.shards} shards were rejected")
        vector, weight, _ = root
        order = sorted(self._rows)
        rows = {name: np.concatenate([self._rows[i][name] for i in order]) for name in self._rows[order[0]]}
        here = vector if isinstance(vector, np.ndarray) else vector.fetch()
        return Sum(wire.unflatten(self.layout, here), weight, {k: torch.from_numpy(v) for k, v in rows.items()})


def _plus(left: Node, right: Node) -> Node:
    """left + right; into left's memory where that is a sum of ours."""
    a, b, weight = left[0], right[0], left[1] + right[1]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.add(a, b, out=a if left[2] else None), weight, True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        raise TypeError("one shard's sum is here and its neighbour's elsewhere")
    return a.plus(b), weight, True


def is_finite(contribution: Contribution) -> bool:
    """Whether every number of the total, and of rows that are carried, is finite; the worker's word for a total that is
    elsewhere.
    """
    if not all(np.isfinite(v).all() for name, v in contribution.rows.items() if name.startswith(CARRIED)):
        return False
    vector = contribution.vector
    return wire.is_finite(vector) if isinstance(vector, np.ndarray) else contribution.finite
