"""Sums whose bracketing depends on shard indices only."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet.messages import Contribution
from cluster.training.aggregate import Tree, is_finite


def answer(values: np.ndarray, weight: float = 1.0) -> Contribution:
    return Contribution(0, 0, "w", 0.0, weight, (("x", values.shape),), values, {"loss": values[:1]})


def bracketed(values: list[np.float32]) -> np.float32:
    """The tree's sum, written down again: pairs of neighbours, level by level."""
    while len(values) > 1:
        values = [values[i] + values[i + 1] if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_sum_is_the_fixed_binary_tree_in_any_order_of_arrival(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(n, 1)) * 10.0 ** rng.integers(-6, 6, (n, 1))).astype(np.float32)
    tree = Tree(n)
    values.flags.writeable = False  # as a view of shared memory is: contributions are not ours to overwrite
    for i in rng.permutation(n):
        tree.add(int(i), answer(values[i]))
    total = tree.total()
    assert total.total["x"].numpy()[0] == bracketed([v[0] for v in values])
    assert total.total["x"].item() == pytest.approx(math.fsum(values[:, 0]), rel=1e-4, abs=1e-2)
    assert total.weight == n
    np.testing.assert_array_equal(total.rows["loss"].numpy(), values[:, 0])


def test_aligned_subtrees_may_be_summed_elsewhere() -> None:
    # What a hierarchical sum relies on: nodes [0, 4) and [4, 8) of eight shards are themselves trees.
    values = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def total(part: np.ndarray) -> np.ndarray:
        tree = Tree(len(part))
        for i, v in enumerate(part):
            tree.add(i, answer(v))
        return tree.total().total["x"].numpy()

    np.testing.assert_array_equal(total(values[:4]) + total(values[4:]), total(values))


def test_rejected_shards_leave_the_others_in_their_brackets() -> None:
    values = [np.float32(v) for v in (1e8, 1.0, -1e8, 1.0, 3.0)]
    for order in permutations(range(5)):
        tree = Tree(5)
        for i in order:
            part = np.array([values[i]])
            part.flags.writeable = False
            tree.reject(i) if i == 1 else tree.add(i, answer(part))
        assert tree.total().weight == 4
        assert tree.total().total["x"].item() == (values[0] + (values[2] + values[3])) + values[4]


def test_a_tree_without_any_answer_says_so() -> None:
    tree = Tree(2)
    tree.reject(0)
    with pytest.raises(ValueError, match="1 of 2 shards are missing"):
        tree.total()
    tree.reject(1)
    with pytest.raises(ValueError, match="all 2 shards were rejected"):
        tree.total()


@pytest.mark.parametrize(
    ("values", "finite"), [([1, 2], True), ([3e38, 3e38], True), ([np.nan, 0], False), ([np.inf, 0], False), ([], True)]
)
def test_finiteness_is_judged_by_entries_not_by_their_sum(values, finite) -> None:
    assert is_finite(answer(np.array(values, np.float32))) is finite
