"""`functional`, which turns anyone's module into a function of its parameters."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from learners.base import Params
from learners.engine.derivative import transformed
from learners.engine.memory import channels_last
from learners.engine.tree import leaves, mapped
from learners.modules.draws import Drawing, Draws, Still
from learners.modules.normalisation import BATCH, BatchNorm, Normalising, Statistics, normalising
from learners.modules.places import cast_constants, copied, is_channels_last, known_by, slots_of, swapped, twin
from learners.modules.precision import Precision, cast, computing
from learners.modules.specialise import specialise
from learners.modules.trial import Findings, apart, called, differentiable_attention, tried

log = logging.getLogger("metafleet")

Inputs: TypeAlias = "Tensor | dict[str, Tensor]"
"""What a module is called with: one tensor, or keyword arguments."""

_REFUSED = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_OBSERVED = ("running_mean", "running_var")


class Functional:
    """A module as a pure function: `model(params, x)`.

    `params` holds every trainable parameter by name, as `params()` gives them, and may hold `running()`, the running
    statistics of BatchNorm layers, which otherwise are the module's own. Parameters with `requires_grad = False` and
    all other buffers are constants of the function.
    """

    def __init__(
        self, module: nn.Module, *, last: bool = False, quiet: bool = False, precision: Precision = "full",
        findings: Findings | None = None, summary: str | None = None,
    ) -> None:  # fmt: skip
        """`last`: whether it keeps images in channels-last memory; `quiet`: whether it never draws; `findings`: what a
        dry run has shown, where there was one; else there is one at its first call.
        """
        self.module, self.channels_last, self._quiet, self._findings = module, last, quiet, findings
        self.precision, self._summary = precision, summary
        self._norms = {name: m for name, m in module.named_modules() if isinstance(m, BatchNorm) and not m.constant}
        self._required = {name for name, p in module.named_parameters() if p.requires_grad}
        self._slots = slots_of(module)
        self._native = [f"{n!r} ({type(m).__name__})" for n, m in module.named_modules() if isinstance(m, nn.RNNBase)]
        self._still: Functional | None = None
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def params(self) -> Params:
        """Copies of the module's trainable parameters: the initial θ."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters() if v.requires_grad}

    def running(self) -> Params:
        """Copies of running means and variances, by name."""
        return {
            f"{name}.{key}": norm.get_buffer(key).clone() for name, norm in self._norms.items() for key in _OBSERVED
        }

    def constants(self) -> Params:
        """Parameters that are not trained, and buffers other than `running()`, by name."""
        running = {f"{name}.{key}" for name in self._norms for key in _OBSERVED}
        frozen = {k: v.detach() for k, v in self.module.named_parameters() if not v.requires_grad}
        return frozen | {k: v for k, v in self.module.named_buffers() if k not in running}

    def summary(self) -> str:
        """Number, bytes and hash of the constants as they were given, and the precision; "" where there is nothing to
        say.
        """
        if self._summary is None:
            self._summary = known_by(self.constants())
        return ", ".join(s for s in (self._summary, self.precision if self.precision != "full" else "") if s)

    @property
    def normalises(self) -> bool:
        """Whether a BatchNorm layer makes examples of a batch depend on each other."""
        return bool(self._norms)

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers in training; as long as there was no dry run, it may."""
        return not self._quiet and (self._findings is None or self._findings.draws)

    def to(self, device: str) -> Functional:
        """The same function on another device."""
        module = twin(self.module)
        if any(v.device != torch.device(device) for v in [*module.parameters(), *module.buffers()]):
            module = copied(self.module).to(device)
        there = Functional(module, last=self.channels_last, quiet=self._quiet, precision=self.precision,
                           findings=self._findings, summary=self._summary)  # fmt: skip
        there._dtype = self._dtype  # that of the constants by now
        return there

    def __call__(self, params: Params, x: Inputs, statistics: Statistics = BATCH, *, draws: Draws | None = None,
                 real: Tensor | None = None) -> Any:  # fmt: skip
        """Outputs for inputs [n, …], or a dictionary of keyword arguments, at `params`; entries of `params` that are
        not the module's are ignored. `draws`: what dropout and its kind take their random numbers from; without them
        the module is in evaluation mode. `real`: see `Normalising`.

        Raises ValueError where a parameter is missing, and at the first call for a module that is no function, or not
        a safe one (`trial.tried`).
        """
        return self._called(params, x, Normalising(statistics, real=real), draws)

    def observe(self, params: Params, x: Inputs, statistics: Statistics, real: Tensor | None = None) -> Params:
        """Mean and biased variance of what reaches each BatchNorm layer, under the names of `running()`."""
        return self.inspect(params, x, statistics, real)[1]

    def inspect(
        self, params: Params, x: Inputs, statistics: Statistics, real: Tensor | None = None
    ) -> tuple[Any, Params]:
        """Outputs, and what `observe` gives, of one forward pass; both can be differentiated."""
        how = Normalising(statistics, seen={}, real=real)
        y, seen = self._called(params, x, how, None), how.seen or {}
        moments = {name: seen[norm] for name, norm in self._norms.items() if norm in seen}
        return y, {f"{name}.{key}": v for name, pair in moments.items() for key, v in zip(_OBSERVED, pair, strict=True)}

    def features(self, params: Params, x: Inputs, statistics: Statistics = BATCH, *, draws: Draws | None = None,
                 real: Tensor | None = None) -> Tensor:  # fmt: skip
        """What reaches the layer named `head`, [n, d]. Raises ValueError for a module without one, or whose head is not
        linear.
        """
        self.try_out(x)  # not with the hook
        head = dict(self._flavour(draws).module.named_modules()).get("head")
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"features are what reaches a linear layer named head; {type(self.module).__name__} has none"
            )
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(params, x, statistics, draws=draws, real=real)
        finally:
            hook.remove()
        return cast(seen[0], self._theta_dtype(params))

    def widest(self, x: Inputs) -> int:
        """Bytes of the largest intermediate result for inputs x."""
        self.try_out(x)  # not with the hooks
        sizes = [v.nbytes for v in leaves(x)]
        inner = [m for m in self._flavour(None).module.modules() if not list(m.children())]
        hooks = [
            m.register_forward_hook(lambda _m, _i, out: sizes.extend(v.nbytes for v in leaves(out))) for m in inner
        ]
        try:
            with torch.no_grad():
                self(self.params(), x)
        finally:
            for hook in hooks:
                hook.remove()
        return max(sizes)

    def try_out(self, x: Inputs) -> None:
        """Run on inputs like x, unless it has been; raises ValueError as `trial.tried` does."""
        if self._findings is None:
            found = tried(self.module, x, quiet=self._quiet)
            if found.draws:
                still = tried(self._flavour(None).module, x, quiet=True)
                found = Findings(True, found.attends or still.attends)
            self._findings = found

    def _called(self, params: Params, x: Inputs, how: Normalising, draws: Draws | None) -> Any:
        if not self._required <= params.keys():
            raise ValueError(
                f"the model's parameter {min(self._required - params.keys())!r} is missing among {', '.join(params)}"
            )
        if self._native and transformed():
            raise ValueError(
                f"layer {self._native[0]} is recurrent and computes in its own way, which torch.vmap cannot batch: "
                "execution = 'loop' wanted"
            )
        self.try_out(x)
        self._fit(params)
        assert self._findings
        flavour = self._flavour(draws)
        if self.channels_last and not transformed():
            x = mapped(channels_last, x)
        theta, x = self._computed_in(params, x)
        with ExitStack() as stack:
            stack.enter_context(computing(self.precision, leaves(x)[0].device.type))
            stack.enter_context(normalising(how))
            if self._findings.attends:
                stack.enter_context(differentiable_attention())
            if self._findings.draws:
                stack.enter_context(Drawing(draws) if draws is not None else Still())
            stack.enter_context(swapped(flavour._slots, theta, flavour.channels_last))
            y = called(flavour.module, x)
        return y if self.precision == "full" else mapped(lambda v: cast(v, self._theta_dtype(params)), y)

    def _computed_in(self, params: Params, x: Inputs) -> tuple[Params, Inputs]:
        """θ and inputs in the dtype that the module computes in."""
        if self.precision != "bfloat16":
            return params, x
        theta = {k: cast(v, torch.bfloat16) if k in self._required else v for k, v in params.items()}
        return theta, mapped(lambda v: cast(v, torch.bfloat16), x)

    def _theta_dtype(self, params: Params) -> torch.dtype | None:
        return next((v.dtype for k, v in params.items() if k in self._required and v.is_floating_point()), self._dtype)

    def _flavour(self, draws: Draws | None) -> Functional:
        """This function in training; or in evaluation mode, where it draws otherwise and `draws` are not given."""
        if draws is not None or not self.draws:
            return self
        if self._still is None:
            self._still = Functional(twin(self.module).eval(), last=self.channels_last, quiet=True)
        return self._still

    def _fit(self, params: Params) -> None:
        """Constants take the dtype that the module computes in."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self._theta_dtype(params)
        if dtype is not None and dtype != self._dtype:
            self.summary()  # of the constants as they were given
            apart(lambda: cast_constants(self.module, self._slots, self._required, dtype))
            self._dtype, self._still = dtype, None


def functional(
    module: nn.Module, example: Inputs | None = None, *, dropout: Literal["task", "off"] = "task",
    precision: Precision = "full",
) -> Functional:  # fmt: skip
    """`module` as a pure function of its trainable parameters; the module itself is left as it is.

    Parameters with `requires_grad = False` are constants: they neither adapt nor train. Layers keep the mode they are
    in: BatchNorm in evaluation mode normalises by its running statistics, a constant too; in training mode by what the
    call says. It is replaced by ours (the log says so): torch's own gives silently wrong second-order gradients under
    some nestings of transforms, and knows no modes. A module whose weights are in channels-last memory
    (`module.to(memory_format=torch.channels_last)`) is kept there, which on a CPU is faster; another keeps torch's
    layout.

    dropout: "task" — masks, and whatever else the module draws in training mode, are a function of the task and the
    inner step, the same on any fleet, and off in evaluation (`learners.modules.draws`);  "off" — never.
    precision: see `Precision`; BatchNorm computes in float32 always.

    Raises ValueError for a module that draws otherwise or keeps state between calls, since an inner loop must be a
    function of its arguments; and for convolutions inside a `forward` that torch computes out of bounds. These show
    when the module runs: here, where an `example` of its inputs [n, …] (or keyword arguments) is given, else at its
    first call.
    """
    if dropout not in ("task", "off"):
        raise ValueError(f"dropout={dropout!r}: 'task' or 'off' wanted")
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is not one of {', '.join(get_args(Precision))}")
    module = copied(module)
    _check(module)
    last = any(is_channels_last(p) for p in module.parameters())
    module, replaced = specialise(module, last)
    if replaced:
        log.warning(
            "functional: replaced BatchNorm layers %s by metafleet's (same parameters, explicit modes)",
            ", ".join(replaced),
        )
    _tell(module)
    quiet = dropout == "off"
    model = Functional(module.eval() if quiet else module, last=last, quiet=quiet, precision=precision)
    if example is not None:
        model.try_out(example)
    return model


def _check(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if "/" in name:
            raise ValueError(f"layer {name!r}: a name without '/' wanted, which separates what learners add to θ")
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in layer._parameters.values()):
            raise ValueError(f"layer {name!r} ({type(layer).__name__}) has no shapes yet: run the module once before")
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"layer {name!r} ({layer.original_name}) is a torch.jit.ScriptModule, whose parameters nothing can "
                "stand in for: the module that it was made of wanted"
            )
        if isinstance(layer, _REFUSED):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) draws random numbers; remove it, or draw its samples in the "
                "task's data"
            )
        tracks = isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats
        if layer.training and (tracks or "SpectralNorm" in type(layer).__name__):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) keeps state between calls; an adapted model must be a "
                "function of its parameters (in evaluation mode, `.eval()`, it is one)"
            )
    if not any(p.requires_grad for p in module.parameters()) and next(module.parameters(), None) is not None:
        raise ValueError(f"no parameter of {type(module).__name__} has requires_grad: there is nothing to learn")


def _tell(module: nn.Module) -> None:
    fixed = [name for name, m in module.named_modules() if isinstance(m, BatchNorm) and m.constant]
    if fixed:
        log.warning(
            "functional: BatchNorm layers %s are in evaluation mode: their running statistics are constants",
            ", ".join(fixed),
        )
    frozen = [v for v in module.parameters() if not v.requires_grad]
    if frozen:
        log.info(
            "functional: %d parameters do not require gradients: constants of %d bytes",
            len(frozen), sum(v.nbytes for v in frozen),
        )  # fmt: skip
