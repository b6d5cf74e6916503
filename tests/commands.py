"""The command as people use it, run in this process."""

from __future__ import annotations

import pytest

from cluster import cli

PATIENCE = 600.0
"""Seconds after which something hangs: far beyond what it takes, so that a busy neighbour breaks nothing."""

SIZE = ["--iterations", "6", "--meta-batch", "8", "--shard", "4"]
HELD_OUT = ["--evaluation.tasks", "10", "--evaluation.validation-tasks", "8"]
TINY = [*SIZE, *HELD_OUT, "--execution", "vmap", "--pool", "local"]


def metafleet(*words: str, expect: int = 0) -> None:
    """Run a command in this process."""
    try:
        cli.main(words)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == expect


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence with which a command fails."""
    metafleet(*words, expect=1)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("error:") :].strip()
