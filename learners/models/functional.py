"""`functional`, which turns anyone's module into a function of its parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learners.base import Params
from learners.engine.derivative import transformed
from learners.engine.memory import channels_last
from learners.models.convolution import PatchConv, PointwiseConv, SafeCalls
from learners.models.normalisation import BATCH, BatchNorm, Normalising, Statistics, normalising

log = logging.getLogger("metafleet")

T = TypeVar("T")

_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_STATEFUL = (nn.RNNBase, nn.modules.lazy.LazyModuleMixin)
_OBSERVED = ("running_mean", "running_var")


class Functional:
    """A module as a pure function: `model(params, x)`.

    `params` holds every parameter by name, as `params()` gives them, and may hold `running()`, the running statistics
    of BatchNorm layers, which otherwise are the module's own.
    """

    def __init__(self, module: nn.Module, *, tried: bool = False) -> None:
        """`tried`: whether the module has run under `SafeCalls` before; else its first call does."""
        self.module, self._tried = module, tried
        self._norms = {name: m for name, m in module.named_modules() if isinstance(m, BatchNorm)}
        self._required = {name for name, _ in module.named_parameters()}
        self._names = self._required | {name for name, _ in module.named_buffers()}

    def params(self) -> Params:
        """Copies of the module's parameters: the initial θ."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    def running(self) -> Params:
        """Copies of running means and variances, by name."""
        return {
            f"{name}.{key}": norm.get_buffer(key).clone() for name, norm in self._norms.items() for key in _OBSERVED
        }

    @property
    def normalises(self) -> bool:
        """Whether a BatchNorm layer makes examples of a batch depend on each other."""
        return bool(self._norms)

    def to(self, device: str) -> Functional:
        """The same function on another device."""
        return Functional(copy.deepcopy(self.module).to(device), tried=self._tried)

    def __call__(self, params: Params, x: Tensor, statistics: Statistics = BATCH) -> Tensor:
        """Outputs [n, …] for inputs [n, …] at `params`; entries that are not the module's are ignored.

        Raises ValueError where a parameter is missing, and at the first call where a convolution is not safe
        (`SafeCalls`).
        """
        return self._called(params, x, Normalising(statistics))

    def observe(self, params: Params, x: Tensor, statistics: Statistics) -> Params:
        """Mean and biased variance of what reaches each BatchNorm layer, under the names of `running()`."""
        return self.inspect(params, x, statistics)[1]

    def inspect(self, params: Params, x: Tensor, statistics: Statistics) -> tuple[Tensor, Params]:
        """Outputs, and what `observe` gives, of one forward pass; both can be differentiated."""
        how = Normalising(statistics, seen={})
        y, seen = self._called(params, x, how), how.seen or {}
        moments = {name: seen[norm] for name, norm in self._norms.items() if norm in seen}
        return y, {f"{name}.{key}": v for name, pair in moments.items() for key, v in zip(_OBSERVED, pair, strict=True)}

    def features(self, params: Params, x: Tensor, statistics: Statistics = BATCH) -> Tensor:
        """What reaches the layer named `head`, [n, d]. Raises ValueError for a module without one, or whose head is not
        linear.
        """
        head = dict(self.module.named_modules()).get("head")
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"features are what reaches a linear layer named head; {type(self.module).__name__} has none"
            )
        self.try_out(x)  # not with the hook
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(params, x, statistics)
        finally:
            hook.remove()
        return seen[0]

    def widest(self, x: Tensor) -> int:
        """Bytes of the largest intermediate result for inputs x."""
        sizes = [x.nbytes]
        leaves = [m for m in self.module.modules() if not list(m.children())]
        hooks = [m.register_forward_hook(lambda _m, _i, out: sizes.append(out.nbytes)) for m in leaves]
        try:
            with torch.no_grad():
                self(self.params(), x)
        finally:
            for hook in hooks:
                hook.remove()
        return max(sizes)

    def try_out(self, x: Tensor) -> None:
        """Run once on inputs like x. Raises ValueError for a convolution whose gradient would leave its memory."""

        def run() -> None:
            like = next(self.module.parameters(), x)
            dtype = like.dtype if x.is_floating_point() else x.dtype
            with torch.no_grad(), SafeCalls():  # type: ignore[no-untyped-call]
                self.module(torch.zeros(x.shape, dtype=dtype, device=like.device))

        if not self._tried:
            _apart(run)
            self._tried = True

    def _called(self, params: Params, x: Tensor, how: Normalising) -> Tensor:
        if not self._required <= params.keys():
            raise ValueError(
                f"the model's parameter {min(self._required - params.keys())!r} is missing among {', '.join(params)}"
            )
        self.try_out(x)
        mine = {k: v for k, v in params.items() if k in self._names}
        with normalising(how):
            y: Tensor = functional_call(self.module, mine, (x if transformed() else channels_last(x),))
        return y


def _apart(run: Callable[[], T]) -> T:
    """`run()` in a thread of its own, which neither vmap's levels nor a tracer's modes reach."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def functional(module: nn.Module, example: Tensor | None = None) -> Functional:
    """`module` as a pure function of its parameters; the module itself is left as it is.

    BatchNorm layers are replaced by ours, which says so in the log: torch's own gives silently wrong second-order
    gradients under some nestings of transforms, and knows no modes. Raises ValueError for layers that draw random
    numbers or keep other state between calls, since an inner loop must be a function of its arguments; and for
    convolutions inside a `forward` that torch computes out of bounds. The latter show when the module runs: here, where
    an `example` of its inputs [n, …] is given, else at its first call.
    """
    module, replaced = specialise(copy.deepcopy(module).train())
    for name, layer in module.named_modules():
        if isinstance(layer, _RANDOM) or (isinstance(layer, nn.MultiheadAttention) and layer.dropout):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) draws random numbers; remove it, or draw its mask in the "
                "task's data"
            )
        tracks = isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats
        if tracks or isinstance(layer, _STATEFUL) or "SpectralNorm" in type(layer).__name__:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) keeps state between calls; an adapted model must be a "
                "function of its parameters"
            )
    if replaced:
        log.warning(
            "functional: replaced BatchNorm layers %s by metafleet's (same parameters, explicit modes)",
            ", ".join(replaced),
        )
    model = Functional(module)
    if example is not None:
        model.try_out(example)
    return model


def specialise(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """`module` with layers swapped in place for equal ones that are faster or safe, and the names of the BatchNorm
    layers among them.

    Parameters keep their names and values, and a layer that stands in two places stays one.
    """
    swapped: dict[nn.Module, nn.Module] = {}
    replaced = []

    def instead(layer: nn.Module, name: str) -> nn.Module:
        if layer not in swapped:
            swapped[layer] = _equal(layer)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                replaced.append(name)
        return swapped[layer]

    for name, parent in list(module.named_modules()):
        for key, layer in list(parent._modules.items()):
            if layer is not None:
                setattr(parent, key, instead(layer, f"{name}.{key}".lstrip(".")))
    return instead(module, "itself"), replaced


def _equal(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return BatchNorm.replacing(layer)
    if PointwiseConv.suits(layer):
        return PointwiseConv(layer)  # type: ignore[arg-type]
    if PatchConv.suits(layer):
        return PatchConv(layer)  # type: ignore[arg-type]
    return layer
