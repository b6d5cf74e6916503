"""What one sees of a run: TensorBoard, metrics.jsonl, status.json and a progress bar. The driver is the only writer."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.record.storage import write_atomically
from cluster.results import prometheus
from cluster.results.history import METRICS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger("metafleet")

STATUS_EVERY = 2.0  # seconds
PLAIN_EVERY = 10.0  # seconds between log lines where there is no terminal
RECENT = 50  # iterations that the time left is reckoned from
KNOWN = 4  # of them done before a time left is shown; the first only begins the count


class Monitor:
    """metrics.jsonl has a line of every iteration; TensorBoard's scalars are averaged over windows of `every`
    iterations, by default a thousand windows a run.
    """

    def __init__(self, directory: Path, start: int, iterations: int, every: int = 0, console: Console | None = None,
                 prometheus_port: int = 0, counters: Collection[str] = ()) -> None:  # fmt: skip
        """`start`: the iteration this process begins from; later points of an earlier attempt are taken back.
        `counters`: scalars under `fleet/` that only ever grow, as Prometheus wants to know."""
        from torch.utils.tensorboard import SummaryWriter

        self.directory, self.iterations = directory, iterations
        self.every = every or max(1, iterations // 1000)
        _truncate(directory / METRICS, start)
        # Held for the life of the run.
        self._jsonl = open(directory / METRICS, "ab", buffering=0)  # noqa: SIM115
        # purge_step (the first step to take back) from the very first writer on: TensorBoard ignores it where the first
        # one had none.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._events_failed = False
        self._window: dict[str, list[float]] = {}
        self._samples: dict[str, list[float]] = {}
        self._now: dict[str, float] = {}
        self._stop_serving = prometheus.serve(prometheus_port, self._now, counters) if prometheus_port else None
        self._status_at = self._plain_at = 0.0
        self._times: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._validation: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best: Mapping[str, float] = {}
        self.console = console or Console(stderr=True)
        self._bar = _progress(self.console) if self.console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("meta-training", total=iterations, completed=start, note="", eta="")
            self._bar.start()

    def scalars(
        self, iteration: int, values: Mapping[str, float], samples: Mapping[str, list[float]] | None = None
    ) -> None:
        """Scalars of one iteration, and numbers that a window shows as a histogram."""
        self._times.append((iteration, time.monotonic()))
        self._line(iteration, "train", values, samples or {})
        for gone in [tag for tag in self._now if tag.startswith("share/")]:
            del self._now[gone]
        self._now.update(values)
        for tag, value in values.items():
            self._window.setdefault(tag, []).append(value)
        for tag, several in (samples or {}).items():
            self._samples.setdefault(tag, []).extend(several)
        if iteration % self.every == 0 or iteration == self.iterations:
            self._show(iteration)
        self._progress(iteration, values)

    def _show(self, iteration: int) -> None:
        """The open window in TensorBoard."""
        # Counters are not averaged: their last value is the one that is true.
        means = {tag: v[-1] if tag.startswith("fleet/") else float(np.mean(v)) for tag, v in self._window.items()}
        self.last |= means
        self._scalars(iteration, means)
        with self._events():
            for tag, several in self._samples.items():
                self._writer.add_histogram(tag, np.asarray(several), iteration)
        self._window.clear()
        self._samples.clear()

    def curve(self, iteration: int, split: str, curve: Mapping[str, NDArray[np.float64]]) -> None:
        """An adaptation curve: one value per inner step for each measure; steps 0, 1 and the last go to TensorBoard."""
        flat = {
            f"{split}/{name}_step{k}": float(values[k])
            for name, values in curve.items()
            for k in sorted({0, 1, len(values) - 1})
            if k < len(values)
        }
        self.last |= flat
        self._now.update(flat)
        if split == "validation":
            name, values = next(iter(curve.items()))
            self._validation = {name: float(values[-1])}
        self._scalars(iteration, flat)
        self._line(iteration, split, flat, {"curve": {k: [float(v) for v in values] for k, values in curve.items()}})

    def values(self, iteration: int, kind: str, values: Mapping[str, float]) -> None:
        """Scalars that come once, not every iteration."""
        self.last |= values
        self._scalars(iteration, values)
        self._line(iteration, kind, values)

    def distributions(self, iteration: int, tag: str, tensors: Mapping[str, Tensor]) -> None:
        """A histogram per name."""
        with self._events():
            for name, tensor in tensors.items():
                self._writer.add_histogram(f"{tag}/{name}", tensor.detach().cpu().numpy(), iteration)

    def picture(self, iteration: int, tag: str, path: Path) -> None:
        """A PNG or GIF file, shown in TensorBoard as it is."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        with Image.open(path) as image, self._events():
            width, height = image.size
            encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            summary = Summary(value=[Summary.Value(tag=tag, image=encoded)])
            self._writer._get_file_writer().add_summary(summary, iteration)  # type: ignore[no-untyped-call]

    def images(self, iteration: int, tag: str, images: Tensor) -> None:
        """Images [n, c, h, w] side by side, each stretched to its own range."""
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        pixels = ((images - low) / (high - low).clamp_min(1e-12)).cpu()
        with self._events():
            self._writer.add_images(tag, pixels, iteration)

    def hparams(self, config: Mapping[str, object], results: Mapping[str, float]) -> None:
        """The configuration beside the final results, for TensorBoard's HPARAMS page."""
        simple = {k: v if isinstance(v, int | float | bool | str) else str(v) for k, v in config.items()}
        with self._events():
            self._writer.add_hparams(simple, {f"final/{k}": v for k, v in results.items()}, run_name=".")

    def event(self, iteration: int, text: str) -> None:
        """Something that happened to the fleet."""
        with self._events():
            self._writer.add_text("fleet", text, iteration)
        self._line(iteration, "fleet", {"event": text})

    def message(self, text: str) -> None:
        """A line for whoever watches."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def status(self, state: str, iteration: int, *, now: bool = False, **fields: Any) -> None:
        """Rewrite status.json, at most every two seconds unless `now`. A failure is no reason to stop."""
        if not now and time.monotonic() - self._status_at < STATUS_EVERY:
            return
        self._status_at = time.monotonic()
        content = {
            "state": state, "iteration": iteration, "iterations": self.iterations, "host": socket.gethostname(),
            "pid": os.getpid(), "updated": time.time(), "eta_s": self._eta(iteration), "validation": self._validation,
            "metrics": self.last, **fields,
        }  # fmt: skip
        try:
            write_atomically(self.directory / "status.json", json.dumps(content, indent=1).encode())
        except OSError as error:
            log.warning("cannot write status.json (%s)", error)

    def end_progress(self) -> None:
        """Take the bar away: what follows are results."""
        if self._bar:
            self._bar.stop()

    def close(self) -> None:
        self.end_progress()
        if self._window:
            self._show(self._times[-1][0])
        if self._stop_serving:
            self._stop_serving()
        self._jsonl.close()
        with self._events():
            self._writer.close()

    def _scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        with self._events():
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, iteration)

    def _line(self, iteration: int, kind: str, *contents: Mapping[str, object]) -> None:
        line: dict[str, object] = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3)}
        for content in contents:
            line |= content
        try:
            self._jsonl.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            log.warning("cannot write %s (%s)", self._jsonl.name, error.strerror)

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Writing events inside; a disk that takes no more is a warning, once."""
        try:
            yield
        except OSError as error:
            if not self._events_failed:
                log.warning("TensorBoard's events end here (%s)", error.strerror)
            self._events_failed = True

    def _progress(self, iteration: int, values: Mapping[str, float]) -> None:
        train = [t for t in values if t.startswith("train/")]
        names = [t for t in train if "return" in t] or [t for t in train if t.endswith(("loss", "accuracy"))]
        shown = {t: self.last.get(t, values[t]) for t in names}
        notes = [f"{t.removeprefix('train/')} {v:.4g}" for t, v in shown.items()]
        notes += [f"validation {name} {v:.4g}{self._best_so_far()}" for name, v in self._validation.items()]
        note, left = "  ".join(notes), self._eta(iteration)
        eta = "" if math.isnan(left) else f"ETA {datetime.timedelta(seconds=round(left))}"
        if self._bar:
            self._bar.update(self._task, completed=iteration, note=note, eta=eta)
        elif time.monotonic() - self._plain_at > PLAIN_EVERY or iteration == self.iterations:
            self._plain_at = time.monotonic()
            self.message("  ".join(filter(None, (f"iteration {iteration}/{self.iterations}", note, eta))))

    def _best_so_far(self) -> str:
        return f" (best {self.best['score']:.4g})" if self.best else ""

    def _eta(self, iteration: int) -> float:
        """Seconds left at the pace of the last iterations; nan until it is known: the first one waits for workers and
        compilers.
        """
        if iteration >= self.iterations:
            return 0.0
        if len(self._times) < KNOWN:
            return math.nan
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (ended - began) / (last - first) * (self.iterations - iteration)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"), TextColumn("{task.fields[note]}"), console=console, refresh_per_second=4,
        transient=True,
    )  # fmt: skip


def _truncate(path: Path, start: int) -> None:
    """Take back lines of iterations after `start`, and lines cut off by a crash or a full disk."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    write_atomically(path, "".join(f"{line}\n" for line in lines if _iteration(line) <= start).encode())


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def plain_logging() -> None:
    """Log lines of this program to stderr, as sentences; also what goes wrong in TensorBoard's writing thread."""
    threading.excepthook = lambda failed: log.warning(
        "%s: %s", failed.thread.name if failed.thread else "a thread", failed.exc_value
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
