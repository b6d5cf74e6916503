"""What a scaling experiment found: CSV, JSON, a plot and a page of text."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.operations.scale import Experiment, Point, rows, smoothed
from cluster.record.storage import Place, make_folder, write_atomically
from cluster.results import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {
    "scaling": "scaling", "policy": "policy", "workers": "workers", "meta_batch": "meta-batch",
    "startup_s": "start-up s", "tasks_per_s": "tasks/s", "efficiency": "efficiency", "of_independent": "of independent",
    "compute": "compute", "communication": "communication", "waiting": "waiting", "time_to_target_s": "time to loss s",
}  # fmt: skip
SHARES = ("efficiency", "of_independent", "compute", "communication", "waiting")


def write(points: list[Point], experiment: Experiment, facts: dict[str, Any], home: Place) -> None:
    """scale.csv, scale.json, scale.png and scale.md in `home`; `facts`: what was run and where."""
    make_folder(home)
    found = rows(points)
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(found[0]))
    sheet.writeheader()
    sheet.writerows(found)
    write_atomically(home / "scale.csv", text.getvalue().encode())
    content = {
        "facts": facts,
        "experiment": asdict(experiment),
        "points": [r | {"curve": p.run.curve} for r, p in zip(found, points, strict=True)],
    }
    write_atomically(home / "scale.json", json.dumps(content, indent=1).encode())
    drawing.save(plot(points), home / "scale.png")
    write_atomically(home / "scale.md", page(found, experiment, facts).encode())


def table(points: list[Point], title: str) -> Table:
    """What fits a terminal."""
    shown = Table(title=title)
    short = {"workers": "workers", "startup_s": "start", "tasks_per_s": "tasks/s", "efficiency": "effic.",
             "of_independent": "indep.", "compute": "comp.", "communication": "comm.", "waiting": "wait",
             "time_to_target_s": "to loss"}  # fmt: skip
    for name in ("series", *short.values()):
        shown.add_column(name, justify="left" if name == "series" else "right", no_wrap=True)
    for row in rows(points):
        shown.add_row(f"{row['scaling']} {row['policy']}", *(_cell(name, row[name]) for name in short))
    return shown


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.0%}" if name in SHARES else f"{value:.4g}"


def page(found: list[dict[str, Any]], experiment: Experiment, facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# Scaling of {facts['run']}", ""]
    lines += [f"- {k}: {v}" for k, v in facts.items() if k != "run"]
    lines += [
        f"- {experiment.iterations} meta-iterations a run, the first {experiment.warmup} not measured; median of "
        f"{experiment.repeats}",
        "- compute, communication, waiting: shares of the workers' time. Waiting: until the busiest worker of a round "
        "was done. "
        "Communication: the rest, in which messages travel and the driver works.",
    ]
    if experiment.independent:
        lines.append(
            "- of independent: the fleet's tasks/s over those of as many processes that each train alone, without Ray, "
            "on the same machine."
        )
    lines.append(
        "- time to loss: until the mean of five meta-iterations is at what the worst fleet of the series reaches, "
        "after the warm-up."
    )
    lines += ["", f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cell(name, row[name]) for name in COLUMNS)} |" for row in found]
    return "\n".join([*lines, "", "![throughput, efficiency, loss over time](scale.png)", ""])


def plot(points: list[Point]) -> Figure:
    """Throughput and efficiency over workers with the ideal, where the workers' time goes, and loss over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    ((throughput, efficiency), (times, loss)) = figure.subplots(2, 2)
    found = rows(points)
    for i, key in enumerate(dict.fromkeys((p.scaling, p.policy) for p in points)):
        mine = [(p, r) for p, r in zip(points, found, strict=True) if (p.scaling, p.policy) == key]
        sizes, rates = [p.workers for p, _ in mine], [p.run.tasks_per_s for p, _ in mine]
        throughput.plot(sizes, rates, "o-", color=f"C{i}", label=", ".join(key))
        throughput.plot(
            sizes, [rates[0] * n / sizes[0] for n in sizes], ":", color=f"C{i}", label="ideal" if not i else None
        )
        if all(p.independent_tasks_per_s for p, _ in mine):
            alone = [p.independent_tasks_per_s for p, _ in mine]
            throughput.plot(sizes, alone, "x--", color="grey", label="independent processes" if not i else None)
        efficiency.plot(sizes, [r["efficiency"] for _, r in mine], "o-", color=f"C{i}", label=", ".join(key))
        for j, (p, _) in enumerate(mine):
            loss.plot(
                *smoothed(p.run.curve),
                color=f"C{i}",
                alpha=0.3 + 0.7 * (j + 1) / len(mine),
                label=f"{', '.join(key)}, {p.workers}",
            )
    efficiency.axhline(1.0, linestyle=":", color="grey", label="ideal")
    sizes = sorted({p.workers for p in points})
    for axes in (throughput, efficiency):
        axes.set(xlabel="workers", xticks=sizes)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    throughput.set(ylabel="tasks/s")
    efficiency.set(ylabel="efficiency: tasks/s per worker, smallest fleet = 1")
    loss.set(xlabel="seconds after the warm-up", ylabel="training loss (or minus return), mean of 5")
    loss.legend(fontsize="x-small")
    _shares(times, points)
    return figure


def _shares(axes: Axes, points: list[Point]) -> None:
    labels = [f"{p.scaling}\n{p.policy}\n{p.workers}" for p in points]
    bottom = [0.0] * len(points)
    for name, colour in (("compute", "C2"), ("communication", "C1"), ("waiting", "C3")):
        heights = [getattr(p.run, name) for p in points]
        axes.bar(labels, heights, bottom=bottom, color=colour, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(ylabel="share of the workers' time", ylim=(0, 1.15))
    axes.legend(fontsize="small", ncols=3, loc="upper center")
