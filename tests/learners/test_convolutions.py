"""No convolution that the product runs reaches torch's kernel that writes out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.engine.derivative import transforms
from learners.models.resnet import ResNet
from learners.modules.convolution import Call, PatchConv, PointwiseConv, unsafe
from learners.modules.functional import functional
from tests import convolutions

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("isa", convolutions.available())
def test_what_this_processor_gets_wrong_is_what_we_avoid(isa: str) -> None:
    """A short sweep in processes of their own under glibc's checking malloc; `make convolutions` is the long one."""
    assert convolutions.held_to(isa, ["--short"]) == 0


@pytest.mark.kernels
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_strided_pointwise_layer_is_swapped_for_the_same_function(
    kind: type[nn.Module], padding: int, stride: int
) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, 1, stride=stride, padding=padding, groups=2).double()
    x = torch.randn(3, 4, *(7,) * {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]).double()
    model = functional(nn.Sequential(layer))
    assert isinstance(model.module[0], PointwiseConv)
    params = {k: v.requires_grad_() for k, v in model.params().items()}
    assert list(params) == ["0.weight", "0.bias"]
    ours, theirs = model(params, x), layer(x)  # contiguous float64: a kernel that does not fail
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours.square().sum(), list(params.values()))
    want = torch.autograd.grad(theirs.square().sum(), list(layer.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Bare(nn.Module):
    """A user's own, with a call inside `forward` that no layer shows."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], inputs: int = 3) -> None:
        super().__init__()
        self.call, self.w = call, nn.Parameter(torch.randn(5, inputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w).mean((2, 3))


REFUSED = r"kernel 1×1 and stride 2×2 over 3 channels: .* convolve x\[\.\.\., ::s, ::s\] with stride 1 instead"


@pytest.mark.kernels
def test_a_call_inside_forward_is_refused_where_an_example_is_given() -> None:
    module, x = Bare(lambda x, w: F.conv2d(x, w, stride=2)), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=REFUSED):
        functional(module, x)
    functional(Bare(lambda x, w: F.conv2d(x[..., ::2, ::2], w)), x)  # as the sentence says
    functional(Bare(lambda x, w: F.conv2d(x, w, stride=2), inputs=16), torch.randn(2, 16, 8, 8))
    functional(Bare(lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1), stride=2)), x)  # another kernel, and right


@pytest.mark.kernels
@pytest.mark.parametrize("mode", ["plain", "vmap"])
def test_without_an_example_the_first_call_refuses(mode: str) -> None:
    model, x = functional(Bare(lambda x, w: F.conv2d(x, w, stride=2))), torch.randn(4, 2, 3, 8, 8)
    params = model.params()
    with pytest.raises(ValueError, match=REFUSED), transforms() if mode == "vmap" else nullcontext():
        torch.vmap(lambda v: model(params, v))(x) if mode == "vmap" else model(params, x[0])


@pytest.mark.kernels
def test_what_hangs_on_a_convolution_is_not_lost() -> None:
    """Hooks, the older spectral norm's `weight_orig`, parametrisations: such a layer is not swapped."""
    seen: list[object] = []
    hooked = nn.Conv2d(1, 4, 3)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    model = functional(nn.Sequential(hooked), torch.zeros(2, 1, 8, 8))
    assert not isinstance(model.module[0], PatchConv)
    model(model.params(), torch.zeros(2, 1, 8, 8))
    assert len(seen) == 3  # tried twice, called once
    reparametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
    names = set(functional(nn.Sequential(reparametrised)).params())
    assert names == {f"0.{k}" for k, _ in reparametrised.named_parameters()}


@pytest.mark.kernels
def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Conv2d(4, 4, 1, stride=2)
    model = functional(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(2, 4, 8, 8))
    assert model.module[0] is model.module[2]
    assert list(model.params()) == ["0.weight", "0.bias"]


@pytest.mark.kernels
def test_a_resnets_shortcuts_are_swapped() -> None:
    model = functional(ResNet(10, 4).build((3, 16, 16), 5), torch.zeros(2, 3, 16, 16))
    shortcuts = [m for name, m in model.module.named_modules() if name.endswith("shortcut.conv")]
    assert len(shortcuts) == 3
    assert all(isinstance(m, PointwiseConv) for m in shortcuts)


@pytest.mark.kernels
def test_the_rule_names_the_family_and_nothing_else() -> None:
    assert unsafe(Call(False, (1, 1), (2, 2), 1, 4))
    assert unsafe(Call(False, (1, 1), (1, 3), 1, 15))
    assert not unsafe(Call(False, (1, 1), (1, 1), 1, 4))
    assert not unsafe(Call(False, (3, 3), (2, 2), 1, 4))
    assert not unsafe(Call(False, (1, 1), (2, 2), 1, 16))
    assert not unsafe(Call(False, (1, 1), (2, 2), 2, 4))
    assert not unsafe(Call(True, (1, 1), (2, 2), 1, 4))
    assert not unsafe(Call(False, (1,), (2,), 1, 4))


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo: which instruction sets there are is not known"
)
def test_a_resnet_of_few_channels_trains_under_the_checking_malloc() -> None:
    """The gradient that used to abort, held to AVX2: four channels, channels-last, twenty times."""
    if "avx2" not in convolutions.available():
        pytest.skip("this processor has no AVX2")
    program = """
import torch
from learners.modules.functional import functional
from learners.models.resnet import ResNet
model = functional(ResNet(10, 4).build((3, 16, 16), 5))
for _ in range(20):
    params = {k: v.requires_grad_() for k, v in model.params().items()}
    torch.autograd.grad(model(params, torch.randn(8, 3, 16, 16)).square().sum(), list(params.values()))
print("whole")
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | convolutions.environment("avx2"),
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "whole", run.stderr[-500:]
