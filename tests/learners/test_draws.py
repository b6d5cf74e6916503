"""Dropout and its kind: masks that belong to the task, the inner step and the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.algorithms.maml import MAML
from learners.base import Data
from learners.engine.execution import Execution
from learners.modules.draws import Draws
from learners.modules.functional import functional
from learners.objectives.supervised import KEY, Supervised
from learners.verbs import common_verbs

N = 10**6


def draws(key: int, step: int = 0) -> Draws:
    return Draws(torch.tensor(key), step)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance_of_a_million_masks(p: float) -> None:
    mask = draws(12345).kept(p, torch.empty(N, dtype=torch.float64))
    # A binomial mean of n draws has standard deviation √(pq/n); five of them.
    assert abs(float(mask.mean()) - (1 - p)) < 5 * (p * (1 - p) / N) ** 0.5
    fourth = p * (1 - p) * (1 - 3 * p * (1 - p))  # central moment of a Bernoulli variable
    spread = ((fourth - (p * (1 - p)) ** 2) / N) ** 0.5
    assert abs(float(mask.var()) - p * (1 - p)) < 5 * spread + 5 / N


def test_words_are_uniform_in_every_bit_and_in_pairs() -> None:
    words = draws(99).words(torch.Size([N]))
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32
    bits = torch.stack([(words >> b & 1).double() for b in range(32)])
    assert float((bits.mean(1) - 0.5).abs().max()) < 5 * 0.5 / N**0.5
    correlation = torch.corrcoef(bits) - torch.eye(32).double()
    assert float(correlation.abs().max()) < 5.5 / N**0.5
    neighbours = (words[:-1] >> 16) * 2**4 // 2**16 * 16 + (words[1:] >> 16) * 2**4 // 2**16  # 16 × 16 cells
    counts = torch.bincount(neighbours, minlength=256).double()
    chi_squared = float(((counts - (N - 1) / 256) ** 2 / ((N - 1) / 256)).sum())
    assert 150 < chi_squared < 375  # 255 degrees of freedom: mean 255, deviation 22.6


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (draws(1), draws(2)), (draws(2**40 + 7), draws(7)), (draws(5, 0), draws(5, 1)), (draws(5, -1), draws(5, 0)),
        (draws(2**61), draws(2**61 + 1)), (draws(5), draws(5, 0)),
    ],
)  # fmt: skip
def test_masks_of_two_tasks_steps_and_calls_are_independent(a: Draws, b: Draws) -> None:
    if (int(a.key), a.step) == (int(b.key), b.step):
        b.words(torch.Size([1]))  # the second call of the same step
    x, y = (d.kept(0.5, torch.empty(N, dtype=torch.float64)) for d in (a, b))
    together = float(((x == 1) & (y == 1)).double().mean())
    assert abs(together - 0.25) < 5 * (0.25 * 0.75 / N) ** 0.5
    for shift in (1, 2, 64, 4096):  # nor is one the other, moved
        moved = float((x == y.roll(shift)).double().mean())
        assert abs(moved - 0.5) < 5 * 0.5 / N**0.5


def test_normal_draws_have_a_normals_moments() -> None:
    z = draws(3).normal(torch.empty(N, dtype=torch.float64))
    assert abs(float(z.mean())) < 5 / N**0.5
    assert abs(float((z**2).mean()) - 1) < 5 * (2 / N) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / N) ** 0.5


class Net(nn.Module):
    """What drops, in the ways people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.head = nn.Linear(3, 16), nn.Dropout(0.4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.drop(torch.tanh(self.a(x))), 0.2, self.training)
        if self.training:  # stochastic depth
            keep = h.new_empty(h.shape[0], 1).bernoulli_(0.8)
            h = h * keep.div_(0.8)
        y: Tensor = self.head(h)
        return y


def tasks(count: int, keys: bool = True) -> Data:
    torch.manual_seed(5)
    data = {
        f"{part}_{kind}": torch.randn(count, 6, width, dtype=torch.float64)
        for part in ("support", "query")
        for kind, width in (("x", 3), ("y", 2))
    }
    return data | {KEY: torch.arange(100, 100 + count)} if keys else data


def gradient(data: Data, mode: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = functional(Net().double(), torch.zeros(6, 3).double())
    verb = common_verbs(MAML(0.1, 2), Supervised(model, "mse"), 1)["gradient"]
    at = {f"params/{k}": v for k, v in model.params().items()}
    return Execution(mode, backend="aot_eager").run(verb.run, at, {}, data).total  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["vmap", "compiled"])
def test_the_masks_are_the_same_in_every_mode(mode: str) -> None:
    data = tasks(3)
    torch.testing.assert_close(gradient(data, mode), gradient(data, "loop"), rtol=1e-10, atol=1e-13)


def test_a_tasks_masks_do_not_depend_on_its_company() -> None:
    data = tasks(3)
    whole = gradient(data, "loop")
    parts = [gradient({k: v[i : i + 1] for k, v in data.items()}, "loop") for i in range(3)]
    for k, v in whole.items():
        torch.testing.assert_close(v, parts[0][k] + parts[1][k] + parts[2][k], rtol=1e-12, atol=1e-14)
    assert not torch.equal(gradient(data | {KEY: data[KEY] + 1}, "loop")["params/a.weight"], whole["params/a.weight"])


def test_inverted_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    model = functional(nn.Sequential(nn.Dropout(0.25), nn.Linear(4, 4)), torch.ones(2, 4))
    identity = {"1.weight": torch.eye(4), "1.bias": torch.zeros(4)}
    x = torch.ones(50_000, 4)
    torch.testing.assert_close(model(identity, x), x, rtol=0, atol=0)
    dropped = model(identity, x, draws=draws(1))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(dropped.mean()) - 1) < 5 * (1 / 3 / 200_000) ** 0.5


def test_dropout_can_be_off() -> None:
    model = functional(Net(), torch.zeros(6, 3), dropout="off")
    assert not model.draws
    x = torch.randn(6, 3)
    torch.testing.assert_close(model(model.params(), x, draws=draws(1)), model(model.params(), x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="dropout='on': 'task' or 'off' wanted"):
        functional(Net(), dropout="on")  # type: ignore[arg-type]


def test_the_key_is_drawn_with_a_training_task_only() -> None:
    data = {"support_x": np.zeros((6, 3)), "support_y": np.zeros((6, 2))}
    verbs = common_verbs(MAML(), Supervised(functional(Net(), torch.zeros(6, 3)), "mse"), 1)
    drawing = [verbs[name].draw for name in ("gradient", "evaluate")]
    drawn = [draw(data, np.random.default_rng(1)) for draw in drawing if draw is not None]
    assert KEY in drawn[0]
    assert KEY not in drawn[1]
    plain = common_verbs(MAML(), Supervised(functional(nn.Linear(3, 2), torch.zeros(6, 3)), "mse"), 1)
    assert KEY not in plain["gradient"].draw(data, np.random.default_rng(1))  # type: ignore[misc]


@pytest.mark.parametrize("need", [True, False])
def test_attention_with_dropout_is_torchs_but_for_the_masks(need: bool) -> None:
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True).double()
    mask, padding = torch.rand(5, 5) > 0.7, torch.zeros(3, 5, dtype=torch.bool)
    mask.fill_diagonal_(False)
    padding[:, -1] = True

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need)[0]
            return y

    x = torch.randn(3, 5, 8).double()
    model = functional(Wrapped(), x)
    torch.testing.assert_close(model(model.params(), x), layer.eval()(x, x, x, padding, need, mask)[0])
    # The mean over many masks is linear in them: without dropout's output.
    outputs = torch.stack([model(model.params(), x, draws=draws(k)) for k in range(4000)])
    apart = (outputs.mean(0) - model(model.params(), x)) / (outputs.std(0) / 4000**0.5 + 1e-12)
    assert float(apart.abs().max()) < 5
    assert float(outputs.std(0).max()) > 0.01


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_recurrent_layers_keeps_the_mean_of_what_is_dropped(kind) -> None:
    torch.manual_seed(1)
    layer = kind(3, 4, 2, dropout=0.5).double()
    model = functional(layer, torch.zeros(5, 2, 3).double())
    x = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(model(model.params(), x)[0], layer.eval()(x)[0])
    a, b = (model(model.params(), x, draws=draws(k))[0] for k in (1, 2))
    assert not torch.allclose(a, b)
    torch.testing.assert_close(model(model.params(), x, draws=draws(1))[0], a, rtol=0, atol=0)
