"""Networks of the literature: parameters counted by hand, outputs and second derivatives against ones written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from learners.models.networks import ModelSpec
from learners.models.resnet12 import ResNet12
from learners.models.vit import ViT
from learners.models.wide_resnet import WideResNet
from learners.modules.drop import DropBlock, StochasticDepth
from learners.modules.functional import functional
from learners.objectives.supervised import KEY, Supervised
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


# Wide ResNet


def wide_resnet(params: Params, x: Tensor) -> Tensor:
    """WRN-10-k: one block a stage, each of another shape than its input."""
    x = F.conv2d(x, params["stem.weight"], padding=1)
    for stage in range(3):
        block, stride = f"stage{stage}_0", 2 if stage else 1
        a = F.relu(norm(params, f"{block}.norm1", x))
        y = F.conv2d(a, params[f"{block}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(F.relu(norm(params, f"{block}.norm2", y)), params[f"{block}.conv2.weight"], padding=1)
        x = y + F.conv2d(a[..., ::stride, ::stride], params[f"{block}.shortcut.weight"])
    x = F.relu(norm(params, "norm", x)).flatten(2).mean(2)
    return F.linear(x, params["head.weight"], params["head.bias"])


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_wide_resnet_and_its_second_derivatives_equal_those_written_out(mode: str) -> None:
    check_second_order(WideResNet(10, 2), wide_resnet, 8, mode)


def test_wrn_28_10_has_as_many_parameters_as_counted() -> None:
    # 36.5 million in the paper's Table 4. Convolutions, then normalisations and the head.
    stages = [(16, 160), (160, 320), (320, 640)]
    weights = 9 * 3 * 16 + sum(9 * i * o + 7 * 9 * o * o + i * o for i, o in stages)
    norms = sum(2 * i + 7 * 2 * o for i, o in stages) + 2 * 640
    with torch.device("meta"):
        module = WideResNet().build((3, 32, 32), 10)
    assert parameters(module) == weights + norms + 641 * 10 == 36_479_194
    assert isinstance(module.head, nn.Linear)


def test_a_wide_resnet_drops_between_the_convolutions_in_training() -> None:
    torch.manual_seed(0)
    module, x = WideResNet(10, 1, 0.3).build((3, 16, 16), 5), torch.randn(4, 3, 16, 16)
    assert sum(isinstance(m, nn.Dropout) for m in module.modules()) == 3
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_wrongly_sized_wide_resnets_are_refused() -> None:
    for keys, text in (({"depth": 20}, "depth=20: one of 10, 16"), ({"widen": 0}, "widen=0"), ({"dropout": 1}, "drop")):
        with pytest.raises(ValueError, match=text):
            WideResNet(**keys)
    with pytest.raises(ValueError, match="wants images"):
        WideResNet(10, 1).build((7,), 5)


# ViT

TINY = ViT(patch=4, dim=6, depth=2, heads=2, hidden=2)


def vit(params: Params, x: Tensor) -> Tensor:
    """torch's own encoder layers, and patches by a strided convolution."""
    dim, heads = 6, 2
    kernel = params["patches.linear.weight"].view(dim, 3, 4, 4)
    x = F.conv2d(x, kernel, params["patches.linear.bias"], stride=4).flatten(2).transpose(1, 2)
    if "tokens.first" in params:
        x = torch.cat([params["tokens.first"].repeat(x.shape[0], 1, 1), x], 1)
    x = x + params["tokens.position"]
    layer = nn.TransformerEncoderLayer(dim, heads, 12, 0.0, "gelu", batch_first=True, norm_first=True).double()
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "linear1.",
        "linear2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for i in range(2):
            own = {f"{t}{k}": params[f"block{i}.{o}{k}"] for t, o in names.items() for k in ("weight", "bias")}
            x = torch.func.functional_call(layer, own, (x,))
    x = F.layer_norm(x, (dim,), params["norm.weight"], params["norm.bias"])
    x = x[:, 0] if "tokens.first" in params else x.mean(1)
    return F.linear(x, params["head.weight"], params["head.bias"])


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_a_vit_and_its_second_derivatives_equal_those_of_torchs_encoder(pooling: str, mode: str) -> None:
    check_second_order(replace(TINY, pooling=pooling), vit, 8, mode)


def test_vit_small_has_as_many_parameters_as_counted() -> None:
    # DeiT-S on 224×224 in patches of 16 (Touvron et al. 2021, Table 1: 22 million).
    d = 384
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    wanted = (16 * 16 * 3 * d + d) + d + 197 * d + 12 * block + 2 * d + 1000 * (d + 1)
    with torch.device("meta"):
        module = ViT(patch=16).build((3, 224, 224), 1000)
    assert parameters(module) == wanted == 22_050_664
    assert isinstance(module.head, nn.Linear)


def test_a_vit_drops_more_and_more_branches_and_only_in_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    for spec in (replace(TINY, dropout=0.3), replace(TINY, stochastic_depth=0.5)):
        module = spec.build((3, 8, 8), 5)
        assert not torch.equal(module(x), module(x))
        assert torch.equal(module.eval()(x), module(x))
    deep = replace(TINY, depth=3, stochastic_depth=0.4).build((3, 8, 8), 5)
    assert [m.p for m in deep.modules() if isinstance(m, StochasticDepth)] == pytest.approx([0, 0.2, 0.4])


def test_wrongly_sized_vits_are_refused() -> None:
    for keys, text in (
        ({"heads": 5}, "heads=5: a divisor of dim=384"),
        ({"patch": 0}, "patch=0"),
        ({"dropout": 1}, "dropout"),
    ):
        with pytest.raises(ValueError, match=text):
            ViT(**keys)
    with pytest.raises(ValueError, match="patch=8: a divisor of the images' sides 84×84"):
        ViT().build((3, 84, 84), 5)
    with pytest.raises(ValueError, match="wants images"):
        ViT().build((7,), 5)


# All of them


@pytest.mark.parametrize(
    ("spec", "size"),
    [(replace(SMALL, dropout=0.3, drop_block=0.3, block=2), 32), (WideResNet(10, 1, 0.3), 8),
     (replace(TINY, dropout=0.2, stochastic_depth=0.3), 8)],
)  # fmt: skip
def test_drops_are_the_tasks_whatever_state_torchs_generator_is_in(spec: ModelSpec, size: int) -> None:
    torch.manual_seed(1)
    model = functional(spec.build((3, size, size), WAYS).double(), torch.zeros(2, 3, size, size))
    theta, data = pack(model.params(), {}), episode(size)
    two = {k: torch.stack([v, v]) for k, v in data.items()}  # equal but for what is drawn
    verb = common_verbs(MAML(RATE, 2), Supervised(model, "cross_entropy"), 1)["gradient"]

    def gradient(mode: str, keys: tuple[int, int]) -> Params:
        run = Execution(mode, backend="aot_eager").run(verb.run, theta, {}, two | {KEY: torch.tensor(keys)})
        return unpack(run.total).params

    loop = gradient("loop", (5, 2**40))
    torch.manual_seed(2)
    for name, g in gradient("loop", (5, 2**40)).items():
        assert torch.equal(g, loop[name])
    largest = max(float(g.abs().max()) for g in loop.values())
    found = gradient("vmap", (5, 2**40))
    assert max(float((found[k] - g).abs().max()) for k, g in loop.items()) <= 1e-9 * largest
    other = gradient("loop", (5, 6))
    assert max(float((other[k] - g).abs().max()) for k, g in loop.items()) > 1e-3 * largest
