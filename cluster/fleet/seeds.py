"""Random numbers that belong to the work: a generator is a pure function of what it is for."""

from __future__ import annotations

import numpy as np

PURPOSES = ("init", "task", "draw", "rollout")
SPLITS = ("none", "train", "validation", "test", "teachers", "adversary")


def generator(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """The generator of (run seed, split, task index, purpose), the same on every machine.

    Philox is counter-based: the seed is its key and the rest its counter, so different arguments give disjoint
    streams of 2⁶⁴ blocks each, by construction rather than by the luck of a hash.
    """
    counter = [0, index, SPLITS.index(split), PURPOSES.index(purpose)]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))
