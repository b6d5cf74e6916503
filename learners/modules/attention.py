"""`torch.nn.functional.multi_head_attention_forward` with a dropout of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Drop = Callable[[Tensor, float], Tensor]
"""(attention weights, p) → weights with dropout."""


def attention_with(
    drop: Drop, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """softmax(q kᵀ/√d + mask) with `drop` on it, times v, per head (Vaswani et al. 2017, §3.2); arguments, shapes
    [length, batch, width] (or without batch) and results as torch's.

    Raises ValueError for biases of keys, an added zero key, and static keys.
    """
    if bias_k is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ValueError(
            f"MultiheadAttention with bias_k, add_zero_attn or static keys, and dropout={dropout_p} or bfloat16: "
            "without these, or with dropout=0 in full precision, wanted"
        )
    batched = query.ndim == 3
    q, k, v = (x if batched else x.unsqueeze(1) for x in (query, key, value))
    biases: Any = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None, None)
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    heads = [_heads(F.linear(x, w, b), num_heads) for x, w, b in zip((q, k, v), weights, biases, strict=True)]
    scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(heads[0].shape[-1])  # [batch, heads, to, from]
    if attn_mask is not None:
        mask = _additive(attn_mask, scores)
        scores = scores + (mask.view(scores.shape) if mask.ndim == 3 else mask)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, scores)
        scores = scores + (padding if batched else padding.unsqueeze(0))[:, None, None, :]
    attention = drop(scores.softmax(-1), dropout_p if training else 0.0)
    mixed = (attention @ heads[2]).permute(2, 0, 1, 3).flatten(2)  # [to, batch, width]
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    if not batched:
        out, attention = out.squeeze(1), attention.squeeze(0)
    if not need_weights:
        return out, None
    return out, attention.mean(-3) if average_attn_weights else attention


def _heads(x: Tensor, heads: int) -> Tensor:
    """[length, batch, width] → [batch, heads, length, width / heads]."""
    return x.reshape(*x.shape[:-1], heads, -1).permute(1, 2, 0, 3)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """−∞ where a boolean mask forbids."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
