"""Gradient checkpointing of inner steps: peak memory and time of a second-order meta-gradient, with and without.

MiniImagenet's Conv4 on images of 84 × 84 (5-way 5-shot, 25 support and 75 query images of noise), for 1 to 10 inner
steps, each measurement in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from learners.algorithms.maml import MAML
from learners.base import pack
from learners.engine.execution import Execution
from learners.models.networks import Conv4
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.bench.timing import machine


def measured(steps: int, checkpointing: bool) -> dict[str, float]:
    """Peak MiB beyond what stands before, and seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = functional(Conv4(width=32, halving="pool", features="flat").build((3, 84, 84), 5))
    verb = common_verbs(MAML(0.01, steps), Supervised(model, "cross_entropy"), 1)["gradient"]
    data = {
        f"{part}_{kind}": torch.randn(1, n, 3, 84, 84) if kind == "x" else (torch.arange(n) % 5)[None]
        for part, n in (("support", 25), ("query", 75))
        for kind in "xy"
    }
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    total = Execution("loop", 0, checkpointing).run(verb.run, pack(model.params(), {}), {}, data).total
    seconds = time.perf_counter() - began
    norm = float(sum(v.double().square().sum() for v in total.values()))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MiB": (after - before) / 1024, "s": seconds, "norm": norm}


def main() -> None:
    """A table; with --one STEPS CHECKPOINTING, one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int)
    one = parser.parse_args().one
    if one:
        print(json.dumps(measured(one[0], bool(one[1]))))
        return
    print(machine())
    print("steps   kept MiB      s   again MiB      s   memory   time")
    for steps in (1, 2, 5, 10):
        kept, again = (
            json.loads(subprocess.check_output([sys.executable, __file__, "--one", str(steps), str(how)], text=True))
            for how in (0, 1)
        )
        assert kept["norm"] == again["norm"]
        print(
            f"{steps:5d} {kept['MiB']:10.0f} {kept['s']:6.2f} {again['MiB']:11.0f} {again['s']:6.2f} "
            f"{again['MiB'] / kept['MiB']:8.2f} {again['s'] / kept['s']:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
