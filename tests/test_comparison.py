"""Runs side by side: their intervals over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.comparison import over_seeds


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (30, 2.045)])
def test_the_interval_over_seeds_has_the_quantile_of_printed_tables(seeds: int, quantile: float) -> None:
    values = np.arange(seeds, dtype=float)
    mean, half = over_seeds(values)
    assert mean == (seeds - 1) / 2
    assert half == pytest.approx(quantile * np.sqrt((seeds + 1) / 12), rel=2e-4)  # s² of 0 … n − 1 is n(n + 1)/12


def test_the_interval_of_three_seeds_holds_the_truth_as_often_as_it_says() -> None:
    mean, half = over_seeds(np.random.default_rng(0).normal(5.0, 2.0, (3, 40_000)))
    assert np.mean(np.abs(mean - 5.0) < half) == pytest.approx(0.95, abs=0.004)  # 1.96 would give 0.81
