"""Sinusoid meta-gradient: our three modes against a plain autograd loop and TorchOpt's functional vmap."""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from torch.func import functional_call

from learners.algorithms.maml import MAML
from learners.base import pack
from learners.engine.execution import Execution
from learners.models.networks import MLP
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.bench.timing import machine, medians, quiet, ratios

LR = 0.01


def main() -> None:
    quiet()
    print(machine())
    fine = True
    for tasks, steps in ((200, 1), (200, 5), (25, 1)):
        fine &= compare(tasks, steps)
    sys.exit(not fine)


def compare(tasks: int, steps: int) -> bool:
    torch.manual_seed(0)
    model = functional(MLP().build((1,), 1))
    run = common_verbs(MAML(LR, steps), Supervised(model, "mse"), 1)["gradient"].run
    data = {k: torch.randn(tasks, 10, 1) for k in ("support_x", "support_y", "query_x", "query_y")}
    at = pack(model.params(), {})
    modes = {name: Execution(name) for name in ("loop", "vmap", "compiled")}
    begin = time.perf_counter()
    modes["compiled"].run(run, at, {}, data)
    compile_s = time.perf_counter() - begin
    candidates = {"plain autograd loop": lambda: plain(model, data, steps)}
    peer = torchopt_vmap(model, data, steps)
    if peer:
        candidates["TorchOpt functional vmap"] = peer
    candidates |= {f"metafleet {n}": lambda e=e: e.run(run, at, {}, data) for n, e in modes.items()}
    agree(candidates)
    wanted = {"metafleet vmap": 9.0, "metafleet compiled": 40.0} if tasks == 200 else {}
    seconds = medians(candidates, 7)
    fine = ratios(
        f"{tasks} tasks, {steps} inner steps, second order (compiling took {compile_s:.1f} s)",
        seconds,
        "plain autograd loop",
        wanted,
    )
    if peer:
        ratio = seconds["TorchOpt functional vmap"] / seconds["metafleet compiled"]
        bar = 3.0 if tasks == 200 else None
        note = f" (wanted {bar:g}: {'reached' if ratio >= bar else 'MISSED'})" if bar else ""
        print(f"  compiled against TorchOpt: x {ratio:.2f}{note}")
        fine &= bar is None or ratio >= bar
    return fine


def plain(model, data, steps: int) -> dict[str, torch.Tensor]:
    """The loop everyone writes first."""
    total: dict[str, torch.Tensor] = {}
    for i in range(len(data["support_x"])):
        theta = {k: v.detach().requires_grad_() for k, v in model.params().items()}
        phi = theta
        for _ in range(steps):
            loss = F.mse_loss(functional_call(model.module, phi, (data["support_x"][i],)), data["support_y"][i])
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {k: v - LR * g for (k, v), g in zip(phi.items(), grads, strict=True)}
        loss = F.mse_loss(functional_call(model.module, phi, (data["query_x"][i],)), data["query_y"][i])
        for k, g in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            total[k] = total[k] + g if k in total else g
    return total


def torchopt_vmap(model, data, steps: int):
    """TorchOpt's functional optimiser under vmap, backward outside, as its own MAML example does; None if not
    installed.
    """
    try:
        import torchopt
    except ImportError:
        print("TorchOpt is not installed (make bench installs it): left out")
        return None
    optimiser = torchopt.sgd(lr=LR)

    def task(theta, sx, sy, qx, qy):
        phi, state = theta, optimiser.init(theta)
        for _ in range(steps):
            grads = torch.func.grad(lambda p: F.mse_loss(functional_call(model.module, p, (sx,)), sy))(phi)
            updates, state = optimiser.update(grads, state, inplace=False)
            phi = torchopt.apply_updates(phi, updates, inplace=False)
        return F.mse_loss(functional_call(model.module, phi, (qx,)), qy)

    def run() -> dict[str, torch.Tensor]:
        theta = {k: v.detach().requires_grad_() for k, v in model.params().items()}
        losses = torch.vmap(task, (None, 0, 0, 0, 0))(
            theta, data["support_x"], data["support_y"], data["query_x"], data["query_y"]
        )
        return dict(zip(theta, torch.autograd.grad(losses.sum(), list(theta.values())), strict=True))

    return run


def agree(candidates) -> None:
    """All compute the same gradient, or the comparison means nothing."""
    results = []
    for call in candidates.values():
        got = call()
        got = {k.removeprefix("params/"): v for k, v in got.total.items()} if hasattr(got, "total") else got
        results.append(got)
    for other in results[1:]:
        for k, v in results[0].items():
            torch.testing.assert_close(other[k], v, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
