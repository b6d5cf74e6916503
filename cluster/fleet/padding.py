"""Tasks of unequal size side by side: padded to the largest of their shard, with masks that say what is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.base import Array, Arrays

PARTS = ("support", "query")


def stacked(tasks: Sequence[Arrays]) -> Arrays:
    """Every array of some tasks, as [tasks, …].

    Where support sets (or query sets) differ in size, every array of theirs (`support_x`, `support_x/ids`, `support_y`,
    whatever begins with `support_`) is filled up with its first row, and `support_mask` (`query_mask`) [tasks, rows] is
    1 for rows that are there and 0 for filling. All else must be of one shape. Raises ValueError, with names and
    shapes, for what does not stack.
    """
    first = tasks[0]
    for task in tasks:
        if task.keys() != first.keys():
            other = sorted(task.keys() ^ first.keys())
            raise ValueError(f"tasks of one split must hold the same arrays; only some have {', '.join(other)}")
    tasks = [dict(task) for task in tasks]
    for part in PARTS:
        _fill(tasks, part)
    for key in tasks[0]:
        shapes = sorted({np.shape(t[key]) for t in tasks})
        if len(shapes) > 1:
            raise ValueError(
                f"{key} is of shape {shapes[0]} in one task and {shapes[1]} in another of its split: only the number "
                "of a support or query set's rows may differ"
            )
    return {key: np.stack([t[key] for t in tasks]) for key in tasks[0]}


def _fill(tasks: list[Arrays], part: str) -> None:
    keys = [k for k in tasks[0] if k.startswith(f"{part}_")]
    if len({tuple(np.shape(task[k])[:1] for k in keys) for task in tasks}) == 1:
        return
    sizes = [_rows(task, keys, part) for task in tasks]
    for task, size in zip(tasks, sizes, strict=True):
        if not size:
            raise ValueError(
                f"a task has an empty {part} set beside others of up to {max(sizes)} rows: 1 at least wanted"
            )
        mask = task.get(f"{part}_mask", np.ones(size, np.float32))
        for key in keys:
            task[key] = np.concatenate([task[key], np.repeat(task[key][:1], max(sizes) - size, 0)])
        task[f"{part}_mask"] = np.concatenate([mask, np.zeros(max(sizes) - size, mask.dtype)])


def _rows(task: Arrays, keys: list[str], part: str) -> int:
    """Examples of a support or query set."""
    seen: dict[str, Array] = {k: task[k] for k in keys}
    if any(np.ndim(v) == 0 for v in seen.values()) or len({len(v) for v in seen.values()}) > 1:
        shapes = ", ".join(f"{k} {np.shape(v)}" for k, v in seen.items())
        raise ValueError(f"arrays of one {part} set have one row for each example: {shapes}")
    return len(next(iter(seen.values())))
