"""Labels of any type are one class each; splits stay apart, or are divided anew; what is wrong has a place."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from envs.sources.classes import collected, names_of

X, Y = np.arange(60, dtype=np.float32)[:, None], np.arange(60) % 20


def found(rows: Any) -> dict[str, dict[str, list[float]]]:
    """Values of every class of every split."""
    x, index = collected("mine", rows, 0.64, 0.16, "")
    return {
        split: {index.classes[c]: x[index.starts[c] : index.starts[c + 1], 0].tolist() for c in classes}
        for split, classes in index.splits.items()
    }


@pytest.mark.parametrize(
    "y",
    [[3, 0], [3.0, 0.0], ["3", "0"], [b"3", b"0"], np.array([3, 0], np.uint8), torch.tensor([3, 0]),
     torch.tensor([3.0, 0.0])],
)  # fmt: skip
def test_a_label_names_the_same_class_whatever_holds_it(y: Any) -> None:
    assert names_of("mine", y).tolist() == ["3", "0"]


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([0.0, np.nan], "label of row 1 is nan; a whole number"),
        ([0.0, np.inf], "label of row 1 is inf; a whole number"),
        ([0.0, 2.5], "label of row 1 is 2.5; a whole number"),
        (["a", None], "row 1 has no label"),
        ([{}, {}], "labels are object; numbers or words wanted"),
        ([1j, 2j], "labels are complex128; numbers or words wanted"),
    ],
)
def test_what_names_no_class_is_refused(y: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        names_of("mine", y)


@pytest.mark.parametrize("other", [Y, Y.astype(float), Y.astype(str), torch.from_numpy(Y)])
def test_splits_never_share_a_class_whatever_types_their_labels_have(
    other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metafleet"):
        parts = found({"train": (X, Y), "val": (X + 100, other), "test": (X + 200, Y + 20)})
    names = [name for part in parts.values() for name in part]
    assert len(names) == len(set(names)) == 40
    assert "20 classes are in two splits" in caplog.text
    for name, values in {k: v for part in parts.values() for k, v in part.items()}.items():
        c = int(name)
        first = [c, c + 20, c + 40]
        wanted = first + [v + 100 for v in first] if c < 20 else [v + 180 for v in first]
        assert sorted(values) == wanted


def test_splits_without_a_common_class_stay_whatever_their_order() -> None:
    parts = found({"test": (X + 200, Y + 40), "dev": (X + 100, Y + 20), "train": (X, Y)})
    assert list(parts) == ["train", "validation", "test"]
    for split, shift in (("train", 0), ("validation", 20), ("test", 40)):
        assert parts[split] == {str(c + shift): [c + 5 * shift + i for i in (0, 20, 40)] for c in range(20)}


def test_one_split_alone_is_divided_as_rows_without_splits_are() -> None:
    assert found({"train": (X, Y)}) == found((X, Y))


@pytest.mark.parametrize("extra", ["extra", "validation"])
def test_no_split_is_dropped_unsaid(extra: str) -> None:
    rows = {"train": (X, Y), "val": (X, Y + 20), "test": (X, Y + 40), extra: (X, Y + 60)}
    with pytest.raises(ValueError, match=f"mine has the splits train, val, test, {extra}, .* each once"):
        found(rows)


@pytest.mark.parametrize("shift", [0, 20])
@pytest.mark.parametrize("other", [X.astype(np.uint8), X.reshape(30, 2)])
def test_splits_of_other_kinds_or_shapes_are_refused(other: Any, shift: int) -> None:
    rows = {"train": (X, Y), "val": (other, Y[: len(other)] + shift), "test": (X, Y + 40)}
    with pytest.raises(ValueError, match="one shape, all bytes or all numbers wanted"):
        found(rows)


@pytest.mark.parametrize("shift", [0, 20])
@pytest.mark.parametrize(("value", "seen"), [(np.nan, "nan"), (-np.inf, "-inf"), (1e300, r"1e\+300")])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_has_a_split_and_a_row(value: float, seen: str, shift: int) -> None:
    bad = X.astype(np.float64)
    bad[[7, 9]] = value
    with pytest.raises(ValueError, match=f"mine, val: row 7 of x holds {seen}, the first of 2 such rows"):
        found({"train": (X, Y), "val": (bad, Y + shift), "test": (X, Y + 40)})


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mine, val: examples are float32 \(0, 1\)"):
        found({"train": (X, Y), "val": (X[:0], Y[:0]), "test": (X, Y + 40)})
