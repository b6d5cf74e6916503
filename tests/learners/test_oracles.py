"""Every learner against the closed forms of quadratic tasks, in every execution mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learners.algorithms.imaml import IMAML
from learners.algorithms.maml import MAML
from learners.algorithms.maml_plus_plus import MAMLPlusPlus, multi_step_weights
from learners.algorithms.meta_curvature import MetaCurvature, precondition
from learners.algorithms.meta_sgd import MetaSGD
from learners.algorithms.reptile import Reptile
from learners.base import Data, Learner, Meta, Params, pack, unpack
from learners.engine.derivative import differentiate
from learners.engine.execution import Execution
from learners.outer.descent import Descent
from learners.verbs import common_verbs
from tests.quadratics import ALPHA, SCALAR, T1, T2, THETA, Quadratic, stack, tensors

MODES = ("loop", "vmap", "compiled")

# task, K, φ_K, L_Q(φ_K), ∇ of MAML, of FOMAML, Reptile's θ − φ_K; θ = (2, 1), α = 0.1
TABLE = [
    (T1, 1, (1.5, 0.5), 3.375, (2.25, -1.5), (3, -1.5), (0.5, 0.5)),
    (T1, 2, (1.2, 0.15), 3.15125, (1.4775, -1.5625), (2.4, -1.85), (0.8, 0.85)),
    (T1, 3, (1.025, -0.1), 3.255625, (1.10525, -1.472), (2.05, -2.1), (0.975, 1.1)),
    (T2, 1, (1.7, 0.8), 0.215, (0.54, -0.03), (0.6, -0.05), (0.3, 0.2)),
    (T2, 2, (1.43, 0.68), 0.12605, (0.2187, -0.153), (0.27, -0.425), (0.57, 0.32)),
    (T2, 3, (1.187, 0.608), 0.1344965, (-0.006561, -0.149148), (-0.009, -0.6905), (0.813, 0.392)),
]


def contribution(
    learner: Learner,
    data: Data,
    mode: str,
    theta: Params = THETA,
    slots: Params | None = None,
    names: tuple[str, ...] = ("theta",),
) -> tuple[Params, float]:
    """Summed gradient and mean metric of stacked tasks, as a worker would compute it."""
    execution = Execution(mode, backend="aot_eager")
    result = execution.run(
        common_verbs(learner, Quadratic(names), 1)["gradient"].run, pack(theta, slots or {}), {}, data
    )
    return unpack(result.total).params, float(next(iter(result.rows.values())).mean())


def close(got: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=torch.float64).reshape(got.shape), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("task", "steps", "phi", "loss", "maml", "fomaml", "delta"), TABLE)
def test_quadratic_tasks_match_their_closed_forms(task, steps, phi, loss, maml, fomaml, delta, mode) -> None:
    data = stack(task)
    close(MAML(ALPHA, steps).adapt(Meta(THETA, {}), Quadratic(), task, steps)["theta"].detach(), phi)
    grads, seen = contribution(MAML(ALPHA, steps), data, mode)
    close(grads["theta"], maml)
    assert seen == pytest.approx(loss, abs=1e-12)
    close(contribution(MAML(ALPHA, steps, order=1), data, mode)[0]["theta"], fomaml)
    close(contribution(Reptile(ALPHA, steps, "sgd", batch=0), data, mode)[0]["theta"], delta)


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_batch_is_the_mean_and_descends_as_on_paper(mode: str) -> None:
    grads, _ = contribution(MAML(ALPHA, 1), stack(T1, T2), mode)
    close(grads["theta"], (2.79, -1.53))
    outer = Descent(optimizer="sgd", lr=0.5)
    meta = Meta(THETA, {})
    stepped, _, _ = outer.apply(meta, outer.init(meta), {"params/theta": grads["theta"] / 2}, 1.0)
    close(stepped.params["theta"], (1.3025, 1.3825))


def test_batched_and_serial_reptile_differ_as_on_paper() -> None:
    outer, learner = Descent(optimizer="sgd", lr=0.25), Reptile(ALPHA, 3, "sgd", batch=0)
    meta = Meta(THETA, {})
    grads, _ = contribution(learner, stack(T1, T2), "loop")
    batched, _, _ = outer.apply(meta, outer.init(meta), {"params/theta": grads["theta"] / 2}, 1.0)
    close(batched.params["theta"], (1.7765, 0.8135))
    for task in (T1, T2):
        grads, _ = contribution(learner, stack(task), "loop", meta.params)
        meta, _, _ = outer.apply(meta, outer.init(meta), {"params/theta": grads["theta"]}, 1.0)
    close(meta.params["theta"], (1.5695140625, 0.6809))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("steps", "phi", "maml", "fomaml"),
    [(1, 1.7, 3.78, 5.4), (2, 1.49, 2.4402, 4.98), (5, 1.16807, 0.7287750498, 4.33614)],
)
def test_the_scalar_task_matches_its_closed_form(steps, phi, maml, fomaml, mode) -> None:
    theta = tensors(theta=[2.0])
    close(MAML(ALPHA, steps).adapt(Meta(theta, {}), Quadratic(), SCALAR, steps)["theta"].detach(), [phi])
    close(contribution(MAML(ALPHA, steps), stack(SCALAR), mode, theta)[0]["theta"], [maml])
    close(contribution(MAML(ALPHA, steps, order=1), stack(SCALAR), mode, theta)[0]["theta"], [fomaml])


@pytest.mark.parametrize("mode", MODES)
def test_two_minibatches_give_the_three_gradients_of_the_reptile_paper(mode: str) -> None:
    # Step 0 sees minibatch 1, the query is minibatch 2; Reptile takes both as steps.
    both = tensors(A=[[[3, 1], [1, 2]], [[1, 0], [0, 4]]], a=[[1, -1], [-1, 0.5]], B=[[1, 0], [0, 4]], b=[-1, 0.5])
    data = stack(both)
    close(contribution(MAML(ALPHA, 1, order=1), data, mode)[0]["theta"], (2.5, 0))
    close(contribution(MAML(ALPHA, 1), data, mode)[0]["theta"], (1.75, -0.25))
    close(contribution(Reptile(ALPHA, 2, "sgd", batch=0), data, mode)[0]["theta"] / ALPHA, (7.5, 5))


def test_first_order_is_not_second_order() -> None:
    # The oldest silent mistake of the field: the two differ on these tasks, so a mix-up cannot pass.
    second, _ = contribution(MAML(ALPHA, 2), stack(T1), "loop")
    first, _ = contribution(MAML(ALPHA, 2, order=1), stack(T1), "loop")
    assert (second["theta"] - first["theta"]).abs().max() > 0.1


def test_a_gradient_may_be_differentiated_with_respect_to_data() -> None:
    # ∂L_Q(φ)/∂a = (I − M)ᵀB(φ − b) and ∂L_Q/∂b = −B(φ − b): what adversarial and data-free learners need.
    def loss(points: Params) -> torch.Tensor:
        task = T1 | points
        return Quadratic().query(MAML(ALPHA, 1).adapt(Meta(THETA, {}), Quadratic(), task, 1), task)

    grads, _ = differentiate(loss, {"a": T1["a"], "b": T1["b"]})
    close(grads["a"], (0.75, 0))
    close(grads["b"], (-3, 1.5))


# α = (0.1, 0.2): K, φ_K, L_Q, ∇θ and ∇α in second order, and in first
META_SGD = [
    (1, (1.5, 0), 4.25, (2.5, -1.5), (-15, 10), (3, -2), (-15, 10)),
    (2, (1.25, -0.5), 4.6875, (1.925, -1.275), (-17.5, 15), (2.5, -2.5), (-18.75, 18.75)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "phi", "loss", "theta2", "alpha2", "theta1", "alpha1"), META_SGD)
def test_meta_sgd_matches_its_closed_form(steps, phi, loss, theta2, alpha2, theta1, alpha1, mode) -> None:
    at = THETA | tensors(**{"alpha/theta": [0.1, 0.2]})
    close(MetaSGD(steps).adapt(Meta(at, {}), Quadratic(), T1, steps)["theta"].detach(), phi)
    grads, seen = contribution(MetaSGD(steps), stack(T1), mode, at)
    close(grads["theta"], theta2)
    close(grads["alpha/theta"], alpha2)
    assert seen == pytest.approx(loss, abs=1e-12)
    grads, _ = contribution(MetaSGD(steps, order=1), stack(T1), mode, at)
    close(grads["theta"], theta1)
    close(grads["alpha/theta"], alpha1)


@pytest.mark.parametrize("rate", ["softplus", "exp"])
def test_a_parametrised_rate_has_the_chain_rules_gradient(rate: str) -> None:
    alpha = torch.tensor([0.1, 0.2], dtype=torch.float64)
    raw, slope = (torch.log(torch.expm1(alpha)), 1 - torch.exp(-alpha)) if rate == "softplus" else (alpha.log(), alpha)
    grads, _ = contribution(MetaSGD(2, rate=rate), stack(T1), "vmap", THETA | {"alpha/theta": raw})
    close(grads["theta"], (1.925, -1.275))
    close(grads["alpha/theta"] / slope, (-17.5, 15))


def test_meta_sgd_begins_with_one_rate_from_the_papers_interval() -> None:
    drawn = set()
    for rate in ("raw", "softplus", "exp"):
        learner = MetaSGD(rate=rate)
        meta = learner.init({"w": torch.zeros(3, 2), "b": torch.zeros(2)}, np.random.default_rng(1))
        alpha = torch.cat([a.flatten() for a in learner.rates(meta.params).values()])
        assert len(alpha) == 8
        torch.testing.assert_close(alpha, alpha[0].expand(8), rtol=0, atol=0)
        assert 0.005 <= alpha[0] <= 0.1
        drawn.add(round(float(alpha[0]), 5))
    assert len(drawn) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "slope"), [(1, -16.2), (2, -20.916), (5, -15.61660821)])
def test_learned_rates_per_step_add_up_to_the_slope_of_a_shared_one(steps, slope, mode) -> None:
    learner = MAMLPlusPlus(ALPHA, steps, multi_step_epochs=0)
    meta = learner.init(tensors(theta=[2.0]), np.random.default_rng(0))
    grads, _ = contribution(learner, stack(SCALAR), mode, *meta)
    close(grads["rate/theta"].sum(), slope)
    close(grads["theta"], contribution(MAML(ALPHA, steps), stack(SCALAR), mode, tensors(theta=[2.0]))[0]["theta"])


@pytest.mark.parametrize("mode", MODES)
def test_the_multi_step_loss_matches_its_closed_form(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = MAMLPlusPlus(ALPHA, 3)
    monkeypatch.setattr(MAMLPlusPlus, "weights", lambda self, meta: torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    grads, _ = contribution(learner, stack(T1), mode, *learner.init(THETA, np.random.default_rng(0)))
    close(grads["theta"], (1.445875, -1.50475))


@pytest.mark.parametrize(
    ("epoch", "early", "final"),
    [
        (0, 0.2, 0.2),
        (1, 0.1866666667, 0.2533333333),
        (5, 0.1333333333, 0.4666666667),
        (14, 0.0133333333, 0.9466666667),
        (20, 0.006, 0.976),
    ],
)
def test_multi_step_weights_move_to_the_last_step(epoch: int, early: float, final: float) -> None:
    weights = multi_step_weights(5, 15, torch.tensor(float(epoch), dtype=torch.float64))
    close(weights, [early] * 4 + [final])
    clock = {"clock": torch.tensor(500.0 * epoch + 499, dtype=torch.float64)}
    used = MAMLPlusPlus(inner_steps=5, epoch=500, multi_step_epochs=15).weights(Meta({}, clock))
    close(used, [0, 0, 0, 0, 1] if epoch >= 15 else [early] * 4 + [final])


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_derivatives_is_annealed_by_the_clock(mode: str) -> None:
    learner = MAMLPlusPlus(ALPHA, 2, epoch=10, multi_step_epochs=0, second_order_from=3)
    meta = learner.init(THETA, np.random.default_rng(0))
    for clock, wanted in ((29, (2.4, -1.85)), (30, (1.4775, -1.5625))):
        slots = {"clock": torch.tensor(float(clock), dtype=torch.float64)}
        close(contribution(learner, stack(T1), mode, meta.params, slots)[0]["theta"], wanted)


def test_the_clock_of_a_long_run_does_not_drift() -> None:
    learner, outer = MAMLPlusPlus(0.0, 1), Descent(optimizer="sgd", lr=0.0)
    meta = learner.init({"theta": torch.tensor([2.0, 1.0])}, np.random.default_rng(0))
    task, state = {k: v.float() for k, v in stack(T1, T2, T1).items()}, outer.init(meta)
    run = common_verbs(learner, Quadratic(), 1)["gradient"].run
    for _ in range(300):
        result = Execution("vmap").run(run, pack(*meta), {}, task)
        meta, state, _ = outer.apply(meta, state, {k: v * (1 / result.weight) for k, v in result.total.items()}, 1.0)
    assert round(float(meta.slots["clock"])) == 300


@pytest.mark.parametrize("mode", MODES)
def test_imaml_matches_its_closed_form(mode: str) -> None:
    learner = IMAML(inner_lr=0.2, inner_steps=40, proximal=2.0, solver_steps=2)
    close(learner.adapt(Meta(THETA, {}), Quadratic(), T1, 40)["theta"], (23 / 19, -1 / 19))
    close(contribution(learner, stack(T1), mode)[0]["theta"], (1.2354570637119113, -1.3351800554016622))


def test_imaml_does_not_solve_the_system_of_the_published_code() -> None:
    # (2 I + H/(λ+10)) v = g is what a swapped argument makes of it.
    g, h = torch.tensor([2.4210526, -2.0526316], dtype=torch.float64), T1["A"]
    swapped = torch.linalg.solve(2 * torch.eye(2).double() + h / 12, g)
    got, _ = contribution(IMAML(0.2, 40), stack(T1), "loop")
    assert (got["theta"] - swapped).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_imaml_through_a_part_is_exact_too(mode: str) -> None:
    # θ = (u, w), only w adapts: minimise over w by hand, and differentiate that.
    split = {"u": THETA["theta"][:1], "w": THETA["theta"][1:]}
    A, a, B, b, lam = T1["A"], T1["a"], T1["B"], T1["b"], 2.0

    def closed(theta: torch.Tensor) -> torch.Tensor:
        w = (A[1, 1] * a[1] - A[1, 0] * (theta[0] - a[0]) + lam * theta[1]) / (A[1, 1] + lam)
        d = torch.stack([theta[0], w]) - b
        return 0.5 * d @ B @ d

    wanted = torch.autograd.functional.jacobian(closed, THETA["theta"])
    grads, _ = contribution(IMAML(0.2, 20, lam, 1, adapts=("w",)), stack(T1), mode, split, names=("u", "w"))
    close(torch.cat([grads["u"], grads["w"]]), wanted.tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("adapts", ["u", "w"])
def test_adapting_a_part_is_meta_sgd_with_zero_rates_elsewhere(adapts: str, steps: int, mode: str) -> None:
    D = torch.diag(torch.tensor([ALPHA * (adapts == "u"), ALPHA * (adapts == "w")], dtype=torch.float64))
    M = torch.linalg.matrix_power(torch.eye(2).double() - D @ T1["A"], steps)
    wanted = M.T @ T1["B"] @ (T1["a"] + M @ (THETA["theta"] - T1["a"]) - T1["b"])
    split = {"u": THETA["theta"][:1], "w": THETA["theta"][1:]}
    grads, _ = contribution(MAML(ALPHA, steps, adapts=(adapts,)), stack(T1), mode, split, names=("u", "w"))
    close(torch.cat([grads["u"], grads["w"]]), wanted.tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2])
def test_meta_curvature_matches_its_closed_form(steps: int, mode: str) -> None:
    # θ as a [2, 1] weight: C = m · M_o, with M_o on the outputs and the 1×1 matrix m on the inputs.
    learner = MetaCurvature(ALPHA, steps)
    meta = learner.init({"theta": THETA["theta"].view(2, 1)}, np.random.default_rng(0))
    grads, _ = contribution(learner, stack(T1), mode, *meta)
    close(grads["theta"], next(row[4] for row in TABLE if row[0] is T1 and row[1] == steps))  # the identity: MAML
    m_out, m_in = torch.tensor([[1.2, 0.3], [-0.4, 0.8]]).double(), 1.5
    at = meta.params | {"curvature/theta/out": m_out, "curvature/theta/in": torch.full((1, 1), m_in).double()}
    C = (m_in * m_out).requires_grad_()
    theta = THETA["theta"].clone().requires_grad_()
    phi = T1["a"] + torch.linalg.matrix_power(torch.eye(2).double() - ALPHA * C @ T1["A"], steps) @ (theta - T1["a"])
    loss = 0.5 * (phi - T1["b"]) @ T1["B"] @ (phi - T1["b"])
    d_theta, d_c = torch.autograd.grad(loss, (theta, C))
    grads, _ = contribution(learner, stack(T1), mode, at)
    close(grads["theta"], d_theta.tolist())
    close(grads["curvature/theta/out"], (m_in * d_c).tolist())
    close(grads["curvature/theta/in"], (m_out * d_c).sum().item())


def test_diagonal_meta_curvature_is_meta_sgd() -> None:
    curved = THETA | tensors(**{"curvature/theta/entries": [1, 2]})
    grads, _ = contribution(MetaCurvature(ALPHA, 2), stack(T1), "loop", curved)
    close(grads["theta"], (1.925, -1.275))
    close(grads["curvature/theta/entries"] / ALPHA, (-17.5, 15))


def test_a_convolutions_curvature_acts_on_outputs_inputs_and_positions() -> None:
    rng = np.random.default_rng(0)
    g, sizes = rng.normal(size=(4, 3, 2, 2)), {"out": 4, "in": 3, "space": 4}
    modes = {mode: rng.normal(size=(n, n)) for mode, n in sizes.items()}
    wanted = np.einsum("ao,oip,ic,pq->acq", modes["out"], g.reshape(4, 3, 4), modes["in"], modes["space"]).reshape(
        g.shape
    )
    got = precondition(torch.from_numpy(g), {k: torch.from_numpy(m) for k, m in modes.items()})
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-12)
