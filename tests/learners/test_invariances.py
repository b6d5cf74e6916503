"""Properties that hold for all tasks: limits, order of tasks, sharding, labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet.messages import Assignment
from cluster.fleet.wire import decode_sum, encode_sum
from cluster.training.aggregate import Tree
from learners.algorithms.maml import MAML
from learners.algorithms.reptile import Reptile
from learners.base import Meta, pack
from learners.engine.execution import Execution
from learners.models.networks import MLP
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.outer.descent import Descent
from learners.verbs import common_verbs
from tests.quadratics import Quadratic, QuadraticTasks

SEEDS = st.integers(0, 2**32 - 1)


def task(seed: int) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in QuadraticTasks().sample("train", np.random.default_rng(seed)).items()}


def theta(seed: int) -> Meta:
    return Meta({"theta": torch.from_numpy(np.random.default_rng([seed, 1]).normal(size=3))}, {})


def grads(learner, meta, data) -> torch.Tensor:
    return learner.gradient(meta, Quadratic(), data).grads["theta"]


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_without_inner_rate_maml_is_the_query_gradient(seed: int, steps: int) -> None:
    data, meta = task(seed), theta(seed)
    plain = data["B"] @ (meta.params["theta"] - data["b"])
    for order in (1, 2):
        torch.testing.assert_close(grads(MAML(0.0, steps, order=order), meta, data), plain, rtol=1e-12, atol=1e-12)
    assert grads(Reptile(0.0, steps, "sgd", batch=0), meta, data).abs().max() == 0


@given(SEEDS, st.floats(0.01, 0.2))
@settings(max_examples=20, deadline=None)
def test_one_full_batch_step_of_reptile_is_the_support_gradient(seed: int, lr: float) -> None:
    data, meta = task(seed), theta(seed)
    support = data["A"] @ (meta.params["theta"] - data["a"])
    torch.testing.assert_close(grads(Reptile(lr, 1, "sgd", batch=0), meta, data) / lr, support, rtol=1e-9, atol=1e-12)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_without_curvature_both_orders_agree(seed: int) -> None:
    data, meta = task(seed), theta(seed)
    data["A"] = torch.zeros_like(data["A"])
    torch.testing.assert_close(grads(MAML(0.1, 2), meta, data), grads(MAML(0.1, 2, order=1), meta, data))


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_reptile_with_rate_one_on_one_task_jumps_to_the_adapted_weights(seed: int) -> None:
    data, meta = task(seed), theta(seed)
    learner, outer = Reptile(0.05, 3, "sgd", batch=0), Descent(optimizer="sgd", lr=1.0)
    stepped, _, _ = outer.apply(meta, outer.init(meta), {"params/theta": grads(learner, meta, data)}, 1.0)
    phi = learner.adapt(meta, Quadratic(), data, 3)["theta"]
    torch.testing.assert_close(stepped.params["theta"], phi, rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_order_and_sharding_of_tasks_do_not_change_the_sum(mode: str) -> None:
    tasks = [task(i) for i in range(12)]
    run = common_verbs(MAML(0.05, 2), Quadratic(), 1)["gradient"].run
    at = pack(*theta(0))

    def total(order: list[int], shard: int) -> torch.Tensor:
        tree = Tree(12 // shard)
        for i in range(0, 12, shard):
            data = {k: torch.stack([tasks[j][k] for j in order[i : i + shard]]) for k in tasks[0]}
            result = Execution(mode).run(run, at, {}, data)
            a = Assignment(0, 0, "gradient", 1, None, "train", i, i + shard, 0)
            tree.add(i // shard, decode_sum(*encode_sum(a, "w", 0.0, result)))
        return tree.total().total["params/theta"]

    reference = total(list(range(12)), 12)
    for shard in (1, 2, 3, 4, 6):
        torch.testing.assert_close(total(list(range(12)), shard), reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total(list(reversed(range(12))), 3), reference, rtol=1e-12, atol=1e-12)


def test_permuting_labels_and_head_together_leaves_the_loss_unchanged() -> None:
    model = functional(MLP(hidden=(8,)).build((4,), 3).double())
    objective = Supervised(model, "cross_entropy")
    torch.manual_seed(0)
    data = {"support_x": torch.randn(6, 4).double(), "support_y": torch.arange(3).repeat(2),
            "query_x": torch.randn(9, 4).double(), "query_y": torch.arange(3).repeat(3)}  # fmt: skip
    order = torch.tensor([2, 0, 1])  # new label of class c is order[c]
    params, inverse = model.params(), torch.argsort(order)
    permuted = params | {k: params[k][inverse] for k in ("head.weight", "head.bias")}
    relabelled = data | {"support_y": order[data["support_y"]], "query_y": order[data["query_y"]]}
    learner = MAML(0.3, 2)
    a = learner.gradient(Meta(params, {}), objective, data).metrics["query_loss"]
    b = learner.gradient(Meta(permuted, {}), objective, relabelled).metrics["query_loss"]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shots", [1, 3])
def test_cbfinns_loss_scale_multiplies_the_inner_gradient_by_the_ways(shots: int) -> None:
    model = functional(MLP(hidden=(8,)).build((4,), 5).double())
    torch.manual_seed(0)
    data = {"support_x": torch.randn(5 * shots, 4).double(), "support_y": torch.arange(5).repeat_interleave(shots)}
    deltas = []
    for scale in ("mean", "sum_over_shots"):
        learner = Reptile(0.1, 1, "sgd", batch=0)
        result = learner.gradient(Meta(model.params(), {}), Supervised(model, "cross_entropy", scale=scale), data)
        deltas.append(result.grads["linear0.weight"])
    torch.testing.assert_close(deltas[1], 5 * deltas[0], rtol=1e-10, atol=1e-14)
