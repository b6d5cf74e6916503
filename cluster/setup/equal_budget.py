"""A TOML file that describes several runs at equal budget: a base, and a table [runs.NAME] of differences for each."""

from __future__ import annotations

import dataclasses

from cluster.setup import config
from cluster.setup.run import Run
from cluster.setup.tables import Table, from_table, merged
from learners.base import training_steps

BUDGETS = ("passes", "env_steps")
"""Keys that say what each run may spend."""

BEGINNING = "init_from"
"""Key of a run; in a run of a comparison it names another of its runs."""


def comparison(name: str, overrides: Table | None = None) -> dict[str, Run]:
    """The runs of a comparison: a base with a table `[runs.NAME]` of differences for each, all at the same budget.

    `passes` is how many backward passes over a support or query set each may take in all, `env_steps` how many time
    steps of RL tasks; iterations follow, unless a run says its own. `overrides` are top-level keys for every run.
    Raises ValueError for a RUN that is no comparison.
    """
    table = config.read(name)
    variants, budget = table.pop(config.VARIANTS, None), {k: table.pop(k) for k in BUDGETS if k in table}
    allowed = next(iter(budget.values()), None)
    tables = isinstance(variants, dict) and variants and all(isinstance(v, dict) for v in variants.values())
    if not tables or len(budget) != 1 or type(allowed) is not int or allowed < 1:
        raise ValueError(
            f"RUN={name!r} is not a comparison: tables [{config.VARIANTS}.NAME] and {' or '.join(BUDGETS)} = a whole "
            "number wanted"
        )
    runs = {}
    for variant, differences in variants.items():
        differences = {k: v for k, v in differences.items() if k != BEGINNING}
        run: Run = from_table(Run, merged(table, differences) | (overrides or {}), f"{config.VARIANTS}.{variant}.")
        if "iterations" not in differences:
            run = dataclasses.replace(run, iterations=max(1, allowed // spent(run, *budget)))
        runs[variant] = run
    return runs


def beginnings(name: str) -> dict[str, str]:
    """Runs of a comparison that begin from the θ of another one (`init_from` in their table), which must stand before
    them.
    """
    found: dict[str, str] = {}
    before: list[str] = []
    for variant, differences in config.read(name).get(config.VARIANTS, {}).items():
        if BEGINNING in differences:
            found[variant] = differences[BEGINNING]
            if found[variant] not in before:
                raise ValueError(
                    f"{config.VARIANTS}.{variant}.{BEGINNING}={found[variant]!r}: a run that stands before it wanted"
                )
        before.append(variant)
    return found


def spent(run: Run, what: str) -> int:
    """Passes over a support or query set ("passes"), or time steps of tasks ("env_steps"), of one meta-iteration."""
    if what == "passes":
        return run.meta_batch * run.learner.passes()
    if run.kind != "control":
        raise ValueError(f"env_steps: {type(run.task).__name__} has none; passes wanted")
    per_step: int = run.task.rollouts * run.task.horizon  # type: ignore[attr-defined]
    return run.meta_batch * (training_steps(run.learner) + 1) * per_step
