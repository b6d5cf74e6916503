"""`make gpu`: the whole suite and every benchmark on a machine with CUDA; its section of RESULTS.md is written anew.

Where there is no GPU it says so and ends with 2. The tests that only a GPU can run (`tests/test_devices.py`: every verb
of every learner there against the CPU, and the same bits twice) skip elsewhere.

    python -m tests.gpu                 # an hour, most of it the benchmarks
    python -m tests.gpu --only suite    # or: devices, benchmarks
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

import torch

HOME = Path(__file__).resolve().parents[1]
RESULTS = HOME / "RESULTS.md"
HEADING = "## On a GPU"
LINES = 40  # of a benchmark's output, from its end


def output(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command of this Python, shown as it comes."""
    with subprocess.Popen(
        [sys.executable, *words], cwd=HOME, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    return process.returncode, "".join(lines)


def section(title: str, words: list[str]) -> tuple[bool, str]:
    """A part of the report, and whether the command ended well."""
    code, text = output(words)
    tail = "\n".join(text.splitlines()[-LINES:])
    command = " ".join(["python", *words])
    return not code, f"### {title}\n\n`{command}` ended with {code}.\n\n```text\n{tail}\n```\n"


def machine() -> str:
    """Which GPU, torch, commit and day."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, text=True, capture_output=True).stdout
    card, day = torch.cuda.get_device_name(), datetime.date.today()
    return f"{card}, CUDA {torch.version.cuda}, torch {torch.__version__}, commit {commit.strip() or 'unknown'}, {day}."


def written(report: str) -> None:
    """Put a report in place of the section of RESULTS.md, or at its end."""
    text = RESULTS.read_text()
    old = re.search(rf"^{HEADING}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    RESULTS.write_text(text[: old.start()] + report + text[old.end() :] if old else f"{text.rstrip()}\n\n{report}")


def main() -> int:
    """Run what is asked for; 1 where any of it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("suite", "devices", "benchmarks"), action="append")
    wanted = parser.parse_args().only or ["suite", "devices", "benchmarks"]
    if not torch.cuda.is_available():
        print(
            "make gpu wants a machine with CUDA, and a torch that is built for it: torch.cuda.is_available() is False"
        )
        return 2
    parts = []
    if "suite" in wanted:
        parts.append(section("The suite", ["-m", "pytest", "-q", "-n", "3", "-m", "not slow"]))
    if "devices" in wanted:
        parts.append(section("Every verb there and here", ["-m", "pytest", "-q", "tests/test_devices.py"]))
    if "benchmarks" in wanted:
        files = sorted((HOME / "tests" / "bench").glob("bench_*.py"))
        parts += [section(f.stem, [str(f.relative_to(HOME))]) for f in files]
    written("\n".join([f"{HEADING}\n\n{machine()}\n", *(text for _, text in parts)]))
    return int(not all(well for well, _ in parts))


if __name__ == "__main__":
    sys.exit(main())
