"""Reptile's variants: moments that run on against torch's own Adam, the last gradient, examples set apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learners.algorithms.reptile import Reptile
from learners.base import Meta, pack, unpack
from learners.engine.execution import Execution
from learners.outer.descent import Descent
from learners.verbs import common_verbs
from tests.quadratics import ALPHA, T1, T2, THETA, Quadratic, QuadraticTasks, stack


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_carried_moments_with_one_task_at_a_time_are_the_serial_algorithm(mode: str) -> None:
    tasks = [
        {k: torch.from_numpy(v) for k, v in QuadraticTasks(2).sample("train", np.random.default_rng(i)).items()}
        for i in range(6)
    ]
    learner, outer = Reptile(0.05, 3, batch=0, moments="carry"), Descent(optimizer="sgd", lr=0.5)
    meta = learner.init(THETA, np.random.default_rng(0))
    state, run = outer.init(meta), common_verbs(learner, Quadratic(), 1)["gradient"].run
    for task in tasks:
        mean = Execution(mode).run(run, pack(*meta), {}, stack(task)).total
        meta, state, _ = outer.apply(meta, state, mean, 1.0)

    # One torch.optim.Adam for all tasks, whose state nobody resets, as in the published code.
    x = THETA["theta"].clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05, betas=(0.0, 0.999), eps=1e-8)
    for task in tasks:
        theta = x.detach().clone()
        for _ in range(3):
            x.grad = task["A"] @ (x.detach() - task["a"])
            adam.step()
        x.data = theta + 0.5 * (x.detach() - theta)
    torch.testing.assert_close(meta.params["theta"], x.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(meta.slots["moments/v/theta"], adam.state[x]["exp_avg_sq"], rtol=0, atol=1e-12)
    assert float(meta.slots["moments/t"]) == 18


def test_moments_of_a_meta_batch_are_the_mean_of_the_tasks() -> None:
    learner = Reptile(0.05, 2, batch=0, moments="carry")
    meta = learner.init(THETA, np.random.default_rng(0))
    both, one, other = (
        unpack(
            Execution("loop").run(common_verbs(learner, Quadratic(), 1)["gradient"].run, pack(*meta), {}, tasks).total
        ).slots
        for tasks in (stack(T1, T2), stack(T1), stack(T2))
    )
    torch.testing.assert_close(both["moments/v/theta"], one["moments/v/theta"] + other["moments/v/theta"])
    assert float(both["moments/t"]) == 4
    assert (one["moments/v/theta"] - other["moments/v/theta"]).abs().max() > 1e-3


def test_adaptation_at_test_begins_from_the_moments_of_training() -> None:
    reset, carry = Reptile(0.05, 1, batch=0), Reptile(0.05, 1, batch=0, moments="carry")
    start = {"moments/v/theta": torch.tensor([4.0, 4.0]).double(), "moments/t": torch.tensor(10.0).double()}
    g = T1["A"] @ (THETA["theta"] - T1["a"])
    v = (0.999 * 4 + 0.001 * g**2) / (1 - 0.999**11)
    got = carry.at_test().adapt(Meta(THETA, start), Quadratic(), T1, 1)["theta"]
    torch.testing.assert_close(got, THETA["theta"] - 0.05 * g / (v.sqrt() + 1e-8))
    fresh = reset.at_test().adapt(Meta(THETA, {}), Quadratic(), T1, 1)["theta"]
    torch.testing.assert_close(fresh, THETA["theta"] - 0.05 * g.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_last_gradient_is_the_last_step_alone(steps: int) -> None:
    learner = Reptile(ALPHA, steps, "sgd", batch=0, update="last_gradient")
    M = torch.eye(2).double() - ALPHA * T1["A"]
    before = T1["a"] + torch.linalg.matrix_power(M, steps - 1) @ (THETA["theta"] - T1["a"])
    got = learner.gradient(Meta(THETA, {}), Quadratic(), T1).grads["theta"]
    torch.testing.assert_close(got, ALPHA * T1["A"] @ (before - T1["a"]), rtol=0, atol=1e-12)


def test_a_tail_is_seen_by_the_last_step_only() -> None:
    learner = Reptile(0.1, 4, "sgd", batch=3, update="last_gradient", tail=4)
    data = learner.draw({"support_x": np.zeros((10, 1))}, np.random.default_rng(0), 4)
    assert data["last_batch"].shape == (1, 4)
    assert set(data["batches"].ravel()) | set(data["last_batch"].ravel()) == set(range(10))
    assert not set(data["batches"].ravel()) & set(data["last_batch"].ravel())
    with pytest.raises(ValueError, match="tail=4 leaves none of a task's 4 examples"):
        learner.draw({"support_x": np.zeros((4, 1))}, np.random.default_rng(0), 4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"moments": "carry", "inner_optimizer": "sgd"}, "moments='carry' wants inner_optimizer='adam'"),
        ({"tail": 3}, "tail=3 wants update='last_gradient'"),
        ({"batch": -1}, "batch=-1"),
    ],
)
def test_nonsense_is_refused(fields, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        Reptile(**fields)
