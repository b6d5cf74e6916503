"""A short visit to the zoo (`python -m tests.zoo` is the whole of it): MAML's gradient through users' modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import zoo
from tests.zoo_case import Case, Net, mlp, numbers
from tests.zoo_modules import CASES

pytestmark = pytest.mark.kernels

BY_NAME = {case.name: case for case in CASES}
SHORT = (
    "conv, BatchNorm, view", "residual block, BatchNorm", "BatchNorm in two places", "tied embedding and decoder",
    "frozen layer", "frozen backbone with BatchNorm", "hooks around BatchNorm", "weight_norm, older, after a forward",
    "TransformerEncoderLayer", "LSTM, two layers, both directions", "GRU", "keyword inputs, key padding mask",
    "tuple of outputs", "F.dropout, task's masks",
)  # fmt: skip
REFUSED = ("spectral_norm, older, on a conv", "buffer written in forward", "noise from numpy", "lazy layer")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", SHORT)
def test_mamls_gradient_is_plain_autograds_over_the_users_own_module(name: str, mode: str, order: int) -> None:
    result = zoo.compare(BY_NAME[name], mode, order, "aot_eager")
    assert not result.sentence
    assert result.error <= zoo.LIMIT


@pytest.mark.parametrize("name", ["conv, BatchNorm, view", "GRU", "F.dropout, task's masks"])
def test_a_compiled_gradient_is_plain_autograds_too(name: str) -> None:
    result = zoo.compare(BY_NAME[name], "compiled", 2, "aot_eager")
    assert not result.sentence
    assert result.error <= zoo.LIMIT


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_is_refused_in_one_sentence(name: str, mode: str) -> None:
    result = zoo.compare(BY_NAME[name], mode, 2, "aot_eager")
    assert not result.bad, result.sentence
    assert ". " not in result.refusal


def test_the_zoo_sees_a_wrong_gradient_an_unwanted_refusal_and_a_missing_one(capsys: pytest.CaptureFixture) -> None:
    class Forgetful(nn.Linear):
        """Its copy, which is what the product works on, has another bias."""

        def __deepcopy__(self, memo: dict) -> nn.Linear:
            other = nn.Linear(self.in_features, self.out_features).to(self.weight)
            other.load_state_dict({"weight": self.weight, "bias": self.bias + 0.1})
            return other

    def refuses(m: Net, x: torch.Tensor) -> torch.Tensor:
        m.calls += 1
        return m.a(x) * m.calls

    cases = [
        Case("wrong", lambda: nn.Sequential(Forgetful(3, 8), nn.Tanh(), nn.Linear(8, 2)), numbers(3)),
        Case("unwanted", lambda: Net(refuses, a=nn.Linear(3, 2), calls=torch.zeros(())), numbers(3)),
        Case("missing", lambda: mlp(nn.Tanh()), numbers(3), refused={"vmap": "cannot"}),
        Case("right", lambda: mlp(nn.Tanh()), numbers(3), refused={"compiled": "cannot"}),
    ]
    assert zoo.table(cases, ["loop", "vmap"], [2], "") == 2 + 2 + 1
    printed = capsys.readouterr().out
    assert "missing: not refused, wanted: … cannot …" in " ".join(printed.split())
    assert "5 of 8 cells are wrong." in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_reference_tells_orders_and_masks_apart() -> None:
    """Else the numbers above would say little."""
    case = BY_NAME["F.dropout, task's masks"]
    torch.manual_seed(0)
    module = case.build().double()
    tasks = zoo.tasks_of(case, module)
    first, second = (zoo.by_hand(case, module, tasks, order) for order in (1, 2))
    others = zoo.by_hand(case, module, [task | {zoo.KEY: task[zoo.KEY] + 1} for task in tasks], 2)
    for other in (first, others):
        assert max(float((other[k] - second[k]).abs().max()) for k in second) > 1e-3
