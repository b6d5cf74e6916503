"""Code that is not ours and that a configuration names: where it is, whether it is the same, whether to run it."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from learners.importing import is_path

NAMING = ("name", "loss", "measures")
"""Keys whose values may be import paths."""
OURS = ("cluster", "envs", "learners")


def foreign(table: dict[str, Any], path: str = "") -> dict[str, str]:
    """Key → import path, of all that a configuration's table would import."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= foreign(value, f"{path}{key}.")
        for each in value if isinstance(value, list) else [value]:
            if key in NAMING and is_path(each) and _top(each) not in OURS:
                found[f"{path}{key}"] = each
    if table.get("name") == "constructor":
        found[f"{path}target"] = str(table.get("target", "torchvision.models.resnet18"))
    return found


def check_trusted(table: dict[str, Any], directory: object, known: Collection[str] = ()) -> None:
    """Raise PermissionError, before anything is imported, where a run directory names code that is neither ours nor
    `known`.
    """
    for key, path in foreign(table).items():
        if path not in known:
            raise PermissionError(
                f"{directory} names code that is not Metafleet's ({key} = {path}, {_place(path)}); --trust runs it, "
                "trust=True in Python"
            )


def fingerprints(table: dict[str, Any]) -> dict[str, str]:
    """Import path → SHA-256 of the source it stands in, with all that this source uses of its own package or folder.

    What a configuration names has been imported already; what is not in any file has no fingerprint.
    """
    found = {}
    for path in foreign(table).values():
        module = _imported(path)
        if module is not None:
            sources = [file.read_bytes() for _, file in sorted(_sources(module).items())]
            found[path] = hashlib.sha256(b"".join(hashlib.sha256(s).digest() for s in sources)).hexdigest()
    return found


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Import paths whose source is another than it was."""
    return [path for path, digest in now.items() if before.get(path, digest) != digest]


def _top(name: str) -> str:
    """The package that a module, or what an import path leads to, is in."""
    return name.partition(":")[0].partition(".")[0]


def _place(path: str) -> str:
    """Where the code would come from, found without running any of it."""
    top = _top(path)
    spec = PathFinder.find_spec(top, [*sys.path, os.getcwd()]) or (sys.modules.get(top) and sys.modules[top].__spec__)
    return str(spec.origin or top) if spec else "which is not here"


def _imported(path: str) -> ModuleType | None:
    """The innermost module of a path that is loaded."""
    parts = path.partition(":")[0].split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((sys.modules[name] for name in names if name in sys.modules), None)


def _sources(module: ModuleType) -> dict[str, Path]:
    """Name → file of a module and of those of the same package, or of no installed one, that it uses."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        each = waiting.pop()
        file = Path(getattr(each, "__file__", None) or "")
        if each.__name__ in found or not file.is_file():
            continue
        top = _top(each.__name__)
        if top == _top(module.__name__) or not (_is_installed(file) or top in OURS):
            found[each.__name__] = file
            waiting += _used(each)
    return found


def _used(module: ModuleType) -> Iterator[ModuleType]:
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules:
            yield sys.modules[name]


def _is_installed(file: Path) -> bool:
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(file.is_relative_to(folder) for folder in folders)
