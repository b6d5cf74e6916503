"""MAML, FOMAML and Reptile against the closed forms of quadratic tasks, in every execution mode."""

from __future__ import annotations

import pytest
import torch

from learners.base import Data, Learner, Meta, Params, pack, unpack
from learners.derivative import differentiate
from learners.execution import Execution
from learners.maml import MAML
from learners.outer import Descent
from learners.reptile import Reptile
from learners.verbs import standard
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


def contribution(learner: Learner, data: Data, mode: str, theta: Params = THETA) -> tuple[Params, float]:
    """Summed gradient and mean metric of stacked tasks, as a worker would compute it."""
    execution = Execution(mode, backend="aot_eager")
    result = execution.run(standard(learner, Quadratic(), 1)["gradient"].run, pack(theta, {}), {}, data)
    return unpack(result.total).params, float(next(iter(result.rows.values())).mean())


def close(got: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64).reshape(got.shape), rtol=0, atol=1e-9)


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
