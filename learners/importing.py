"""Anyone's code, by the name of what is wanted of it."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from types import ModuleType
from typing import Any

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_path(name: object) -> bool:
    """Whether a name says where to import from: package.module:Name."""
    return isinstance(name, str) and PATH.fullmatch(name) is not None


def imported(name: str, key: str) -> Any:
    """What `package.module:Name` (or package.module.Name) names; the working directory is searched last.

    Raises ValueError, beginning with `key`, for what is not there, or fails while it is imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, inside = name.partition(":")
    try:
        found, attributes = (_module(module), inside.split(".")) if inside else _deepest(module.split("."))
    except ValueError as error:
        raise ValueError(f"{key}={name!r}: {error}") from error
    for attribute in attributes:
        if not hasattr(found, attribute):
            near = difflib.get_close_matches(attribute, dir(found), 1)
            raise ValueError(f"{key}={name!r}: there is no {attribute}{f'; did you mean {near[0]}?' if near else ''}")
        found = getattr(found, attribute)
    return found


def line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}, line {error.lineno} of {error.filename}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _deepest(parts: list[str]) -> tuple[Any, list[str]]:
    """The innermost module of a dotted name, and what is left of the name."""
    found: Any = _module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        inner = ".".join(parts[: i + 1])
        if hasattr(found, part) and not isinstance(getattr(found, part), ModuleType):
            return found, parts[i:]
        if not hasattr(found, "__path__") or importlib.util.find_spec(inner) is None:
            return found, parts[i:]
        found = _module(inner)
    return found, []


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"there is no module {error.name}; install it, or name its folder in PYTHONPATH"
            ) from error
        raise ValueError(f"{name} imports {error.name}, and there is no such module; install it") from error
    except Exception as error:  # whatever its code does while it is imported
        fit = f"; a build of it for torch {importlib.metadata.version('torch')} wanted" if "torch" in str(error) else ""
        raise ValueError(f"{name} cannot be imported ({line(error)}){fit}") from error
