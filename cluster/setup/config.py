"""The typed configuration of a run: TOML presets with `extends`, then `--key value`; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable
from pathlib import Path

import tomli_w

from cluster.record.storage import Place, place
from cluster.setup.run import Run
from cluster.setup.tables import Table, choose, flat, from_table, merged, nearest, to_table
from learners.base import training_steps

PRESETS = Path(__file__).parent / "presets"
VARIANTS = "runs"
BUDGETS = ("passes", "env_steps")
"""Keys of a TOML file that make it a comparison of several runs, and say what each may spend."""

BEGINNING = "init_from"
"""Key of a run; in a run of a comparison it names another of its runs."""

NOTES = ("description", "reference", "extends", "environment")
"""Keys of a TOML file that say something about the run, and are not configuration."""

RESUMABLE = (
    "iterations", "workers", "min_workers", "pool", "address", "cpus_per_worker", "gpus_per_worker", "allow_mixed_fleet", "checkpoint",
    "evaluation", "sums", "prometheus_port", "policy.deadlines", "policy.max_attempts",
)  # fmt: skip
"""Keys, and tables of keys, that may change when a run goes on: the fleet, and what looks at θ without moving it."""


def load(name: str, overrides: dict[str, str] | None = None) -> Run:
    """The run of a preset's name or a TOML file's path; `overrides` are "learner.name": "reptile" and the like.

    Raises ValueError for unknown names and keys, naming the nearest known one.
    """
    table = read(name)
    if VARIANTS in table:
        raise ValueError(f"RUN={name!r} is a comparison of {len(table[VARIANTS])} runs: metafleet compare {name}")
    for path, choice in (overrides or {}).items():
        choose(table, path.split("."), choice)
    run: Run = from_table(Run, table)
    return run


def read(name: str, extending: tuple[Place, ...] = ()) -> Table:
    """The raw table of a preset or file, with what it extends merged in; a path in `extends` is relative to its file."""
    path = find(name, extending[-1].parent if extending else Path())
    if path in extending:
        raise ValueError(f"{path} extends itself, by way of {', '.join(p.name for p in extending)}")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    base = table.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends={base!r}: a preset's name or a path wanted")
    table = merged(read(base, (*extending, path)), table) if base else table
    for note in NOTES:
        table.pop(note, None)
    return table


def comparison(name: str, overrides: Table | None = None) -> dict[str, Run]:
    """The runs of a comparison: a base with a table `[runs.NAME]` of differences for each, all at the same budget.

    `passes` is how many backward passes over a support or query set each may take in all, `env_steps` how many time steps
    of RL tasks; iterations follow, unless a run says its own. `overrides` are top-level keys for every run. Raises
    ValueError for a RUN that is no comparison.
    """
    table = read(name)
    variants, budget = table.pop(VARIANTS, None), {k: table.pop(k) for k in BUDGETS if k in table}
    allowed = next(iter(budget.values()), None)
    tables = isinstance(variants, dict) and variants and all(isinstance(v, dict) for v in variants.values())
    if not tables or len(budget) != 1 or type(allowed) is not int or allowed < 1:
        raise ValueError(f"RUN={name!r} is not a comparison: tables [{VARIANTS}.NAME] and {' or '.join(BUDGETS)} = a whole number wanted")
    runs = {}
    for variant, differences in variants.items():
        differences = {k: v for k, v in differences.items() if k != BEGINNING}
        run: Run = from_table(Run, merged(table, differences) | (overrides or {}), f"{VARIANTS}.{variant}.")
        if "iterations" not in differences:
            run = dataclasses.replace(run, iterations=max(1, allowed // spent(run, *budget)))
        runs[variant] = run
    return runs


def beginnings(name: str) -> dict[str, str]:
    """Runs of a comparison that begin from the θ of another one (`init_from` in their table), which must stand before them."""
    found: dict[str, str] = {}
    before: list[str] = []
    for variant, differences in read(name).get(VARIANTS, {}).items():
        if BEGINNING in differences:
            found[variant] = differences[BEGINNING]
            if found[variant] not in before:
                raise ValueError(f"{VARIANTS}.{variant}.{BEGINNING}={found[variant]!r}: a run that stands before it wanted")
        before.append(variant)
    return found


def spent(run: Run, what: str) -> int:
    """Passes over a support or query set ("passes"), or time steps of tasks ("env_steps"), of one meta-iteration."""
    if what == "passes":
        return run.meta_batch * run.learner.passes()
    if run.task.kind != "control":
        raise ValueError(f"env_steps: {type(run.task).__name__} has none; passes wanted")
    steps: int = run.meta_batch * (training_steps(run.learner) + 1) * run.task.rollouts * run.task.horizon  # type: ignore[attr-defined]
    return steps


def find(name: str, folder: Place = Path()) -> Place:
    """The file of a preset's name, or of a path (relative to `folder`) or URL."""
    if name.endswith(".toml"):
        path = place(name) if "://" in name else folder / name
        if not path.exists():
            raise ValueError(f"RUN={path}: no such file")
        return path
    path = PRESETS / f"{name}.toml"
    if not path.exists():
        raise ValueError(
            f"RUN={name!r} is neither a preset nor a .toml file{nearest(name, presets()) or '; `metafleet list` shows the presets'}"
        )
    return path


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def to_toml(run: Run, notes: Table | None = None) -> str:
    """The resolved run as TOML; scalars first, then tables."""
    table = to_table(run)
    scalars = {k: v for k, v in table.items() if not isinstance(v, dict)}
    return tomli_w.dumps(scalars | {k: v for k, v in table.items() if isinstance(v, dict)} | (notes or {}))


def within(key: str, tables: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or in a table that is."""
    return f"{key}.".startswith(tuple(f"{t}." for t in tables))


def check_resumable(old: Run, new: Run) -> None:
    """Raise ValueError where `new` differs from `old` in a key that the numbers depend on."""
    before, after = flat(to_table(old)), flat(to_table(new))
    for key in before | after:
        if before.get(key) != after.get(key) and not within(key, RESUMABLE):
            raise ValueError(
                f"{key} was {before.get(key)!r} when this run began and is {after.get(key)!r} now: it cannot change on resume "
                f"(only {', '.join(RESUMABLE)} can); use another directory for another run"
            )
