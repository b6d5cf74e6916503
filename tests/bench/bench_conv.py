"""Conv4, 5-way 1-shot, 15 queries: our loop against the plain channels-first loop with torch's own layers."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from learners.algorithms.maml import MAML
from learners.base import pack
from learners.engine.execution import Execution
from learners.engine.memory import channels_last
from learners.models.networks import Conv4
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.bench.timing import machine, medians, quiet, ratios

LR, TASKS = 0.4, 2


class Native(nn.Module):
    """Torch's batch normalisation with a learned shift; its scale is there, and 1, or double backward fails."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("one", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, self.one, self.bias, True)


def plain_net() -> nn.Module:
    """Conv4 with pooling as people write it: convolution with bias, BatchNorm, ReLU, pool."""
    net = nn.Sequential()
    for i in range(4):
        block = nn.Sequential()
        block.add_module("conv", nn.Conv2d(64 if i else 1, 64, 3, padding=1))
        block.add_module("norm", Native(64))
        block.add_module("relu", nn.ReLU())
        block.add_module("pool", nn.MaxPool2d(2))
        net.add_module(f"block{i}", block)
    net.add_module("features", nn.Flatten())
    net.add_module("head", nn.Linear(64, 5))
    return net


def main() -> None:
    quiet()
    print(machine())
    torch.manual_seed(0)
    net, ours = plain_net(), functional(Conv4(halving="pool", features="flat").build((1, 28, 28), 5))
    shared = {k: v for k, v in net.state_dict().items() if k in ours.params()}
    ours.module.load_state_dict(shared, strict=False)
    data = {
        "support_x": torch.rand(TASKS, 5, 1, 28, 28), "support_y": torch.arange(5).repeat(TASKS, 1),
        "query_x": torch.rand(TASKS, 75, 1, 28, 28), "query_y": torch.arange(5).repeat_interleave(15).repeat(TASKS, 1),
    }  # fmt: skip
    fine = True
    for order, wanted in ((2, 1.35), (1, 1.5)):
        run = common_verbs(MAML(LR, 1, order=order), Supervised(ours, "cross_entropy"), 1)["gradient"].run
        at = {k: channels_last(v) for k, v in pack(ours.params(), {}).items()}
        candidates = {
            "plain loop": lambda order=order: plain(net, data, order),
            "metafleet loop": lambda run=run, at=at: Execution("loop").run(run, at, {}, data),
        }
        a, b = candidates["plain loop"](), candidates["metafleet loop"]().total
        worst = max(float((b[f"params/{k}"] - a[k]).abs().max() / a[k].abs().max()) for k in ours.params())
        title = f"{TASKS} tasks, order {order} (largest relative difference of a gradient, float32: {worst:.0e})"
        fine &= ratios(title, medians(candidates, 15), "plain loop", {"metafleet loop": wanted})
    sys.exit(not fine)


def plain(net: nn.Module, data, order: int) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for i in range(TASKS):
        theta = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}

        def loss(p, part, i=i):
            return F.cross_entropy(functional_call(net, p, (data[f"{part}_x"][i],)), data[f"{part}_y"][i])

        grads = torch.autograd.grad(loss(theta, "support"), list(theta.values()), create_graph=order == 2)
        phi = {k: v - LR * g for (k, v), g in zip(theta.items(), grads, strict=True)}
        at = theta
        if order == 1:
            at = phi = {k: v.detach().requires_grad_() for k, v in phi.items()}
        for k, g in zip(theta, torch.autograd.grad(loss(phi, "query"), list(at.values())), strict=True):
            total[k] = total[k] + g if k in total else g
    return total


if __name__ == "__main__":
    main()
