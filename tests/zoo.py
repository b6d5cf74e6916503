"""`python -m tests.zoo`: is MAML's gradient right through modules as people write them?

Each module of `tests.zoo_modules`, in each mode of execution and at both orders, against plain autograd in double
precision, written by hand over the user's own module: an inner loop whose steps are
`torch.autograd.grad(…, create_graph=True)`, with parameters put into every place where the module holds them. Printed
as a table of max|difference|/max|gradient|; below it, every refusal by its sentence, numbered. The exit code is 1
where an error is larger than 1e-9, a refusal was not wanted, or a wanted one did not come.

    python -m tests.zoo                                  # everything: forty minutes on a core
    python -m tests.zoo --modes loop vmap                # half a minute
    python -m tests.zoo --only "conv*" --modes compiled --backend inductor

"compiled" takes the backend aot_eager: the graph is traced by us, captured by dynamo and decomposed by AOTAutograd as
ever, and only the C++ (20 to 60 s for each graph) is left out. Modules with a star are compiled by inductor.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from learners.algorithms.maml import MAML
from learners.base import Params, pack, unpack
from learners.engine.execution import Execution, Mode
from learners.modules.draws import QUERY as DRAWS_OF_QUERY
from learners.modules.draws import Drawing, Draws
from learners.modules.functional import functional
from learners.objectives.supervised import KEY, Supervised
from learners.verbs import common_verbs
from tests.zoo_case import Case, Inputs
from tests.zoo_modules import CASES

TASKS, STEPS, RATE = 3, 2, 0.1
SUPPORT, QUERY = 5, 4  # rows
LIMIT = 1e-9
BY_INDUCTOR = ("MLP, tanh", "conv, BatchNorm, view", "MultiheadAttention", "GRU")
"""One of each kind of layer."""
Order = Literal[1, 2]
Task = dict[str, Any]
"""support_x, support_y, query_x, query_y; an x may be a dictionary."""


def loss_of(case: Case) -> Callable[..., Tensor]:
    """torch's own."""
    names = {"mse": F.mse_loss, "cross_entropy": lambda y, t: F.cross_entropy(getattr(y, "logits", y), t)}
    return names[case.loss] if isinstance(case.loss, str) else case.loss


def tasks_of(case: Case, module: nn.Module) -> list[Task]:
    """Three tasks, whose targets have the outputs' shape, and the key of their masks where there are any."""
    g = torch.Generator().manual_seed(1)
    keys = [{KEY: torch.tensor(11 + (k << 40))} if case.dropout == "task" else {} for k in range(TASKS)]
    return [_part(case, module, "support", SUPPORT, g) | _part(case, module, "query", QUERY, g) | key for key in keys]


def _part(case: Case, module: nn.Module, part: str, rows: int, generator: torch.Generator) -> Task:
    x = case.inputs(generator, rows)
    with torch.no_grad():
        y = called(module, x)
    y = getattr(y, "logits", y)
    y = y[0] if isinstance(y, tuple) else y["y"] if isinstance(y, dict) else y
    if case.loss == "cross_entropy":
        target = torch.randint(y.shape[1], (rows, *y.shape[2:]), generator=generator)
    else:
        target = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return {f"{part}_x": x, f"{part}_y": target}


def called(module: nn.Module, x: Inputs) -> Any:
    return module(**x) if isinstance(x, dict) else module(x)


@contextmanager
def holding(module: nn.Module, params: Params) -> Iterator[None]:
    """Inside, wherever the module holds one of its parameters it holds the tensor of that name."""
    names = {id(p): name for name, p in module.named_parameters()}
    places = [(m._parameters, key, p) for m in module.modules() for key, p in m._parameters.items() if p is not None]
    try:
        for place, key, p in places:
            if names[id(p)] in params:
                place[key] = params[names[id(p)]]
        yield
    finally:
        for place, key, p in places:
            place[key] = p


def by_hand(case: Case, module: nn.Module, tasks: list[Task], order: Order) -> Params:
    """Σ over tasks of ∇θ L_Q(φ_K(θ)), over what of the module requires a gradient."""
    theta = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters() if p.requires_grad}
    criterion = loss_of(case)

    def loss(params: Params, task: Task, part: str, step: int) -> Tensor:
        with holding(module, params), sdpa_kernel(SDPBackend.MATH), drawing(case, task, step):
            return criterion(called(module, task[f"{part}_x"]), task[f"{part}_y"])

    total = {k: torch.zeros_like(v) for k, v in theta.items()}
    for task in tasks:
        phi = theta
        for step in range(STEPS):
            grads = torch.autograd.grad(
                loss(phi, task, "support", step), list(phi.values()), create_graph=order == 2, materialize_grads=True
            )
            phi = {k: v - RATE * g for (k, v), g in zip(phi.items(), grads, strict=True)}
        found = torch.autograd.grad(
            loss(phi, task, "query", DRAWS_OF_QUERY), list(theta.values()), materialize_grads=True
        )
        total = {k: total[k] + g for k, g in zip(total, found, strict=True)}
    return total


@contextmanager
def drawing(case: Case, task: Task, step: int) -> Iterator[None]:
    """Inside, dropout multiplies by the masks that the task's key stands for; they are tested elsewhere, the gradient
    through them here.
    """
    with Drawing(Draws(task[KEY], step)) if case.dropout == "task" else nullcontext():
        yield


def flat(tasks: list[Task]) -> dict[str, Tensor]:
    """Stacked tasks, as workers get them."""
    parts = [{f"{k}/{n}" if n else k: v for k, d in t.items() for n, v in _leaves(d)} for t in tasks]
    return {k: torch.stack([torch.as_tensor(part[k]) for part in parts]) for k in parts[0]}


def _leaves(x: Any) -> list[tuple[str, Any]]:
    return list(x.items()) if isinstance(x, dict) else [("", x)]


@dataclass(frozen=True)
class Result:
    """One cell of the table."""

    error: float = float("nan")
    refusal: str = ""
    wanted: str = ""
    """Part of the refusal that was wanted."""
    absent: str = ""
    """Why the module could not be built: a package that is not there."""

    @property
    def bad(self) -> bool:
        if self.absent:
            return False
        if self.wanted or self.refusal:
            return not self.wanted or self.wanted not in self.refusal
        return not self.error <= LIMIT

    @property
    def sentence(self) -> str:
        """What the list below the table says; "" where a number says all."""
        missing = f"not refused, wanted: … {self.wanted} …" if self.wanted else ""
        return self.absent or self.refusal or missing


def compare(case: Case, mode: Mode, order: Order, backend: str) -> Result:
    """The product's gradient against the one by hand."""
    torch.manual_seed(0)
    wanted = case.wanted(mode, order)
    try:
        module = case.build().double()
    except (ImportError, RuntimeError) as error:  # an extension made for another torch raises the latter
        if not case.needs:
            raise
        return Result(absent=f"{case.needs} is not there, or does not fit this torch: {str(error).splitlines()[0]}")
    try:
        model = functional(module, **({} if case.dropout is None else {"dropout": case.dropout}))
        if case.dropout == "off":
            module.eval()
        tasks, theta = tasks_of(case, module), model.params()
        verb = common_verbs(MAML(RATE, STEPS, order), Supervised(model, case.loss), STEPS)["gradient"]
        got = unpack(Execution(mode, backend=backend).run(verb.run, pack(theta, {}), {}, flat(tasks)).total).params
    except Exception as refusal:  # whatever stops it is what the table is to show
        kind = "" if type(refusal) is ValueError else f"{type(refusal).__name__}: "
        return Result(refusal=" ".join(f"{kind}{refusal}".split()), wanted=wanted)
    if wanted:
        return Result(wanted=wanted)
    want = by_hand(case, module, tasks, order)
    if got.keys() != want.keys() or got.keys() & {*case.frozen}:
        return Result(refusal=f"θ holds {sorted({*got})}, wanted: {sorted({*want} - {*case.frozen})}")
    largest = max(float(v.abs().max()) for v in want.values())
    return Result(max(float((got[k] - want[k]).abs().max()) for k in want) / largest)


def table(cases: list[Case], modes: list[Mode], orders: list[Order], backend: str) -> int:
    """Print it; how many cells are bad."""
    rows = Table(box=None, pad_edge=False, title=f"max|difference|/max|gradient| of {len(cases)} modules")
    rows.add_column("module")
    for mode in modes:
        for order in orders:
            rows.add_column(f"{mode} {order}", justify="right")
    sentences: dict[str, int] = {}
    bad = 0
    for case in cases:
        star = not backend and case.name in BY_INDUCTOR and "compiled" in modes
        by = backend or ("inductor" if star else "aot_eager")
        cells = [_cell(compare(case, m, o, by), case, sentences) for m in modes for o in orders]
        rows.add_row(escape(case.name) + " *" * star, *(f"[red]{text}[/]" if wrong else text for text, wrong in cells))
        bad += sum(wrong for _, wrong in cells)
        print(f"{case.name}: {', '.join(text for text, _ in cells)}", file=sys.stderr, flush=True)
    console = Console(width=80, highlight=False)
    console.print(rows)
    for text, number in sentences.items():
        console.print(f"{number}. {escape(text)}")
    console.print(f"{bad} of {len(cases) * len(modes) * len(orders)} cells are wrong.")
    return bad


def _cell(result: Result, case: Case, sentences: dict[str, int]) -> tuple[str, bool]:
    """(text, whether it is bad); the sentence goes to the list."""
    if not result.sentence:
        return ("0" if result.error == 0 else f"{result.error:.0e}"), result.bad
    text = f"{'WRONG, ' if result.bad else ''}{case.name}: {result.sentence}"
    return f"see {sentences.setdefault(text, len(sentences) + 1)}", result.bad


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="*", choices=get_args(Mode), default=get_args(Mode))
    parser.add_argument("--orders", nargs="*", type=int, choices=get_args(Order), default=get_args(Order))
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of modules' names")
    parser.add_argument("--backend", default="", help="of all compiled ones: aot_eager, eager or inductor")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cases = [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in options.only)]
    sys.exit(bool(table(cases, options.modes, options.orders, options.backend)))


if __name__ == "__main__":
    main()
