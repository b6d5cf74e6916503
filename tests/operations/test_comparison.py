"""Runs side by side: their intervals over seeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.operations.comparison import grouped
from cluster.results.interval import over_seeds


def test_runs_of_one_kind_are_seeds_wherever_they_ran_and_the_same_seed_twice_is_not_two(
    finished: Path, tmp_path: Path
) -> None:
    text = (finished / "run.toml").read_text()
    changes = {"x/seed-0": {}, "x/seed-1": {"seed = 0": "seed = 1", "workers = 2": "workers = 4"}, "y/seed-0": {}}
    for name, changed in changes.items():
        shutil.copytree(finished, tmp_path / name)
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new, 1)  # evaluation has a seed of its own
        (tmp_path / name / "run.toml").write_text(text)
        text = (finished / "run.toml").read_text()
    groups = grouped([tmp_path / name for name in changes])
    assert [(g.label, len(g.results)) for g in groups] == [("x (2 seeds)", 2), ("y/seed-0", 1)]
    for name in ("maml-0", "other/maml-0"):
        shutil.copytree(finished, tmp_path / name)
    groups = grouped([tmp_path / name for name in ("maml-0", "other/maml-0")])
    assert [g.label for g in groups] == [str(tmp_path / "maml-0"), str(tmp_path / "other/maml-0")]


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (30, 2.045)])
def test_the_interval_over_seeds_has_the_quantile_of_printed_tables(seeds: int, quantile: float) -> None:
    values = np.arange(seeds, dtype=float)
    half = over_seeds(values)
    assert half == pytest.approx(quantile * np.sqrt((seeds + 1) / 12), rel=2e-4)  # s² of 0 … n − 1 is n(n + 1)/12


def test_the_interval_of_three_seeds_holds_the_truth_as_often_as_it_says() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, (3, 40_000))
    mean, half = values.mean(0), over_seeds(values)
    assert np.mean(np.abs(mean - 5.0) < half) == pytest.approx(0.95, abs=0.004)  # 1.96 would give 0.81
