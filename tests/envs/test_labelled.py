"""Arrays, Datasets and Hugging Face directories as sources: every row where its class is, splits that share none."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.setup import assemble, config
from envs.images.augmentation import Augmentation
from envs.images.episodes import Episodes, ImageSource
from envs.sources.hugging_face import HuggingFace
from envs.sources.labelled import Stored, from_arrays, from_datasets
from envs.sources.npz import Npz

RNG = np.random.default_rng
pytestmark = pytest.mark.usefixtures("data_folder")


def pictures(classes: int = 20, each: int = 6, c: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images all of whose pixels are 10 · class + number, shuffled; and names of the classes."""
    number = RNG(0).permutation(classes * each)
    value = (10 * (number // each) + number % each).astype(np.uint8)
    return np.broadcast_to(value[:, None, None, None], (len(value), c, size, size)).copy(), np.array(
        [f"class {n // each}" for n in number]
    )


def rows_of(source: ImageSource) -> dict[str, dict[str, list[int]]]:
    """Every pixel value of every class of every split."""
    there = source.load()
    return {
        split: {
            there.index.classes[c]: sorted(int(there.images[i].reshape(-1)[0]) for i in there.rows(c))
            for c in there.classes(split)
        }
        for split in ("train", "validation", "test")
    }


def check(source: ImageSource, classes: int = 20, each: int = 6) -> None:
    source.prepare()
    found = rows_of(source)
    names = [name for part in found.values() for name in part]
    assert sorted(names) == sorted(f"class {i}" for i in range(classes))  # each in one split
    for part in found.values():
        assert part
        for name, values in part.items():
            first = 10 * int(name.split()[1])
            assert values == list(range(first, first + each))


def episodes(source: Any, **changes: Any) -> Episodes:
    tasks = Episodes(source, ways=2, shots=1, queries=2, test_queries=2, **changes)
    tasks.prepare()
    return tasks


def test_arrays_in_memory_are_a_source(tmp_path: Path) -> None:
    x, y = pictures()
    source = from_arrays(x, y)
    check(source)
    assert {s: len(v) for s, v in rows_of(source).items()} == {"train": 13, "validation": 3, "test": 4}
    task = episodes(source).sample("train", RNG(0))
    assert task["support_x"].shape == (2, 3, 8, 8)
    assert task["support_x"].max() <= 1
    assert from_arrays(x, y) == source  # by content
    assert from_arrays(x[::-1], y) != source


def test_splits_that_are_given_stay(tmp_path: Path) -> None:
    x, y = pictures()
    parts = {"train": y < "class 15", "val": (y >= "class 15") & (y < "class 5"), "test": y >= "class 5"}
    source = from_arrays({s: (x[rows], y[rows]) for s, rows in parts.items()})
    check(source)
    found = rows_of(source)
    assert set(found["validation"]) == set(y[parts["val"]])
    with pytest.raises(ValueError, match="no validation split, but train, test"):
        from_arrays({s: (x[parts[s]], y[parts[s]]) for s in ("train", "test")})


def test_vectors_and_other_examples_are_numbers_as_they_are() -> None:
    x = RNG(0).normal(size=(60, 5))
    source = from_arrays(x, np.arange(60) % 20)
    task = episodes(source).sample("test", RNG(0))
    assert task["support_x"].shape == (2, 5)
    for row in task["query_x"]:
        assert (np.abs(x.astype(np.float32) - row).max(1) == 0).any()
    with pytest.raises(ValueError, match=r"rotations and augment are of images .* examples are \(5,\)"):
        episodes(source, augment=Augmentation(flip=0.5))


class Pairs(torch.utils.data.Dataset):
    """(example, label) by index; without an end when iterated."""

    def __init__(self, x: list[Any], y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.x[i % len(self.x)], self.y[i % len(self.y)]


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0))


@pytest.mark.parametrize("kind", ["tensors", "arrays", "pillow"])
def test_a_torch_dataset_is_a_source(kind: str) -> None:
    x, y = pictures()
    make = {
        "tensors": torch.from_numpy,
        "arrays": np.asarray,
        "pillow": lambda v: Image.fromarray(v.transpose(1, 2, 0)),
    }
    data = Pairs([make[kind](one) for one in x], y)
    check(from_datasets(data, size=8))
    labels = torch.tensor([int(name.split()[1]) for name in y])
    numbered = from_datasets(Pairs(list(x), labels))
    assert {len(v) for part in rows_of(numbered).values() for v in part.values()} == {6}


@pytest.mark.parametrize("named", [False, True])
def test_an_npz_file_is_a_source(tmp_path: Path, named: bool) -> None:
    x, y = pictures()
    if named:
        last = np.array([int(name.split()[1]) % 3 for name in y])
        parts = {s: last == i for i, s in enumerate(("train", "val", "test"))}
        arrays = {f"{s}_{k}": v[rows] for s, rows in parts.items() for k, v in (("x", x), ("y", y))}
    else:
        arrays = {"x": x, "y": y}
    np.savez(tmp_path / "own.npz", **arrays)
    source = Npz(str(tmp_path / "own.npz"))
    check(source)
    run = replace(config.load("glyphs"), task=episodes(source))
    path = tmp_path / "own.toml"
    path.write_text(config.to_toml(run))
    assert config.load(str(path)) == run
    assert (run.task.inputs, run.network().params()["head.weight"].shape[0]) == ((3, 8, 8), 2)
    (tmp_path / "own.npz").unlink()
    source.prepare()  # decoded before


@pytest.mark.parametrize("shared", [False, True])
def test_a_hugging_face_directory_is_a_source(tmp_path: Path, shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    x, y = pictures()
    names = sorted(set(y))
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=names)})

    def part(rows: np.ndarray) -> Any:
        images = [picture(v) for v in x[rows]]
        return datasets.Dataset.from_dict({"img": images, "fine": [names.index(v) for v in y[rows]]}, features)

    number = np.array([int(name.split()[1]) for name in y])
    by = np.arange(len(y)) if shared else number
    whole = datasets.DatasetDict({s: part(by % 3 == i) for i, s in enumerate(("train", "validation", "test"))})
    whole.save_to_disk(tmp_path / "hf")
    with caplog.at_level(logging.INFO, "metafleet"):
        check(HuggingFace(str(tmp_path / "hf"), size=8))
    assert ("classes are in two splits" in caplog.text) == shared
    if not shared:
        assert set(rows_of(HuggingFace(str(tmp_path / "hf"), size=8))["train"]) == {
            f"class {i}" for i in range(0, 20, 3)
        }
    with pytest.raises(ValueError, match="image='picture' is not a column of .*: img, fine"):
        HuggingFace(str(tmp_path / "hf"), image="picture").prepare()
    with pytest.raises(ValueError, match="is not a directory of save_to_disk"):
        HuggingFace(str(tmp_path)).prepare()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.full((9, 2), np.nan), np.arange(9), r"example 0 \(of 9\) holds NaN"),
        (np.zeros((9, 2)), np.arange(8), r"9 examples and labels of shape \(8,\)"),
        (np.zeros(9), np.arange(9), r"numbers \[rows, …\] wanted"),
        (np.zeros((9, 2), object), np.arange(9), "examples are object"),
        ([[1.0], [1.0, 2.0]], [0, 1], "unequal shapes"),
        (np.zeros((9, 2)), np.zeros(9), "1 classes: at least one for each"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_examples_are_refused(x: Any, y: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_arrays(x, y)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task.source.file='' does not exist"):
        Npz().prepare()
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match="is not an .npz file of plain arrays"):
        Npz(str(tmp_path / "text.npz")).prepare()
    np.savez(tmp_path / "pickled.npz", x=np.array([{}] * 9, object), y=np.arange(9))
    with pytest.raises(ValueError, match="is not an .npz file of plain arrays"):
        Npz(str(tmp_path / "pickled.npz")).prepare()
    np.savez(tmp_path / "other.npz", images=np.zeros((9, 2)))
    with pytest.raises(ValueError, match="holds images: x and y wanted"):
        Npz(str(tmp_path / "other.npz")).prepare()
    with pytest.raises(ValueError, match=r"train=0.9, validation=0.2: shares"):
        Npz("a", train=0.9, validation=0.2)
    with pytest.raises(FileNotFoundError, match="was not prepared"):
        Stored("nothing").prepare()


def test_a_run_on_ones_own_arrays_learns(tmp_path: Path) -> None:
    x, y = pictures(c=1, size=16)
    run = replace(config.load("glyphs"), task=episodes(from_arrays(x, y)), execution="loop")
    parts, params = assemble.recipe(run)
    verb = parts.verbs(parts.objective)["gradient"]
    share = verb.run({f"params/{k}": v for k, v in params.items()}, {}, parts.tensors(parts.task("train", 0, verb)))
    assert all(v.isfinite().all() for v in share.total.values())
