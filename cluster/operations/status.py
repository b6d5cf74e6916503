"""What a run is doing, from the files that its driver writes. Nothing here computes, and so nothing is imported that
would.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from typing import Any

from rich.table import Table

from cluster.record.storage import Place

SILENT = 60.0
"""Seconds without news after which a run that claims to be running is said to be silent."""


def status(directory: Place) -> Table:
    """status.json as a table: state and progress, then results, then the fleet."""
    path = directory / "status.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no status.json: not a run directory, or one that has not begun")
    content: dict[str, Any] = json.loads(path.read_text())
    age, running = time.time() - content["updated"], content["state"] == "running"
    metrics = {k: f"{v:.5g}" for k, v in content["metrics"].items()}
    results = {k: metrics.pop(k) for k in list(metrics) if k.startswith(("test/", "validation/"))}
    rows: dict[str, object] = {
        "state": content["state"] + (f" (but silent for {age:.0f} s)" if running and age > SILENT else ""),
        "progress": _progress(content),
        "time left": _time(content.get("eta_s")) if running else "",
        "best on validation": ", ".join(f"{k} {v:g}" for k, v in content["best"].items()),
        "stopped by": content.get("stopped_by", ""),
        **dict(sorted(results.items())),
        "driver": f"process {content['pid']} on {content['host']}, attempt {content['attempt']}",
        "updated": f"{age:.0f} s ago",
        "workers": ", ".join(f"{name} ({where})" for name, where in content["workers"].items()),
        "nodes": ", ".join(content["nodes"].values()),
        "tickets": ", ".join(f"{v} {k}" for k, v in content["counts"].items() if v),
    }
    table = Table(title=str(directory), show_header=False)
    for key, value in (rows | dict(sorted(metrics.items()))).items():
        if value != "":
            table.add_row(key, str(value))
    return table


def is_running(directory: Place) -> bool:
    """Whether a run says that it goes on."""
    return bool(json.loads((directory / "status.json").read_text())["state"] == "running")


def _progress(content: dict[str, Any]) -> str:
    done, of = content["iteration"], content["iterations"]
    share = f" ({done / of:.0%})" if of else ""
    return f"iteration {done} of {of}{share}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None or not math.isfinite(seconds) else str(datetime.timedelta(seconds=round(seconds)))
