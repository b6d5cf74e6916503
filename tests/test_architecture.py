"""Imports run one way, between storeys and between the folders of each; Ray in two files; no driver or worker knows an
algorithm.
"""

from __future__ import annotations

import ast
import re
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
        if "envs" in path.relative_to(ROOT).parts:
            assert not tops(imported(tree)) & {"torch", "ray", "learners", "cluster"}, path


def test_learners_import_of_envs_only_the_interface_and_never_ray() -> None:
    for path, tree in FILES.items():
        if "learners" in path.relative_to(ROOT).parts:
            names = imported(tree)
            assert not tops(names) & {"ray", "cluster"}, path
            foreign = {n for n in names if n.startswith("envs.") and n.split(".")[1] != "base"}
            assert not foreign, path


FLOORS: dict[str, dict[str, tuple[str, ...]]] = {
    "cluster": {
        "fleet": (), "record": ("fleet",), "results": ("fleet", "record"), "training": ("fleet", "record", "results"),
        "setup": ("fleet", "record", "results", "training"),
        "operations": ("fleet", "record", "results", "training", "setup"),
        "commands": ("fleet", "record", "results", "training", "setup", "operations"),
        "cli": ("commands",), "train": ("cli",),
    },
    "learners": {
        "base": (), "importing": (), "engine": ("base",), "inner": ("base", "engine"), "modules": ("base", "engine"),
        "models": ("importing", "modules"), "objectives": ("base", "engine", "inner", "modules"),
        "algorithms": ("base", "engine", "inner", "modules", "models", "objectives"),
        "outer": ("base", "engine", "inner", "objectives"),
        "verbs": ("base", "objectives"),
        "purer": ("base", "engine", "inner", "modules", "models", "objectives", "algorithms", "outer"),
    },
    "envs": {
        "base": (), "store": (), "sinusoid": ("base",), "sources": ("base", "store"),
        "images": ("base", "store", "sources"), "control": ("base",),
        "registration": ("base", "control"),
    },
}  # fmt: skip
"""For each storey its folders (and the files at its root), and which others each may import: DESIGN's table."""


@pytest.mark.parametrize("storey", list(FLOORS))
def test_folders_import_only_what_is_below_them(storey: str) -> None:
    for path, tree in FILES.items():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == storey and parts[1] != "__init__":
            ours = {n.split(".")[1] for n in imported(tree) if n.startswith(f"{storey}.")} & FLOORS[storey].keys()
            assert ours <= {parts[1], *FLOORS[storey][parts[1]]}, f"{'/'.join(parts)} imports {ours}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): imported(tree) for p, tree in FILES.items()}
    arrows = {name: sorted(names & modules.keys()) for name, names in modules.items()}
    longest: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        assert name not in above, " → ".join((*above, name))
        if name not in longest:
            longest[name] = 1 + max((depth(n, (*above, name)) for n in arrows[name]), default=0)
        return longest[name]

    for name in arrows:
        depth(name, ())


def test_within_a_folder_ten_floors_at_most() -> None:
    folders = {str(p.parent.relative_to(ROOT)) for p in FILES}
    for folder in folders:
        inside = {p.stem: imported(t) for p, t in FILES.items() if str(p.parent.relative_to(ROOT)) == folder}
        prefix = folder.replace("/", ".")
        arrows = {n: [m for m in inside if m != n and f"{prefix}.{m}" in names] for n, names in inside.items()}

        def floor(name: str, arrows: dict[str, list[str]] = arrows) -> int:
            return 1 + max(map(floor, arrows[name]), default=0)

        assert max(map(floor, arrows), default=0) <= 10, folder


def test_ray_is_imported_in_exactly_two_files() -> None:
    users = {path.name for path, tree in FILES.items() if "ray" in tops(imported(tree))}
    assert users == {"ray_pool.py", "ray_fleet.py"}


def test_modules_of_ours_that_a_text_names_exist() -> None:
    """In docstrings, commands and entry points: a file that moves takes those along."""
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in re.findall(r"\b(?:cluster|learners|envs)(?:\.[a-z_]+)+", node.value):
                    file, _, attribute = str(ROOT / name.replace(".", "/")).rpartition("/")
                    known = Path(f"{file}/{attribute}.py").exists() or Path(f"{file}/{attribute}").is_dir()
                    inside = Path(f"{file}.py").exists() and attribute in Path(f"{file}.py").read_text()
                    assert known or inside, f"{path.relative_to(ROOT)} names {name}"


def test_lines_of_code_end_at_120_columns() -> None:
    """Ruff spares lines that end in a pragma; this does not."""
    for path in [p for part in ("cluster", "learners", "envs", "tests", "deploy") for p in (ROOT / part).rglob("*.py")]:
        assert [line for line in path.read_text().splitlines() if len(line) > 120] == [], path


def test_no_pickle_and_no_unsafe_load() -> None:
    for path, tree in FILES.items():
        assert not tops(imported(tree)) & {"pickle", "cloudpickle", "marshal", "shelve", "joblib"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "torch.load"):
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("allow_pickle") == "False" or safe.get("weights_only") == "True", path


def test_training_and_fleet_name_no_learner_task_or_policy_of_the_catalog() -> None:
    from cluster.setup.catalog import LEARNERS, OUTERS, POLICIES, SOURCES, TASKS

    tables = (TASKS, SOURCES, LEARNERS, OUTERS)
    names = {n for table in tables for n in table} | {c.__name__ for table in tables for c in table.values()}
    own = {*POLICIES, *(c.__name__ for c in POLICIES.values())}  # a policy's file is its own
    for path, tree in FILES.items():
        if path.parent.name in ("training", "fleet"):
            words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            words |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            wanted = names if path.stem in POLICIES else names | own
            assert not words & wanted, f"{path.relative_to(ROOT)}: {words & wanted}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("envs.sinusoid", ("torch", "ray", "matplotlib")),
        ("envs.sources.omniglot", ("torch", "ray")),
        ("learners.algorithms.maml", ("ray", "tensorboard")),
        ("cluster.training.driver", ("ray", "tensorboard")),
        ("cluster.cli", ("torch", "ray")),
        ("cluster.setup.catalog", ("torch", "ray", "numpy")),
    ],
)
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
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare
