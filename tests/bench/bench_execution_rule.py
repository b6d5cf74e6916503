"""`execution = auto` against measurement: for 100 and 100 000 shards, does the rule pick the mode of least total
time?
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # compile times are cold ones

import torch

from learners.algorithms.maml import MAML
from learners.base import pack
from learners.engine import execution
from learners.engine.execution import Execution, choose
from learners.models.networks import MLP, Conv4
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.bench.timing import machine, medians, quiet

SLACK = 1.15  # a choice within 15 % of the best is as good as the best on a machine that is never quiet


def main() -> None:
    quiet()
    print(machine())
    fine = [sinusoid(tasks, steps) for tasks, steps in ((25, 1), (50, 1), (25, 5))] + [images()]
    print(
        "the rule without a C++ compiler:",
        choose(activation_bytes=1600, device="cpu", inner_steps=1, tasks_per_call=25, calls=10**6, compiler=False)[1],
    )
    sys.exit(not all(fine))


def sinusoid(tasks: int, steps: int) -> bool:
    model = functional(MLP().build((1,), 1))
    data = {k: torch.randn(tasks, 10, 1) for k in ("support_x", "support_y", "query_x", "query_y")}
    return judge(f"sinusoid, {tasks} tasks a shard, {steps} steps", model, "mse", MAML(0.01, steps), data, tasks)


def images() -> bool:
    model = functional(Conv4().build((1, 28, 28), 5))
    y = torch.arange(5).repeat(4, 1)
    data = {
        "support_x": torch.rand(4, 5, 1, 28, 28),
        "support_y": y,
        "query_x": torch.rand(4, 5, 1, 28, 28),
        "query_y": y,
    }
    return judge(
        "Omniglot Conv4, 4 tasks a shard", model, "cross_entropy", MAML(0.4, 1), data, 4, modes=("loop", "vmap")
    )


def judge(title: str, model, loss: str, learner: MAML, data, tasks: int, modes=("loop", "vmap", "compiled")) -> bool:
    run, at = common_verbs(learner, Supervised(model, loss), 1)["gradient"].run, pack(model.params(), {})
    executions = {name: Execution(name) for name in modes}
    compile_s = dict.fromkeys(modes, 0.0)
    if "compiled" in modes:
        begin = time.perf_counter()
        executions["compiled"].run(run, at, {}, data)
        compile_s["compiled"] = time.perf_counter() - begin
    call_s = medians({n: lambda e=e: e.run(run, at, {}, data) for n, e in executions.items()}, 5)
    print(
        f"\n{title}: "
        + ", ".join(f"{n} {call_s[n] * 1e3:.2f} ms" for n in modes)
        + f"; compiling {compile_s.get('compiled', 0):.1f} s"
    )
    fine = True
    for calls in (100, 100_000):
        total = {n: compile_s[n] + calls * call_s[n] for n in modes}
        chosen, _, why = choose(activation_bytes=model.widest(data["query_x"][0]), device="cpu",
        inner_steps=learner.inner_steps,
                             tasks_per_call=tasks, calls=calls, compiler=execution.has_compiler())  # fmt: skip
        best = min(total, key=total.__getitem__)
        good = chosen in total and total[chosen] <= SLACK * total[best]
        fine &= good
        print(
            f"  {calls:7d} shards: least is {best} ({total[best]:.1f} s); chosen {chosen}: "
            f"{'right' if good else 'WRONG'} — {why}"
        )
    return fine


if __name__ == "__main__":
    main()
