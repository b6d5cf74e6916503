"""Several runs side by side: a table and a plot, runs that differ in their seed only being averaged."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cluster.operations.existing_run import CONFIGURATION, run_of
from cluster.record.storage import Place, place, write_atomically
from cluster.results import drawing, history, interval
from cluster.results.report import RESULTS
from cluster.setup import equal_budget, resolve
from cluster.setup.run import Run
from cluster.setup.tables import flat, to_table


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, over seeds."""

    label: str
    run: Run
    results: list[dict[str, Any]]
    """Contents of each run's evaluation.json."""
    validation: list[list[dict[str, Any]]]
    """Validation lines of each run's metrics.jsonl."""

    def curve(self, measure: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(mean, half-width of the 95 % interval) per inner step: over seeds, or over tasks where there is one seed."""
        means = np.array([r["mean"][measure] for r in self.results])
        if len(means) == 1:
            return means[0], np.array(self.results[0]["ci95"][measure])
        return means.mean(0), interval.over_seeds(means)

    def spent(self, what: str) -> str:
        """What one run took to train, in the currency of equal budgets, with the runs that it began from."""
        total, run = 0, self.run
        while True:
            total += run.iterations * equal_budget.spent(run, what)
            if not run.init_from:
                return f"{total:,}"
            before = place(run.init_from)
            if not (before / CONFIGURATION).exists():
                return f"{total:,} + {run.init_from}"
            run = run_of(before, like=run)

    def attacked(self) -> dict[str, tuple[float, float]]:
        """(mean, half-width of the 95 % interval) under attack, by "support/query/measure"; {} where nobody
        attacked.
        """
        found = [r["robustness"] for r in self.results if "robustness" in r]
        if not found:
            return {}
        means = {k: np.array([f["mean"][k] for f in found]) for k in found[0]["mean"]}
        if len(found) == 1:
            return {k: (float(v[0]), found[0]["ci95"][k]) for k, v in means.items()}
        return {k: (float(v.mean(0)), float(interval.over_seeds(v))) for k, v in means.items()}


def grouped(directories: Sequence[Place], *, trust: bool = False) -> list[Group]:
    """Finished runs by configuration. Raises FileNotFoundError for one without results, PermissionError for one that
    names code of others, if `trust` does not say that it may.
    """
    groups: dict[tuple[str, int], list[Place]] = {}
    runs: dict[tuple[str, int], Run] = {}
    met: Counter[tuple[str, int]] = Counter()
    for directory in directories:
        if not (directory / RESULTS).exists():
            raise FileNotFoundError(
                f"{directory} has no {RESULTS}: not a run directory, or a run that has not finished"
            )
        run = run_of(directory, trust=trust)
        kind = _kind(run)
        key = kind, met[kind, run.seed]  # the same seed again is no other seed, and stands apart
        met[kind, run.seed] += 1
        groups.setdefault(key, []).append(directory)
        runs[key] = run
    found = [_group(members, runs[key]) for key, members in groups.items()]
    twice = Counter(g.label for g in found)
    return [
        replace(g, label=", ".join(map(str, m))) if twice[g.label] > 1 else g
        for g, m in zip(found, groups.values(), strict=True)
    ]


def _kind(run: Run) -> str:
    """What runs of one kind have in common: all that numbers depend on but the seed."""
    others = {"seed", *resolve.RESUMABLE} - {"iterations", "evaluation"}
    keys = {k: v for k, v in flat(to_table(run)).items() if not resolve.within(k, others)}
    return json.dumps(keys | {"init_from": re.sub(r"/seed-\d+$", "", run.init_from)})


def tables(groups: list[Group]) -> list[Table]:
    """One table per measure: a row per group, columns for inner steps 0, 1 and the last."""
    measures = list(dict.fromkeys(m for g in groups for m in g.results[0]["mean"]))
    attacked = list(dict.fromkeys(m for g in groups for m in g.attacked() if not m.split("/")[-1].startswith("loss")))
    names = dict.fromkeys(key.split("/")[-1] for key in attacked)
    return [_table(groups, m) for m in measures] + [
        _attacked(groups, m, [k for k in attacked if k.endswith(f"/{m}")]) for m in names
    ]


def write(tables: list[Table], out: Path) -> None:
    """The tables as text."""
    text = io.StringIO()
    console = Console(file=text, width=160)
    for table in tables:
        console.print(table)
    write_atomically(out, text.getvalue().encode())


def plot(groups: list[Group], out: Path) -> None:
    """Adaptation curves on test tasks, and validation over meta-iterations where there was any, of the first
    measure.
    """
    from matplotlib.figure import Figure

    measure = next(iter(groups[0].results[0]["mean"]))
    validated = any(lines for group in groups for lines in group.validation)
    figure = Figure(figsize=(11 if validated else 8, 4.2), layout="constrained")
    left, *rest = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for i, group in enumerate(g for g in groups if measure in g.results[0]["mean"]):
        mean, half = group.curve(measure)
        if len(mean) == 1:  # it does not adapt
            line = left.axhline(mean[0], label=group.label, linestyle="--", color=f"C{i}")
        else:
            (line,) = left.plot(mean, label=group.label, color=f"C{i}")
        left.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.2, color=line.get_color())
        for right, lines in ((right, lines) for right in rest for lines in group.validation):
            points = [(v["iteration"], v["curve"][measure][-1]) for v in lines if measure in v["curve"]]
            right.plot([i for i, _ in points], [v for _, v in points], color=line.get_color(), alpha=0.7)
    name = measure.replace("_", " ", 1)
    left.set(xlabel="inner steps", ylabel=f"test {name} (95 % CI)")
    for right in rest:
        right.set(xlabel="meta-iterations", ylabel=f"validation {name}, last inner step")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize="small")
    drawing.save(figure, out)


def _group(members: list[Place], run: Run) -> Group:
    label = ", ".join(m.name for m in members)
    if all(m.name.startswith("seed-") for m in members):
        label = members[0].parent.name + (f" ({len(members)} seeds)" if len(members) > 1 else f"/{label}")
    lines = [history.lines(m) for m in members]
    return Group(
        label, run, [json.loads((m / RESULTS).read_text()) for m in members],
        [[line for line in run_lines if line["kind"] == "validation"] for run_lines in lines],
    )  # fmt: skip


def _table(groups: list[Group], measure: str) -> Table:
    table = Table(
        title=f"test {measure.replace('_', ' ', 1)}: "
        "mean ± 95 % CI (over seeds where there are several, else over tasks)"
    )
    lived = all(group.run.kind == "control" for group in groups)
    budget, currency = ("env_steps", "time steps") if lived else ("passes", "backward passes")
    for name in ("run", "seeds", "iterations", currency, "step 0", "step 1", "last step"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=name == "run")
    for group in groups:
        if measure not in group.results[0]["mean"]:
            continue
        mean, half = group.curve(measure)
        cells = [f"{mean[k]:.4f} ± {half[k]:.4f}" for k in (0, min(1, len(mean) - 1), len(mean) - 1)]
        table.add_row(group.label, str(len(group.results)), str(group.run.iterations), group.spent(budget), *cells)
    return table


def _attacked(groups: list[Group], name: str, keys: list[str]) -> Table:
    table = Table(title=f"test {name.replace('_', ' ', 1)} under attack, by support/query: mean ± 95 % CI")
    table.add_column("run", no_wrap=True)
    for key in keys:
        table.add_column(key.rpartition("/")[0], justify="right")
    for group in groups:
        found = group.attacked()
        if found:
            table.add_row(group.label, *("{:.4f} ± {:.4f}".format(*found[m]) if m in found else "" for m in keys))
    return table
