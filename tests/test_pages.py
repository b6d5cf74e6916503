"""The pages, as they stand: lines, links, every code block; commands run in order, in an empty folder, small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cluster import cli
from cluster.commands import flags
from cluster.commands.tools import NoOptions
from tests.commands import metafleet

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "envs/README.md",
    "learners/README.md",
    "cluster/README.md",
    "deploy/README.md",
    "CONTRIBUTING.md",
]
TEXTS = [*PAGES, "DESIGN.md", "RESULTS.md", "CHANGELOG.md"]
BLOCKS = {page: re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.S) for page in PAGES}
PROGRAMS = {
    name: (page, program)
    for page in PAGES
    for name, program in re.findall(r"<!-- test: (\S+) -->\n```python\n(.*?)```", (ROOT / page).read_text(), re.S)
}

RUN = "--iterations 2 --meta-batch 4 --shard 2 --pool local --evaluation.tasks 2 --evaluation.validation-tasks 0"
SMALL = {
    "train": f"{RUN} --evaluation.pictures 0",
    "resume": "--pool local",
    "evaluate": "--tasks 2 --pool local",
    "compare": "--pool local",
    "check": "",
    "doctor": "--pool local",
    "teachers": "--epochs 1 --pool local",
    "show": "",
    "list": "",
    "status": "",
    "replay": "",
    "export": "",
}
"""What is appended to a command."""
ELSEWHERE = ("scale",)  # tests/operations/test_scale.py
MACHINES = ("ray", "kubectl", "helm", "docker", "kustomize", "export", "tensorboard", "pip", "git", "python")
"""Programs that need a cluster: looked at, not run here (`ray` is, in test_launcher.py and test_jobs.py)."""

COMPARISON = """extends = "comparison-glyphs"
passes = 1
evaluation.tasks = 2
evaluation.steps = 1
evaluation.robustness.eps = 0.0
task.source = { name = "glyphs", characters = 40, size = 16 }
model.width = 4
meta_batch = 1
shard = 1
"""


def commands(page: str) -> list[str]:
    """Commands of a page's console blocks, continued lines joined."""
    text = "".join(body for language, body in BLOCKS[page] if language == "console").replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("text", TEXTS)
def test_lines_end_at_120_columns_and_links_lead_somewhere(text: str) -> None:
    content = (ROOT / text).read_text()
    assert [line for line in content.splitlines() if len(line) > 120] == []
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", content):
        assert ((ROOT / text).parent / target).exists(), target


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_blocks_of_known_kinds_and_a_command_comes_first(page: str) -> None:
    kinds = [language for language, _ in BLOCKS[page]]
    assert kinds[0] == "console"
    assert set(kinds) <= {"console", "python", "toml", ""}
    tested = sum(page == where for where, _ in PROGRAMS.values())
    assert kinds.count("python") == tested, "a python block without <!-- test: NAME.py -->"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(COMPARISON)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in commands(page):
        words = shlex.split(line.replace("(", " ").replace(")", " "), comments=True)
        program, needs = words[0], "# needs" in line
        if program == "make":
            assert words[1] in targets, line
        elif program != "metafleet":
            assert program in (*MACHINES, "cd"), line
            for word in words:
                if word.startswith("deploy/") or word.endswith(("train.py", "sweep.py")):
                    assert (ROOT / word).exists(), line
        elif (
            needs or words[1] in ELSEWHERE or "://" in line or any("REGISTRY" in w or w.startswith("/") for w in words)
        ):
            assert words[1] in cli.COMMANDS, line
            if words[1] == "train":  # its keys are at least what a run has
                flags.configured("train", [w for w in words[2:] if not w.startswith("--dir")][:1], NoOptions, "")
        else:
            words = ["small.toml" if w == "comparison-glyphs" else w for w in words[1:] if w != "--follow"]
            metafleet(*words, *SMALL[words[0]].split())


def test_every_file_that_a_page_names_exists() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text):
            places = [ROOT, (ROOT / page).parent, ROOT / "cluster" / "training", ROOT / "learners", ROOT / "tests"]
            found = any((place / name).exists() for place in places) or list((ROOT / page).parent.rglob(name))
            assert found, f"{page} names {name}"
