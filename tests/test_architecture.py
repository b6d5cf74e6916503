"""Imports run one way: cluster → learners → envs; Ray in two files; no driver or worker knows an algorithm."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {p: ast.parse(p.read_text()) for part in ("cluster", "learners", "envs") for p in (ROOT / part).rglob("*.py")}


def imported(tree: ast.Module) -> set[str]:
    """Modules a file imports anywhere, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
    return names


def tops(names: set[str]) -> set[str]:
    return {n.partition(".")[0] for n in names}


def test_envs_import_neither_torch_nor_ray_nor_us() -> None:
    for path, tree in FILES.items():
        if path.parent.name == "envs":
            assert not tops(imported(tree)) & {"torch", "ray", "learners", "cluster"}, path


def test_learners_import_of_envs_only_the_interface_and_never_ray() -> None:
    for path, tree in FILES.items():
        if "learners" in path.relative_to(ROOT).parts:
            names = imported(tree)
            assert not tops(names) & {"ray", "cluster"}, path
            foreign = {n for n in names if n.startswith("envs.") and n.split(".")[1] != "base"}
            assert not foreign, path


def test_ray_is_imported_in_exactly_two_files() -> None:
    users = {path.name for path, tree in FILES.items() if "ray" in tops(imported(tree))}
    assert users == {"ray_pool.py", "ray_fleet.py"}


def test_no_pickle_and_no_unsafe_load() -> None:
    for path, tree in FILES.items():
        assert not tops(imported(tree)) & {"pickle", "cloudpickle", "marshal", "shelve", "joblib"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "torch.load"):
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("allow_pickle") == "False" or safe.get("weights_only") == "True", path


def test_driver_and_worker_name_no_learner_task_or_policy_of_the_catalog() -> None:
    from cluster.catalog import LEARNERS, POLICIES, SOURCES, TASKS

    tables = (TASKS, SOURCES, LEARNERS, POLICIES)
    names = {n for table in tables for n in table} | {c.__name__ for table in tables for c in table.values()}
    for file in ("driver.py", "worker.py", "dispatch.py"):
        words = {n.id for n in ast.walk(FILES[ROOT / "cluster" / file]) if isinstance(n, ast.Name)}
        words |= {n.value for n in ast.walk(FILES[ROOT / "cluster" / file]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not words & names, file


@pytest.mark.parametrize(
    ("module", "absent"),
    [("envs.sinusoid", ("torch", "ray", "matplotlib")), ("envs.omniglot", ("torch", "ray")), ("learners.maml", ("ray", "tensorboard")),
     ("cluster.driver", ("ray", "tensorboard")), ("cluster.cli", ("torch", "ray"))],
)  # fmt: skip
def test_a_fresh_interpreter_loads_no_more_than_it_should(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_package_files_are_empty_and_top_level_folders_are_the_agreed_ones() -> None:
    for part in ("cluster", "learners", "envs"):
        assert (ROOT / part / "__init__.py").read_text() == ""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    folders = {name.partition("/")[0] for name in tracked if "/" in name}
    assert folders <= {"cluster", "learners", "envs", "tests", "deploy", ".ci"}


def test_public_functions_and_classes_say_what_they_are() -> None:
    bare = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in FILES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare
