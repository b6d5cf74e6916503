"""Layers swapped for equal ones that are faster, or safe, or right under transforms."""

from __future__ import annotations

from torch import nn

from learners.modules.convolution import PatchConv, PointwiseConv, is_plain
from learners.modules.normalisation import BatchNorm
from learners.modules.recurrent import Recurrent


def specialise(module: nn.Module, channels_last: bool) -> tuple[nn.Module, list[str]]:
    """`module` with layers swapped in place, and the names of the BatchNorm layers among them.

    Parameters keep their names and values, a layer that stands in two places stays one, and one that something hangs on
    (hooks, reparametrisations) stays what it is. `channels_last`: whether images are kept in that memory format.
    """
    swapped: dict[nn.Module, nn.Module] = {}
    replaced = []

    def instead(layer: nn.Module, name: str) -> nn.Module:
        if layer not in swapped:
            swapped[layer] = _equal(layer, channels_last)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                replaced.append(name)
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
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        norm = BatchNorm.replacing(layer)
        _keep_hooks(layer, norm)
        return norm.train(layer.training)
    if PointwiseConv.suits(layer):
        return PointwiseConv(layer)  # type: ignore[arg-type]
    if channels_last and PatchConv.suits(layer):
        return PatchConv(layer)  # type: ignore[arg-type]
    if isinstance(layer, nn.RNNBase) and is_plain(layer, type(layer), {*layer._flat_weights_names}):
        return Recurrent(layer).train(layer.training)
    return layer


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """What hangs on the old layer hangs on the new one."""
    for name in (
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    ):  # fmt: skip
        setattr(new, name, getattr(old, name))
