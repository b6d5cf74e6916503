"""Arrays, Datasets and Hugging Face directories as sources: every row where its class is, splits that share none."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.setup import assemble, config
from cluster.setup.catalog import CHOICES
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
    with pytest.raises(
        ValueError, match="has the splits train, test, which share no class: train, validation, test wanted"
    ):
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


def test_a_run_on_arrays_in_memory_survives_a_round_trip(tmp_path: Path) -> None:
    run = replace(config.load("glyphs"), task=episodes(from_arrays(*pictures())))
    path = tmp_path / "own.toml"
    path.write_text(config.to_toml(run))
    assert config.load(str(path)) == run


def test_no_class_that_a_table_names_has_a_key_of_that_name() -> None:
    for choices in CHOICES.values():
        for choice in choices.values():
            assert "name" not in {f.name for f in fields(choice)}, choice


def test_arrays_of_equal_bytes_and_other_shapes_or_kinds_are_other_sources() -> None:
    x, y = RNG(0).integers(0, 127, (60, 4), np.uint8), np.arange(60) % 20
    given = [x, x.reshape(60, 2, 2), x.view(np.float32)]
    for one, source in [(v, from_arrays(v, y)) for v in given]:
        assert source.shape == one.shape[1:]
        assert source.load().images.dtype == one.dtype


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


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((np.zeros(2), 1, "more"), "row 2 is tuple of 3; a pair"),
        ({"image": np.zeros(2), "label": 1}, "row 2 is dict of 2; a pair"),
        ((np.zeros(2), np.eye(3)[0]), r"row 2 has a label of shape \(3,\); one number or word"),
        ((np.zeros(2, np.uint8), 1), "some examples are bytes, some other numbers"),
    ],
)
def test_a_dataset_of_other_than_pairs_is_refused(row: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_datasets([(np.zeros(2), 0), (np.zeros(2), 1), row])


def test_tensors_that_are_differentiated_are_read() -> None:
    x = torch.arange(60.0)[:, None].requires_grad_()
    source = from_datasets([(v, i % 20) for i, v in enumerate(x)])
    assert sorted(source.load().images[:, 0].tolist()) == list(range(60))


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


def test_an_npz_file_may_list_the_classes_of_each_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = np.arange(60, dtype=np.float32)[:, None]
    lists = {"train": [3, 1, 4], "validation": [15, 9], "test": [2, 6]}
    given = {"x": x, "y": np.arange(60) % 20} | {f"{s}_classes": np.array(v) for s, v in lists.items()}
    np.savez(tmp_path / "own.npz", **given)
    source = Npz(str(tmp_path / "own.npz"))
    with caplog.at_level(logging.INFO, "metafleet"):
        source.prepare()
    wanted = {s: {str(c): [c, c + 20, c + 40] for c in v} for s, v in lists.items()}
    assert rows_of(source) == wanted
    assert "13 classes are in no list (0 …), and left out" in caplog.text
    for key, value, words in (
        ("test_classes", np.array([2, 3]), "has the class 3 in two places"),
        ("test_classes", np.array([2, 77]), "has the class 77 in its lists, and not in y"),
    ):
        np.savez(tmp_path / "other.npz", **(given | {key: value}))
        with pytest.raises(ValueError, match=words):
            Npz(str(tmp_path / "other.npz")).prepare()
    np.savez(tmp_path / "two.npz", **{k: v for k, v in given.items() if k != "test_classes"})
    with pytest.raises(ValueError, match="lists classes for train, validation: .*test_classes wanted, or none"):
        Npz(str(tmp_path / "two.npz")).prepare()


def test_what_was_decoded_stays_until_a_run_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, x=np.zeros((60, 4)), y=np.arange(60) % 20)
    source = Npz(str(path))
    source.prepare()
    np.savez(path, x=np.zeros((60, 5)), y=np.arange(60) % 20)
    assert source.shape == (4,)
    source.prepare()
    assert source.shape == (5,)


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


def numbers(datasets: Any, column: Any, values: Any, labels: Any) -> Any:
    features = datasets.Features({"v": column, "l": datasets.ClassLabel(num_classes=20)})
    return datasets.Dataset.from_dict({"v": values, "l": labels}, features)


def test_columns_of_a_hugging_face_directory_keep_their_kind(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    x, y = RNG(0).integers(0, 256, (60, 3, 4, 4), np.uint8), [i % 20 for i in range(60)]
    columns = {
        "bytes": (datasets.Array3D((3, 4, 4), "uint8"), x, np.uint8),
        "floats": (datasets.Array2D((4, 4), "float32"), x[:, 0].astype(np.float32), np.float32),
        "lists": (datasets.Sequence(datasets.Value("uint8")), x[:, 0, 0], np.uint8),
    }
    for name, (column, values, kind) in columns.items():
        numbers(datasets, column, values.tolist(), y).save_to_disk(tmp_path / name)
        source = HuggingFace(str(tmp_path / name), image="v")
        source.prepare()
        there = source.load()
        assert there.images.dtype == kind
        for c, label in enumerate(there.index.classes):
            np.testing.assert_array_equal(there.images[there.rows(c)], values[int(label) :: 20])


def test_images_of_a_hugging_face_directory_are_decoded_however_it_was_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    x, y = pictures()
    whole = numbers(datasets, datasets.Image(), [picture(v) for v in x], [int(n.split()[1]) for n in y])
    whole.with_format("numpy").save_to_disk(tmp_path / "arrays")
    whole.with_format("torch", columns=["l"]).save_to_disk(tmp_path / "labels")
    whole.cast_column("v", datasets.Image(decode=False)).save_to_disk(tmp_path / "encoded")
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "alone")  # one split: its classes are divided
    for name in ("arrays", "labels", "encoded", "alone"):
        source = HuggingFace(str(tmp_path / name), size=8)
        source.prepare()
        found = {k: v for part in rows_of(source).values() for k, v in part.items()}
        assert found == {str(i): list(range(10 * i, 10 * i + 6)) for i in range(20)}, name
        assert source.shape == (3, 8, 8)


def test_a_hugging_face_directory_with_gaps_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image, y = Image.new("RGB", (8, 8)), [i % 20 for i in range(60)]
    good = numbers(datasets, datasets.Image(), [image] * 60, y)
    gaps = {
        "unlabelled": (numbers(datasets, datasets.Image(), [image] * 60, [0] + [-1] * 59), "row 1 of l is -1"),
        "missing": (numbers(datasets, datasets.Image(), [image] * 60, [*y[:59], None]), "row 59 of l is None"),
        "empty": (numbers(datasets, datasets.Image(), [*[image] * 7, None, *[image] * 52], y), "row 7 of v is empty"),
    }
    for name, (part, words) in gaps.items():
        datasets.DatasetDict({"train": good, "test": part}).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}, test: {words}"):
            HuggingFace(str(tmp_path / name)).prepare()
    with pytest.raises(ValueError, match="size=0: at least 1 wanted"):
        HuggingFace(size=0)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.full((9, 2), np.nan), np.arange(9), r"the arrays: row 0 of x holds nan, the first of 9 such rows"),
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
    np.save(tmp_path / "one.npy", np.zeros((9, 2)))
    (tmp_path / "empty.npz").touch()
    for name in ("one.npy", "empty.npz"):
        with pytest.raises(ValueError, match="is not an .npz file of plain arrays"):
            Npz(str(tmp_path / name)).prepare()
    np.savez(tmp_path / "half.npz", train_x=np.zeros((9, 2)), train_y=np.arange(9), val_x=np.zeros((9, 2)))
    with pytest.raises(ValueError, match="and no val_y: x and y wanted"):
        Npz(str(tmp_path / "half.npz")).prepare()
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
