"""What is wrong with an image set and no error: images or classes that are there twice, files that are not read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from envs.sources.layouts import Found


@dataclass(frozen=True)
class Census:
    """Counts equal files, by a hash of their bytes."""

    places: dict[bytes, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """The (split, class) pairs that a file is in."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Copies within a class, per split."""
    shared: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Files in both of two splits; with a split twice, in two classes of it."""
    examples: dict[str | tuple[str, str], str] = field(default_factory=dict)

    def new(self, split: str, label: str, name: str, content: bytes) -> bool:
        """Count a file; whether its class does not have it yet."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        before = self.places.get(digest, ())
        if (split, label) in before:
            self.repeated[split] += 1
            self.examples.setdefault(split, name)
            return False
        for other in {s for s, _ in before}:
            self.shared[other, split] += 1
            self.examples.setdefault((other, split), name)
        self.places[digest] = (*before, (split, label))
        return True

    def remarks(self, found: Found) -> Iterator[str]:
        """A sentence for each kind of fault and split."""
        for split, count in self.repeated.items():
            yield (
                f"{count} images of the {split} split are in their class already and count once, e.g. "
                f"{self.examples[split]}"
            )
        for (one, other), count in self.shared.items():
            example = self.examples[one, other]
            if one == other:
                yield f"{count} images of the {one} split are in another class of it as well, e.g. {example}"
            else:
                yield f"{count} images are in the {one} and in the {other} split, e.g. {example}"
        for one, other in combinations(found.splits, 2):
            both = sorted(found.splits[one].keys() & found.splits[other].keys())
            if both:
                yield f"{len(both)} classes of the {one} and the {other} split have the same name, e.g. {both[0]}"
        for split in found.splits:
            seen = {suffix: count for (s, suffix), count in sorted(found.skipped.items()) if s == split}
            if seen:
                counts = ", ".join(f"{count} {suffix}" for suffix, count in seen.items())
                yield f"files of the {split} split are no images of a known suffix and are skipped: {counts}"
