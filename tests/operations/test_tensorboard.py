"""TensorBoard in a real browser, on a finished run: scalars, histograms, images and hparams are there to see.

Screenshots are kept where $METAFLEET_SCREENSHOTS points.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.commands import PATIENCE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that runs write."""
    home = tmp_path_factory.mktemp("board")
    main(["train", "sinusoid", "--pool", "local", "--learner.name", "meta_sgd", "--iterations", "40",
          "--evaluation.every", "10", "--evaluation.validation-tasks", "8", "--evaluation.tasks", "8", "--dir",
          str(home / "sinusoid")])  # fmt: skip
    return home


@pytest.fixture(scope="module")
def board(run: Path) -> Iterator[str]:
    """The address of a TensorBoard that reads it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            if "sinusoid" in urllib.request.urlopen(f"{url}/data/runs", timeout=5).read().decode():
                break
        except (urllib.error.URLError, OSError):
            pass
        assert time.monotonic() < give_up, "TensorBoard does not answer"
        time.sleep(0.3)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a screen."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic",
                 "window-size=1500,1300", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield window
    window.quit()


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The condition's value once it is true."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    return found


# TensorBoard's pages are made of nested shadow trees, which `innerText` of the body does not see into.
TEXT = """
const out = [];
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) {
    if (child.nodeType === 3 && child.textContent.trim()) out.push(child.textContent.trim());
    else if (child.nodeType === 1 && !['SCRIPT', 'STYLE'].includes(child.tagName)) walk(child);
  }
};
walk(document.body);
return out.join('\\n');
"""
COUNT = """
let count = 0;
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children || []) {
    if (child.matches(arguments[0]) && child.getBoundingClientRect().width > 20) count += 1;
    walk(child);
  }
};
walk(document.body);
return count;
"""


@pytest.mark.parametrize(("page", "words", "drawn"), [
    ("?tagFilter=query_loss|mse_step1|tasks_per_s#timeseries",
    ("train/query_loss", "validation/mse_step1", "perf/tasks_per_s"), "canvas"),
    ("#histograms", ("rate/head.bias",), "svg"), ("#images", ("test/adaptation",), "img"),
    ("#hparams", ("iterations", "learner.name", "final/mse_0"), "vaadin-grid"),
])  # fmt: skip
def test_tensorboard_shows_a_finished_run(
    page: str, words: tuple[str, ...], drawn: str, board: str, browser: Any, tmp_path: Path
) -> None:
    browser.get("about:blank")  # else only the part after # would change, and nothing be loaded anew
    browser.get(f"{board}/{page}")

    def text() -> str:
        return "".join(browser.execute_script(TEXT).split())

    for word in words:
        until(lambda word=word: word in text(), f"{word!r} on the page {page}")
    until(lambda: browser.execute_script(COUNT, drawn), f"something drawn on the page {page}")
    time.sleep(1.0)  # charts fade in
    kept = Path(os.environ.get("METAFLEET_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(kept / f"tensorboard-{page.rpartition('#')[2]}.png"))
