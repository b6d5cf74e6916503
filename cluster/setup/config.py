"""The typed configuration of a run: TOML presets with `extends`, then `--key value`; unknown keys are errors."""

from __future__ import annotations

import tomllib
from pathlib import Path

import tomli_w

from cluster.record.storage import Place, place
from cluster.setup.run import Run
from cluster.setup.tables import Table, choose, from_table, merged, nearest, to_table

PRESETS = Path(__file__).parent / "presets"
VARIANTS = "runs"
"""Table of a TOML file that makes it a comparison of several runs (`setup.equal_budget`)."""

NOTES = ("description", "reference", "extends", "environment", "code")
"""Keys of a TOML file that say something about the run, and are not configuration."""
RENAMED = {"dtype": "precision"}
"""Keys of older files, and what they are called now."""


def load(
    name: str, overrides: dict[str, str] | None = None, changes: Table | None = None, given: Run | None = None
) -> Run:
    """The run of a preset's name or a TOML file's path; `overrides` are "learner.name": "reptile" and the like,
    `changes` other keys. `given`: a run whose objects of Python the file only describes.

    Raises ValueError for unknown names and keys, naming the nearest known one.
    """
    table = read(name)
    if VARIANTS in table:
        raise ValueError(f"RUN={name!r} is a comparison of {len(table[VARIANTS])} runs: metafleet compare {name}")
    for path, choice in (overrides or {}).items():
        choose(table, path.split("."), choice)
    run: Run = from_table(Run, merged(table, changes or {}), given=given)
    return run


def read(name: str, extending: tuple[Place, ...] = ()) -> Table:
    """The raw table of a preset or file, with what it extends merged in; a path in `extends` is relative to its
    file.
    """
    path = find(name, extending[-1].parent if extending else Path())
    if path in extending:
        raise ValueError(f"{path} extends itself, by way of {', '.join(p.name for p in extending)}")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    table = {RENAMED.get(key, key): value for key, value in table.items()}
    base = table.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends={base!r}: a preset's name or a path wanted")
    table = merged(read(base, (*extending, path)), table) if base else table
    for note in NOTES:
        table.pop(note, None)
    return table


def note(path: Place, key: str) -> Table:
    """One of the tables of a file that are not configuration; {} where it has none."""
    found = tomllib.loads(path.read_text()).get(key, {})
    return found if isinstance(found, dict) else {}


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
            f"RUN={name!r} is neither a preset nor a .toml "
            f"file{nearest(name, presets()) or '; `metafleet list` shows the presets'}"
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
