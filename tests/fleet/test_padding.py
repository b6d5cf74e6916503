"""Tasks of unequal size: padded and masked, they are the tasks one by one, in every mode of BatchNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.fleet.padding import stacked
from cluster.fleet.recipe import Recipe
from cluster.training.driver import Driver
from envs.base import Arrays
from learners.algorithms.maml import MAML
from learners.base import Params, Sum, Verb, pack
from learners.engine.execution import Execution
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.outer.descent import Descent
from tests.fleet.runs import FEW

pytestmark = pytest.mark.kernels

WAYS = 4


class Clusters:
    """2 to 4 classes of points and of their names, 1 to 5 of each to learn from, 1 to 6 to be asked for."""

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        ways = int(rng.integers(2, WAYS + 1))
        task: Arrays = {"class_mask": (np.arange(WAYS) < ways).astype(np.int64)}
        centres = rng.standard_normal((WAYS, 3))
        for part, most in (("support", 5), ("query", 6)):
            y = np.arange(ways).repeat(rng.integers(1, most + 1, ways))
            x = centres[y] + rng.standard_normal((len(y), 3)) / 2
            task |= {f"{part}_x/points": x, f"{part}_x/names": y * 7 % 5, f"{part}_y": y.astype(np.int32)}
        return task


class Named(nn.Module):
    """A classifier of points with names."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.body = nn.Embedding(5, 6), nn.Linear(3, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, WAYS)

    def forward(self, points: Tensor, names: Tensor) -> Any:
        return self.head(torch.tanh(self.norm(self.body(points) + self.names(names))))


def recipe(norm: Any) -> tuple[Recipe, Supervised]:
    torch.manual_seed(0)
    example = {"points": torch.zeros(4, 3).double(), "names": torch.zeros(4, dtype=torch.long)}
    objective = Supervised(functional(Named().double(), example), "cross_entropy", norm=norm)
    return Recipe(Clusters(), MAML(0.1, 2), objective, Descent(), dtype="float64", evaluation_steps=2), objective


def check_together(parts: Recipe, verb: Verb, at: Params, tasks: list[Arrays], mode: Any) -> None:
    """A verb's sum and rows over tasks side by side are those of the tasks one by one."""

    def sums(some: list[Arrays], mode: Any) -> Sum:
        return Execution(mode).run(verb.run, at, {}, parts.tensors(stacked(some)))

    together, alone = sums(tasks, mode), [sums([t], "loop") for t in tasks]
    wanted = {k: sum(one.total[k] for one in alone) for k in together.total}
    torch.testing.assert_close(together.total, wanted, rtol=1e-9, atol=1e-11)
    rows = {k: torch.cat([one.rows[k] for one in alone]) for k in together.rows}
    torch.testing.assert_close(together.rows, rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("verb", ["gradient", "evaluate"])
@pytest.mark.parametrize("norm", ["transductive", "support_statistics", "support_plus_one", "frozen"])
def test_any_way_and_any_shot_together_are_the_tasks_one_by_one(norm: str, verb: str, mode: Any) -> None:
    parts, objective = recipe(norm)
    function = parts.verbs(objective)[verb]
    tasks = [parts.task("train", i, function) for i in range(5)]
    assert len({len(t["support_y"]) for t in tasks}) > 2
    assert len({t["class_mask"].sum() for t in tasks}) > 1
    at = pack(objective.model.params(), objective.slots())

    check_together(parts, function, at, tasks, mode)


def test_a_run_of_unequal_tasks_is_the_same_in_any_company(tmp_path: Any) -> None:
    from cluster.fleet.pool import LocalPool

    parts, objective = recipe("transductive")

    def trained(shard: int) -> dict[str, Tensor]:
        driver = Driver(parts, objective.model.params(), LocalPool(parts), tmp_path / str(shard), iterations=3,
                        meta_batch=4, shard=shard, evaluation=FEW)  # fmt: skip
        return driver.run().params

    torch.testing.assert_close(trained(4), trained(1), rtol=1e-6, atol=1e-8)


def test_what_does_not_stack_is_named_with_its_shapes() -> None:
    x = {"support_x": np.zeros((3, 2)), "support_y": np.zeros(3)}
    assert "support_mask" not in stacked([x, x])
    np.testing.assert_array_equal(
        stacked([x, {k: v[:1] for k, v in x.items()}])["support_mask"], [[1, 1, 1], [1, 0, 0]]
    )
    with pytest.raises(ValueError, match=r"support_x is of shape \(3, 2\) in one task and \(3, 4\) in another"):
        stacked([x, x | {"support_x": np.zeros((3, 4))}])
    with pytest.raises(ValueError, match="only some have query_x"):
        stacked([x, x | {"query_x": np.zeros((3, 4))}])
    with pytest.raises(ValueError, match=r"one row for each example: support_x \(3, 2\), support_y \(2,\)"):
        stacked([x, x | {"support_y": np.zeros(2)}])
    with pytest.raises(ValueError, match="empty support set beside others of up to 3 rows"):
        stacked([x, {k: v[:0] for k, v in x.items()}])
