"""Layouts of published sets, made small here: CIFAR-FS, FC100, CUB-200-2011, tieredImageNet."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.images.episodes import Episodes
from envs.sources import layouts
from envs.sources.image_folder import ImageFolder
from envs.store import ImageSet

COARSE = ("fish", "trees", "people", "insects")
FINE = ("ray", "oak", "baby", "bee", "trout", "pine", "girl", "moth")  # class i lies in the coarse class i % 4
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 3, 32, 32), np.uint8)  # image n is of class n % 8
BERTINETTO = {"train": ("oak", "bee", "ray", "pine"), "val": ("moth", "trout"), "test": ("girl", "baby")}
FC100 = {"train": ("fish", "insects"), "val": ("trees",), "test": ("people",)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLEET_DATA", str(tmp_path / "cache"))


def loaded(path: Path, size: int = 32, splits: str = "") -> ImageSet:
    tasks = Episodes(ImageFolder(str(path), size, splits=splits), ways=2, shots=1, queries=2, test_queries=2)
    tasks.prepare()
    return tasks.source.load()


def by_class(images: ImageSet) -> dict[str, dict[str, np.ndarray]]:
    """Split → class → images."""
    return {
        split: {
            images.index.classes[c]: images.images[images.rows(c).start : images.rows(c).stop]
            for c in images.classes(split)
        }
        for split in images.index.splits
    }


def binary() -> dict[str, bytes]:
    """What cifar-100-binary.tar.gz holds: <coarse><fine><1024 red><1024 green><1024 blue> for each image."""
    records = [bytes([n % 8 % 4, n % 8]) + PIXELS[n].tobytes() for n in range(48)]
    return {
        "train.bin": b"".join(records[:40]), "test.bin": b"".join(records[40:]),
        "fine_label_names.txt": "\n".join(FINE).encode() + b"\n",
        "coarse_label_names.txt": "\n".join(COARSE).encode() + b"\n",
    }  # fmt: skip


def write_tar(path: Path, folder: str, contents: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(content), 10**9  # zips know no time before 1980
            archive.addfile(member, io.BytesIO(content))


def write_splits(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")


def holds(images: ImageSet, splits: dict[str, tuple[str, ...]]) -> None:
    """Whether these fine classes are in these splits, with exactly their pixels, six of each in the archive's order."""
    found = by_class(images)
    assert {s: set(classes) for s, classes in found.items()} == {
        "train": set(splits["train"]), "validation": set(splits["val"]), "test": set(splits["test"])
    }  # fmt: skip
    for classes in found.values():
        for name, pixels in classes.items():
            np.testing.assert_array_equal(pixels, PIXELS[FINE.index(name) :: 8])


def test_cifar_100s_binary_archive_is_split_by_files_of_class_names(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    write_tar(root / "cifar-100-binary.tar.gz", "cifar-100-binary", binary())
    write_splits(root / "splits" / "bertinetto", BERTINETTO)
    holds(loaded(root), BERTINETTO)
    holds(loaded(root / "cifar-100-binary.tar.gz", splits="splits/bertinetto"), BERTINETTO)
    holds(loaded(root / "cifar-100-binary.tar.gz", splits=str(root / "splits" / "bertinetto")), BERTINETTO)
    with tarfile.open(root / "cifar-100-binary.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    holds(loaded(tmp_path / "unpacked" / "cifar-100-binary", splits=str(root / "splits" / "bertinetto")), BERTINETTO)
    shutil.copytree(root / "splits", tmp_path / "unpacked" / "splits")
    holds(loaded(tmp_path / "unpacked"), BERTINETTO)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "unpacked")
    holds(loaded(tmp_path / "zipped.zip"), BERTINETTO)


def test_a_coarse_class_in_a_split_file_stands_for_its_fine_ones(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    write_tar(root / "cifar-100-binary.tar.gz", "cifar-100-binary", binary())
    write_splits(root / "splits" / "fc100", FC100)
    fine = {"train": ("ray", "trout", "bee", "moth"), "val": ("oak", "pine"), "test": ("baby", "girl")}
    holds(loaded(root), fine)
    write_splits(root / "splits" / "bertinetto", BERTINETTO)
    with pytest.raises(ValueError, match="has several splits .*: splits= the folder of one of them wanted"):
        loaded(root)
    holds(loaded(root, splits="fc100"), fine)
    holds(loaded(root, splits="bertinetto"), BERTINETTO)
    for split, pairs in {"train": [["fish", "ray"], ["fish", "trout"]], "val": ["trees"], "test": ["people"]}.items():
        (root / "splits" / "fc100" / f"{split}.txt").unlink()
        (root / "splits" / "fc100" / f"{split}.json").write_text(json.dumps(pairs))
    holds(loaded(root, splits="fc100"), fine | {"train": ("ray", "trout")})


def test_cifar_fs_as_pngs_holds_what_the_binary_archive_does(tmp_path: Path) -> None:
    root = tmp_path / "outer" / "cifar100"
    for n, pixels in enumerate(PIXELS):
        (root / "data" / FINE[n % 8]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(root / "data" / FINE[n % 8] / f"{n:02}.png")
    write_splits(root / "splits" / "bertinetto", BERTINETTO)
    (root / "splits" / "bertinetto" / ".train.txt.swp").write_text("")
    holds(loaded(root), BERTINETTO)
    holds(loaded(tmp_path / "outer", splits="bertinetto"), BERTINETTO)
    with zipfile.ZipFile(tmp_path / "cifar100.zip", "w") as z:
        for file in sorted(root.rglob("*.*")):
            z.write(file, str(file.relative_to(tmp_path / "outer")))
    holds(loaded(tmp_path / "cifar100.zip"), BERTINETTO)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_changed_split_file_divides_anew(absolute: bool, tmp_path: Path) -> None:
    write_tar(tmp_path / "down" / "c.tar.gz", "cifar-100-binary", binary())
    given = str(tmp_path / "lists") if absolute else "../lists"
    write_splits(tmp_path / "lists", BERTINETTO)
    holds(loaded(tmp_path / "down" / "c.tar.gz", splits=given), BERTINETTO)
    swapped = BERTINETTO | {"val": BERTINETTO["test"], "test": BERTINETTO["val"]}
    write_splits(tmp_path / "lists", swapped)
    holds(loaded(tmp_path / "down" / "c.tar.gz", splits=given), swapped)


def cub(root: Path) -> list[str]:
    """CUB-200-2011's folder, of eight birds; their names."""
    birds = [f"{i + 1:03}.Bird_{'ABCDEFGH'[i]}" for i in range(8)]
    lines = []
    for i, bird in enumerate(birds):
        (root / "images" / bird).mkdir(parents=True)
        for k in range(4):
            name = f"{bird[4:]}_{k:04}.jpg"
            Image.fromarray(PIXELS[4 * i + k].transpose(1, 2, 0)).save(root / "images" / bird / name)
            lines.append(f"{bird}/{name}")
    (root / "images.txt").write_text("".join(f"{n + 1} {line}\n" for n, line in enumerate(lines)))
    (root / "image_class_labels.txt").write_text("".join(f"{n + 1} {n // 4 + 1}\n" for n in range(32)))
    (root / "classes.txt").write_text("".join(f"{i + 1} {bird}\n" for i, bird in enumerate(birds)))
    (root / "attributes").mkdir()
    return birds


def test_cub_is_split_by_files_of_class_names_or_of_images(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    birds = cub(root)
    divided = {"base": birds[::2], "val": birds[1::4], "novel": birds[3::4]}
    lists, files = tmp_path / "lists", root / "splits" / "files"
    for folder in (lists, files):
        folder.mkdir(parents=True)
    for split, names in divided.items():
        (lists / f"{split}.txt").write_text("\n".join(names))
        images = [p for name in names for p in sorted((root / "images" / name).iterdir())[:3]]
        # as the lists of Chen et al. 2019: paths of the machine that made them, numbers of all classes
        table = {
            "label_names": birds,
            "image_names": [f"/home/somebody/CUB/images/{p.parent.name}/{p.name}" for p in images],
            "image_labels": [birds.index(p.parent.name) for p in images],
        }
        (files / f"{split}.json").write_text(json.dumps(table))
    wanted = {"train": set(divided["base"]), "validation": set(divided["val"]), "test": set(divided["novel"])}
    for each, images in ((4, loaded(root, splits=str(lists))), (3, loaded(root)), (3, loaded(root, splits="files"))):
        assert {s: set(classes) for s, classes in by_class(images).items()} == wanted
        assert {len(images.rows(c)) for c in range(8)} == {each}
    found = layouts.find(root, str(lists))
    assert [str(f) for f in found.splits["test"][birds[3]]] == sorted(
        str(f) for f in (root / "images" / birds[3]).iterdir()
    )


def test_tiered_imagenet_is_a_folder_per_split_and_class(tmp_path: Path) -> None:
    n = 0
    for split, synsets in {"train": ("n1", "n2"), "val": ("n3", "n4"), "test": ("n5", "n6")}.items():
        for synset in synsets:
            (tmp_path / "tiered" / split / synset).mkdir(parents=True)
            for k in range(3):
                n += 1
                Image.fromarray(PIXELS[n].transpose(1, 2, 0)).save(
                    tmp_path / "tiered" / split / synset / f"{synset}0000{k}.JPEG", "jpeg"
                )
    found = by_class(loaded(tmp_path / "tiered"))
    assert {s: list(c) for s, c in found.items()} == {
        "train": ["n1", "n2"], "validation": ["n3", "n4"], "test": ["n5", "n6"]
    }  # fmt: skip


def test_pickled_archives_are_refused_unread(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "run",)  # type: ignore[return-value]

    import pickle

    poison = pickle.dumps(Planted())
    python = dict.fromkeys(("train", "test", "meta"), poison)
    write_tar(tmp_path / "a" / "cifar-100-python.tar.gz", "cifar-100-python", python)
    (tmp_path / "b").mkdir()
    for name, content in python.items():
        (tmp_path / "b" / name).write_bytes(content)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mini-imagenet-cache-train.pkl").write_bytes(poison)
    for path in ("a", "a/cifar-100-python.tar.gz", "b", "c"):
        with pytest.raises(ValueError, match="is pickled Python, which may run any program .* cifar-100-binary.tar.gz"):
            loaded(tmp_path / path)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    write_tar(root / "cifar-100-binary.tar.gz", "cifar-100-binary", binary())
    with pytest.raises(
        ValueError, match=r"is CIFAR-100, which has no few-shot splits: splits= a folder with train.txt"
    ):
        loaded(root)
    with pytest.raises(ValueError, match=r"splits='mine' is no folder with train.txt"):
        loaded(root, splits="mine")
    write_splits(root / "splits", BERTINETTO | {"val": ("moth", "mouse")})
    with pytest.raises(ValueError, match=r"splits/val.txt names class mouse, which is no fine or coarse class"):
        loaded(root)
    write_splits(root / "splits", BERTINETTO)
    for name, content, message in (
        ("test.bin", binary()["test.bin"][:-1], r"test.bin has 24591 bytes, wanted a multiple of 3074"),
        ("test.bin", b"\3\10" + bytes(3072), r"test.bin: record 0 has the labels 3, 8, .* 4 coarse and 8 fine names"),
    ):
        write_tar(root / "cifar-100-binary.tar.gz", "cifar-100-binary", binary() | {name: content})
        with pytest.raises(ValueError, match=message):
            loaded(root)
    whole = (root / "cifar-100-binary.tar.gz").read_bytes()
    (root / "cifar-100-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cifar-100-binary.tar.gz is not a whole archive"):
        loaded(root)
    write_tar(tmp_path / "birds.tgz", "birds", {"a.jpg": b""})
    with pytest.raises(ValueError, match="is a tar without train.bin, .*: unpack it, and give the folder"):
        loaded(tmp_path / "birds.tgz")
    birds = cub(tmp_path / "CUB")
    write_splits(tmp_path / "CUB" / "splits", {"train": (birds[0], "009.None"), "val": (), "test": ()})
    with pytest.raises(ValueError, match=r"train.txt names class 009.None, which has no folder in .*images"):
        loaded(tmp_path / "CUB")
    write_splits(tmp_path / "CUB" / "splits", {"train": ("009.None",)})
    with pytest.raises(ValueError, match="has a folder for none of the classes that .*train.txt names"):
        loaded(tmp_path / "CUB")
    for split in ("train", "val", "test"):
        (tmp_path / "CUB" / "splits" / f"{split}.txt").unlink()
        (tmp_path / "CUB" / "splits" / f"{split}.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"splits/train.json is neither a list of classes nor an object"):
        loaded(tmp_path / "CUB")
