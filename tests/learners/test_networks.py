"""Networks of the literature: parameters counted by hand, outputs and second derivatives against ones written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from learners.algorithms.maml import MAML
from learners.base import Data, Params, pack, unpack
from learners.engine.execution import Execution
from learners.models.drop import DropBlock, StochasticDepth
from learners.models.functional import functional
from learners.models.networks import ModelSpec
from learners.models.resnet12 import ResNet12
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

WAYS, RATE = 3, 0.1
Forward = Callable[[Params, Tensor], Tensor]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def episode(size: int) -> Data:
    generator = torch.Generator().manual_seed(4)

    def images(n: int) -> Tensor:
        return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)

    return {
        "support_x": images(6), "support_y": torch.arange(WAYS).repeat(2),
        "query_x": images(9), "query_y": torch.arange(WAYS).repeat(3),
    }  # fmt: skip


def by_hand(forward: Forward, theta: Params, data: Data) -> Params:
    """MAML's gradient of two inner steps by plain autograd."""
    phi = leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    for _ in range(2):
        loss = F.cross_entropy(forward(phi, data["support_x"]), data["support_y"])
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {k: v - RATE * g for (k, v), g in zip(phi.items(), grads, strict=True)}
    loss = F.cross_entropy(forward(phi, data["query_x"]), data["query_y"])
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check_second_order(spec: ModelSpec, forward: Forward, size: int, mode: str) -> None:
    """Outputs, and MAML's gradient of one task, of `spec`'s network against `forward`, in float64."""
    torch.manual_seed(1)
    data = episode(size)
    model = functional(spec.build((3, size, size), WAYS).double())
    theta = {k: v + 0.1 * torch.randn_like(v) for k, v in model.params().items()}  # no γ = 1, no β = 0
    torch.testing.assert_close(model(theta, data["query_x"]), forward(theta, data["query_x"]), rtol=1e-9, atol=1e-9)
    wanted = by_hand(forward, theta, data)
    verbs = common_verbs(MAML(RATE, 2), Supervised(model, "cross_entropy"), 1)
    one = {k: v.unsqueeze(0) for k, v in data.items()}
    got = unpack(Execution(mode, backend="aot_eager").run(verbs["gradient"].run, pack(theta, {}), {}, one).total).params
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert set(got) == set(wanted)
    assert largest > 1e-3
    for name, g in wanted.items():
        assert float((got[name] - g).abs().max()) <= 1e-8 * largest, name


def norm(params: Params, name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, params[f"{name}.weight"], params[f"{name}.bias"], training=True)


# DropBlock and stochastic depth


@pytest.mark.parametrize(("size", "block"), [(5, 5), (8, 3), (10, 1)])
def test_dropblock_keeps_as_many_as_its_places_say(size: int, block: int) -> None:
    torch.manual_seed(0)
    draws, p = 40_000, 0.2
    kept = DropBlock(p, block).mask(torch.zeros(draws, 1, size, size, dtype=torch.float64))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    places = size - block + 1
    gamma = p / block**2 * size**2 / places**2
    reach = [min(i, places - 1) - max(i - block + 1, 0) + 1 for i in range(size)]  # places that cover i, on one axis
    wanted = torch.tensor([[(1 - gamma) ** (r * c) for c in reach] for r in reach], dtype=torch.float64)
    error = 4.5 * float((wanted * (1 - wanted) / draws).sqrt().max())
    torch.testing.assert_close(kept.mean((0, 1)), wanted, rtol=0, atol=error)


def test_what_dropblock_drops_is_squares() -> None:
    torch.manual_seed(0)
    block = 3
    dropped = DropBlock(0.3, block).mask(torch.zeros(64, 4, 9, 7)).numpy() == 0
    assert 0.05 < dropped.mean() < 0.5
    whole = sliding_window_view(dropped, (block, block), axis=(2, 3)).all((-1, -2))
    covered = np.zeros_like(dropped)
    for n, c, i, j in zip(*whole.nonzero(), strict=True):
        covered[n, c, i : i + block, j : j + block] = True
    assert (covered == dropped).all()  # whatever is dropped lies in a whole square that is
    assert not (dropped == dropped[:, :1]).all()  # channels by themselves


def test_dropblock_keeps_the_sum_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    layer, x = DropBlock(0.3, 2), torch.ones(5, 4, 6, 6, dtype=torch.float64)
    y = layer(x)
    assert float(y.mean()) == pytest.approx(1)
    assert int((y == 0).sum()) > 0
    assert layer.eval()(x) is x
    assert DropBlock(0.0, 2)(x) is x
    whole = DropBlock(0.999, 2)(torch.ones(1, 1, 2, 2))  # all of it: no 0/0
    assert bool(torch.isfinite(whole).all())


def test_stochastic_depth_drops_examples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.ones(40_000, 2, 3)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert bool((y == y[:, :1, :1]).all())
    assert float(y.mean()) == pytest.approx(1, abs=4.5 * (0.25 / 0.75 / 40_000) ** 0.5)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("layer", [DropBlock(0.3, 2), StochasticDepth(0.3)])
def test_drops_stand_under_vmap_and_differentiate(layer: nn.Module) -> None:
    x = torch.randn(4, 5, 3, 6, 6, dtype=torch.float64)
    grads, y = torch.vmap(torch.func.grad_and_value(lambda v: layer(v).sum()), randomness="different")(x)
    torch.testing.assert_close((grads * x).flatten(1).sum(1), y)  # linear in x


# ResNet-12


def resnet12(params: Params, x: Tensor) -> Tensor:
    """Lee et al. 2019: activation, then pooling."""
    for b in range(4):
        y = x
        for i in range(1, 4):
            y = F.conv2d(y, params[f"block{b}.conv{i}.weight"], padding=1)
            y = norm(params, f"block{b}.norm{i}", y)
            y = F.leaky_relu(y, 0.1) if i < 3 else y
        shortcut = F.conv2d(x, params[f"block{b}.shortcut.conv.weight"])
        y = y + norm(params, f"block{b}.shortcut.norm", shortcut)
        x = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    return F.linear(x.flatten(2).mean(2), params["head.weight"], params["head.bias"])


SMALL = ResNet12((2, 3, 3, 4), dropout=0, drop_block=0)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_resnet12_and_its_second_derivatives_equal_those_written_out(mode: str) -> None:
    check_second_order(SMALL, resnet12, 32, mode)


# Per block of c_i → c: 9 c_i c + 2 · 9 c² + c_i c of convolutions, 4 · 2c of normalisation.
@pytest.mark.parametrize(
    ("widths", "wanted"),
    [
        ((64, 160, 320, 640), 76_160 + 564_480 + 2_357_760 + 9_425_920),
        ((64, 128, 256, 512), 76_160 + 377_856 + 1_509_376 + 6_033_408),
    ],
)
def test_resnet12_has_as_many_parameters_as_counted(widths: tuple[int, int, int, int], wanted: int) -> None:
    module = ResNet12(widths).build((3, 84, 84), 5)
    assert parameters(module) == wanted + 5 * (widths[-1] + 1)
    assert isinstance(module.head, nn.Linear)
    with torch.no_grad():
        assert module(torch.zeros(2, 3, 84, 84)).shape == (2, 5)


def test_resnet12_drops_where_it_says_and_only_in_training() -> None:
    torch.manual_seed(0)
    module, x = ResNet12((4, 4, 4, 4), 0.5, 0.5, block=2).build((3, 32, 32), 5), torch.randn(6, 3, 32, 32)
    drops = [type(module.get_submodule(f"block{i}.drop")) for i in range(4)]
    assert drops == [nn.Dropout, nn.Dropout, DropBlock, DropBlock]
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_resnet12_names_the_square_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"block=5: .* 2×2; 2 or less"):
        ResNet12().build((3, 32, 32), 5)
    with pytest.raises(ValueError, match="8×8 are too small"):
        ResNet12(block=1).build((3, 8, 8), 5)
    with pytest.raises(ValueError, match="wants images"):
        ResNet12().build((7,), 5)
    wrong: list[dict[str, Any]] = [{"drop_block": 1.0}, {"dropout": -0.1}, {"block": 0}, {"widths": (0, 1, 1, 1)}]
    for keys in wrong:
        with pytest.raises(ValueError, match=next(iter(keys))):
            ResNet12(**keys)
