"""More of `tests.zoo_modules`: sequences, several inputs and outputs, randomness and state, libraries, the unusual."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_case import LOOP_ONLY, Case, Net, images, mlp, named, numbers, padding, seq, still, tokens, weights


def _self_attention(m: Any, x: Tensor) -> Tensor:
    x = m.e(x)
    y: Tensor = m.out(m.a(x, x, x, need_weights=False)[0].mean(1))
    return y


def _scaled_dot(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], 2, 3, 4).transpose(1, 2).unbind(3)
    y: Tensor = m.out(F.scaled_dot_product_attention(q, k, v, is_causal=m.causal).transpose(1, 2).flatten(2))
    return y


def _attended(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
    x = m.e(ids)
    x = m.a(x, x, x, key_padding_mask=mask == 0)[0] * mask.unsqueeze(-1)
    y: Tensor = m.out(x.sum(1) / mask.sum(1, keepdim=True))
    return y


def _cells(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 5)
    state = (h, h)
    for t in range(x.shape[1]):
        state = m.lstm(x[:, t], state)
        h = m.gru(state[0], h)
    y: Tensor = m.out(h)
    return y


def recurrent(layer: nn.RNNBase, features: int) -> nn.Module:
    """The layer's last outputs (batch first, or length first), and a linear one."""
    first = layer.batch_first
    return Net(
        lambda m, x: m.out(m.r(x if first else x.transpose(0, 1))[0][(slice(None), -1) if first else -1]),
        r=layer,
        out=nn.Linear(features, 2),
    )


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)


SEQUENCES = [
    Case("MultiheadAttention", lambda: Net(
        _self_attention, e=nn.Linear(3, 8), a=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 2)),
        numbers(4, 3)),
    Case("scaled_dot_product_attention", lambda: Net(
        _scaled_dot, qkv=nn.Linear(3, 24), out=nn.Linear(8, 2), causal=False), numbers(4, 3)),
    Case("causal attention", lambda: Net(_scaled_dot, qkv=nn.Linear(3, 24), out=nn.Linear(8, 2), causal=True),
         numbers(4, 3)),
    Case("TransformerEncoderLayer", lambda: Net(
        lambda m, x: m.out(m.t(m.e(x)).mean(1)), e=nn.Linear(3, 8), t=encoder_layer(), out=nn.Linear(8, 2)),
        numbers(4, 3)),
    Case("TransformerEncoder, two, norm first", lambda: Net(
        lambda m, x: m.out(m.t(m.e(x)).mean(1)), e=nn.Linear(3, 8), out=nn.Linear(8, 2),
        t=nn.TransformerEncoder(encoder_layer(norm_first=True, activation="gelu"), 2, enable_nested_tensor=False)),
        numbers(4, 3)),
    Case("TransformerDecoderLayer", lambda: Net(
        lambda m, x: m.out(m.t(m.e(x), m.e(x.flip(1))).mean(1)), e=nn.Linear(3, 8), out=nn.Linear(8, 2),
        t=nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)), numbers(4, 3)),
    Case("LSTM", lambda: recurrent(nn.LSTM(3, 5, batch_first=True), 5), numbers(4, 3)),
    Case("LSTM, two layers, both directions", lambda: recurrent(nn.LSTM(3, 4, 2, bidirectional=True), 8),
         numbers(4, 3)),
    Case("LSTM, projected", lambda: recurrent(nn.LSTM(3, 5, proj_size=2, batch_first=True), 2), numbers(4, 3)),
    Case("GRU", lambda: recurrent(nn.GRU(3, 5, batch_first=True), 5), numbers(4, 3)),
    Case("GRU, two layers, both directions", lambda: recurrent(
        nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), 8), numbers(4, 3)),
    Case("GRU, learnt start", lambda: Net(
        lambda m, x: m.out(m.r(x, m.h.expand(1, x.shape[0], 5).contiguous())[1][0]), r=nn.GRU(3, 5, batch_first=True),
        h=weights(5), out=nn.Linear(5, 2)), numbers(4, 3)),
    Case("RNN, two layers", lambda: recurrent(nn.RNN(3, 5, 2, batch_first=True), 5), numbers(4, 3)),
    Case("LSTMCell, GRUCell", lambda: Net(_cells, lstm=nn.LSTMCell(3, 5), gru=nn.GRUCell(5, 5), out=nn.Linear(5, 2)),
         numbers(4, 3)),
    Case("Embedding, padding index", lambda: seq(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 3)),
         tokens(5), "cross_entropy"),
    Case("EmbeddingBag", lambda: seq(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)), tokens(5), "cross_entropy",
         refused={"2": "_embedding_bag_backward"}),
    Case("int32 tokens", lambda: seq(nn.Embedding(7, 4), nn.Flatten(), nn.Tanh(), nn.Linear(20, 3)),
         lambda g, n: torch.randint(7, (n, 5), generator=g, dtype=torch.int32), "cross_entropy"),
    Case("logits [n, C, L]", lambda: Net(
        lambda m, x: m.out(m.e(x)).transpose(1, 2), e=nn.Embedding(7, 8), out=nn.Linear(8, 5)), tokens(5),
        "cross_entropy"),
]  # fmt: skip


def _sum_of_squares(output: Any, target: Any) -> Tensor:
    return F.mse_loss(output[0], target) + 0.1 * output[1].square().mean()


def _of_dictionary(output: Any, target: Any) -> Tensor:
    return F.mse_loss(output["y"], target) + 0.1 * output["h"].abs().mean()


def _pooled(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y: Tensor = m.rho((m.phi(x) * mask.unsqueeze(-1)).sum(1))
    return y


def _written(m: Any, x: Tensor) -> Tensor:
    m.seen += x.detach().mean()
    y: Tensor = m.a(x) + m.seen
    return y


def _remembered(m: Any, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    y: Tensor = m.a(x) * m.calls
    return y


@functools.cache
def _vision() -> object:
    """Imports torchvision. Where its extension is made for another torch that fails for two operators, which networks
    do not use and which are declared here; the result keeps them declared.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library
    return None


def _bert() -> nn.Module:
    with suppress(ModuleNotFoundError):
        _vision()  # transformers imports it where it is there
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))  # fmt: skip


def _resnet() -> nn.Module:
    _vision()
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=3)
    return model


def _timm() -> nn.Module:
    _vision()
    import timm

    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    return model


OTHERS = [
    Case("keyword inputs, key padding mask", lambda: Net(
        _attended, e=nn.Embedding(7, 8), a=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 2)),
        named(ids=tokens(5), mask=padding(5))),
    Case("DeepSets with masks", lambda: Net(_pooled, phi=mlp(nn.Tanh()), rho=nn.Linear(2, 2)),
         named(x=numbers(4, 3), mask=padding(4))),
    Case("FiLM, two inputs", lambda: Net(
        lambda m, x, task: m.b(torch.tanh(m.a(x) * m.scale(task) + m.shift(task))), a=nn.Linear(3, 8),
        b=nn.Linear(8, 2), scale=nn.Linear(2, 8), shift=nn.Linear(2, 8)), named(x=numbers(3), task=numbers(2))),
    Case("tuple of outputs", lambda: Net(lambda m, x: (m.b(h := m.a(x).tanh()), h), a=nn.Linear(3, 8),
         b=nn.Linear(8, 2)), numbers(3), _sum_of_squares),
    Case("dictionary of outputs", lambda: Net(
        lambda m, x: {"y": m.b(h := m.a(x).tanh()), "h": h}, a=nn.Linear(3, 8), b=nn.Linear(8, 2)), numbers(3),
        _of_dictionary),
    Case("dropout 0", lambda: mlp(nn.Dropout(0.0), nn.Tanh()), numbers(3)),
    Case("nn.Dropout, off", lambda: mlp(nn.Tanh(), nn.Dropout(0.5)), numbers(3), dropout="off"),
    Case("F.dropout, off", lambda: Net(lambda m, x: m.b(F.dropout(m.a(x), 0.5, m.training)), a=mlp(nn.Tanh()),
         b=nn.Linear(2, 2)), numbers(3), dropout="off"),
    Case("F.dropout, task's masks", lambda: Net(lambda m, x: m.b(F.dropout(m.a(x).tanh(), 0.5, m.training)),
         a=nn.Linear(3, 8), b=nn.Linear(8, 2)), numbers(3), dropout="task"),
    Case("nn.Dropout2d, task's masks", lambda: images(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.4), nn.Tanh(), features=16),
         numbers(1, 4, 4), dropout="task"),
    Case("Transformer, dropout, task's masks", lambda: Net(
        lambda m, x: m.out(m.t(m.e(x)).mean(1)), e=nn.Linear(3, 8), out=nn.Linear(8, 2),
        t=nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)), numbers(4, 3), dropout="task"),
    Case("noise from torch.randn_like", lambda: Net(
        lambda m, x: m.a(x + 0.1 * torch.randn_like(x)) if m.training else m.a(x), a=mlp(nn.Tanh())), numbers(3),
        dropout="task"),
    Case("noise in evaluation too", lambda: Net(lambda m, x: m.a(x + 0.1 * torch.randn_like(x)), a=mlp(nn.Tanh())),
         numbers(3), refused={"": "draws"}),
    Case("noise from numpy", lambda: Net(lambda m, x: m.a(x) * np.random.rand(), a=mlp(nn.Tanh())), numbers(3),
         refused={"": "draws"}),
    Case("buffer written in forward", lambda: Net(_written, a=mlp(nn.Tanh()), seen=torch.zeros(())), numbers(3),
         refused={"": "state"}),
    Case("attribute written in forward", lambda: Net(_remembered, a=mlp(nn.Tanh()), calls=0), numbers(3),
         refused={"": "state"}),
    Case("lazy layer", lambda: seq(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2)), numbers(3),
         refused={"": "has no shapes yet"}),
    Case("nothing to learn", lambda: still(mlp(nn.Tanh())), numbers(3), refused={"": "nothing to learn"}),
    Case("transformers: Bert", _bert, named(input_ids=tokens(5)), "cross_entropy", needs="transformers"),
    Case("transformers: Bert, attention mask", _bert, named(
        input_ids=tokens(5), attention_mask=lambda g, rows: padding(5)(g, rows).long()), "cross_entropy",
        refused=LOOP_ONLY, needs="transformers"),
    Case("torchvision: resnet18", _resnet, numbers(3, 32, 32), "cross_entropy", needs="torchvision"),
    Case("timm: ViT", _timm, numbers(3, 16, 16), "cross_entropy", needs="timm"),
]  # fmt: skip


class Reversal(torch.autograd.Function):
    """x, whose gradient changes sign (Ganin, Lempitsky 2015); in the form that torch's transforms do not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # noqa: ARG004
        return -g


class Squashed(torch.autograd.Function):
    """tanh, in the form that they take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


def _energy(m: Any, x: Tensor) -> Tensor:
    y: Tensor = torch.func.grad(lambda v: m.a(v).sum())(x)
    return y


def _rounded(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    y: Tensor = m.b(h + (h.round() - h).detach())
    return y


def _cached(m: Any, x: Tensor) -> Tensor:
    if m.scale is None:
        m.scale = torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)
    y: Tensor = m.a(x * m.scale)
    return y


def _cached_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    if m.scale is None:
        m.register_buffer("scale", torch.linspace(1, 2, x.shape[-1], dtype=x.dtype), persistent=False)
    y: Tensor = m.a(x * m.scale)
    return y


def _filled(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 4)
    out[:, :2], out[:, 2:] = m.a(x).tanh(), m.a(x).sin()
    return out


def _patches(m: Any, x: Tensor) -> Tensor:
    y: Tensor = F.fold(m.a(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2).tanh(), 4, 2, stride=2)
    return y


def _of_equal_length(m: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
    y: Tensor = m.out(m.r(packed)[1][-1])
    return y


def _with_empty_buffer(module: nn.Module, name: str) -> nn.Module:
    module.register_buffer(name, None, persistent=False)
    return module


def _biases_only(module: nn.Module) -> nn.Module:
    for name, p in module.named_parameters():
        p.requires_grad_("bias" in name)
    return module


UNUSUAL = [
    Case("autograd.Function, setup_context", lambda: Net(
        lambda m, x: m.b(Squashed.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), numbers(3)),
    Case("autograd.Function, older form", lambda: Net(
        lambda m, x: m.b(Reversal.apply(m.a(x)).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), numbers(3),
        refused=LOOP_ONLY),
    Case("branch on the data", lambda: Net(
        lambda m, x: (m.a(x) if x.sum() > 0 else m.b(x)).tanh(), a=nn.Linear(3, 2), b=nn.Linear(3, 2)), numbers(3),
        refused=LOOP_ONLY),
    Case("boolean indexing", lambda: Net(
        lambda m, x: m.a(x).tanh() + m.a(x)[x[:, 0] > 0].sum(), a=nn.Linear(3, 2)), numbers(3), refused=LOOP_ONLY),
    Case("GRU, packed sequence", lambda: Net(_of_equal_length, r=nn.GRU(3, 5, batch_first=True), out=nn.Linear(5, 2)),
         numbers(4, 3), refused=LOOP_ONLY),
    Case("Embedding with max_norm", lambda: seq(nn.Embedding(7, 4, max_norm=1.0), nn.Flatten(), nn.Linear(20, 3)),
         tokens(5), "cross_entropy", refused={"": "writes the parameter"}),
    Case("cdist", lambda: Net(lambda m, x: torch.cdist(m.a(x), m.p).square(), a=nn.Linear(3, 4), p=weights(5, 4)),
         numbers(3), refused={"2": "_cdist_backward"}),
    Case("gradient inside (torch.func)", lambda: Net(_energy, a=mlp(nn.Tanh())), numbers(3)),
    Case("straight-through rounding", lambda: Net(_rounded, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), numbers(3)),
    Case("cached constant", lambda: Net(_cached, a=nn.Linear(3, 2), scale=None), numbers(3)),
    Case("constant cached in a buffer", lambda: _with_empty_buffer(
        Net(_cached_in_a_buffer, a=nn.Linear(3, 2)), "scale"), numbers(3)),
    Case("outputs written into zeros", lambda: Net(_filled, a=nn.Linear(3, 2)), numbers(3)),
    Case("unfold, fold", lambda: Net(_patches, a=nn.Linear(4, 4)), numbers(1, 4, 4)),
    Case("solve, Cholesky", lambda: Net(
        lambda m, x: torch.linalg.solve(s := m.p @ m.p.t() + torch.eye(3, dtype=x.dtype), x.t()).t()
        @ torch.linalg.cholesky(s), p=weights(3, 3)), numbers(3)),
    Case("sort, topk", lambda: Net(
        lambda m, x: m.b(m.a(x).topk(3, 1)[0] * m.a(x).sort(1)[0][:, :3]), a=nn.Linear(3, 5), b=nn.Linear(3, 2)),
        numbers(3)),
    Case("messages on a graph", lambda: Net(
        lambda m, x: m.b(torch.zeros_like(h := m.a(x).tanh()).index_add(0, torch.arange(len(x)).flip(0) // 2, h)),
        a=nn.Linear(3, 4), b=nn.Linear(4, 2)), numbers(3)),
    Case("complex parameters", lambda: Net(
        lambda m, x: (x.to(torch.complex128) @ torch.view_as_complex(m.w)).abs(), w=weights(3, 2, 2)), numbers(3)),
    Case("torch.compile'd by the user", lambda: torch.compile(mlp(nn.Tanh()), backend="eager"), numbers(3),
         refused={"compiled": "trace a dynamo-optimized function"}),
    Case("biases alone are trained", lambda: _biases_only(mlp(nn.Tanh(), nn.Tanh())), numbers(3),
         frozen=("0.weight", "2.weight", "4.weight")),
    Case("all in evaluation mode", lambda: mlp(nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Tanh()).eval(), numbers(3)),
    Case("encoder's fast path, frozen", lambda: Net(
        lambda m, x: m.out(m.t(m.e(x)).mean(1)), e=nn.Linear(3, 8), out=nn.Linear(8, 2),
        t=still(nn.TransformerEncoder(encoder_layer(), 1))), numbers(4, 3)),
]  # fmt: skip
