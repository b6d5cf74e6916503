"""This machine: threads and determinism, what must be equal for equal bits, whereabouts, data files."""

from __future__ import annotations

import os
import platform
import socket
from typing import Literal, TypeAlias

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from envs import store
from envs.base import HasFiles, TaskDistribution
from learners.engine.memory import keep_freed_memory

Determinism: TypeAlias = Literal["on", "warn", "off"]
"""Of operations whose bits differ from call to call on a GPU: refused, warned of, or taken."""


def set_up_torch(threads: int, device: str, deterministic: Determinism = "on") -> None:
    """Threads (torch's and numpy's), memory and determinism, the same in the driver and in every worker."""
    torch.set_num_threads(threads)
    # Ray's workers have few by themselves; processes beside each other would slow each other down
    threadpool_limits(threads, "blas")
    keep_freed_memory()
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this torch sees no CUDA device; device='cpu' works everywhere")
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may pick another algorithm each time
        torch.use_deterministic_algorithms(deterministic != "off", warn_only=deterministic == "warn")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = deterministic == "off"


def environment() -> dict[str, str]:
    """What must be equal on all machines for equal bits: versions and processor features."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def whereabouts() -> str:
    """Host and process, for people who look for a worker."""
    return f"{socket.gethostname()}:{os.getpid()}"


def data_files(tasks: TaskDistribution) -> dict[str, str]:
    """The tasks' data files, with what tells one version from another; "" for one that this node lacks."""
    return {f: store.fingerprint(f) for f in (tasks.files() if isinstance(tasks, HasFiles) else ())}
