"""One's own classes by import path: trained, recorded, trusted, refused where they have changed."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.setup import catalog, code
from tests.commands import TINY, metafleet, refusal

LEARNER = '''
from dataclasses import dataclass
from own_helper import FACTOR
from learners.algorithms.maml import MAML

@dataclass(frozen=True)
class Slower(MAML):
    """MAML, slower."""

    factor: float = FACTOR
    """Of nothing yet."""

class Net: ...
'''
TASKS = '''
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True)
class Lines:
    """y = a x."""

    shots: int = 5
    """Examples to adapt to."""
    kind = "regression"
    inputs = (1,)
    outputs = 1

    def prepare(self) -> None:
        pass

    def sample(self, split, rng):
        x = rng.uniform(-1, 1, (self.shots + 5, 1)).astype(np.float32)
        y = np.float32(rng.uniform(1, 2)) * x
        k = self.shots
        return {"support_x": x[:k], "support_y": y[:k], "query_x": x[k:], "query_y": y[k:]}
'''
WORDS = ["--learner.name", "own_learner:Slower", "--task.name", "own_tasks:Lines", "--task.shots", "4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder, and nothing of it imported yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_learner.py").write_text(LEARNER)
    (tmp_path / "own_helper.py").write_text("FACTOR = 0.5\n\ndef of(x):\n    return x\n")
    (tmp_path / "own_tasks.py").write_text(TASKS)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


def test_a_run_of_ones_own_classes_is_a_run_like_any_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("train", "sinusoid", *WORDS, "--learner.factor", "0.25", "--dir", "r", *TINY)
    table = tomllib.loads((folder / "r" / "run.toml").read_text())
    assert table["learner"]["name"] == "own_learner:Slower"
    assert table["learner"]["factor"] == 0.25
    assert table["task"] == {"name": "own_tasks:Lines", "shots": 4}
    assert set(table["code"]) == {"own_learner:Slower", "own_tasks:Lines"}
    metafleet("evaluate", "r", "--trust", "--tasks", "3", "--steps", "2")
    metafleet("replay", "r", "--trust")
    metafleet("train", "sinusoid", *WORDS, "--learner.factor", "0.25", "--dir", "r", *TINY)  # named again: trusted
    metafleet("resume", "r", "--trust", "--iterations", "7")
    metafleet("check", "sinusoid", *WORDS)
    assert "is second order" in capsys.readouterr().out


def test_a_run_directory_imports_nothing_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("train", "sinusoid", *WORDS, "--dir", "r", *TINY)
    for name in ("own_learner", "own_tasks"):
        del sys.modules[name]
        (folder / f"{name}.py").write_text("raise SystemExit('it was run')")
    for words in (["evaluate", "r"], ["resume", "r"], ["replay", "r"], ["compare", "r", "r"], ["adapt", "r"]):
        more = ["--support", "x.npz", "--predict", "x.npz"] if words[0] == "adapt" else []
        assert "names code that is not Metafleet's" in refusal(capsys, *words, *more)
    metafleet("status", "r")
    metafleet("export", "r", "theta.safetensors")


def test_a_constructor_in_a_run_directory_is_not_called_either() -> None:
    table = {"model": {"name": "unit", "network": {"name": "constructor", "target": "os.system"}}}
    with pytest.raises(PermissionError, match=r"model.network.target = os.system"):
        code.check_trusted(table, "r")
    code.check_trusted(table, "r", {"os.system"})


def test_changed_code_is_refused_on_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("train", "sinusoid", *WORDS, "--dir", "r", *TINY)
    path = folder / "own_learner.py"
    path.write_text(path.read_text() + "\n# other\n")
    text = refusal(capsys, "train", "sinusoid", *WORDS, "--dir", "r", *TINY, "--iterations", "8")
    assert "the source of own_learner:Slower is not what it was" in text
    metafleet("train", "sinusoid", *WORDS, "--dir", "r", *TINY, "--iterations", "8", "--allow-changed-code")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learner.name", "own_learner:Slowest"], "there is no Slowest; did you mean Slower?"),
        (["--learner.name", "own_lerner:Slower"], "there is no module own_lerner; install it, or name its folder"),
        (["--learner.name", "own_learner:FACTOR"], "is a float: a class wanted"),
        (["--learner.name", "own_tasks:Lines"], "has no init, draw, path, adapt, gradient, claim, passes, at_test"),
        (["--task.name", "own_learner:Net"], "has no sample, which envs.base.TaskDistribution wants"),
        (["--learner.name", "own_learner:Slower", "--learner.name", "mamal"], "did you mean maml?"),
    ],
)
def test_what_is_no_class_of_the_kind_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert sentence in refusal(capsys, "train", "sinusoid", *words)


def test_a_module_that_fails_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own_broken.py").write_text("x = 1 +\n")
    text = refusal(capsys, "train", "sinusoid", "--learner.name", "own_broken:L")
    assert "own_broken cannot be imported (SyntaxError: invalid syntax, line 1 of" in text


def test_a_loss_of_ones_own_goes_by_its_path(folder: Path) -> None:
    (folder / "own_loss.py").write_text(
        "def cubic(output, target):\n    return ((output - target).abs() ** 3).mean()\n"
        "def worst(output, target):\n    return (output - target).abs().max()\n"
    )
    loss = ["--objective.loss", "own_loss:cubic", "--objective.measures", "own_loss:worst"]
    metafleet("train", "sinusoid", *loss, "--dir", "r", *TINY)
    assert '"mean": {\n  "worst": [' in (folder / "r" / "evaluation.json").read_text()


def test_every_name_of_ours_leads_to_a_class_of_its_kind() -> None:
    for choices in catalog.KEYS.values():
        for name in choices.ours:
            cls = choices[name]
            choices._check(name, cls)
            assert choices.name_of(cls) == name
