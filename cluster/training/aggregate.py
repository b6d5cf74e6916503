"""Adding contributions up, in an order fixed by index. Pure."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.fleet import wire
from cluster.fleet.messages import Contribution, Elsewhere, Layout, Vector
from learners.base import CARRIED, Sum

Node: TypeAlias = tuple[Vector | Elsewhere, float, bool] | None
"""Total and weight of a subtree, and whether the total is ours to overwrite; None where all of it was rejected."""


class Tree:
    """Σ over shards 0 … n−1, bracketed as a binary tree over shard indices.

    Floats are not associative, so the bracketing may not depend on who answered first: node [a, b) of a level is
    its left half plus its right half, whenever both are there. A rejected shard leaves its half empty. Vectors that are
    elsewhere are added there, in the same brackets, once the total is asked for.
    """

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.layout: Layout | None = None
        self._nodes: dict[tuple[int, int], Node] = {}  # (level, position) → sum
        self._rows: dict[int, dict[str, NDArray[np.floating]]] = {}
        self._missing = shards

    @property
    def done(self) -> bool:
        """Whether every shard was added or rejected."""
        return self._missing == 0

    def add(self, index: int, contribution: Contribution) -> None:
        """Add the contribution of shard `index`."""
        if self.layout is None:
            self.layout = contribution.layout
        elif self.layout != contribution.layout:
            raise ValueError(f"shard {index} answered with other parameters than the shards before it")
        self._rows[index] = contribution.rows
        self._place(index, (contribution.vector, contribution.weight, False))

    def reject(self, index: int) -> None:
        """Go on without shard `index`."""
        self._place(index, None)

    def total(self) -> Sum:
        """The sum over all shards. Raises ValueError where every one was rejected, Lost where one that was elsewhere is gone."""
        if not self.done:
            raise ValueError(f"{self._missing} of {self.shards} shards are missing")
        level = (self.shards - 1).bit_length()
        root = self._nodes[level, 0]
        if root is None or self.layout is None:
            raise ValueError(f"all {self.shards} shards were rejected")
        vector, weight, _ = root
        order = sorted(self._rows)
        rows = {name: np.concatenate([self._rows[i][name] for i in order]) for name in self._rows[order[0]]}
        here = vector if isinstance(vector, np.ndarray) else vector.fetch()
        return Sum(wire.unflatten(self.layout, here), weight, {k: torch.from_numpy(v) for k, v in rows.items()})

    def _place(self, index: int, value: Node) -> None:
        self._missing -= 1
        level, position = 0, index
        self._nodes[0, index] = value
        while level < (self.shards - 1).bit_length():
            left, right = (level, position & ~1), (level, position | 1)
            if left not in self._nodes or (right not in self._nodes and self._exists(right)):
                return
            value = _plus(self._nodes.pop(left), self._nodes.pop(right, None))
            level, position = level + 1, position >> 1
            self._nodes[level, position] = value

    def _exists(self, node: tuple[int, int]) -> bool:
        level, position = node
        return position << level < self.shards


def _plus(left: Node, right: Node) -> Node:
    """left + right; into left's memory where that is a sum of ours."""
    if left is None or right is None:
        return left or right
    a, b, weight = left[0], right[0], left[1] + right[1]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.add(a, b, out=a if left[2] else None), weight, True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        raise TypeError("one shard's sum is here and its neighbour's elsewhere")
    return a.plus(b), weight, True


def is_finite(contribution: Contribution) -> bool:
    """Whether every number of the total, and of rows that are carried, is finite; the worker's word for a total that is elsewhere."""
    if not all(np.isfinite(v).all() for name, v in contribution.rows.items() if name.startswith(CARRIED)):
        return False
    vector = contribution.vector
    return wire.is_finite(vector) if isinstance(vector, np.ndarray) else contribution.finite
