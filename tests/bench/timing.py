"""Side-by-side timing: candidates in turn, medians, one core, one thread."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import torch

from cluster.training.driver import Driver
from learners.engine.memory import keep_freed_memory


def quiet() -> None:
    """One thread, and memory as workers have it."""
    torch.set_num_threads(1)
    keep_freed_memory()


def machine() -> str:
    """What the numbers were measured on."""
    with open("/proc/cpuinfo") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{names[0] if names else platform.processor()}, {len(names)} CPUs, torch {torch.__version__}, commit {commit}"
    )


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Seconds per call of each candidate, taken in turn so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def iteration_seconds(driver: Driver, leave_out: int) -> float:
    """Median seconds of a driver's iterations, the first few left out; runs it to its end."""
    times: list[float] = []
    real = driver.iterate

    def timed() -> None:
        begin = time.perf_counter()
        real()
        times.append(time.perf_counter() - begin)

    driver.iterate = timed  # type: ignore[method-assign]
    driver.run()
    return statistics.median(times[leave_out:])


def ratios(title: str, seconds: Mapping[str, float], base: str, wanted: Mapping[str, float] | None = None) -> bool:
    """Print a table of times and ratios to `base`; whether every wanted ratio was reached."""
    print(f"\n{title}")
    fine = True
    for name, t in seconds.items():
        bar = (wanted or {}).get(name)
        reached = bar is None or seconds[base] / t >= bar
        fine = fine and reached
        note = "" if bar is None else f"   (wanted {bar:g}: {'reached' if reached else 'MISSED'})"
        print(f"  {name:42s} {t * 1e3:9.2f} ms   x {seconds[base] / t:6.2f}{note}")
    return fine
