"""A trained θ as one uses it: adapted to examples of one's own, in Python and at the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import metafleet as public
from cluster.fleet import seeds
from envs.images.episodes import Episodes
from envs.sources.glyphs import Glyphs
from learners.models.networks import Conv4
from metafleet import MAML, Evaluation, ProtoNet, Run, launch, load
from tests.commands import TINY, metafleet, refusal

SOURCE = Glyphs(characters=30, drawings=8, size=16)
EPISODES = Episodes(SOURCE, ways=3, shots=2, queries=3, test_queries=3)
KEYS = {"iterations": 3, "meta_batch": 4, "shard": 2, "pool": "local", "evaluation": Evaluation(0, 0, 4, 2)}


class Lines:
    """y = a x; nothing but `sample`."""

    def sample(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.uniform(-1, 1, (10, 1)).astype(np.float32)
        y = np.float32(rng.uniform(1, 2)) * x
        return {"support_x": x[:5], "support_y": y[:5], "query_x": x[5:], "query_y": y[5:]}


def test_a_run_of_pythons_objects_adapts_as_plain_autograd_does(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    run = Run(task=Lines(), model=net, learner=MAML(inner_lr=0.1, inner_steps=2), **KEYS)
    few = launch(run, tmp_path / "r")
    x = np.linspace(-1, 1, 6)[:, None]
    fitted = few.adapt(x, 1.5 * x, steps=4)

    theta = {k: v.clone().requires_grad_() for k, v in few.params.items()}
    inputs = torch.from_numpy(x).float()
    for _ in range(4):
        loss = F.mse_loss(torch.func.functional_call(net, theta, (inputs,)), 1.5 * inputs)
        grads = torch.autograd.grad(loss, list(theta.values()))
        theta = {k: (v - 0.1 * g).detach().requires_grad_() for (k, v), g in zip(theta.items(), grads, strict=True)}
    expected = torch.func.functional_call(net, theta, (inputs,)).detach().numpy()
    np.testing.assert_allclose(fitted.predict(x), expected, atol=1e-6)

    again = load(tmp_path / "r", run)
    np.testing.assert_array_equal(again.adapt(x, 1.5 * x, steps=4).predict(x), fitted.predict(x))
    with pytest.raises(ValueError, match="model was an object of Python"):
        load(tmp_path / "r", trust=True)


def test_predictions_agree_with_evaluation(tmp_path: Path, data_folder: Path) -> None:
    few = launch(Run(task=EPISODES, model=Conv4(width=4), learner=MAML(0.1, 2), **KEYS), tmp_path / "r")
    right = []
    for i in range(4):
        task = few.run.task.sample("test", _generator(i))
        fitted = few.adapt(task["support_x"], np.array(["c", "a", "b"])[task["support_y"]])
        assert list(fitted.classes_) == ["a", "b", "c"]
        order = np.array([2, 0, 1])  # label 0 is called c, which is the last of the sorted ones
        same = few.adapt(task["support_x"], order[task["support_y"]])
        said = same.predict_proba(task["query_x"])
        np.testing.assert_allclose(said, fitted.predict_proba(task["query_x"]))
        np.testing.assert_allclose(said.sum(1), 1)
        plain = few.adapt(task["support_x"], task["support_y"])
        right.append(plain.score(task["query_x"], task["query_y"]))
    mean = few.evaluate().curves.mean["accuracy_transductive"][-1]
    assert np.mean(right) == pytest.approx(mean, abs=1e-6)


def test_fewer_and_more_classes_than_in_training(tmp_path: Path, data_folder: Path) -> None:
    few = launch(Run(task=EPISODES, model=Conv4(width=4), learner=MAML(0.1, 2), **KEYS), tmp_path / "r")
    x = np.random.default_rng(0).random((10, 1, 16, 16), dtype=np.float32)
    assert few.adapt(x[:4], [0, 0, 1, 1]).predict_proba(x).shape == (10, 2)
    wide = few.adapt(x, [0, 1, 2, 3, 4] * 2, steps=0)
    assert np.allclose(wide.predict_proba(x), 0.2)  # every row of the head is the mean of the trained ones
    assert few.adapt(x, [0, 1, 2, 3, 4] * 2).predict_proba(x).shape == (10, 5)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (np.zeros((4, 28, 28, 1)), [0, 0, 1, 1], r"x has shape \(4, 28, 28, 1\): \[n, 1, 16, 16\] wanted"),
        (np.zeros((4, 16, 16, 1)), [0, 0, 1, 1], "channels come first"),
        (np.zeros((4, 1, 16, 16)), [0, 1], "4 examples and 2 targets"),
        (np.full((2, 1, 16, 16), np.nan), [0, 1], "not finite"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, data_folder: Path, x: np.ndarray, y: list[int], sentence: str
) -> None:
    few = launch(Run(task=EPISODES, model=Conv4(width=4), learner=ProtoNet(), **KEYS), tmp_path / "r")
    with pytest.raises(ValueError, match=sentence):
        few.adapt(x, y)


def test_folders_of_drawings_become_predictions(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task.source.characters", "30", "--task.source.drawings", "8", "--task.ways", "3", "--task.queries", "3"]
    words += ["--task.test-queries", "3", "--model.width", "4", "--evaluation.pictures", "0"]
    metafleet("train", "glyphs", *words, "--dir", str(tmp_path / "r"), *TINY)
    run = load(tmp_path / "r").run
    task = run.task.sample("test", _generator(0))
    for part, folder in (("support", tmp_path / "known"), ("query", tmp_path / "unknown")):
        for i, (image, label) in enumerate(zip(task[f"{part}_x"], task[f"{part}_y"], strict=True)):
            path = folder / (f"letter {label}" if part == "support" else "") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - np.round(255 * image[0]).astype(np.uint8)).save(path)
    out = tmp_path / "p" / "said.csv"
    folders = ["--support", str(tmp_path / "known"), "--predict", str(tmp_path / "unknown"), "--out", str(out)]
    metafleet("adapt", str(tmp_path / "r"), *folders, "--export", str(tmp_path / "phi.safetensors"))
    assert "BatchNorm: transductive" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["query", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    fitted = load(tmp_path / "r").adapt(task["support_x"], task["support_y"])
    assert [r["class"] for r in rows] == [f"letter {k}" for k in fitted.predict(task["query_x"])]
    said = fitted.predict_proba(task["query_x"]).max(1)
    np.testing.assert_allclose([float(r["probability"]) for r in rows], said, atol=1e-5)
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 600
    assert (tmp_path / "phi.safetensors").exists()
    text = refusal(capsys, "adapt", str(tmp_path / "r"), "--support", folders[3], "--predict", folders[3])
    assert "examples with classes wanted" in text


def test_evaluation_under_other_conditions(tmp_path: Path, data_folder: Path) -> None:
    words = ["--task.source.characters", "30", "--task.source.drawings", "10", "--model.width", "4", "--task.ways", "3"]
    words += ["--task.queries", "3", "--task.test-queries", "3", "--evaluation.pictures", "0"]
    metafleet("train", "glyphs", *words, "--dir", str(tmp_path / "r"), *TINY)
    out = ["--json", str(tmp_path / "e.json")]
    metafleet("evaluate", str(tmp_path / "r"), "--task.shots", "5", "--task.ways", "5", "--task.source.seed", "1", *out)
    curve = json.loads((tmp_path / "e.json").read_text())["mean"]["accuracy_transductive"]
    assert curve[0] == pytest.approx(0.2)  # five equal rows in the head: no class is preferred, the first is said
    metafleet("evaluate", str(tmp_path / "r"), "--learner.name", "proto_net", "--checkpoint", "newest", *out)
    metafleet("train", str(tmp_path / "r" / "run.toml"), "--iterations", "0", "--init-from", str(tmp_path / "r"),
              "--pool", "local", "--dir", str(tmp_path / "z"))  # fmt: skip
    ours, theirs = (json.loads((tmp_path / d / "evaluation.json").read_text())["mean"] for d in "rz")
    assert ours == theirs


def test_public_names_are_these() -> None:
    assert sorted(public.NAMES) == dir(public) == sorted(public.__all__)
    for name in public.NAMES:
        assert getattr(public, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        public.lunch


def _generator(index: int) -> np.random.Generator:
    return seeds.generator(0, "test", index, "task")
