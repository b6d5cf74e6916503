"""What tests share: one thread, wide lines, a finished run, a data folder of their own, and the reasons for which tests
skip.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import TINY, metafleet

SHARED = Path(os.environ.get("METAFLEET_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


# Rays of processes beside each other must not find each other: "auto" is whichever started last in a folder.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")

CLUSTERS = ("test_chaos", "test_jobs", "test_launcher", "test_elastic", "test_sweep", "test_scale", "test_doctor")
"""Files whose hosts, or many processes, there is room for once."""


def scope(nodeid: str) -> str:
    """What runs in one process, in order: a file; but all that makes clusters, and all of Ray's workers."""
    path = nodeid.partition("::")[0]
    name = Path(path).stem
    return "clusters" if name in CLUSTERS else "ray" if name.startswith("test_ray") else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest, and mostly waits, begins, so that the rest goes beside it."""
    order = {"clusters": 0, "ray": 1}
    items.sort(key=lambda item: order.get(scope(item.nodeid), 2))  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Processes of `pytest -n` take one scope after another, in the order of `pytest_collection_modifyitems`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False
    return ByScope(config, log)


def pytest_unconfigure() -> None:
    """Take the Rays' folder away."""
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wrapped lines."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """METAFLEET_DATA for the whole session, so that data sets are decoded once."""
    folder = tmp_path_factory.mktemp("data")
    before = os.environ.get("METAFLEET_DATA")
    os.environ["METAFLEET_DATA"] = str(folder)
    yield folder
    if before is None:
        del os.environ["METAFLEET_DATA"]
    else:
        os.environ["METAFLEET_DATA"] = before


@pytest.fixture
def omniglot_archives() -> Path:
    """Folder of the two real Omniglot zips."""
    folder = SHARED / "omniglot"
    if not folder.exists():
        pytest.skip(f"real Omniglot archives not found in {folder} (METAFLEET_TEST_DATA names another place)")
    return folder


@pytest.fixture
def tiny_imagenet() -> Path:
    """A real data set in MiniImagenet's layout."""
    archive = SHARED / "tiny_imagenet_fewshot.zip"
    if not archive.exists():
        pytest.skip(f"{archive} not found (METAFLEET_TEST_DATA names another place)")
    return archive


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    metafleet("train", "sinusoid", "--dir", str(directory), *TINY)
    return directory
