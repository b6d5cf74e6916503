"""Figures become files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, TypeVar

from cluster.record.storage import Place, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T", bound=Place)


def save(figure: Figure, path: T, *, tight: bool = False) -> T:
    """Write a PNG in one step; the path. `tight`: cut off margins that nothing is drawn in."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight" if tight else None)
    write_atomically(path, file.getvalue())
    return path
