"""Reading back what a run measured."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from cluster.record.storage import place, write_atomically
from cluster.results.history import history, rows

LINES = [
    {"iteration": 1, "kind": "train", "train/loss": 3.0, "seconds": [1.0, 2.0]},
    {"iteration": 1, "kind": "fleet", "event": "joined"},
    {"iteration": 1, "kind": "validation", "validation/loss_step0": 2.0, "curve": {"loss": [2.0]}},
    {"iteration": 2, "kind": "test", "test/loss_step0": 1.0},
    {"iteration": 2, "kind": "test", "test/robust": 0.5},
]
WANTED = [
    {"iteration": 1, "kind": "train", "train/loss": 3.0},
    {"iteration": 1, "kind": "validation", "validation/loss_step0": 2.0},
    {"iteration": 2, "kind": "test", "test/loss_step0": 1.0, "test/robust": 0.5},
]


def written(folder, tail: bytes = b"") -> None:
    write_atomically(folder / "metrics.jsonl", "".join(f"{json.dumps(x)}\n" for x in LINES).encode() + tail)


def test_a_row_per_iteration_and_kind_without_lists_and_without_a_half_written_line(tmp_path: Path) -> None:
    written(tmp_path, b'{"iteration": 3, "ki')
    assert rows(tmp_path) == rows(str(tmp_path)) == WANTED


def test_a_run_in_a_store_is_read_by_its_url() -> None:
    written(place("memory://history-of/run"))
    assert rows("memory://history-of/run") == WANTED


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "kind": "train"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        history(tmp_path)


def test_pandas_is_used_where_it_is_and_not_missed_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert history(tmp_path) == WANTED
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = tuple
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pandas)
    assert history(tmp_path) == tuple(WANTED)
