"""Anyone's networks, by the dotted name of what makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from learners.importing import imported, is_path, line


@dataclass(frozen=True)
class Constructor:
    """Any class or function that gives an nn.Module, such as torchvision.models.resnet18 or timm.create_model.

    `target` is imported and called, so that a configuration with one is a program: run only your own.
    """

    target: str = "torchvision.models.resnet18"
    """Its dotted name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keywords that it is called with."""
    outputs: str = "num_classes"
    """Its keyword for the number of outputs."""
    inputs: str = ""
    """Its keyword for the number of input channels (in_chans, in_channels), if it has one."""
    head: str = ""
    """Its last layer, a linear one (torchvision's ResNets: fc), if that is to be named `head`, as prototypes and
    `adapts = ["head*"]` want it."""

    def __post_init__(self) -> None:
        for key in ("outputs", "inputs"):
            if getattr(self, key) in self.arguments:
                raise ValueError(f"arguments.{getattr(self, key)}: the task says this one, as {key} names it; drop it")

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        given = {self.outputs: outputs} | ({self.inputs: inputs[0]} if self.inputs else {})
        module = self._called(located(self.target), self.arguments | given)
        x = torch.randn(2, *inputs, generator=torch.Generator().manual_seed(0))
        y = self._tried(module, x)
        if not isinstance(y, Tensor) or y.shape != (2, outputs):
            seen = f"outputs of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"target={self.target!r} gives {seen} for two inputs: (2, {outputs}) wanted")
        if self.head not in ("", "head"):
            module = Headed(module, self.head)
            if not torch.allclose(self._tried(module, x), y, rtol=1e-4, atol=1e-5):
                raise ValueError(f"head={self.head!r} is not the last layer of {self.target}")
        return module

    def _called(self, make: Callable[..., object], keywords: dict[str, Any]) -> nn.Module:
        try:
            module = make(**keywords)
        except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            said = ", ".join(f"{k}={v!r}" for k, v in keywords.items())
            raise ValueError(f"target={self.target!r} called with {said}: {line(error)}{_keywords(make)}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"target={self.target!r} gives a {type(module).__name__}: an nn.Module wanted")
        return module

    def _tried(self, module: nn.Module, x: Tensor) -> Any:
        """Outputs in evaluation mode; every layer is in its own mode afterwards."""
        modes = [(m, m.training) for m in module.modules()]
        try:
            with torch.no_grad():
                return module.eval()(x)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"target={self.target!r} does not take the task's inputs of shape {tuple(x.shape[1:])}: {line(error)}"
            ) from error
        finally:
            for layer, mode in modes:
                layer.training = mode


class Headed(nn.Module):
    """A module whose last layer, linear and named `name` in it, is called after it and named `head`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        if name not in linear:
            raise ValueError(f"head={name!r}: one of its linear layers wanted ({', '.join(linear) or 'it has none'})")
        parent, _, key = name.rpartition(".")
        setattr(module.get_submodule(parent), key, nn.Identity())
        self.body, self.head = module, linear[name]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def located(name: str) -> Callable[..., object]:
    """The class or function of a dotted name. Raises ValueError for one that is not there or not to be called."""
    parts = name.split(".")
    if not is_path(name) and (len(parts) < 2 or not all(part.isidentifier() for part in parts)):
        raise ValueError(f"target={name!r}: a dotted name like torchvision.models.resnet18 wanted")
    found = imported(name, "target")
    if not callable(found):
        raise ValueError(f"target={name!r} is a {type(found).__name__}: a class or function wanted")
    made: Callable[..., object] = found
    return made


def _keywords(make: Callable[..., object]) -> str:
    """What `make` can be called with, for the end of a sentence."""
    try:
        names = list(inspect.signature(make).parameters)
    except ValueError:  # builtins may not say
        return ""
    return f" (its keywords: {', '.join(names)}; outputs, inputs name two of them)" if names else ""
