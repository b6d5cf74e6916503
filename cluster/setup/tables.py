"""Between dataclasses and tables (TOML, keys with dots): typed, strict, and with sentences that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from typing import Any, TypeAlias

import pydantic

from cluster.setup.catalog import CHOICES, Choices
from learners.importing import imported, is_path

Table: TypeAlias = dict[str, Any]


OBJECT = "object"
"""Key of the table that stands for an object made in Python, which no import path and no keys describe."""


def from_table(cls: Any, table: Table, path: str = "", given: Any = None) -> Any:
    """A dataclass from a table; `given`: one whose objects stand where the table has only their description.

    Raises ValueError with the full key for whatever does not fit.
    """
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    declared = fields(cls)
    for key in table:
        if key not in {f.name for f in declared}:
            raise ValueError(f"unknown key {path}{key}{nearest(key, sorted(f.name for f in declared), path)}")
    values = {key: _value(hints[key], value, f"{path}{key}", getattr(given, key, None)) for key, value in table.items()}
    required = [f.name for f in declared if f.default is f.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise ValueError(f"{path}{name} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _value(hint: Any, value: Any, path: str, given: Any) -> Any:
    if isinstance(value, dict) and OBJECT in value:
        if given is None:
            raise ValueError(
                f"{path} was an object of Python ({value[OBJECT]}), which no import path names: from Python, with it, "
                "metafleet.load(directory, run) opens this run and metafleet.launch(run, directory) goes on with it"
            )
        return given
    choices = choices_of(hint)
    if choices is not None or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a table wanted")
        rest = dict(value)
        if choices is not None:
            hint = chosen(choices, rest.pop("name", None), f"{path}.")
        return from_table(hint, rest, f"{path}.", given)
    if rows_of(hint) is not None:
        return from_rows(hint, value, path)
    try:
        return pydantic.TypeAdapter(hint, config={"allow_inf_nan": True}).validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}={value!r}: {error.errors()[0]['msg'].replace('Input should', 'should')}") from error


def chosen(choices: Choices, name: object, path: str) -> type[Any]:
    """The class that a `name` chooses. Raises ValueError, beginning with `path`, where it chooses none."""
    if name not in choices:
        known = list(choices)
        raise ValueError(
            f"{path}name={name!r} is not one of {', '.join(known)}"
            f"{nearest(str(name), known) or ', nor package.module:Class'}"
        )
    try:
        return choices[str(name)]
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def from_rows(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    """The dataclasses of a field that holds any number of them, from a list of tables."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{path}={value!r}: tables wanted, [[{path}]] in TOML")
    return tuple(from_table(rows_of(hint), row, f"{path}[{i}].") for i, row in enumerate(value))


def rows_of(hint: Any) -> Any:
    """The dataclass of which a field holds any number; None for another field."""
    row = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return row if dataclasses.is_dataclass(row) else None


def to_table(config: Any) -> Table:
    """The table that `from_table` reads back; every key is there, names of choices included."""
    hints = typing.get_type_hints(type(config)) if fields(type(config)) else {}
    return {f.name: _told(hints[f.name], getattr(config, f.name)) for f in fields(type(config))}


def _told(hint: Any, value: Any) -> Any:
    choices = choices_of(hint)
    if choices is not None:
        return named(choices, value)
    if dataclasses.is_dataclass(hint) and type(value) is not hint:
        return _object(value)
    if dataclasses.is_dataclass(value):
        return to_table(value)
    rows = list(value) if isinstance(value, tuple) else value
    many = isinstance(rows, list) and any(map(dataclasses.is_dataclass, rows))
    return [to_table(row) for row in rows] if many else rows


def named(choices: Choices, value: Any) -> Table:
    """The table of a value that stands where one of `choices` is wanted, with the `name` that chooses its class; of one
    that could not be made from it again a description.
    """
    cls = type(value)
    stateless = not dataclasses.is_dataclass(cls) and not getattr(value, "__dict__", {"": 0})
    if not (stateless or dataclasses.is_dataclass(cls)) or not can_be_imported(cls):
        return _object(value)
    table = to_table(value)
    return {"name": choices.name_of(cls)} | table if _plain(table) else _object(value)


def can_be_imported(made: Any) -> bool:
    """Whether another process finds a class or function where it says it is."""
    module, name = getattr(made, "__module__", "__main__"), getattr(made, "__qualname__", "")
    return module != "__main__" and getattr(sys.modules.get(module), name, None) is made


def _object(value: Any) -> Table:
    return {OBJECT: f"{type(value).__module__}:{type(value).__qualname__}"}


def _plain(value: Any) -> bool:
    """Whether TOML can hold it."""
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return all(map(_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float)


def choices_of(hint: Any) -> Choices | None:
    """The classes among which a field declared so chooses by `name`; None for another field."""
    return CHOICES.get(getattr(hint, "__name__", ""))


def fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The keys of a class; () of one that is no dataclass."""
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def flat(table: Table, path: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return leaves


def choose(table: Table, path: list[str], choice: str) -> None:
    """Set a `name` key; keys of another choice do not carry over, but tables that both have."""
    for key in path[:-1]:
        table = table.setdefault(key, {})
    if table.get("name") != choice:
        if is_path(choice):
            kinds = [imported(choice, ".".join(path))]
        else:
            kinds = [choices[choice] for choices in CHOICES.values() if choice in choices.paths]
        known = {f.name for kind in kinds for f in fields(kind)}
        kept = {k: v for k, v in table.items() if isinstance(v, dict) and k in known}
        table.clear()
        table.update(kept)
        table["name"] = choice


def merged(base: Table, table: Table) -> Table:
    """`base` with the differences of `table`, tables within tables; one with another `name` replaces the whole."""
    if "name" in table and table["name"] != base.get("name"):
        return dict(table)
    whole = dict(base)
    for key, value in table.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        whole[key] = merged(base[key], value) if both else value
    return whole


def nearest(word: str, known: list[str], path: str = "") -> str:
    """A question for the end of a sentence, did you mean …?, where a known word is like this one; else nothing."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {path}{near[0]}?" if near else ""
