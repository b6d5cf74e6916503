"""Task families: what every one promises, and what each one is."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.fleet import seeds
from envs import store
from envs.base import HasFiles, TaskFamily
from envs.images.episodes import Episodes
from envs.sinusoid import Sinusoid
from envs.sources import omniglot
from envs.sources.glyphs import Glyphs
from envs.sources.omniglot import Omniglot

SMALL_GLYPHS = Glyphs(characters=40, drawings=12)
FAMILIES = {
    "sinusoid": Sinusoid(),
    "sinusoid for Reptile": Sinusoid(train_shots=50),
    "glyphs": Episodes(SMALL_GLYPHS, queries=3, test_queries=4),
    "glyphs for Reptile": Episodes(SMALL_GLYPHS, train_shots=10, test_queries=4, rotations="train"),
}


def rng(index: int = 0, split: str = "train") -> np.random.Generator:
    return seeds.generator(0, split, index, "task")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_promises(name: str, data_folder: Path) -> None:
    tasks: TaskFamily = FAMILIES[name]
    tasks.prepare()
    hash(tasks)
    for split in ("train", "validation", "test"):
        first, again, other = (tasks.sample(split, rng(i, split)) for i in (3, 3, 4))
        assert first.keys() >= {"support_x", "support_y"}
        for key in first:
            np.testing.assert_array_equal(first[key], again[key])
            assert (first[key].shape, first[key].dtype) == (other[key].shape, other[key].dtype)
        assert any((first[k] != other[k]).any() for k in first)
        assert first["support_x"].shape[1:] == tasks.inputs
        assert ("query_x" in first) == (split != "train" or "Reptile" not in name)
        if tasks.kind == "classification":
            assert sorted(set(first["support_y"])) == list(range(tasks.outputs))
        else:
            assert first["support_y"].shape[1:] == (tasks.outputs,)
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test"):
        tasks.sample("dev", rng())
    if isinstance(tasks, HasFiles):
        assert all((store.data_folder() / f).exists() for f in tasks.files())


def test_sinusoids_are_amplitude_times_sine_of_x_minus_phase() -> None:
    amplitudes, phases = [], []
    for i in range(200):
        task = Sinusoid(shots=30).sample("train", rng(i))
        x, y = task["support_x"][:, 0].astype(float), task["support_y"][:, 0].astype(float)
        # y = c sin x + d cos x with c = A cos b, d = −A sin b: two unknowns, solved by least squares.
        (c, d), residual, *_ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y, rcond=None)
        assert residual < 1e-9
        amplitudes.append(np.hypot(c, d))
        phases.append(np.arctan2(-d, c))
        assert np.abs(x).max() <= 5
    assert 0.1 <= min(amplitudes) < 0.4
    assert 4.7 < max(amplitudes) <= 5
    assert 0 <= min(phases) < 0.1
    assert 3.0 < max(phases) <= np.pi
    assert np.mean(amplitudes) == pytest.approx(2.55, abs=0.3)


def test_the_frequency_varying_family_varies_its_frequency() -> None:
    family = Sinusoid(shots=200, frequency=(0.8, 1.2), amplitude=(1.0, 1.0), phase=(0.0, 0.0))
    for i in range(5):
        task = family.sample("train", rng(i))
        x, y = task["support_x"][:, 0].astype(float), task["support_y"][:, 0].astype(float)
        errors = {w: np.abs(np.sin(w * x) - y).max() for w in np.linspace(0.8, 1.2, 4001)}
        assert min(errors.values()) < 1e-3


def test_episodes_hold_different_images_and_no_query_is_in_the_support(data_folder: Path) -> None:
    tasks = Episodes(SMALL_GLYPHS, ways=5, shots=2, queries=3, test_queries=3)
    tasks.prepare()
    images = SMALL_GLYPHS.load()
    by_pixels = {images.images[r].tobytes(): (c, r) for c in range(40) for r in images.rows(c)}
    for split in ("train", "validation", "test"):
        task = tasks.sample(split, rng(0, split))
        found = {
            part: [by_pixels[(x * 255).round().astype(np.uint8).tobytes()] for x in task[f"{part}_x"]]
            for part in ("support", "query")
        }
        assert not set(found["support"]) & set(found["query"])
        assert len(set(found["support"])) == 10
        assert len(set(found["query"])) == 15
        label = {task["support_y"][i]: c for i, (c, _) in enumerate(found["support"])}
        assert len(set(label.values())) == 5
        assert set(label.values()) <= set(images.classes(split))
        assert [label[y] for y in task["query_y"]] == [c for c, _ in found["query"]]


def test_splits_share_no_class(data_folder: Path) -> None:
    SMALL_GLYPHS.prepare()
    splits = SMALL_GLYPHS.load().index.splits
    assert sorted(c for s in splits.values() for c in s) == list(range(40))


def test_rotations_turn_whole_classes_in_the_splits_asked_for(data_folder: Path) -> None:
    plain, turned = (Episodes(SMALL_GLYPHS, queries=2, test_queries=2, rotations=r) for r in ("none", "train"))
    plain.prepare()
    known = {x.tobytes() for x in SMALL_GLYPHS.load().images}

    def upright(tasks: Episodes, split: str) -> list[bool]:
        found = []
        for i in range(10):
            task = tasks.sample(split, rng(i, split))
            x = np.concatenate(
                [task["support_x"].reshape(5, 1, 1, 28, 28), task["query_x"].reshape(5, 2, 1, 28, 28)], 1
            )
            for images in (x * 255).round().astype(np.uint8):
                same = {image.tobytes() in known for image in images}
                assert len(same) == 1  # all images of a class, or none
                found.append(same.pop())
        return found

    assert all(upright(plain, "train"))
    assert all(upright(turned, "test"))
    assert 0.1 < np.mean(upright(turned, "train")) < 0.45  # a quarter of the classes keeps its orientation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 9}, "ways=9 exceeds the 8 classes of the validation split"),
        ({"shots": 10}, "13 images per class wanted in the train split .* a class has only 12"),
        ({"ways": 1}, "ways=1: at least 2 wanted"),
    ],
)
def test_impossible_episodes_are_refused_with_the_numbers(change, message, data_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Episodes(SMALL_GLYPHS, **({"queries": 3, "test_queries": 3} | change)).prepare()


def test_glyphs_of_a_class_look_alike_and_classes_differ(data_folder: Path) -> None:
    SMALL_GLYPHS.prepare()
    images = SMALL_GLYPHS.load().images.astype(float).reshape(40, 12, -1)
    centres = images[:, :6].mean(1)
    nearest = np.linalg.norm(images[:, 6:, None] - centres, axis=-1).argmin(-1)
    right = (nearest == np.arange(40)[:, None]).mean()
    assert 0.5 < right < 1.0  # far above chance (0.025), yet not trivial for a nearest mean
    assert images.max() > 200


def test_real_omniglot_is_recognised_by_its_content(omniglot_archives: Path, data_folder: Path) -> None:
    source = Omniglot(folder=str(omniglot_archives))
    source.prepare()
    stored = source.load()
    assert stored.images.shape == (1623 * 20, 1, 28, 28)
    splits = stored.index.splits
    assert [len(splits[s]) for s in ("train", "test")] == [1200, 423]
    assert not set(splits["train"]) & set(splits["test"])
    assert 0.02 < stored.images.mean() / 255 < 0.15  # ink is 1, paper 0
    code = Omniglot(train=1100, validation=100).load().index.splits  # decoded once, whatever the split
    assert [len(code[s]) for s in ("train", "validation", "test")] == [1100, 100, 423]
    assert len({c for s in code.values() for c in s}) == 1623
    # One character against Pillow's own reading of it.
    name = stored.index.classes[7]
    for archive in omniglot_archives.glob("*.zip"):
        with zipfile.ZipFile(archive) as z:
            files = sorted(n for n in z.namelist() if f"/{name}/" in n and n.endswith(".png"))
            if files:
                image = Image.open(io.BytesIO(z.read(files[3]))).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
                np.testing.assert_array_equal(stored.images[7 * 20 + 3, 0], 255 - np.asarray(image))


def test_archives_that_are_not_omniglot_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLEET_DATA", str(tmp_path / "data"))
    for name in omniglot.ARCHIVES:
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            z.writestr("images_background/Greek/character01/0001_01.png", b"no image")
    with pytest.raises(ValueError, match="images_background.zip holds 1 characters, wanted 964 with 20 drawings each"):
        Omniglot(folder=str(tmp_path)).prepare()
    whole = (tmp_path / "images_background.zip").read_bytes()
    (tmp_path / "images_background.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="images_background.zip is not a whole zip archive"):
        Omniglot(folder=str(tmp_path)).prepare()
    with pytest.raises(FileNotFoundError, match="holds neither images_background.zip nor its unpacked folder"):
        Omniglot(folder=str(tmp_path / "data")).prepare()
    with pytest.raises(ValueError, match="train=1600 \\+ validation=23 characters leave none"):
        Omniglot(folder=str(tmp_path), train=1600, validation=23).prepare()
    assert not list((tmp_path / "data").rglob("*.npy"))


def test_a_download_is_checked_against_its_published_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "images_background.zip").write_bytes(b"tampered with")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("METAFLEET_DATA", str(tmp_path / "data"))
        wrong = hashlib.md5(b"tampered with", usedforsecurity=False).hexdigest()
        with pytest.raises(ValueError, match=f"has MD5 {wrong}, wanted 68d2efa1b9178cc56df9314c21c6e718"):
            Omniglot().prepare()
        server.shutdown()


def test_generators_depend_on_everything_they_are_for_and_on_nothing_else() -> None:
    drawn = {
        (seed, split, index, purpose): seeds.generator(seed, split, index, purpose).random(4).tobytes()
        for seed in (0, 1, 2**63) for split in ("train", "test") for index in (0, 1, 10**9)
        for purpose in ("task", "draw")
    }  # fmt: skip
    assert len(set(drawn.values())) == len(drawn)
    np.random.seed(3)
    assert seeds.generator(1, "test", 1, "draw").random(4).tobytes() == drawn[1, "test", 1, "draw"]
