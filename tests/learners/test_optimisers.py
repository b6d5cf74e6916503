"""Optimisers against torch's own and hand-computed numbers; schedules; clipping."""

from __future__ import annotations

import pytest
import torch

from cluster.record.checkpoint import State
from learners.algorithms.reptile import minibatches
from learners.base import Meta
from learners.engine.conjugate_gradient import conjugate_gradient
from learners.engine.derivative import transforms
from learners.engine.optimisers import SGD, Adam, clip_by_norm, clip_by_value, scheduled
from learners.outer.descent import Descent, Group


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


NAMES = ("body.weight", "body.bias", "head.weight")


def torchs(name: str, groups: list[dict[str, object]], **options: float | bool) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    return kind(groups, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {"weight_decay": 0.1}), ("adamw", {"weight_decay": 0.1}), ("adamw", {"weight_decay": 0.0}),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.9}), ("sgd", {"momentum": 0.9, "nesterov": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grouped", [False, True])
def test_outer_optimisers_with_decay_and_groups_are_torchs(name: str, options: dict, grouped: bool) -> None:
    theta = {k: torch.linspace(-1, 2, 3 + i, dtype=torch.float64) for i, k in enumerate(NAMES)}
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    rates = {"head.weight": {"lr": 0.05}, "body.bias": {"weight_decay": 0.0}} if grouped else {}
    theirs = torchs(name, [{"params": [p], **rates.get(k, {})} for k, p in leaves.items()], lr=0.01, **options)
    groups = (Group("head.*", lr=0.05), Group("*.bias", weight_decay=0.0)) if grouped else ()
    ours = Descent(name, 0.01, groups=groups, **options)  # type: ignore[arg-type]
    meta = Meta(theta, {})
    state = ours.init(meta)
    for _ in range(30):
        theirs.zero_grad()
        sum((p**4).sum() for p in leaves.values()).backward()  # type: ignore[union-attr]
        theirs.step()
        mean = {f"params/{k}": 4 * p**3 for k, p in meta.params.items()}
        meta, state, _ = ours.apply(meta, state, mean, 1.0)
    assert list(meta.params) == list(NAMES)
    torch.testing.assert_close(meta.params, {k: p.detach() for k, p in leaves.items()}, rtol=0, atol=1e-12)


def test_groups_keep_their_rates_in_proportion_under_a_schedule_and_rates_that_are_learned_do_not_decay() -> None:
    theta = {k: torch.ones(2, dtype=torch.float64) for k in ("a", "b", "rates/a")}
    outer = Descent("sgd", 0.1, "linear", 0.0, horizon=4, weight_decay=0.5, groups=(Group("b", lr=0.3),))
    meta = Meta(theta, {})
    state = outer.init(meta)
    for step in range(3):
        before = meta.params
        meta, state, _ = outer.apply(meta, state, {f"params/{k}": torch.ones_like(v) for k, v in theta.items()}, 1.0)
        left = 1 - step / 4
        for k, rate, decay in (("a", 0.1, 0.5), ("b", 0.3, 0.5), ("rates/a", 0.1, 0.0)):
            wanted = before[k] - rate * left * (1 + decay * before[k])
            torch.testing.assert_close(meta.params[k], wanted, rtol=0, atol=1e-12)


def test_the_first_group_that_matches_counts_and_patterns_without_a_stroke_leave_learned_rates_alone() -> None:
    names = ("head.bias", "head.weight", "alpha/head.weight")
    theta = {k: torch.ones(1, dtype=torch.float64) for k in names}
    ones = {f"params/{k}": v for k, v in theta.items()}

    def moved(*groups: Group) -> list[float]:
        outer = Descent("sgd", 0.25, groups=groups)
        meta, _, _ = outer.apply(Meta(theta, {}), outer.init(Meta(theta, {})), ones, 1.0)
        return [1 - float(meta.params[k]) for k in names]

    assert moved(Group("*.bias", lr=0.125), Group("*head*", lr=0.5)) == [0.125, 0.5, 0.25]
    assert moved(Group("*", lr=0.5)) == [0.5, 0.5, 0.25]
    assert moved(Group("alpha/*", lr=0.5)) == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("lr", [0.01, 0.0])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_rate_of_0_freezes_whatever_the_schedule_and_leaves_the_norm_to_what_moves(name: str, lr: float) -> None:
    theta = {k: torch.linspace(1, 2, 3, dtype=torch.float64) for k in NAMES}
    mean = {f"params/{k}": 5 * v for k, v in theta.items()}
    groups = (Group("body.*", lr=0.0), Group("head.*", lr=0.1))
    outer = Descent(name, lr, "linear", 0.5, horizon=8, clip_norm=0.3, weight_decay=0.1, groups=groups)
    metas = [Meta(theta, {})]
    state = outer.init(metas[0])
    for _ in range(8):
        meta, state, _ = outer.apply(metas[-1], state, mean, 1.0)
        metas.append(meta)
    assert all(torch.equal(metas[-1].params[k], theta[k]) for k in NAMES if k.startswith("body"))
    assert not torch.equal(metas[-1].params["head.weight"], theta["head.weight"])
    if name == "sgd":  # the head's gradient alone has the norm 0.3
        head, g = theta["head.weight"], mean["params/head.weight"]
        wanted = head - 0.1 * (0.3 * g / g.norm() + 0.1 * head)
        torch.testing.assert_close(metas[1].params["head.weight"], wanted, rtol=0, atol=1e-12)


def test_groups_under_clipping_and_a_schedule_are_torchs() -> None:
    theta = {k: torch.linspace(-1, 2, 3 + i, dtype=torch.float64) for i, k in enumerate(NAMES)}
    x = {k: v.clone().requires_grad_() for k, v in theta.items()}
    rates = {"head.weight": {"lr": 0.05}, "body.bias": {"weight_decay": 0.0}}
    theirs = torch.optim.AdamW([{"params": [p], **rates.get(k, {})} for k, p in x.items()], lr=0.01, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 25)
    groups = (Group("head.*", lr=0.05), Group("*.bias", weight_decay=0.0))
    ours = Descent("adamw", 0.01, "cosine", horizon=25, clip_norm=0.5, weight_decay=0.2, groups=groups)
    meta = Meta(theta, {})
    state = ours.init(meta)
    for _ in range(25):
        slope = {k: p.detach() ** 3 for k, p in x.items()}
        norm = torch.cat([g.flatten() for g in slope.values()]).norm()  # torch's own clipping adds 1e-6 to it
        for k, p in x.items():
            p.grad = slope[k] * min(1.0, 0.5 / float(norm))
        theirs.step()
        schedule.step()
        meta, state, _ = ours.apply(meta, state, {f"params/{k}": v**3 for k, v in meta.params.items()}, 1.0)
    torch.testing.assert_close(meta.params, {k: p.detach() for k, p in x.items()}, rtol=0, atol=1e-12)


def test_a_running_mean_of_theta_is_what_is_used() -> None:
    outer, meta = Descent("sgd", 1.0, ema=0.5), Meta({"a": torch.zeros((), dtype=torch.float64)}, {"s": torch.ones(1)})
    state, mean = outer.init(meta), 0.0
    for step in range(12):
        meta, state, _ = outer.apply(meta, state, {"params/a": torch.tensor(-1.0).double()}, 1.0)
        d = min(0.5, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * (step + 1)
        assert float(State(step, meta, state).used.params["a"]) == pytest.approx(mean, abs=1e-12)
    assert State(12, meta, state).used.slots is meta.slots
    assert State(12, meta, Descent().init(meta)).used is meta


def test_patterns_and_numbers_that_cannot_be_are_refused() -> None:
    meta = Meta({"head.weight": torch.ones(1)}, {})
    with pytest.raises(
        ValueError, match=r"match='haed\.\*' matches none of the parameters; did you mean head.weight\?"
    ):
        Descent(groups=(Group("haed.*", lr=0.1),)).init(meta)
    with pytest.raises(ValueError, match=r"match='\*weight' matches only what groups before it do"):
        Descent(groups=(Group("head.*", lr=0.1), Group("*weight", lr=0.2))).init(meta)
    with pytest.raises(ValueError, match="lr=-2"):
        Group("*", lr=-2)
    with pytest.raises(ValueError, match="ema=1"):
        Descent(ema=1)
    with pytest.raises(ValueError, match="nesterov without momentum"):
        Descent("sgd", nesterov=True)


@pytest.mark.parametrize("style", ["torch", "tf1"])
@pytest.mark.parametrize("functions", [False, True])
def test_adams_derivative_at_a_zero_gradient_is_a_number(style, functions: bool) -> None:
    # The first direction is g/(|g| + ε) (tf1: ε/√(1−β₂)), whose derivative at 0 is 1/ε; from then on v > 0.
    optimiser = Adam(beta1=0.0, eps=1e-3, style=style)
    params = {"x": torch.zeros(2, dtype=torch.float64)}

    def moved(g: torch.Tensor) -> torch.Tensor:
        first, state = optimiser.update(params, {"x": g}, optimiser.init(params), 1.0)
        return optimiser.update(first, {"x": g}, state, 1.0)[0]["x"]

    g = torch.tensor([0.0, 0.7], dtype=torch.float64)
    if functions:
        with transforms():
            got = torch.func.jacrev(moved)(g).diagonal()
    else:
        got = torch.autograd.functional.jacobian(moved, g).diagonal()
    eps = 1e-3 if style == "torch" else 1e-3 / (1 - 0.999) ** 0.5
    second = 1e-3 if style == "torch" else 1e-3 / (1 - 0.999**2) ** 0.5
    assert float(got[0]) == pytest.approx(-1 / eps - 1 / second, rel=1e-9)
    step = 1e-6
    slope = (moved(g + step) - moved(g - step)) / (2 * step)
    assert float(got[1]) == pytest.approx(float(slope[1]), rel=1e-5)


def solved(matrix: list[list[float]], b: list[float], steps: int) -> tuple[list[float], list[float]]:
    a = torch.tensor(matrix, dtype=torch.float64)
    found = conjugate_gradient(lambda v: {"x": a @ v["x"]}, {"x": torch.tensor(b, dtype=torch.float64)}, steps)
    return found[0]["x"].tolist(), found[1]["x"].tolist()


def test_conjugate_gradient_stops_where_the_curvature_is_not_positive() -> None:
    assert solved([[2, 0], [0, 4]], [2, 4], 5)[0] == pytest.approx([1, 1])
    # Along b = (1, 2): bᵀAb = 4 · 1 − 1 · 4 = 0, so x = b.
    assert solved([[4, 0], [0, -1]], [1, 2], 5) == ([1, 2], [1 - 4, 2 + 2])
    # Along b = (1, 1): 3; one step of ‖b‖²/3, then a direction of negative curvature, and there it stays.
    once, residual = solved([[4, 0], [0, -1]], [1, 1], 1)
    assert once == pytest.approx([2 / 3, 2 / 3])
    assert solved([[4, 0], [0, -1]], [1, 1], 7) == (once, residual)
