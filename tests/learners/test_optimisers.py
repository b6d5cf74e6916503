"""Optimisers against torch's own and hand-computed numbers; schedules; clipping."""

from __future__ import annotations

import pytest
import torch

from learners.algorithms.reptile import minibatches
from learners.engine.optimisers import SGD, Adam, clip_by_norm, clip_by_value, scheduled


def start(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([value], dtype=torch.float64)}


@pytest.mark.parametrize(
    ("style", "wanted"),
    [
        ("torch", (1.9990000000033334, 1.9980005001317276, 1.997001500468808)),
        ("tf1", (1.9990000001054093, 1.9980005003049734, 1.9970015006995274)),
    ],
)
def test_adam_without_momentum_takes_the_published_steps(style, wanted) -> None:
    # f'(x) = 3(x − 1) from x = 2, rate 1e-3: the two placements of ε differ in the tenth digit.
    optimiser = Adam(beta1=0.0, style=style)
    params = start(2.0)
    state = optimiser.init(params)
    for value in wanted:
        params, state = optimiser.update(params, {"x": 3 * (params["x"] - 1)}, state, 1e-3)
        assert params["x"].item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("style", "wanted"), [("torch", 0.9990909090909091), ("tf1", 0.9997597469266479)])
def test_a_tiny_gradient_shows_where_epsilon_stands(style, wanted) -> None:
    optimiser = Adam(beta1=0.0, style=style)
    params, _ = optimiser.update(start(1.0), start(1e-7), optimiser.init(start(1.0)), 1e-3)
    assert params["x"].item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("ours", [SGD(), SGD(momentum=0.9), Adam(), Adam(beta1=0.5, eps=1e-3)])
def test_every_optimiser_follows_torchs_own(ours) -> None:
    x = torch.linspace(-1, 2, 5, dtype=torch.float64).requires_grad_()
    if isinstance(ours, SGD):
        theirs = torch.optim.SGD([x], lr=0.01, momentum=ours.momentum)
    else:
        theirs = torch.optim.Adam([x], lr=0.01, betas=(ours.beta1, ours.beta2), eps=ours.eps)
    params = {"x": x.detach().clone()}
    state = ours.init(params)
    for _ in range(20):
        theirs.zero_grad()
        (x**4).sum().backward()
        theirs.step()
        params, state = ours.update(params, {"x": 4 * params["x"] ** 3}, state, 0.01)
    torch.testing.assert_close(params["x"], x.detach(), rtol=0, atol=1e-12)


def test_reptiles_rate_falls_linearly_to_zero() -> None:
    assert [scheduled("linear", 1.0, 0.0, i, 4) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_cosine_schedule_is_half_way_at_half_time() -> None:
    assert scheduled("cosine", 1.0, 0.2, 50, 100) == pytest.approx(0.6)
    assert scheduled("cosine", 1.0, 0.2, 500, 100) == pytest.approx(0.2)
    assert scheduled("constant", 1.0, 0.2, 50, 100) == 1.0


def test_clipping_bounds_entries_or_norm_and_leaves_small_gradients() -> None:
    g = {"x": torch.tensor([3.0, -4.0])}
    assert clip_by_value(g, 3.5)["x"].tolist() == [3.0, -3.5]
    torch.testing.assert_close(clip_by_norm(g, 1.0)["x"], torch.tensor([0.6, -0.8]))
    assert clip_by_norm(g, 10.0)["x"].tolist() == [3.0, -4.0]


def test_minibatches_use_every_example_equally_often() -> None:
    import numpy as np

    rows = minibatches(np.arange(10), 4, 5, np.random.default_rng(0))
    assert rows.shape == (5, 4)
    assert np.bincount(rows.ravel(), minlength=10).tolist() == [2] * 10
    assert sorted(rows.ravel()[:10]) == list(range(10))
