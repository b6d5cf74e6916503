"""Augmented training images against windows, mirrors and colours written out; tasks of unequal way and shot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.setup import config
from cluster.setup.tables import to_table
from envs.images.augmentation import Augmentation, cropped, recoloured
from envs.images.episodes import Episodes
from envs.sources.glyphs import Glyphs

RNG = np.random.default_rng


def images(n: int = 400, c: int = 3, size: int = 6) -> np.ndarray:
    return RNG(0).random((n, c, size, size), np.float32)


@pytest.fixture
def episodes(data_folder: Path) -> Episodes:
    tasks = Episodes(Glyphs(characters=30, drawings=8, size=16), ways=4, shots=3, queries=2, test_queries=2)
    tasks.prepare()
    return tasks


def test_a_crop_is_a_window_of_the_image_with_a_border() -> None:
    x = images(5)
    corner = RNG(1).integers(0, 5, (5, 2))
    got = cropped(x, corner, 2)
    for i, (down, right) in enumerate(corner):
        framed = np.zeros((3, 10, 10), np.float32)
        framed[:, 2:8, 2:8] = x[i]
        np.testing.assert_array_equal(got[i], framed[:, down : down + 6, right : right + 6])
    np.testing.assert_array_equal(cropped(x, np.full((5, 2), 2), 2), x)


def test_every_window_is_as_likely_as_another() -> None:
    x = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3).repeat(9000, 0)
    got = Augmentation(crop=1).applied(x, RNG(0))
    _, counts = np.unique(got.reshape(9000, -1), axis=0, return_counts=True)
    assert len(counts) == 9
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_flips_exchange_left_and_right_as_often_as_is_said() -> None:
    x = images(4000)
    got = Augmentation(flip=0.3).applied(x, RNG(0))
    turned = (got == x[..., ::-1]).all((1, 2, 3))
    assert ((got == x).all((1, 2, 3)) | turned).all()
    assert abs(turned.mean() - 0.3) < 5 * np.sqrt(0.21 / 4000)


def test_colours_move_as_their_formula_says_and_stay_in_range() -> None:
    x = images(50)
    b, c, s = (RNG(i).uniform(0.6, 1.4, (50, 1, 1, 1)).astype(np.float32) for i in range(3))
    got = recoloured(x, b, c, s)
    for i in range(50):
        one = np.clip(x[i] * b[i], 0, 1)
        luma = 0.299 * one[0] + 0.587 * one[1] + 0.114 * one[2]
        one = np.clip(luma.mean() + c[i] * (one - luma.mean()), 0, 1)
        luma = 0.299 * one[0] + 0.587 * one[1] + 0.114 * one[2]
        np.testing.assert_allclose(got[i], np.clip(luma + s[i] * (one - luma), 0, 1), atol=1e-6)
    assert got.dtype == np.float32
    assert 0 <= got.min() <= got.max() <= 1
    grey = images(5, 1)
    assert recoloured(grey, *np.ones((3, 5, 1, 1, 1), np.float32)).shape == grey.shape
    np.testing.assert_allclose(recoloured(x, *np.ones((3, 50, 1, 1, 1), np.float32)), x, atol=1e-6)


def test_a_mixed_image_is_between_two_of_its_class_and_nearer_to_itself() -> None:
    y = np.arange(4).repeat(5)
    x = np.zeros((20, 1, 1, 20), np.float32)
    x[np.arange(20), 0, 0, np.arange(20)] = 1  # so that a mixture shows what it is of
    got = Augmentation(mix=0.5).mixed(x, y, RNG(0)).reshape(20, 20)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    for i, row in enumerate(got):
        parts = np.flatnonzero(row)
        assert row[i] >= 0.5
        assert len(parts) == 2
        assert (y[parts] == y[i]).all()
    alone = Augmentation(mix=0.5).mixed(x[:3], np.arange(3), RNG(0))
    np.testing.assert_allclose(alone, x[:3], atol=1e-6)


def test_classes_and_images_are_the_same_and_held_out_tasks_untouched(episodes: Episodes) -> None:
    changed = replace(episodes, augment=Augmentation(crop=2, flip=0.5, jitter=0.4, mix=1.0))
    for split in ("train", "validation", "test"):
        plain, other = episodes.sample(split, RNG(3)), changed.sample(split, RNG(3))
        assert other.keys() == plain.keys()
        for key in ("support_y", "query_y"):
            np.testing.assert_array_equal(other[key], plain[key])
        same = all(np.array_equal(other[k], plain[k]) for k in ("support_x", "query_x"))
        assert same == (split != "train")
        assert {k: v.dtype for k, v in other.items()} == {k: v.dtype for k, v in plain.items()}
    flipped = replace(episodes, augment=Augmentation(flip=1.0))
    plain, other = episodes.sample("train", RNG(3)), flipped.sample("train", RNG(3))
    for key in ("support_x", "query_x"):
        np.testing.assert_array_equal(other[key], plain[key][..., ::-1])
    again = changed.sample("train", RNG(3))
    np.testing.assert_array_equal(again["support_x"], changed.sample("train", RNG(3))["support_x"])


def test_tasks_may_differ_in_way_and_shot(episodes: Episodes) -> None:
    varied = replace(episodes, min_ways=2, min_shots=1)
    ways, shots = set(), set()
    for i in range(60):
        task = varied.sample("test", RNG(i))
        n = len(np.unique(task["support_y"]))
        np.testing.assert_array_equal(task["class_mask"], np.arange(4) < n)
        np.testing.assert_array_equal(task["query_y"], np.arange(n).repeat(2))
        counts = np.bincount(task["support_y"])
        assert len(task["support_x"]) == counts.sum()
        ways.add(n)
        shots.update(counts)
    assert ways == {2, 3, 4}
    assert shots == {1, 2, 3}


def test_a_preset_with_augmentation_and_varied_ways_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('extends = "glyphs"\n[task]\nmin_ways = 2\n[task.augment]\ncrop = 2\nflip = 0.5\n')
    run = config.load(str(path))
    assert (run.task.min_ways, run.task.augment) == (2, Augmentation(crop=2, flip=0.5))
    path.write_text(config.to_toml(run))
    assert config.load(str(path)) == run
    assert to_table(run)["task"]["augment"]["crop"] == 2


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"flip": 1.5}, {"jitter": -0.1}, {"mix": -1}])
def test_impossible_augmentations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


@pytest.mark.parametrize("wrong", [{"min_ways": 1}, {"min_ways": 6}, {"min_shots": 2}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Episodes(Glyphs(), **wrong)
