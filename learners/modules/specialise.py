"""Layers swapped for equal ones that are faster, or safe, or right under transforms."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from learners.modules.convolution import PatchConv, PointwiseConv, is_plain
from learners.modules.normalisation import BatchNorm
from learners.modules.recurrent import Recurrent

log = logging.getLogger("metafleet")

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
RECURRENT = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


def specialise(module: nn.Module, channels_last: bool) -> tuple[nn.Module, list[str]]:
    """`module` with layers swapped in place, and the names of the BatchNorm layers among them.

    Parameters keep their names and values, a layer that stands in two places stays one, and one that something hangs on
    (hooks, reparametrisations), or that has a `forward` of its own, stays what it is. `channels_last`: whether images
    are kept in that memory format.
    """
    swapped: dict[nn.Module, nn.Module] = {}
    replaced = []

    def instead(layer: nn.Module, name: str) -> nn.Module:
        if layer not in swapped:
            swapped[layer] = _equal(layer, channels_last)
            if isinstance(swapped[layer], BatchNorm) and swapped[layer] is not layer:
                replaced.append(name)
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.track_running_stats:
                layer.track_running_stats = False
                log.warning(
                    "functional: layer %r (%s) computes in its own way: it normalises by each batch, whatever "
                    "objective.norm says, and its running statistics are not used", name, type(layer).__name__,
                )  # fmt: skip
            elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                layer.sparse = False  # the same function, with a gradient that can be differentiated
        return swapped[layer]

    for name, parent in list(module.named_modules(remove_duplicate=True)):
        for key, layer in list(parent._modules.items()):
            if layer is not None:
                parent._modules[key] = instead(layer, f"{name}.{key}".lstrip("."))
    module = instead(module, "itself")
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.channels_last = channels_last
    return module, replaced


def _equal(layer: nn.Module, channels_last: bool) -> nn.Module:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and _is_as(layer, BATCH_NORMS):
        norm = BatchNorm.replacing(layer)
        _keep_hooks(layer, norm)
        return norm.train(layer.training)
    if PointwiseConv.suits(layer):
        return PointwiseConv(layer)  # type: ignore[arg-type]
    if channels_last and PatchConv.suits(layer):
        return PatchConv(layer)  # type: ignore[arg-type]
    plain = isinstance(layer, nn.RNNBase) and is_plain(layer, type(layer), {*layer._flat_weights_names})
    if isinstance(layer, nn.RNNBase) and plain and _is_as(layer, RECURRENT):
        return Recurrent(layer).train(layer.training)
    return layer


def _is_as(layer: nn.Module, forwards: tuple[Callable[..., Any], ...]) -> bool:
    """Whether a layer computes as torch's own does: with its `forward`, and of parameters as they are."""
    return type(layer).forward in forwards and not hasattr(layer, "parametrizations")


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """What hangs on the old layer hangs on the new one."""
    for name in (
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    ):  # fmt: skip
        setattr(new, name, getattr(old, name))
