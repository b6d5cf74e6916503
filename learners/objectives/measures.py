"""Measures, and what losses and measures have in common: outputs, labels, padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Measure: TypeAlias = Callable[..., Tensor]
"""(output, target) or (output, target, mask) → scalar."""
IGNORED = -100
"""The label of positions that count neither in the cross-entropy nor in accuracy, as in torch."""


def accuracy(output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
    """Share of examples (and positions, but those labelled −100) whose largest output is the label's (or of the
    largest probability); outputs [n, C, …].
    """
    output = one_tensor(output, "accuracy")
    target = labels(output, target)
    truth = target.argmax(1) if target.is_floating_point() else target
    right = (output.argmax(1) == truth).to(output.dtype)
    counted = (truth != IGNORED).to(output.dtype)
    if mask is not None:
        counted = known(counted, mask)
    return torch.div((right * counted).sum(), counted.sum())


def binary_accuracy(output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
    """Share of labels whose output has the right sign."""
    output = same_shape(output, target, "accuracy")
    return mean(((output > 0) == (target > 0.5)).to(output.dtype), mask)


def f1(output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
    """2 TP / (2 TP + FP + FN) over all labels of the task; 0 where none is there and none is predicted."""
    output = same_shape(output, target, "f1")
    said, true = (output > 0).to(output.dtype), (target > 0.5).to(output.dtype)
    if mask is not None:
        said, true = known(said, mask), known(true, mask)
    return torch.div(2 * (said * true).sum(), (said.sum() + true.sum()).clamp(min=1))


def mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [n, …] over the examples that are there."""
    if mask is None:
        return each.mean()
    return torch.div(known(each, mask).sum(), mask.to(each.dtype).sum() * (each.numel() // each.shape[0]))


def one_tensor(output: Any, what: str) -> Tensor:
    """The tensor of outputs: itself, or the `logits` of Hugging Face's outputs."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{what} wants one tensor of outputs, the model gives a {type(output).__name__}: loss=callable (and "
            "measures) of your own wanted, which take it apart"
        )
    return output


def labels(output: Tensor, target: Tensor) -> Tensor:
    """Labels as torch wants them. Raises ValueError for targets that do not fit outputs [n, C, …]."""
    wanted = output.shape[:1] + output.shape[2:]
    if target.is_floating_point():
        if target.shape != output.shape:
            raise ValueError(
                f"targets are numbers of shape {tuple(target.shape)}: cross_entropy wants integer labels "
                f"{tuple(wanted)} for outputs {tuple(output.shape)}, or probabilities of the outputs' shape"
            )
        return target.to(output.dtype)
    if output.ndim < 2 or target.shape != wanted:
        raise ValueError(
            f"labels of shape {tuple(target.shape)} do not fit outputs of shape {tuple(output.shape)}: outputs "
            f"[n, classes, …] and labels [n, …] wanted"
        )
    return target.long()


def same_shape(output: Any, target: Tensor, what: str) -> Tensor:
    """The tensor of outputs. Raises ValueError for targets of another shape."""
    one = one_tensor(output, what)
    if one.shape != target.shape:
        raise ValueError(
            f"targets of shape {tuple(target.shape)} do not fit outputs of shape {tuple(one.shape)}: {what} wants "
            "one target for each output"
        )
    return one


def known(values: Tensor, mask: Tensor) -> Tensor:
    """Values [n, …], 0 for padding, whatever stood there."""
    return torch.where(mask.bool().view(-1, *(1 for _ in values.shape[1:])), values, 0)


def scalar(measure: Measure, output: Any, target: Any, mask: Tensor | None, name: str) -> Tensor:
    """What a callable makes of outputs and targets. Raises ValueError where that is no scalar tensor."""
    if mask is not None and not _takes_mask(measure):
        raise ValueError(
            f"{name}={called(measure)} takes (output, target), but tasks are padded: (output, target, mask) wanted, "
            "with mask [n] 0 for padding"
        )
    value = measure(output, target) if mask is None else measure(output, target, mask)
    if not isinstance(value, Tensor) or value.ndim:
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name}={called(measure)} gives {seen}: a scalar tensor wanted, the mean over examples")
    return value


def _takes_mask(measure: Measure) -> bool:
    try:
        parameters = inspect.signature(measure).parameters.values()
    except ValueError:  # built in, without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    third = positional[2].name if len(positional) > 2 else ""
    return third == "mask" or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def called(measure: str | Measure) -> str:
    """How a loss or measure is named."""
    return measure if isinstance(measure, str) else getattr(measure, "__qualname__", None) or repr(measure)
