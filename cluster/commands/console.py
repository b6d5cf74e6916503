"""What every command needs, and no more: it must start at once."""

from __future__ import annotations

from typing import TypeVar

import tyro
from rich.console import Console

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)


def parsed(command: str, cls: type[T], words: list[str]) -> T:
    """The options of a command that has no run's keys."""
    return tyro.cli(cls, args=words, prog=f"metafleet {command}")
