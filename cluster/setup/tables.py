"""Between dataclasses and tables (TOML, keys with dots): typed, strict, and with sentences that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any, TypeAlias

import pydantic

from cluster.setup.catalog import CHOICES

Table: TypeAlias = dict[str, Any]


def from_table(cls: Any, table: Table, path: str = "") -> Any:
    """A dataclass from a table. Raises ValueError with the full key for whatever does not fit."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise ValueError(f"unknown key {path}{key}{nearest(key, sorted(fields), path)}")
    values = {key: _value(hints[key], value, f"{path}{key}") for key, value in table.items()}
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise ValueError(f"{path}{name} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _value(hint: Any, value: Any, path: str) -> Any:
    choices = CHOICES.get(getattr(hint, "__name__", ""))
    if choices is not None or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a table wanted")
        rest = dict(value)
        if choices is not None:
            name = rest.pop("name", None)
            if name not in choices:
                raise ValueError(
                    f"{path}.name={name!r} is not one of {', '.join(choices)}{nearest(str(name), list(choices))}"
                )
            hint = choices[name]
        return from_table(hint, rest, f"{path}.")
    if rows_of(hint) is not None:
        return from_rows(hint, value, path)
    try:
        return pydantic.TypeAdapter(hint, config={"allow_inf_nan": True}).validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}={value!r}: {error.errors()[0]['msg'].replace('Input should', 'should')}") from error


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
    table: Table = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = named(value)
        else:
            rows = list(value) if isinstance(value, tuple) else value
            many = isinstance(rows, list) and any(map(dataclasses.is_dataclass, rows))
            table[f.name] = [to_table(row) for row in rows] if many else rows
    return table


def named(config: Any) -> Table:
    """The same, with the `name` of the choice that it is, if it is one."""
    names = {c: n for choices in CHOICES.values() for n, c in choices.items()}
    name = {"name": names[type(config)]} if type(config) in names else {}
    return name | to_table(config)


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
        known = {
            f.name for choices in CHOICES.values() if choice in choices for f in dataclasses.fields(choices[choice])
        }
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
