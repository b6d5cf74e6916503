"""`functional`, which turns anyone's module into a function of its parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learners.base import Params
from learners.engine.derivative import transformed
from learners.engine.memory import channels_last
from learners.models import normalisation
from learners.models.convolution import PatchConv
from learners.models.normalisation import BatchNorm

log = logging.getLogger("metafleet")


_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


_STATEFUL = (nn.RNNBase, nn.modules.lazy.LazyModuleMixin)


class Functional:
    """A module as a pure function: `model(params, x)`.

    `params` holds every parameter by name, as `params()` gives them, and may hold `running()`, the running statistics
    of BatchNorm layers, which otherwise are the module's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._norms = {name: m for name, m in module.named_modules() if isinstance(m, normalisation.BatchNorm)}
        self._required = {name for name, _ in module.named_parameters()}
        self._names = self._required | {name for name, _ in module.named_buffers()}

    def params(self) -> Params:
        """Copies of the module's parameters: the initial θ."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    def running(self) -> Params:
        """Copies of running means and variances, by name."""
        return {
            f"{name}.{key}": norm.get_buffer(key).clone() for name, norm in self._norms.items() for key in ("running_mean", "running_var")
        }

    @property
    def normalises(self) -> bool:
        """Whether a BatchNorm layer makes examples of a batch depend on each other."""
        return bool(self._norms)

    def to(self, device: str) -> Functional:
        """The same function on another device."""
        return Functional(copy.deepcopy(self.module).to(device))

    def __call__(self, params: Params, x: Tensor, statistics: normalisation.Statistics = normalisation.BATCH) -> Tensor:
        """Outputs [n, …] for inputs [n, …] at `params`; entries that are not the module's are ignored.

        Raises ValueError where a parameter is missing.
        """
        if not self._required <= params.keys():
            raise ValueError(f"the model's parameter {min(self._required - params.keys())!r} is missing among {', '.join(params)}")
        for norm in self._norms.values():
            norm.statistics = statistics
        mine = {k: v for k, v in params.items() if k in self._names}
        y: Tensor = functional_call(self.module, mine, (x if transformed() else channels_last(x),))
        return y

    def observe(self, params: Params, x: Tensor, statistics: normalisation.Statistics) -> Params:
        """Mean and biased variance of what reaches each BatchNorm layer, under the names of `running()`."""
        return self.inspect(params, x, statistics)[1]

    def inspect(self, params: Params, x: Tensor, statistics: normalisation.Statistics) -> tuple[Tensor, Params]:
        """Outputs, and what `observe` gives, of one forward pass; both can be differentiated."""
        with self._recording():
            y = self(params, x, statistics)
            seen = {name: norm.seen for name, norm in self._norms.items()}
        return y, {
            f"{name}.{key}": value
            for name, pair in seen.items()
            for key, value in zip(("running_mean", "running_var"), pair or (), strict=True)
        }

    def features(self, params: Params, x: Tensor, statistics: normalisation.Statistics = normalisation.BATCH) -> Tensor:
        """What reaches the layer named `head`, [n, d]. Raises ValueError for a module without one, or whose head is not linear."""
        head = dict(self.module.named_modules()).get("head")
        if not isinstance(head, nn.Linear):
            raise ValueError(f"features are what reaches a linear layer named head; {type(self.module).__name__} has none")
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

    @contextmanager
    def _recording(self) -> Iterator[None]:
        for norm in self._norms.values():
            norm.record = True
        try:
            yield
        finally:
            for norm in self._norms.values():
                norm.record, norm.seen = False, None


def functional(module: nn.Module) -> Functional:
    """`module` as a pure function of its parameters; the module itself is left as it is.

    BatchNorm layers are replaced by ours, which says so in the log: torch's own gives silently wrong second-order
    gradients under some nestings of transforms, and knows no modes. Raises ValueError for layers that draw random
    numbers or keep other state between calls, since an inner loop must be a function of its arguments.
    """
    module = copy.deepcopy(module).train()
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module = nn.Sequential(module)
    replaced = specialise(module)
    for name, layer in module.named_modules():
        if isinstance(layer, _RANDOM) or (isinstance(layer, nn.MultiheadAttention) and layer.dropout):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) draws random numbers; remove it, or draw its mask in the task's data"
            )
        tracks = isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats
        if tracks or isinstance(layer, _STATEFUL) or "SpectralNorm" in type(layer).__name__:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) keeps state between calls; an adapted model must be a function of its parameters"
            )
    if replaced:
        log.warning("functional: replaced BatchNorm layers %s by metafleet's (same parameters, explicit modes)", ", ".join(replaced))
    return Functional(module)


def specialise(module: nn.Module) -> list[str]:
    """Swap layers of `module` in place for equal, faster ones; returns the names of replaced BatchNorm layers."""
    replaced = []
    for name, child in list(module.named_modules()):
        for key, layer in list(child.named_children()):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                setattr(child, key, BatchNorm.replacing(layer))
                replaced.append(f"{name}.{key}".lstrip("."))
            elif PatchConv.suits(layer):
                assert isinstance(layer, nn.Conv2d)
                setattr(child, key, PatchConv(layer))
    return replaced
