"""Modules as people write them, which `python -m tests.zoo` holds against plain autograd: networks of rows and images,
what is shared in them, what is constant, and what hangs on layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.zoo_case import LOOP_ONLY, Case, Net, images, mlp, numbers, seq, still, tied, tokens, warmed, weights
from tests.zoo_sequences import OTHERS, SEQUENCES, UNUSUAL


def hooked(module: nn.Module, pre: Any = None, post: Any = None) -> nn.Module:
    if pre:
        module.register_forward_pre_hook(pre)
    if post:
        module.register_forward_hook(post)
    return module


def twice(layer: nn.Module, a: nn.Module, b: nn.Module, c: nn.Module) -> nn.Module:
    """One layer in two places."""
    return seq(seq(a, layer, nn.Tanh()), seq(b, layer, nn.Tanh()), c)


MLPS = [
    Case("MLP, tanh", lambda: mlp(nn.Tanh(), nn.Tanh()), numbers(3)),
    Case("MLP, GELU and SiLU", lambda: mlp(nn.GELU(), nn.SiLU()), numbers(3)),
    Case("MLP, softplus and ELU", lambda: mlp(nn.Softplus(), nn.ELU()), numbers(3)),
    Case("MLP, ReLU in place", lambda: mlp(nn.ReLU(inplace=True), nn.ReLU(inplace=True)), numbers(3), "cross_entropy"),
    Case("MLP, Mish, CELU, SELU", lambda: mlp(nn.Mish(), nn.CELU(), nn.SELU()), numbers(3)),
    Case("MLP, PReLU and GLU", lambda: seq(nn.Linear(3, 8), nn.PReLU(8), nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 2)),
         numbers(3)),
    Case("Bilinear", lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)), x), a=nn.Linear(3, 4), b=nn.Bilinear(4, 3, 2)),
         numbers(3)),
    Case("residual MLP", lambda: Net(
        lambda m, x: m.out(m.b(torch.tanh(m.a(x))) + x), a=nn.Linear(3, 8), b=nn.Linear(8, 3), out=nn.Linear(3, 2)),
        numbers(3)),
    Case("einsum", lambda: Net(
        lambda m, x: torch.einsum("nij,jk->nk", torch.einsum("ni,nj->nij", x, x).tanh(), m.w), w=weights(3, 2)),
        numbers(3)),
    Case("cumsum", lambda: Net(lambda m, x: m.b(torch.cumsum(m.a(x).tanh(), 1)), a=nn.Linear(3, 8), b=nn.Linear(8, 2)),
         numbers(3)),
    Case("FFT", lambda: Net(
        lambda m, x: m.out(torch.fft.irfft(torch.fft.rfft(m.a(x)) * torch.complex(m.re, m.im), n=8).tanh()),
        a=nn.Linear(3, 8), re=weights(5), im=weights(5), out=nn.Linear(8, 2)), numbers(3)),
    Case("ParameterList, ParameterDict", lambda: Net(
        lambda m, x: (x @ m.l[0] + m.d["b"]).tanh() @ m.l[1], l=nn.ParameterList([weights(3, 8), weights(8, 2)]),
        d=nn.ParameterDict({"b": weights(8)})), numbers(3)),
    Case("ModuleDict", lambda: Net(
        lambda m, x: m.d["out"](m.d[m.kind](x)), kind="tanh",
        d=nn.ModuleDict({"tanh": mlp(nn.Tanh()), "out": nn.Linear(2, 2)})), numbers(3)),
    Case("mixture of experts", lambda: Net(
        lambda m, x: torch.stack([e(x) for e in m.experts], 1).mul(m.gate(x).softmax(-1).unsqueeze(-1)).sum(1),
        gate=nn.Linear(3, 3), experts=nn.ModuleList(mlp(nn.Tanh()) for _ in range(3))), numbers(3)),
    Case("hypernetwork", lambda: Net(
        lambda m, x: torch.einsum("nio,ni->no", m.h(x).view(-1, 3, 2).tanh(), x), h=nn.Linear(3, 6)), numbers(3)),
    Case("unused parameter", lambda: Net(lambda m, x: m.a(x), a=mlp(nn.Tanh()), b=nn.Linear(2, 2)), numbers(3)),
    Case("branch without gradient", lambda: Net(
        lambda m, x: m.a(x) * m.b(x).detach() + _no_grad(m.b, x), a=mlp(nn.Tanh()), b=nn.Linear(3, 2)), numbers(3)),
    Case("gradient checkpointing", lambda: Net(
        lambda m, x: m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False)), a=mlp(nn.Tanh()),
        b=nn.Linear(2, 2)), numbers(3), refused=LOOP_ONLY),
    Case("three outputs as one tensor", lambda: Net(
        lambda m, x: torch.stack([a(x) for a in m.a], -1), a=nn.ModuleList(mlp(nn.Tanh()) for _ in range(3))),
        numbers(3)),
]  # fmt: skip


def _no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def _unet(m: Any, x: Tensor) -> Tensor:
    a = F.softplus(m.down(x))
    b = F.softplus(m.middle(F.avg_pool2d(a, 2)))
    y: Tensor = m.out(torch.cat([a, m.up(b)], 1))
    return y


def _squeezed(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    y: Tensor = m.head((x * torch.sigmoid(m.b(F.silu(m.a(x.mean((2, 3))))))[:, :, None, None]).amax((2, 3)))
    return y


def _residual(m: Any, x: Tensor) -> Tensor:
    y = m.bn2(m.conv2(F.softplus(m.bn1(m.conv1(x)))))
    z: Tensor = m.head(F.relu(y + m.skip(x), inplace=True).flatten(1))
    return z


CONVOLUTIONS = [
    Case("conv, view, 1 channel", lambda: images(nn.Conv2d(1, 4, 3), nn.Tanh(), features=64, view=True),
         numbers(1, 6, 6), "cross_entropy"),
    Case("conv, max-pool, flatten, 3 channels", lambda: images(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), features=36), numbers(3, 6, 6), "cross_entropy"),
    Case("conv, BatchNorm, view", lambda: images(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), features=128, view=True), numbers(3, 4, 4), "cross_entropy"),
    Case("conv of many channels, view", lambda: images(
        nn.Conv2d(16, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3), features=16, view=True), numbers(16, 4, 4)),
    Case("channels-last module, reshape", lambda: images(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), features=32).to(memory_format=torch.channels_last),
        numbers(3, 4, 4)),
    Case("grouped conv", lambda: images(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), features=32), numbers(4, 4, 4)),
    Case("depthwise separable conv", lambda: images(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1), nn.GELU(), features=96), numbers(4, 4, 4)),
    Case("dilated conv", lambda: images(nn.Conv2d(2, 4, 3, dilation=2), nn.Tanh(), features=16), numbers(2, 6, 6)),
    Case("strided 1×1 conv", lambda: images(nn.Conv2d(3, 4, 1, stride=2), nn.Tanh(), features=16), numbers(3, 4, 4)),
    Case("F.conv2d strided 1×1, few channels", lambda: Net(
        lambda m, x: F.conv2d(x, m.w, stride=2).flatten(1), w=nn.Parameter(torch.randn(2, 3, 1, 1))), numbers(3, 4, 4),
        refused={"": "writes out of bounds"}),
    Case("transposed conv", lambda: images(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), features=147),
         numbers(2, 3, 3)),
    Case("conv1d, BatchNorm1d", lambda: images(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), features=24),
         numbers(2, 8)),
    Case("conv3d, BatchNorm3d", lambda: images(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Tanh(), features=16),
         numbers(1, 4, 4, 4)),
    Case("circular and same padding", lambda: images(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(4, 2, 3, padding="same"),
        features=32), numbers(2, 4, 4)),
    Case("pixel shuffle", lambda: seq(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.PixelShuffle(2)), numbers(2, 4, 4)),
    Case("interpolation, adaptive pooling", lambda: Net(
        lambda m, x: m.h(F.adaptive_avg_pool2d(F.interpolate(m.c(x), size=(7, 7), mode="bilinear"), 3).flatten(1)),
        c=nn.Conv2d(2, 3, 3), h=nn.Linear(27, 2)), numbers(2, 5, 5)),
    Case("U-Net", lambda: Net(
        _unet, down=nn.Conv2d(1, 4, 3, padding=1), middle=nn.Conv2d(4, 8, 3, padding=1),
        up=nn.ConvTranspose2d(8, 4, 2, stride=2), out=nn.Conv2d(8, 2, 1)), numbers(1, 4, 4)),
    Case("squeeze-excitation", lambda: Net(
        _squeezed, conv=nn.Conv2d(3, 6, 3), a=nn.Linear(6, 3), b=nn.Linear(3, 6), head=nn.Linear(6, 2)),
        numbers(3, 5, 5)),
    Case("residual block, BatchNorm", lambda: Net(
        _residual, conv1=nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(4),
        skip=seq(nn.Conv2d(3, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)), head=nn.Linear(16, 3)),
        numbers(3, 4, 4), "cross_entropy"),
]  # fmt: skip

NORMS = [
    Case("BatchNorm1d over [n, C]", lambda: mlp(nn.BatchNorm1d(8), nn.Tanh()), numbers(3), "cross_entropy"),
    Case("BatchNorm, no affine, no tracking", lambda: mlp(
        nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Tanh()), numbers(3)),
    Case("GroupNorm", lambda: images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), features=16), numbers(2, 4, 4)),
    Case("LayerNorm", lambda: mlp(nn.LayerNorm(8), nn.GELU()), numbers(3)),
    Case("InstanceNorm, affine", lambda: images(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), features=36), numbers(2, 5, 5)),
    Case("InstanceNorm that tracks", lambda: images(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), features=36), numbers(2, 5, 5),
        refused={"": "keeps state between calls"}),
    Case("LocalResponseNorm", lambda: images(nn.Conv2d(2, 6, 3), nn.LocalResponseNorm(3), nn.Tanh(), features=24),
         numbers(2, 4, 4)),
    Case("RMSNorm", lambda: mlp(nn.RMSNorm(8), nn.Tanh()), numbers(3)),
    Case("F.batch_norm in forward", lambda: Net(
        lambda m, x: m.b(F.batch_norm(m.a(x), None, None, m.g, training=True).tanh()), a=nn.Linear(3, 4), g=weights(4),
        b=nn.Linear(4, 2)), numbers(3)),
    Case("normalised by hand (std)", lambda: Net(
        lambda m, x: m.b(((h := m.a(x)) - h.mean(0)) / (h.std(0) + 1e-3)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
        numbers(3)),
]  # fmt: skip

SHARED = [
    Case("BatchNorm in two places", lambda: twice(
        nn.BatchNorm1d(8), nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)), numbers(3)),
    Case("Linear in two places", lambda: twice(
        nn.Linear(8, 8), nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)), numbers(3)),
    Case("conv in two places", lambda: images(*[nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()] * 2, features=16),
         numbers(1, 4, 4)),
    Case("tied embedding and decoder", lambda: Net(
        lambda m, x: m.out(torch.tanh(m.mix(m.e(x)))).transpose(1, 2), mix=nn.Linear(8, 8),
        e=(e := nn.Embedding(7, 8)), out=tied(e, nn.Linear(8, 7))), tokens(5)),
    Case("tied autoencoder, transposed", lambda: Net(
        lambda m, x: F.linear(torch.tanh(m.e(x)), m.e.weight.t(), m.b), e=nn.Linear(3, 8), b=weights(3)), numbers(3)),
    Case("shared module list", lambda: Net(
        lambda m, x: m.out(m.second(m.first(x).tanh()).tanh()), first=(body := seq(nn.Linear(3, 3), nn.Tanh())),
        second=nn.ModuleList([body, nn.Linear(3, 3)])[0], out=nn.Linear(3, 2)), numbers(3)),
    Case("one parameter, two names", lambda: Net(
        lambda m, x: (x @ m.a).tanh() @ m.b, a=(w := weights(3, 3)), b=w), numbers(3)),
    Case("one layer, applied in a loop", lambda: Net(
        lambda m, x: m.out(m.a(m.a(m.a(x).tanh()).tanh())), a=nn.Linear(3, 3), out=nn.Linear(3, 2)), numbers(3)),
]  # fmt: skip


def _frozen_first(module: nn.Sequential) -> nn.Module:
    module[0].requires_grad_(False)
    return module


def _pruned(layer: nn.Module) -> nn.Module:
    pruned: nn.Module = prune.random_unstructured(layer, "weight", 0.3)
    return pruned


class Symmetric(nn.Module):
    """(W + Wᵀ)/2."""

    def forward(self, w: Tensor) -> Tensor:
        return (w + w.t()) / 2


def _parametrised(layer: nn.Module, by: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", by)
    return layer


CONSTANTS = [
    Case("frozen layer", lambda: _frozen_first(mlp(nn.Tanh(), nn.Tanh())), numbers(3), frozen=("0.weight", "0.bias")),
    Case("frozen convolution, strided 1×1", lambda: images(
        still(nn.Conv2d(3, 4, 1, stride=2)), nn.Tanh(), features=16), numbers(3, 4, 4), frozen=("0.0.weight",)),
    Case("BatchNorm in evaluation mode", lambda: seq(
        nn.Linear(3, 8), warmed(nn.BatchNorm1d(8), 8).eval(), nn.Tanh(), nn.Linear(8, 2)), numbers(3)),
    Case("frozen backbone with BatchNorm", lambda: images(still(seq(
        nn.Conv2d(1, 4, 3), warmed(nn.BatchNorm2d(4), 4, 2, 2), nn.Tanh())), nn.Conv2d(4, 2, 1), features=8),
        numbers(1, 4, 4), frozen=("0.0.0.weight", "0.0.1.weight")),
    Case("LoRA by hand", lambda: Net(
        lambda m, x: m.head((m.base(x) + x @ m.a @ m.b).tanh()), base=still(nn.Linear(3, 8)), a=weights(3, 2),
        b=weights(2, 8), head=nn.Linear(8, 2)), numbers(3), frozen=("base.weight",)),
    Case("positional encoding in a buffer", lambda: Net(
        lambda m, x: m.out((m.e(x) + m.position).tanh().mean(1)), e=nn.Embedding(7, 8), position=torch.randn(5, 8),
        out=nn.Linear(8, 2)), tokens(5)),
    Case("mask in a buffer", lambda: Net(
        lambda m, x: m.out(F.linear(x, m.a.weight * m.mask, m.a.bias).tanh()), a=nn.Linear(3, 8),
        mask=(torch.arange(24).view(8, 3) % 3 > 0).double(), out=nn.Linear(8, 2)), numbers(3)),
    Case("weight_norm", lambda: seq(
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Tanh(), nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(16, 2))), numbers(1, 4, 4)),
    Case("orthogonal", lambda: seq(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
         numbers(4)),
    Case("parametrisation of one's own", lambda: seq(
        nn.Linear(3, 4), _parametrised(nn.Linear(4, 4), Symmetric()), nn.Tanh(), nn.Linear(4, 2)), numbers(3)),
    Case("spectral_norm", lambda: seq(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), numbers(3),
         refused={"": "keeps state between calls"}),
    Case("spectral_norm, evaluation mode", lambda: seq(
        parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), nn.Tanh(), nn.Linear(4, 2)), numbers(3)),
    Case("weight_norm, older, after a forward", lambda: warmed(seq(
        nn.utils.weight_norm(nn.Conv2d(1, 4, 3)), nn.Tanh(), nn.Flatten(), nn.utils.weight_norm(nn.Linear(16, 2))),
        1, 4, 4), numbers(1, 4, 4)),
    Case("spectral_norm, older, on a conv", lambda: images(
        nn.utils.spectral_norm(nn.Conv2d(1, 4, 3)), nn.Tanh(), features=16), numbers(1, 4, 4),
        refused={"": "keeps state between calls"}),
    Case("pruned layer", lambda: seq(_pruned(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 2)), numbers(3)),
    Case("forward hook on a conv", lambda: images(
        hooked(nn.Conv2d(1, 4, 3), post=lambda m, i, y: y * y), features=16), numbers(1, 4, 4)),
    Case("hooks around BatchNorm", lambda: mlp(
        hooked(nn.BatchNorm1d(8), lambda m, i: (i[0] * 2 + 1,), lambda m, i, y: y * i[0].tanh()), nn.Tanh()),
        numbers(3)),
    Case("pre-hook on the module", lambda: hooked(mlp(nn.Tanh()), lambda m, i: (i[0].sin(),)), numbers(3)),
]  # fmt: skip


CASES = [*MLPS, *CONVOLUTIONS, *NORMS, *SHARED, *CONSTANTS, *SEQUENCES, *OTHERS, *UNUSUAL]
