"""What tests share: one thread, wide lines, a finished run, a data folder of their own, and the reasons for which tests
skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import TINY, metafleet

SHARED = Path(os.environ.get("METAFLEET_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, and all that starts a Ray in the same one, first: two Rays at a time on two
    cores are too many. (`pytest -n 2 --dist loadgroup`; without xdist the groups mean nothing.)
    """
    for item in items:
        name = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)  # stable: the longest group begins


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
