"""Rows of labelled examples, class by class; and which classes are of which split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from envs.base import SPLITS, Array
from envs.store import Index

log = logging.getLogger("metafleet")

Part: TypeAlias = tuple[Array, NDArray[np.str_]]
"""Examples [rows, …], bytes or float32, and the class of each [rows]."""
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
"""What else a validation split is called."""


def collected(what: str, rows: Any, train: float, validation: float, fingerprint: str) -> tuple[Array, Index]:
    """Examples, class by class, and their index: of {split: (x, y)}, or of (x, y), whose classes are divided.

    Splits stay as they are where no two share a class. One split alone, or splits that share classes, are put together
    and their classes divided: few-shot tasks at test are of classes that training has not seen.
    """
    given = rows if isinstance(rows, Mapping) else {"": rows}
    parts = {s: _checked(f"{what}, {s}" if s else what, *part) for s, part in given.items()}
    kinds = {f"{x.dtype} {x.shape[1:]}" for x, _ in parts.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{what}: examples are {' and '.join(sorted(kinds))}; one shape, all bytes or all numbers wanted"
        )
    shared = {a for s, t in combinations(parts, 2) for a in np.intersect1d(parts[s][1], parts[t][1]).tolist()}
    if len(parts) > 1 and not shared:
        return _arranged({s: _grouped(*part) for s, part in _in_order(what, parts).items()}, fingerprint)
    if shared:
        log.info(
            "%s: %d classes are in two splits (%s …): all rows together, classes divided %g to training and %g to "
            "validation", what, len(shared), min(shared), train, validation,
        )  # fmt: skip
    x, names = (np.concatenate([part[i] for part in parts.values()]) for i in range(2))
    return _arranged(divided(what, _grouped(x, names), train, validation), fingerprint)


def divided(what: str, groups: Mapping[str, Array], train: float, validation: float) -> dict[str, dict[str, Array]]:
    """Classes by split: always the same ones, in an order that does not follow their names."""
    names = sorted(groups)
    if len(names) < len(SPLITS):
        raise ValueError(f"{what} has {len(names)} classes: at least one for each of {', '.join(SPLITS)} wanted")
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    first = min(max(1, round(train * len(names))), len(names) - 2)
    second = min(max(first + 1, round((train + validation) * len(names))), len(names) - 1)
    return {
        split: {name: groups[name] for name in sorted(part)}
        for split, part in zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True)
    }


def names_of(what: str, y: Any) -> NDArray[np.str_]:
    """Labels as names: 3, 3.0 and the text 3 are one class, however a file or a tensor holds them."""
    y = plain(y)
    if y.dtype.kind == "S":
        decoded: NDArray[np.str_] = np.char.decode(y, "utf-8")
        return decoded
    if y.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(y) | (y != np.round(y)))
        if len(wrong):
            raise ValueError(
                f"{what}: label of row {wrong[0]} is {y.reshape(-1)[wrong[0]]}; a whole number or a word wanted"
            )
    elif y.dtype.kind not in "uibUT":
        empty = [i for i, v in enumerate(y.reshape(-1)) if v is None]
        raise ValueError(
            f"{what}: row {empty[0]} has no label"
            if empty
            else f"{what}: labels are {y.dtype}; numbers or words wanted"
        )
    names: NDArray[np.str_] = y.astype(np.int64).astype(str) if y.dtype.kind in "fb" else y.astype(str)
    return names


def plain(values: Any) -> Array:
    """As an array; tensors of autograd or an accelerator too."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _checked(what: str, x: Any, y: Any) -> Part:
    """Raises ValueError for what is no rectangle of finite numbers with a label for each row."""
    if isinstance(x, list) and len({v.dtype == np.uint8 for v in x if isinstance(v, np.ndarray)}) > 1:
        raise ValueError(f"{what}: some examples are bytes, some other numbers; all of one kind wanted")
    try:
        x = plain(x)
    except ValueError as error:
        raise ValueError(f"{what}: examples of unequal shapes; one shape wanted") from error
    if x.dtype.kind not in "uifb" or x.ndim < 2 or not len(x):
        raise ValueError(f"{what}: examples are {x.dtype} {x.shape}; numbers [rows, …] wanted")
    names = names_of(what, y)
    if names.shape != x.shape[:1]:
        raise ValueError(f"{what}: {len(x)} examples and labels of shape {names.shape}; one label for each wanted")
    return x if x.dtype == np.uint8 else _finite(what, x), names


def _finite(what: str, x: Array) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
        values = np.asarray(x, np.float32)
    wrong = np.flatnonzero(~np.isfinite(values.reshape(len(x), -1)).all(1))
    if len(wrong):
        row = wrong[0]
        seen = x[row][~np.isfinite(values[row])][0]
        raise ValueError(
            f"{what}: row {row} of x holds {seen}, the first of {len(wrong)} such rows; finite float32 numbers wanted"
        )
    return values


def _in_order(what: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The three splits by their own names."""
    called = [ALIASES.get(s, s) for s in parts]
    if sorted(called) != sorted(SPLITS):
        raise ValueError(
            f"{what} has the splits {', '.join(parts)}, which share no class: {', '.join(SPLITS)} wanted, each once"
        )
    return {s: part for split in SPLITS for s, part in zip(called, parts.values(), strict=True) if s == split}


def _grouped(x: Array, names: NDArray[np.str_]) -> dict[str, Array]:
    """Rows by class, in the order in which they came."""
    found, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(numbers, kind="stable")
    return {str(name): x[rows] for name, rows in zip(found, np.split(order, counts.cumsum()[:-1]), strict=True)}


def _arranged(parts: Mapping[str, Mapping[str, Array]], fingerprint: str) -> tuple[Array, Index]:
    rows: list[Array] = []
    names: list[str] = []
    splits: dict[str, list[int]] = {}
    for split, groups in parts.items():
        splits[split] = list(range(len(names), len(names) + len(groups)))
        names += groups
        rows += groups.values()
    starts = [0, *np.cumsum([len(r) for r in rows]).tolist()]
    return np.concatenate(rows), Index(names, starts, splits, fingerprint)
