"""Second-order terms against finite differences, through batch normalisation in every mode, in every execution mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learners.algorithms.maml import MAML
from learners.base import Data, Meta, Params, pack, unpack
from learners.engine.execution import Execution
from learners.modules.functional import Functional, functional
from learners.modules.normalisation import BatchNorm
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

pytestmark = pytest.mark.kernels

NORMS = ("transductive", "support_plus_one", "support_statistics", "frozen")


def smooth_net() -> Functional:
    """Convolutions, BatchNorm with and without scale, no kink anywhere: finite differences converge."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3, bias=False), BatchNorm(4, scale=False), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    return functional(net)


def episode() -> Data:
    torch.manual_seed(4)
    return {
        "support_x": torch.randn(6, 1, 8, 8).double(), "support_y": torch.arange(3).repeat(2),
        "query_x": torch.randn(9, 1, 8, 8).double(), "query_y": torch.arange(3).repeat(3),
    }  # fmt: skip


def directional(loss, at: Params, direction: Params, h: float = 1e-4) -> float:
    """Derivative of `loss` along `direction`, by Richardson-extrapolated central differences (error O(h⁴))."""

    def central(step: float) -> float:
        up, down = ({k: v + s * step * direction[k] for k, v in at.items()} for s in (1, -1))
        return float(loss(up) - loss(down)) / (2 * step)

    return (4 * central(h) - central(2 * h)) / 3


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_the_meta_gradient_is_the_derivative_of_the_adapted_query_loss(norm: str, steps: int) -> None:
    model, data = smooth_net(), episode()
    objective = Supervised(model, "cross_entropy", norm=norm)
    learner = MAML(0.5, steps)
    slots = {k: v.double() for k, v in objective.slots().items()}

    def adapted(theta: Params) -> torch.Tensor:
        return objective.query(slots | learner.adapt(Meta(theta, slots), objective, data, steps), data).detach()

    torch.manual_seed(5)
    theta = model.params()
    direction = {k: torch.randn_like(v) for k, v in theta.items()}
    wanted = directional(adapted, theta, direction)
    stacked = {k: v.unsqueeze(0) for k, v in data.items()}
    run = common_verbs(learner, objective, 1)["gradient"].run
    seen = {}
    for mode in ("loop", "vmap", "compiled") if steps == 2 else ("loop", "vmap"):
        result = Execution(mode, backend="aot_eager").run(run, pack(theta, slots), {}, stacked)
        grads = unpack(result.total).params
        seen[mode] = float(sum((grads[k] * direction[k]).sum() for k in theta))
        assert seen[mode] == pytest.approx(wanted, rel=1e-6), mode
    assert max(seen.values()) - min(seen.values()) <= 1e-9 * abs(wanted)
    # The test can fail: the first-order gradient is another number.
    first = MAML(0.5, steps, order=1).gradient(Meta(theta, slots), objective, data).grads
    assert abs(float(sum((first[k] * direction[k]).sum() for k in theta)) - wanted) > 1e-3 * abs(wanted)


def test_torchs_own_normalisation_is_wrong_where_ours_is_right() -> None:
    """MAML with the outer derivative outside of vmap: a nesting in which torch's native normalisation fails
    silently.
    """
    torch.manual_seed(6)
    x, q, t = torch.randn(4, 6, 3).double(), torch.randn(4, 6, 3).double(), torch.randn(4, 6, 2).double()
    theta = {
        "a": torch.randn(3, 5).double(),
        "c": torch.randn(5, 2).double(),
        "weight": torch.ones(5).double(),
        "bias": torch.zeros(5).double(),
    }
    layer = functional(nn.BatchNorm1d(5).double())

    def ours(v: torch.Tensor, w: Params) -> torch.Tensor:
        return layer(w, v)

    def native(v: torch.Tensor, w: Params) -> torch.Tensor:
        return F.batch_norm(v, None, None, w["weight"], w["bias"], True)

    def query_losses(norm):
        def net(w: Params, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(norm(x @ w["a"], w)) @ w["c"]

        def task(w: Params, x: torch.Tensor, q: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            g = torch.func.grad(lambda w: F.mse_loss(net(w, x), t))(w)
            return F.mse_loss(net({k: v - 0.5 * g[k] for k, v in w.items()}, q), t)

        return lambda w: torch.vmap(task, (None, 0, 0, 0))(w, x, q, t).sum()

    direction = {k: torch.randn_like(v) for k, v in theta.items()}
    truth = directional(lambda w: query_losses(ours)(w).detach(), theta, direction)
    seen = {}
    for name, norm in (("ours", ours), ("native", native)):
        grads = torch.func.grad(query_losses(norm))(theta)
        seen[name] = float(sum((grads[k] * direction[k]).sum() for k in theta))
    assert seen["ours"] == pytest.approx(truth, rel=1e-7)
    # Should torch mend it one day, this line says so, and kernels.BatchNorm can be reconsidered.
    assert seen["native"] != pytest.approx(truth, rel=0.1)
