"""What a run measured, row by row: metrics.jsonl as Python sees it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from upath import UPath

from cluster.record.storage import Place, place, read

METRICS = "metrics.jsonl"
"""File of a run directory with a line for each iteration, evaluation and event of the fleet."""


def lines(home: Place) -> list[dict[str, Any]]:
    """Everything that the driver has written there, as it stands."""
    return [json.loads(line) for line in (home / METRICS).read_text().splitlines()]


def rows(directory: str | Path | UPath) -> list[dict[str, Any]]:
    """One row per iteration and kind (train, validation, test), with its scalars, oldest first. A last line that is
    half-written, of a run under way or cut off, is left out. Raises FileNotFoundError for a folder that is no run.
    """
    home = place(directory)
    try:
        content = read(home / METRICS).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{home} has no {METRICS}: not a run directory, or a run that has not begun") from None
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(content[:-1], 1):
        try:
            values = json.loads(line)
            key = int(values["iteration"]), str(values["kind"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{home / METRICS}, line {number}: no row of a run ({line[:40]!r})") from None
        if key[1] != "fleet":  # what happened, not what was measured
            scalars = {k: v for k, v in values.items() if isinstance(v, int | float | str)}
            merged[key] = merged.get(key, {}) | scalars
    return list(merged.values())


def history(directory: str | Path | UPath) -> Any:
    """`rows` as a pandas DataFrame where pandas is installed, else as they are."""
    found = rows(directory)
    if importlib.util.find_spec("pandas") is None:
        return found
    return importlib.import_module("pandas").DataFrame(found)
