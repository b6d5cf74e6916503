"""`make convolutions`: is each convolution that torch can run on this processor right, and does it stay within its
memory?

Every mix of dimension, kernel, stride, groups, dilation, channels and memory format runs forward, backward and double
backward in processes of their own under glibc's checking malloc, and is compared with float64; for each instruction set
that the machine has. A case that crashes, hangs or is wrong makes a row of the table; the exit code is 1 where one of
those fails that the product lets through (`learners.modules.convolution.unsafe` says which it does not).

    python -m tests.convolutions                      # everything: some minutes on each instruction set
    python -m tests.convolutions --isa avx2 --short   # a hundred cases, as the suite does
"""

from __future__ import annotations

import argparse
import ctypes.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.modules.convolution import Call, unsafe

# As the environment names them: oneDNN's ceiling, and torch's own kernels'.
INSTRUCTION_SETS = {
    "sse4.1": ("SSE41", "default"),
    "avx": ("AVX", "default"),
    "avx2": ("AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "avx512"),
    "all": ("DEFAULT", ""),
}
FLAGS = {"avx": "avx", "avx2": "avx2", "avx512": "avx512f"}
"""What /proc/cpuinfo calls them."""
LIMIT = 120.0  # seconds for a case; they take milliseconds
BATCH = 64  # cases to a process; those of one that fails run again, each in its own
STAGES = ("forward", "backward", "double backward")


@dataclass(frozen=True)
class Case:
    """One convolution."""

    spatial: int
    transposed: bool
    kernel: int
    stride: int
    dilation: int
    groups: int
    inputs: int
    outputs: int
    size: int
    channels_last: bool

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    def kind(self) -> str:
        """What rows of the table are told apart by."""
        layout = "channels-last" if self.channels_last else "contiguous"
        groups = "one group" if self.groups == 1 else "groups"
        name = f"{'transposed ' if self.transposed else ''}{self.spatial}d"
        return f"{name}, kernel {self.kernel}, stride {self.stride}, dilation {self.dilation}, {layout}, {groups}"

    def call(self) -> Call:
        """What the product would be asked about it."""
        over = (self.outputs if self.transposed else self.inputs) // self.groups
        return Call(self.transposed, (self.kernel,) * self.spatial, (self.stride,) * self.spatial, self.groups, over)


def cases(*, short: bool) -> Iterator[Case]:
    """All mixes that torch accepts; the short list holds every kind, with few channels."""
    channels = (1, 2, 3, 4, 7, 8, 15, 16) if short else range(1, 25)
    dimensions = ((2, False),) if short else ((2, False), (2, True), (1, False), (3, False))
    kernels, strides = ((1, 3), (1, 2)) if short else ((1, 3, 5), (1, 2, 3))
    for (spatial, transposed), kernel, stride, inputs, last in itertools.product(
        dimensions, kernels, strides, channels, (False, True)
    ):
        for dilation, size in itertools.product((1, 2) if kernel > 1 else (1,), (12 if spatial < 3 else 6, 3)):
            if not transposed and dilation * (kernel - 1) >= size:
                continue  # larger than the image
            shapes = {(1, inputs, 8), (1, inputs, inputs), (inputs, inputs, inputs)}
            shapes |= set() if short else {(g, inputs, 2 * g) for g in (2, 4) if inputs % g == 0}
            for groups, _, outputs in sorted(shapes):
                yield Case(spatial, transposed, kernel, stride, dilation, groups, inputs, outputs, size, last)


def convolve(case: Case, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The convolution of a case."""
    how = {"stride": case.stride, "dilation": case.dilation, "groups": case.groups}
    if case.transposed:
        return F.conv_transpose2d(x, w, b, **how)
    return {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[case.spatial](x, w, b, **how)  # type: ignore[operator]


def results(
    case: Case, x: Tensor, w: Tensor, b: Tensor, gy: Tensor | None
) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """(stage, tensors, gy) for each stage."""
    y = convolve(case, x, w, b)
    if gy is None:
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gy = gy.to(y.dtype).requires_grad_()
    yield "forward", [y], gy
    first = torch.autograd.grad((y * gy).sum(), [x, w, b], create_graph=True)
    yield "backward", list(first), gy
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w, gy])
    yield "double backward", list(second), gy


def attempt(case: Case) -> str:
    """ "" where the case is right; else the stage at which it is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, case.inputs, *(case.size,) * case.spatial), generator=generator)
    shape = (
        (case.inputs, case.outputs // case.groups) if case.transposed else (case.outputs, case.inputs // case.groups)
    )
    w = torch.randn((*shape, *(case.kernel,) * case.spatial), generator=generator)
    b = torch.randn(case.outputs, generator=generator)
    exact = [v.double().requires_grad_() for v in (x, w, b)]
    if case.channels_last:  # of one dimension torch has no such format, but sequences [n, length, channels] come so
        x, w = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, w))
    wanted, gy = {}, None
    for stage, tensors, gy in results(case, *exact, None):  # noqa: B007
        wanted[stage] = tensors
    for _ in range(3):  # what is written out of bounds may hit nothing the first time
        mine = [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in (x, w, b)]
        for stage, tensors, _ in results(case, *mine, gy.detach()):
            for got, want in zip(tensors, wanted[stage], strict=True):
                if not torch.allclose(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-4):
                    return f"{stage} is wrong"
    return ""


def forked(batch: list[Case]) -> str:
    """What became of a process that tried a batch: "" or what failed in it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc's last words
        failed = [f for f in map(attempt, batch) if f]
        os.write(writer, (failed[0] if failed else "").encode())
        os._exit(bool(failed))
    os.close(writer)
    until = time.monotonic() + LIMIT + 0.1 * len(batch)
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.001)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
        said = "hangs"
    else:
        code = os.waitstatus_to_exitcode(ended[1])
        said = f"dies of signal {-code}" if code < 0 else os.read(reader, 200).decode()
    os.close(reader)
    return said


def sweep(*, short: bool) -> int:
    """Try all cases in this process's children; prints what failed; how many of those the product lets through."""
    torch.set_num_threads(1)
    failures: list[tuple[Case, str]] = []
    waiting = list(cases(short=short))
    count = len(waiting)
    for start in range(0, count, BATCH):
        batch = waiting[start : start + BATCH]
        if forked(batch):
            failures += [(case, said) for case in batch if (said := forked([case]))]
    through = [(case, said) for case, said in failures if not unsafe(case.call())]
    kinds: dict[str, list[Case]] = {}
    for case, said in failures:
        fate = "refused or swapped" if unsafe(case.call()) else "LET THROUGH"
        kinds.setdefault(f"{case.kind()}: {said}; {fate}", []).append(case)
    for kind, members in sorted(kinds.items()):
        inputs = sorted({c.inputs // c.groups for c in members})
        print(f"  {len(members):4} × {kind} ({inputs[0]}–{inputs[-1]} inputs per group)")
    print(f"  {count} cases, {len(failures)} fail, {len(through)} of them let through", flush=True)
    return len(through)


def available() -> list[str]:
    """Instruction sets that this machine has."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return [name for name in INSTRUCTION_SETS if name not in FLAGS or FLAGS[name] in flags]


def environment(name: str) -> dict[str, str]:
    """Variables that hold a process to an instruction set, under the checking malloc."""
    onednn, aten = INSTRUCTION_SETS[name]
    checking = ctypes.util.find_library("c_malloc_debug") or "libc_malloc_debug.so.0"
    variables = {"ONEDNN_MAX_CPU_ISA": onednn, "GLIBC_TUNABLES": "glibc.malloc.check=3", "LD_PRELOAD": checking}
    return variables | ({"ATEN_CPU_CAPABILITY": aten} if aten else {})


def held_to(name: str, words: list[str]) -> int:
    """Run this program under an instruction set; its exit code."""
    command = [sys.executable, "-m", "tests.convolutions", "--here", *words]
    return subprocess.run(
        command, env=os.environ | environment(name), cwd=Path(__file__).parents[1], check=False
    ).returncode


def main() -> None:
    """The table, by instruction set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="*", choices=list(INSTRUCTION_SETS), default=available())
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    words = ["--short"] if options.short else []
    if options.here:
        sys.exit(bool(sweep(short=options.short)))
    failed = False
    for name in options.isa:
        print(f"{name}:", flush=True)
        failed |= held_to(name, words) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
