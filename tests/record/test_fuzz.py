"""Readers of what comes from disk or network raise ValueError, or read (`make fuzz`: a million inputs)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import attempt, mutated, targets

NAMES = [
    "assignment",
    "sum",
    "broadcast",
    "checkpoint",
    "journal, read",
    "journal, unfinished",
    "journal, replay",
    "configuration",
]


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1), blob=st.binary(max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_and_foreign_inputs_raise_nothing_but_value_errors(
    tmp_path: Path, name: str, seed: int, blob: bytes
) -> None:
    target = next(t for t in targets(tmp_path) if t.name == name)
    attempt(target, mutated(target, np.random.default_rng(seed)))
    attempt(target, blob)
    if target.unwrap:
        attempt(target, target.wrap(blob))


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_we_read(tmp_path: Path, name: str) -> None:
    target = next(t for t in targets(tmp_path) if t.name == name)
    assert attempt(target, target.sample)


def test_every_reader_is_tried(tmp_path: Path) -> None:
    assert [t.name for t in targets(tmp_path)] == NAMES
