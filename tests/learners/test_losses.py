"""Losses and measures by name against torch's and scikit-like definitions written out; one's own; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.algorithms.maml import MAML
from learners.base import Data
from learners.modules.functional import functional
from learners.objectives.losses import LOSSES, CrossEntropy
from learners.objectives.measures import accuracy
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

pytestmark = pytest.mark.kernels

OUTPUT = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DENSE = torch.randn(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
TARGET = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LABELS, DENSE_LABELS = torch.tensor([0, 3, 1, 2, 2, 0]), torch.arange(30).view(6, 5) % 4
MANY = (TARGET > 0).double()
MASK = torch.tensor([1.0, 1, 0, 1, 0, 1])
THERE = MASK.bool()


class Same(nn.Module):
    """x + w, w one number: outputs are what the task's inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w


def task(output: Tensor, target: Tensor, **more: Tensor) -> Data:
    return {"support_x": output, "support_y": target, "query_x": output, "query_y": target} | more


def scores(objective: Supervised, data: Data) -> dict[str, float]:
    return {k: float(v) for k, v in objective.measure(objective.model.params(), data).items()}


CASES: dict[str, tuple[Any, Tensor, Tensor, Any]] = {
    "mse": ("mse", OUTPUT, TARGET, F.mse_loss),
    "l1": ("l1", OUTPUT, TARGET, F.l1_loss),
    "huber": ("huber", OUTPUT, TARGET, F.huber_loss),
    "labels": ("cross_entropy", OUTPUT, LABELS, F.cross_entropy),
    "int32 labels": ("cross_entropy", OUTPUT, LABELS.int(), lambda o, t: F.cross_entropy(o, t.long())),
    "a label for each position": ("cross_entropy", DENSE, DENSE_LABELS, F.cross_entropy),
    "positions that do not count": (
        "cross_entropy", DENSE, DENSE_LABELS.masked_fill(DENSE_LABELS == 2, -100), F.cross_entropy,
    ),
    "probabilities": ("cross_entropy", OUTPUT, TARGET.softmax(1), F.cross_entropy),
    "label smoothing": (
        CrossEntropy(label_smoothing=0.2), OUTPUT, LABELS, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2),
    ),
    "class weights": (
        CrossEntropy(class_weights=(1, 2, 3, 0.5)), DENSE, DENSE_LABELS,
        lambda o, t: F.cross_entropy(o, t, torch.tensor([1, 2, 3, 0.5]).double()),
    ),
    "several labels at a time": ("binary_cross_entropy", OUTPUT, MANY, F.binary_cross_entropy_with_logits),
    "boolean targets": (
        "binary_cross_entropy", OUTPUT, MANY.bool(), lambda o, t: F.binary_cross_entropy_with_logits(o, t.double()),
    ),
    "means and log variances": (
        "gaussian_nll", OUTPUT, TARGET[:, :2], lambda o, t: F.gaussian_nll_loss(o[:, :2], t, o[:, 2:].exp()),
    ),
}  # fmt: skip


def test_a_pair_of_means_and_variances_is_torchs_too() -> None:
    variance = OUTPUT.square()
    wanted = F.gaussian_nll_loss(OUTPUT, TARGET, variance)
    assert float(LOSSES["gaussian_nll"]()((OUTPUT, variance), TARGET)) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_torchs(name: str) -> None:
    loss, output, target, wanted = CASES[name]
    objective = Supervised(functional(Same()), loss)
    theta, data = objective.model.params(), task(output, target)
    assert float(objective.support(theta, data, 0)) == pytest.approx(float(wanted(output, target)), abs=1e-12)
    assert float(objective.query(theta, data)) == pytest.approx(float(wanted(output, target)), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_padding_counts_in_no_loss_and_no_measure_whatever_stands_there(name: str) -> None:
    loss, output, target, _ = CASES[name]
    objective = Supervised(functional(Same()), loss)
    broken = torch.where(THERE.view(-1, *(1 for _ in output.shape[1:])), output, torch.nan)
    padded = task(broken, target, support_mask=MASK, query_mask=MASK)
    small = task(output[THERE], target[THERE])
    theta = objective.model.params()
    assert float(objective.support(theta, padded, 0)) == pytest.approx(float(objective.support(theta, small, 0)))
    assert scores(objective, padded) == pytest.approx(scores(objective, small), abs=1e-12)


@pytest.mark.parametrize(
    "name", ["labels", "int32 labels", "a label for each position", "probabilities", "label smoothing"]
)
def test_a_sum_over_shots_is_the_sum_over_examples_divided_by_examples_per_way(name: str) -> None:
    loss, output, target, wanted = CASES[name]
    objective = Supervised(functional(Same()), loss, scale="sum_over_shots")
    summed = float(wanted(output, target)) * len(output) / (len(output) / 4)
    theta = objective.model.params()
    assert float(objective.support(theta, task(output, target), 0)) == pytest.approx(summed, abs=1e-12)
    padded = task(output, target, support_mask=MASK)
    fewer = float(wanted(output[THERE], target[THERE])) * 4
    assert float(objective.support(theta, padded, 0)) == pytest.approx(fewer, abs=1e-12)


def test_accuracy_is_over_classes_whatever_the_other_axes_are() -> None:
    square = DENSE[:, :, :4]  # as many positions as classes
    right = square.argmax(1)
    assert float(accuracy(square, right)) == 1
    wrong = (right + (torch.arange(4) % 2)) % 4  # every other position
    assert float(accuracy(square, wrong)) == 0.5
    assert float(accuracy(square, wrong.masked_fill(torch.arange(4) % 2 == 1, -100))) == 1


def test_measures_of_several_labels_are_their_definitions() -> None:
    said, true = OUTPUT > 0, MANY.bool()
    hits = (said & true).sum()
    got = scores(Supervised(functional(Same()), "binary_cross_entropy"), task(OUTPUT, MANY))
    assert got["accuracy"] == pytest.approx(float((said == true).double().mean()))
    assert got["f1"] == pytest.approx(float(2 * hits / (2 * hits + (said & ~true).sum() + (~said & true).sum())))
    assert list(got) == ["accuracy", "f1", "loss"]


def test_classes_that_a_task_has_not_are_never_chosen_and_have_no_probability() -> None:
    objective = Supervised(functional(Same()), "cross_entropy")
    data = task(OUTPUT[:, :], LABELS.clamp(max=1), class_mask=torch.tensor([1, 1, 0, 0]))
    wanted = F.cross_entropy(OUTPUT[:, :2], LABELS.clamp(max=1))
    assert float(objective.query(objective.model.params(), data)) == pytest.approx(float(wanted))
    share = float((OUTPUT[:, :2].argmax(1) == LABELS.clamp(max=1)).double().mean())
    assert scores(objective, data)["accuracy"] == pytest.approx(share)
    smooth = Supervised(functional(Same()), CrossEntropy(label_smoothing=0.1))
    with pytest.raises(ValueError, match="label_smoothing is over all classes"):
        smooth.query(smooth.model.params(), data)


def test_a_loss_and_measures_of_ones_own_are_what_descends_and_what_is_reported() -> None:
    def pinball(output: Tensor, target: Tensor) -> Tensor:
        error = target - output
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    def covered(output: Tensor, target: Tensor) -> Tensor:
        return (target <= output).to(output.dtype).mean()

    objective = Supervised(functional(Same()), pinball, measures={"covered": covered})
    data = task(OUTPUT, TARGET)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    inner = torch.autograd.grad(pinball(OUTPUT + w, TARGET), w, create_graph=True)[0]
    wanted = torch.autograd.grad(pinball(OUTPUT + w - 0.1 * inner, TARGET), w)[0]
    verb = common_verbs(MAML(0.1, 1), objective, 1)["gradient"]
    got = verb.run({"params/w": torch.zeros((), dtype=torch.float64)}, {}, data)
    assert float(got.total["params/w"]) == pytest.approx(float(wanted), abs=1e-12)
    assert list(scores(objective, data)) == ["covered", "loss"]
    assert scores(objective, data)["covered"] == pytest.approx(float((TARGET <= OUTPUT).double().mean()))
    assert "pinball" in objective.summary()
    assert "covered" in objective.summary()


@pytest.mark.parametrize(
    ("loss", "output", "target", "words"),
    [
        ("mse", OUTPUT, TARGET[:, :1], "targets of shape (6, 1) do not fit outputs of shape (6, 4)"),
        ("cross_entropy", OUTPUT, TARGET[:, :3], "cross_entropy wants integer labels (6,)"),
        ("cross_entropy", OUTPUT, DENSE_LABELS, "labels of shape (6, 5) do not fit outputs of shape (6, 4)"),
        ("binary_cross_entropy", OUTPUT, LABELS, "targets of shape (6,) do not fit outputs of shape (6, 4)"),
        ("gaussian_nll", OUTPUT[:, :3], TARGET[:, :1], "outputs (mean, variance)"),
        (CrossEntropy(class_weights=(1, 2)), OUTPUT, LABELS, "2 class_weights do not fit outputs of 4 classes"),
        (lambda o, t: (o - t), OUTPUT, TARGET, "gives a tensor of shape (6, 4): a scalar tensor wanted"),
        (lambda o, t: 0.5, OUTPUT, TARGET, "gives a float: a scalar tensor wanted"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_both_shapes(loss: Any, output: Tensor, target: Tensor, words: str) -> None:
    objective = Supervised(functional(Same()), loss)
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        objective.query(objective.model.params(), task(output, target))


def test_numbers_for_several_labels_train_no_softmax() -> None:
    objective = Supervised(functional(Same()), "cross_entropy")
    data = {k: v.numpy() for k, v in task(OUTPUT, MANY).items()}
    with pytest.raises(ValueError, match="binary_cross_entropy is for several labels at a time"):
        objective.draw(data, np.random.default_rng(0))


def test_a_callable_without_a_mask_is_refused_where_tasks_are_padded() -> None:
    objective = Supervised(functional(Same()), lambda output, target: F.l1_loss(output, target))
    with pytest.raises(ValueError, match=r"\(output, target, mask\) wanted"):
        objective.query(objective.model.params(), task(OUTPUT, TARGET, query_mask=MASK))


@pytest.mark.parametrize("loss", ["bce", F, 3])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="loss="):
        Supervised(functional(Same()), loss)


def test_every_name_is_tested() -> None:
    assert {c[0] if isinstance(c[0], str) else c[0].name for c in CASES.values()} == set(LOSSES)
