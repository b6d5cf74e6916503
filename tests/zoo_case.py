"""What the zoo's modules are written with: a case, its inputs, and short forms of what people write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = "Tensor | dict[str, Tensor]"
Draw: TypeAlias = Callable[[torch.Generator, int], Inputs]
"""Inputs of a number of rows."""


@dataclass(frozen=True)
class Case:
    """A user's module, and what is wanted of it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Draw
    loss: Literal["mse", "cross_entropy"] | Callable[..., Tensor] = "mse"
    frozen: tuple[str, ...] = ()
    """Names that must not be in θ."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Part of the sentence wanted, by mode ("vmap") or order ("2"); "" stands for all."""
    dropout: Literal["task", "off"] | None = None
    """What `functional` is told; None: nothing."""
    needs: str = ""
    """A package that the suite does without."""

    def wanted(self, mode: str, order: int) -> str:
        """Part of the refusal that is wanted; "" where none is."""
        return next((said for key, said in self.refused.items() if key in ("", mode, str(order))), "")


LOOP_ONLY = {"vmap": "execution = 'loop'", "compiled": "execution = 'loop'"}
"""Task by task it runs, and what stops it under vmap says so."""


def numbers(*shape: int) -> Draw:
    """Standard normal inputs [rows, *shape]."""
    return lambda g, rows: torch.randn(rows, *shape, generator=g, dtype=torch.float64)


def tokens(length: int, of: int = 7) -> Draw:
    """Token ids [rows, length]."""
    return lambda g, rows: torch.randint(of, (rows, length), generator=g)


def named(**each: Draw) -> Draw:
    """Keyword arguments."""
    return lambda g, rows: {k: draw(g, rows) for k, draw in each.items()}


def padding(length: int) -> Draw:
    """1 for the first one to `length` places of a row, then 0."""
    return lambda g, rows: (
        torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)
    ).double()  # fmt: skip


class Net(nn.Module):
    """Members, and a `forward` that is given the module itself."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


def mlp(*activations: nn.Module) -> nn.Module:
    """3 → 8 → … → 2 with these in between."""
    hidden = [layer for k, a in enumerate(activations) for layer in (nn.Linear(8 if k else 3, 8), a)]
    return seq(*hidden, nn.Linear(8, 2))


def still(module: nn.Module) -> nn.Module:
    """Frozen: a constant, in evaluation mode."""
    return module.requires_grad_(False).eval()


def warmed(module: nn.Module, *shape: int) -> nn.Module:
    """A module that has run; a BatchNorm's running statistics are not those of a new one."""
    module(torch.randn(20, *shape) * 2 + 1)
    return module


def tied(a: nn.Module, b: nn.Module, name: str = "weight") -> nn.Module:
    """b, with a's parameter."""
    setattr(b, name, getattr(a, name))
    return b


def images(*layers: nn.Module, features: int, view: bool = False) -> nn.Module:
    """Layers, flattened by the module or by `view`, and a linear one."""
    body, head = nn.Sequential(*layers), nn.Linear(features, 3)
    if view:
        return Net(lambda m, x: m.head(_viewed(m.body(x))), body=body, head=head)
    return seq(body, nn.Flatten(), head)


def _viewed(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)
