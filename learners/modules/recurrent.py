"""Recurrent layers by their cells where torch's own kernels do not go: under vmap, compiled, and with dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from learners.engine.derivative import transformed

State = tuple[Tensor, ...]
"""(h,) of RNN and GRU, (h, c) of LSTM; each [batch, hidden]."""


class Recurrent(nn.Module):
    """nn.RNN, nn.GRU or nn.LSTM: the layer itself, or the same equations step by step (torch's documentation of each).

    Torch's GRU has no batching rule, and dropout between layers would draw from torch's generator.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        self._shape = [layer]  # in a list: its parameters are this module's, by the same names

    @property
    def layer(self) -> nn.RNNBase:
        """The layer that this one stands for."""
        return self._shape[0]

    def forward(self, x: Any, state: Any = None) -> Any:
        layer = self.layer
        drops = layer.dropout > 0 and layer.num_layers > 1 and self.training
        if not transformed() and not drops:
            return self._native(x, state)
        if isinstance(x, PackedSequence):
            raise ValueError(
                f"{type(layer).__name__} on a PackedSequence under vmap, or with dropout: padded sequences wanted "
                "(or execution = 'loop' and dropout 0)"
            )
        return self._by_cells(x, state)

    def _native(self, x: Any, state: Any) -> Any:
        before = dict(self.layer._parameters)
        self.layer._parameters.update(self._parameters)
        try:
            return self.layer.train(self.training)(x, state)
        finally:
            self.layer._parameters.update(before)

    def _by_cells(self, x: Tensor, state: Any) -> Any:
        layer, lstm = self.layer, isinstance(self.layer, nn.LSTM)
        batched = x.ndim == 3
        x = x if batched else x.unsqueeze(1 - layer.batch_first)
        x = x.transpose(0, 1) if layer.batch_first else x  # [length, batch, inputs]
        given: list[Tensor] = [] if state is None else list(state) if lstm else [state]
        given = [s if batched else s.unsqueeze(1) for s in given]
        sides = 2 if layer.bidirectional else 1
        ends: list[State] = []
        for level in range(layer.num_layers):
            if level and layer.dropout:
                x = F.dropout(x, layer.dropout, self.training)
            outputs = []
            for side in range(sides):
                at = level * sides + side
                y, end = self._along(x, level, side, tuple(s[at] for s in given))
                outputs.append(y)
                ends.append(end)
            x = torch.cat(outputs, -1)
        last = [torch.stack(part) for part in zip(*ends, strict=True)]
        if not batched:
            x, last = x.squeeze(1), [s.squeeze(1) for s in last]
        elif layer.batch_first:
            x = x.transpose(0, 1)
        return x, tuple(last) if lstm else last[0]

    def _along(self, x: Tensor, level: int, side: int, state: State) -> tuple[Tensor, State]:
        """One layer in one direction: outputs [length, batch, hidden] and the last state."""
        layer, suffix = self.layer, f"l{level}" + "_reverse" * side
        w_x, w_h, b_x, b_h, project = (
            self._parameters.get(f"{name}_{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        )
        assert w_x is not None
        assert w_h is not None
        if not state:
            wide = x.new_zeros(x.shape[1], layer.hidden_size)
            state = (x.new_zeros(x.shape[1], layer.proj_size) if project is not None else wide, wide)
        from_x = F.linear(x, w_x, b_x)
        steps = range(len(x) - 1, -1, -1) if side else range(len(x))
        out: dict[int, Tensor] = {}
        for t in steps:
            state = self._cell(from_x[t], F.linear(state[0], w_h, b_h), state)
            if project is not None:
                state = (F.linear(state[0], project), *state[1:])
            out[t] = state[0]
        return torch.stack([out[t] for t in range(len(x))]), state

    def _cell(self, x: Tensor, h: Tensor, state: State) -> State:
        if isinstance(self.layer, nn.LSTM):
            i, f, g, o = (x + h).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        if isinstance(self.layer, nn.GRU):
            (r_x, z_x, n_x), (r_h, z_h, n_h) = x.chunk(3, -1), h.chunk(3, -1)
            z = torch.sigmoid(z_x + z_h)
            return ((1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * state[0],)
        squash = torch.tanh if self.layer.nonlinearity == "tanh" else torch.relu
        return (squash(x + h),)
