"""Folders and zips of images: whose image is whose, what is decoded to what, and what is said of faults."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluster.fleet import seeds
from envs.images.episodes import Episodes
from envs.sources import decoding
from envs.sources.image_folder import ImageFolder
from envs.store import ImageSet

SIZE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLEET_DATA", str(tmp_path / "cache"))


def noise(*key: int, size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(key).integers(0, 255, (size, size, 3), np.uint8)


def make_folder(root: Path, classes: int = 3, images: int = 4) -> Path:
    """train/, val/, test/ with a folder per class, all images different."""
    for s, split in enumerate(("train", "val", "test")):
        for c in range(classes):
            (root / split / f"{split}{c}").mkdir(parents=True)
            for i in range(images):
                Image.fromarray(noise(s, c, i)).save(root / split / f"{split}{c}" / f"{i}.png")
    return root


def make_listed(root: Path) -> Path:
    """The same with csv files: class/0.png and so on under images/."""
    make_folder(root)
    for split in ("train", "val", "test"):
        files = sorted((root / split).rglob("*.png"))
        rows = [f"{f.parent.name}/{f.name},{f.parent.name}" for f in files]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
        shutil.copytree(root / split, root / "images", dirs_exist_ok=True)
        shutil.rmtree(root / split)
    return root


def loaded(path: Path, **keys: object) -> ImageSet:
    source = ImageFolder(folder=str(path), **({"size": SIZE} | keys))  # type: ignore[arg-type]
    source.prepare()
    return source.load()


def decoded(path: Path, **keys: object) -> NDArray[np.uint8]:
    """What the first image of class train0 becomes, rows × columns × RGB."""
    images = loaded(path, **keys)
    return images.images[images.rows(images.index.classes.index("train0")).start].transpose(1, 2, 0)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_real_image_set_in_miniimagenets_layout(tiny_imagenet: Path) -> None:
    source = ImageFolder(folder=str(tiny_imagenet), size=32)
    tasks = Episodes(source, ways=5, shots=1, queries=15, test_queries=15)
    tasks.prepare()
    images = source.load()
    assert images.images.shape == (15000, 3, 32, 32)
    assert [len(images.classes(s)) for s in ("train", "validation", "test")] == [64, 16, 20]
    task = tasks.sample("test", seeds.generator(0, "test", 0, "task"))
    assert task["query_x"].shape == (75, 3, 32, 32)
    assert 0.2 < task["query_x"].mean() < 0.8


def test_a_folder_per_class_and_the_csv_layout_hold_the_same_images(tmp_path: Path) -> None:
    make_folder(tmp_path / "folders")
    with zipfile.ZipFile(tmp_path / "listed.zip", "w") as z:
        for split in ("train", "val", "test"):
            rows = ["filename,label"]
            for file in sorted((tmp_path / "folders" / split).rglob("*.png")):
                z.write(file, f"images/{file.parent.name}_{file.name}")
                rows.append(f"{file.parent.name}_{file.name},{file.parent.name}")
            z.writestr(f"{split}.csv", "\ufeff" * (split == "val") + "\n".join(rows))  # as a spreadsheet writes it
    one, other = loaded(tmp_path / "folders"), loaded(tmp_path / "listed.zip")
    np.testing.assert_array_equal(one.images, other.images)
    assert one.index.splits == other.index.splits
    assert one.index.classes == other.index.classes


def test_an_image_listed_twice_counts_once_and_is_never_in_support_and_query(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_listed(tmp_path / "twice")
    with open(root / "train.csv", "a") as f:
        f.write("".join(f"train{c}/0.png,train{c}\n" * 3 for c in range(3)))
    shutil.copy(root / "images" / "test1" / "2.png", root / "images" / "test1" / "copy.png")
    with open(root / "test.csv", "a") as f:
        f.write("test1/copy.png,test1\n")
    images = loaded(root)
    assert [len(images.rows(c)) for c in range(9)] == [4] * 9
    first, second = said(caplog)
    assert "9 images of the train split are in their class already and count once, e.g. " in first
    assert "train0/0.png" in first
    assert "1 images of the test split" in second
    assert "copy.png" in second
    tasks = Episodes(ImageFolder(str(root), SIZE), ways=2, shots=1, queries=3, test_queries=3)
    for index in range(50):
        task = tasks.sample("train", seeds.generator(0, "train", index, "task"))
        assert len({x.tobytes() for part in ("support_x", "query_x") for x in task[part]}) == 8


def test_classes_and_images_in_two_splits_are_said_in_every_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "shared")
    shutil.copytree(root / "train" / "train2", root / "test" / "train2")
    shutil.copy(root / "val" / "val0" / "1.png", root / "val" / "val1" / "7.png")
    for _ in range(2):  # decoded, then mapped
        caplog.clear()
        assert len(loaded(root).images) == 36 + 4 + 1
        torn, images, classes = said(caplog)
        assert "1 images of the validation split are in another class of it as well, e.g. " in torn
        assert "val1/7.png" in torn
        assert "4 images are in the train and in the test split, e.g. " in images
        assert "test/train2/0.png" in images
        assert "1 classes of the train and the test split have the same name, e.g. train2" in classes


def test_a_clean_set_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(loaded(make_folder(tmp_path / "clean")).images) == 36
    assert said(caplog) == []


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif", "tiff", "ppm", "gif", "TIF"])
def test_formats_without_loss_give_the_pixels_that_were_saved(suffix: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "formats")
    grey = np.repeat(noise(9)[..., :1], 3, 2)  # a gif's palette has room for them
    lossless = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(grey).save(root / "train" / "train0" / f"_.{suffix}", **lossless)
    images = loaded(root)
    rows = images.images[images.rows(0).start : images.rows(0).stop].transpose(0, 2, 3, 1)
    assert len(rows) == 5
    assert any((row == grey).all() for row in rows)


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "film")
    frames = [Image.fromarray(np.full((SIZE, SIZE), v, np.uint8)) for v in (40, 200)]
    frames[0].save(root / "train" / "train0" / "+.gif", save_all=True, append_images=frames[1:])
    assert (decoded(root) == 40).all()


def test_what_is_skipped_is_counted_by_suffix_and_hidden_names_are_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "mixed")
    folder = root / "train" / "train1"
    for name in ("a.svg", "b.svg", "Thumbs.db", "list"):
        (folder / name).write_text("no image")
    (folder / "inner").mkdir()
    (folder / "._0.png").write_text("no image")
    for hidden in (root / "val" / ".ipynb_checkpoints", root / "val" / "__MACOSX", root / ".git"):
        hidden.mkdir()
    assert len(loaded(root).images) == 36
    (message,) = said(caplog)
    assert message.endswith(
        "files of the train split are no images of a known suffix and are skipped: 1 .db, 2 .svg, 1 folder, 1 no suffix"
    )


def test_a_zip_made_on_a_mac_of_a_folder_in_a_folder_is_the_folder(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "readme.txt").write_text("mine")
    with zipfile.ZipFile(tmp_path / "top.zip", "w") as z:
        for file in sorted((tmp_path / "outer").rglob("*.*")):
            z.write(file, str(file.relative_to(tmp_path)))
            z.writestr(f"__MACOSX/{file.relative_to(tmp_path).parent}/._{file.name}", "no image")
    plain = loaded(root)
    for path in (tmp_path / "outer", tmp_path / "top.zip"):
        np.testing.assert_array_equal(loaded(path).images, plain.images)


def test_transparent_images_lie_on_white_or_on_the_background_asked_for(tmp_path: Path) -> None:
    # A black square on transparent black: without a background there is nothing to see.
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[2:5, 2:5] = 255
    alpha[6, 6] = 51  # a fifth
    layer = np.zeros((SIZE, SIZE, 4), np.uint8)
    layer[..., 3] = alpha
    mode_p = Image.fromarray((alpha == 255).astype(np.uint8), "P")
    mode_p.putpalette([7, 7, 7, 0, 0, 0])
    kept = {
        "rgba": (Image.fromarray(layer), {}),
        "la": (Image.fromarray(layer).convert("LA"), {}),
        "p": (mode_p, {"transparency": 0}),
        "deep": (Image.fromarray(np.where(alpha == 255, 0, 9).astype(np.uint16)), {"transparency": 9}),
    }
    for name, (image, options) in kept.items():
        root = make_folder(tmp_path / name)
        image.save(root / "train" / "train0" / "+.png", **options)
        for background in ((255, 255, 255), (10, 200, 30)):
            got = decoded(root, background=background)
            assert (got[2:5, 2:5] == 0).all(), name
            assert (got[0] == background).all(), name
            if name in ("rgba", "la"):
                np.testing.assert_allclose(got[6, 6], np.asarray(background) * 0.8, atol=1)
    with pytest.raises(ValueError, match=r"background=\(0, 0, 256\): three values from 0 to 255 wanted"):
        ImageFolder("somewhere", background=(0, 0, 256))


def test_every_exif_orientation_is_brought_upright(tmp_path: Path) -> None:
    # What the standard says of the stored rows: 6, "the 0th row is the visual right-hand side", and so on.
    upright = noise(5)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    for suffix in ("png", "tif", "webp"):
        for orientation, pixels in stored.items():
            root = make_folder(tmp_path / f"{suffix}{orientation}")
            exif = Image.Exif()
            exif[0x0112] = orientation
            lossless = {"lossless": True} if suffix == "webp" else {}
            Image.fromarray(np.ascontiguousarray(pixels)).save(
                root / "train" / "train0" / f"+.{suffix}", exif=exif, **lossless
            )
            np.testing.assert_array_equal(decoded(root), upright, err_msg=f"{suffix} {orientation}")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
    values[0, :3] = 0, 65535, 40_000
    root = make_folder(tmp_path / "deep")
    Image.fromarray(values).save(root / "train" / "train0" / f"+.{suffix}")
    wanted = np.rint(values / 65535 * 255)
    np.testing.assert_array_equal(decoded(root), np.repeat(wanted[..., None], 3, 2))


def test_numbers_without_a_largest_are_refused(tmp_path: Path) -> None:
    for name, pixels in {"F": np.ones((8, 8), np.float32), "I": np.ones((8, 8), np.int32)}.items():
        root = make_folder(tmp_path / name)
        Image.fromarray(pixels).save(root / "val" / "val1" / "2.tif")
        message = rf"class val1 of the validation split: .*val1/2.tif has pixels of mode {name}: 8 or 16 bits"
        with pytest.raises(ValueError, match=message):
            loaded(root)


def test_messages_name_the_file_and_the_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "broken")
    broken = root / "val" / "val2" / "2.png"
    whole = broken.read_bytes()
    for content, reason in (
        (whole[:100], ".*"),
        (b"no image", r"its 8 bytes are of no known format"),
        (whole[:40] + b"\0" * 30 + whole[70:], ".*"),
    ):
        broken.write_bytes(content)
        message = rf"class val2 of the validation split: .*val2/2.png is not a readable image \({reason}\)"
        with pytest.raises(ValueError, match=message):
            loaded(root)
    broken.write_bytes(whole)
    (root / "test" / "test3").mkdir()
    with pytest.raises(ValueError, match="class test3 of the test split has no image"):
        loaded(root)
    listed = make_listed(tmp_path / "listed")
    (listed / "images" / "val1" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"class val1 of the validation split: .*val1/3.png does not exist"):
        loaded(listed)
    (listed / "val.csv").write_text("filename,label\nval1/0.png,\n")
    with pytest.raises(ValueError, match=r"val.csv, line 2: .*, wanted a filename and a label"):
        loaded(listed)
    (listed / "val.csv").write_text("file;label\n")
    with pytest.raises(ValueError, match="val.csv has the columns file;label, wanted filename,label"):
        loaded(listed)


def test_a_folder_of_no_known_layout_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither train.csv, val.csv, test.csv nor folders .*: it holds nothing"):
        loaded(tmp_path / "empty")
    shutil.rmtree(make_folder(tmp_path / "two") / "val")
    with pytest.raises(ValueError, match="it holds test, train"):
        loaded(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="does not exist: a folder or a zip of images is wanted"):
        loaded(tmp_path / "nowhere")


def test_what_other_rules_decoded_is_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "old")
    before = loaded(root).index.fingerprint
    assert loaded(root).index.fingerprint == before
    monkeypatch.setattr(decoding, "RULES", "other")
    assert loaded(root).index.fingerprint != before


def test_a_folder_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ImageFolder(folder="some")
    assert relative == ImageFolder(folder=str(tmp_path / "some"))
    name = relative.files()
    monkeypatch.chdir("/")
    assert relative.files() == name
