"""PURER's pieces against closed forms and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learners.algorithms.maml import MAML
from learners.algorithms.proto_net import ProtoNet
from learners.base import Meta, pack
from learners.engine.derivative import differentiate
from learners.models.networks import MLP, Conv4
from learners.modules.functional import functional
from learners.modules.normalisation import BATCH, BatchNorm
from learners.purer.calibration import Calibration, DataFreeMAML, contrastive
from learners.purer.curriculum import Switch
from learners.purer.inversion import FROZEN, Inversion, Teacher, feature_distance, norm, roll, total_variation
from learners.purer.objective import DataFree, episode
from learners.purer.outer import Purer
from learners.purer.schooling import Schooling
from tests.quadratics import ALPHA, T1, THETA, Quadratic

pytestmark = pytest.mark.kernels

SMALL = Conv4(width=4, halving="pool", features="flat", norm_scale=True)


# --- oracles
# ------------------------------------------------------------------------------------------------------------


def test_total_variation_of_a_checkerboard_and_of_a_constant() -> None:
    board = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]], dtype=torch.float64)
    assert total_variation(board).item() == pytest.approx(4 * math.sqrt(2), abs=1e-12)
    assert norm(board).item() == pytest.approx(2.0, abs=1e-12)
    flat = torch.full((2, 1, 3, 3), 0.7, dtype=torch.float64)
    grads, value = differentiate(lambda p: total_variation(p["x"]), {"x": flat}, False)
    assert value.item() == 0
    assert torch.equal(grads["x"], torch.zeros_like(flat))


def test_total_variation_looks_along_both_axes_and_both_diagonals() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [
            (x[n, c, i + down, j + right] - x[n, c, i, j]).item() ** 2
            for n in range(2) for c in range(3) for i in range(4 - down)
            for j in range(max(0, -right), 5 - max(0, right))
        ]  # fmt: skip
        wanted += math.sqrt(sum(pairs))
    assert total_variation(x).item() == pytest.approx(wanted, rel=1e-12)


def test_feature_distance_of_a_constant_input() -> None:
    channels, c = 5, 0.3
    module = nn.Sequential(BatchNorm(channels), nn.Flatten(), nn.Linear(channels * 4, 2)).double()
    model = functional(module)
    _, seen = model.inspect(
        model.params() | model.running(), torch.full((7, channels, 2, 2), c, dtype=torch.float64), FROZEN
    )
    assert feature_distance(seen, model.running()).item() == pytest.approx(
        math.sqrt(channels) * (1 + abs(c)), abs=1e-12
    )


def test_rolling_is_torchs_roll() -> None:
    x = torch.randn(2, 3, 5, 6)
    for down, right in [(0, 0), (2, -1), (-2, 2), (1, 0)]:
        assert torch.equal(roll(x, torch.tensor([down, right])), torch.roll(x, (down, right), (2, 3)))


def test_the_inversion_gradient_of_a_linear_softmax_teacher() -> None:
    """∂CE/∂x = Wᵀ(p − e_y)/n, in the units of D where the teacher has others."""
    generator = torch.Generator().manual_seed(0)
    model = functional(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double())
    x, y = torch.randn(4, 1, 2, 3, dtype=torch.float64, generator=generator), torch.tensor([0, 2, 1, 1])
    only_ce, still = Inversion(tv=0.0, l2=0.0, features=0.0), torch.tensor([0, 0])
    for teacher, scale, offset in (
        (Teacher(model, model.params(), 3), 1.0, 0.0),
        (Teacher(model, model.params(), 3, (2.0,), (0.5,)), 2.0, 0.5),
    ):
        got = differentiate(lambda p, t=teacher: only_ce.loss(t, p["x"], y, still)[0], {"x": x}, False)[0]["x"].flatten(
            1
        )
        p = torch.softmax(model(model.params(), scale * x + offset), 1)
        wanted = scale * (p - F.one_hot(y, 3)) @ model.params()["1.weight"] / 4
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_inversion_adds_its_terms_with_their_weights() -> None:
    model = functional(SMALL.build((1, 16, 16), 3)).to("cpu")
    teacher = Teacher(model, model.params() | model.running(), 3)
    x, y = torch.randn(6, 1, 16, 16), torch.arange(3).repeat_interleave(2)
    loss, terms = Inversion().loss(teacher, x, y, torch.tensor([1, -2]))
    wanted = terms["classification"] + 1e-4 * terms["total_variation"] + 1e-5 * terms["norm"] + 1e-2 * terms["features"]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert terms["norm"].item() == pytest.approx(x.norm().item(), rel=1e-6)
    assert terms["features"].item() > 0


def test_the_switch_fires_at_the_eighth_value_and_begins_anew() -> None:
    switch = Switch("plateau", patience=6, warmup=0)
    state, fired = switch.init(), []
    for i, accuracy in enumerate([50, 51, 51, 50, 49, 51, 50, 50, 49, 48, 48, 48, 48, 48, 48]):
        state, fires = switch.update(state, i, accuracy, 0.0)
        fired.append(fires)
    assert [i for i, f in enumerate(fired) if f] == [7, 14]


def test_the_literal_switch_wants_six_rises_in_a_row_and_no_switch_is_before_warmup() -> None:
    switch = Switch("rising", patience=6, warmup=2)
    state, fired = switch.init(), []
    for i, loss in enumerate([9, 8, 1, 2, 3, 4, 5, 6, 7, 7, 8]):
        state, fires = switch.update(state, i, 0.0, loss)
        fired.append(fires)
    assert [i for i, f in enumerate(fired) if f] == [8]
    assert not any(Switch("off", warmup=0).update(switch.init(), i, 0.0, float(i))[1] for i in range(20))


@pytest.mark.parametrize(("temperature", "wanted"), [(0.5, 0.4326529029917915), (0.1, 1.8158323181698095e-4)])
def test_the_contrastive_loss_of_one_positive_and_four_orthogonal_negatives(temperature: float, wanted: float) -> None:
    z = torch.eye(5, dtype=torch.float64)
    got = contrastive(3 * z[:1], torch.tensor([0]), z, torch.arange(5), temperature)
    assert got.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("steps", "wanted"), [(1, (0.75, 0.0)), (2, (0.9225, -0.2875))])
def test_the_adversarial_gradient_through_the_inner_loop_of_a_quadratic_task(
    steps: int, wanted: tuple[float, float]
) -> None:
    """The support "image" is the vector a: ∂L_Q/∂a = (I − Mᴷ) B (φ_K − b); and −B (φ − b) for the query's b."""

    def outer(images):
        data = T1 | images
        return Quadratic().query(MAML(ALPHA, steps).adapt(Meta(THETA, {}), Quadratic(), data, steps), data)

    grads, _ = differentiate(outer, {"a": T1["a"], "b": T1["b"]}, False)
    assert grads["a"].tolist() == pytest.approx(wanted, abs=1e-12)
    if steps == 1:
        assert grads["b"].tolist() == pytest.approx((-3, 1.5), abs=1e-12)


@pytest.mark.parametrize(("steps", "order"), [(1, 2), (2, 2), (2, 1)])
def test_the_adversarial_gradient_through_a_network_against_finite_differences(
    steps: int, order: Literal[2, 1]
) -> None:
    torch.manual_seed(0)
    model = functional(Conv4(width=3, halving="pool", features="flat", norm_scale=True).build((1, 16, 16), 2).double())
    objective = DataFree(model, "cross_entropy", per_class=3, shape=(1, 16, 16))
    verb = Purer().verbs(MAML(0.1, steps, order), objective)["adversary"]
    images = torch.randn(1, 2, 3, 1, 16, 16, dtype=torch.float64)
    data = {"support_rows": torch.tensor([[0], [3]]), "query_rows": torch.tensor([[2, 1], [5, 4]])}
    theta = pack(model.params(), {})
    share = verb.run(theta, {"images": images}, data)
    gradient = torch.zeros(6, 1, 16, 16, dtype=torch.float64).index_add_(
        0, share.row["carry/which"], share.row["carry/gradient"]
    )

    def outer(d: torch.Tensor) -> float:
        task = episode(d, data)
        phi = MAML(0.1, steps).adapt(Meta(model.params(), {}), objective, task, steps)
        return float(objective.query(phi, task).detach())

    direction = torch.randn(images.shape, dtype=torch.float64)
    h = 1e-4
    difference = (8 * (outer(images + h * direction) - outer(images - h * direction))
                  - (outer(images + 2 * h * direction) - outer(images - 2 * h * direction))) / (12 * h)  # fmt: skip
    assert (gradient.view_as(images) * direction).sum().item() == pytest.approx(difference, rel=1e-6)


def test_prototypes_classify_by_distance() -> None:
    torch.manual_seed(0)
    model = functional(MLP(hidden=(8,)).build((3,), 4).double())
    x, y, q = torch.randn(12, 3).double(), torch.arange(4).repeat(3), torch.randn(5, 3).double()
    data = {"support_x": x, "support_y": y, "query_x": q, "query_y": torch.zeros(5, dtype=torch.long)}
    objective = DataFree(model, "cross_entropy")
    phi = ProtoNet().adapt(Meta(model.params(), {}), objective, data, 1)
    z = lambda v: torch.relu(model.module.linear0(v))  # noqa: E731
    prototypes = torch.stack([z(x[y == c]).mean(0) for c in range(4)])
    wanted = torch.softmax(-(torch.cdist(z(q), prototypes) ** 2), 1)
    torch.testing.assert_close(torch.softmax(model(phi, q), 1), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["transductive", "frozen"])
def test_prototypes_and_queries_are_normalised_alike(norm: Literal["transductive", "frozen"]) -> None:
    # A query set that is the support set lies around its own prototypes only if both passed the same BatchNorm.
    torch.manual_seed(0)
    model = functional(SMALL.build((1, 16, 16), 3).double())
    objective = DataFree(model, "cross_entropy", norm)
    slots = {k: v + torch.rand_like(v) for k, v in objective.slots().items()}
    x, y = torch.randn(6, 1, 16, 16).double(), torch.arange(3).repeat(2)
    data = {"support_x": x, "support_y": y, "query_x": x, "query_y": y}
    meta = Meta(model.params(), slots)
    z = model.features(slots | meta.params, x, FROZEN if norm == "frozen" else BATCH)
    prototypes = torch.stack([z[y == c].mean(0) for c in range(3)])
    wanted = torch.softmax(-(torch.cdist(z, prototypes) ** 2), 1)
    phi = slots | ProtoNet().adapt(meta, objective, data, 1)
    torch.testing.assert_close(torch.softmax(objective.predict(phi, data, x), 1), wanted, rtol=1e-9, atol=1e-12)


def test_prototypes_without_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="inner_steps=0: at least 1 wanted"):
        ProtoNet(inner_steps=0)


def test_calibration_fits_the_function_that_is_judged() -> None:
    # With frozen statistics, those in the slots and not the module's own.
    torch.manual_seed(0)
    model = functional(SMALL.build((1, 16, 16), 3))
    objective, params = DataFree(model, "cross_entropy", "frozen"), model.params()
    data = {"support_x": torch.randn(3, 1, 16, 16), "support_y": torch.arange(3), "noise": torch.randn(15, 1, 16, 16)}
    slots = {k: v + torch.rand_like(v) for k, v in objective.slots().items()}
    calibrate = Calibration(inversion_steps=2, steps=0)
    images = calibrate._inverted(objective, slots | params, data["noise"], torch.arange(3).repeat_interleave(5))
    moved = {k: v.detach().requires_grad_() for k, v in params.items()}
    both_x, both_y = (
        torch.cat([data["support_x"], images]),
        torch.cat([torch.arange(3), torch.arange(3).repeat_interleave(5)]),
    )
    F.cross_entropy(model(slots | moved, both_x, FROZEN), both_y).backward()
    after = replace(calibrate, steps=1)(objective, slots, params, data, 0.1)
    assert list(after) == list(params)
    torch.testing.assert_close(after["head.weight"], (moved["head.weight"] - 0.1 * moved["head.weight"].grad).detach())


def test_calibration_draws_real_features_to_the_inverted_ones_of_their_class() -> None:
    torch.manual_seed(0)
    model = functional(SMALL.build((1, 16, 16), 3))
    objective = DataFree(model, "cross_entropy")
    x, y = torch.randn(6, 1, 16, 16), torch.arange(3).repeat(2)
    data = {"support_x": x, "support_y": y, "noise": torch.randn(15, 1, 16, 16)}
    params = model.params()
    both = Calibration(inversion_steps=20, steps=10)
    images = both._inverted(objective, params, data["noise"], torch.arange(3).repeat_interleave(5))

    def distance(p) -> float:
        z = model.features(p, torch.cat([x, images]))
        return float(contrastive(z[:6], y, z[6:], torch.arange(3).repeat_interleave(5), both.temperature))

    after = both(objective, {}, params, data, 0.1)
    assert list(after) == list(params)
    assert distance(after) < distance(params)
    body_only = replace(both, kind="contrastive")(objective, {}, params, data, 0.1)
    assert torch.equal(body_only["head.weight"], params["head.weight"])
    assert not torch.equal(after["head.weight"], params["head.weight"])
    assert DataFreeMAML(calibration=Calibration("off")).at_test() == DataFreeMAML(calibration=Calibration("off"))


def test_only_the_last_step_at_test_is_calibrated() -> None:
    torch.manual_seed(0)
    objective = DataFree(functional(SMALL.build((1, 16, 16), 3)), "cross_entropy")
    data = {"support_x": torch.randn(3, 1, 16, 16), "support_y": torch.arange(3), "noise": torch.randn(15, 1, 16, 16)}
    meta = Meta(objective.model.params(), {})
    learner = DataFreeMAML(0.1, 2, calibration=Calibration(inversion_steps=2, steps=1))
    plain, found = (list(each.path(meta, objective, data, 2)) for each in (MAML(0.1, 2), learner.at_test()))
    wanted = [*plain[:-1], learner.calibration(objective, {}, plain[-1], data, 0.1)]
    for got, like in zip(found, wanted, strict=True):
        assert all(torch.equal(got[k], like[k]) for k in like)
    assert not torch.equal(found[-1]["head.weight"], plain[-1]["head.weight"])


@pytest.mark.parametrize("residual", [False, True])
def test_teachers_are_taught_as_torchs_optimisers_and_schedule_would(residual: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    network = nn.Sequential(*layers).double()
    plan = Schooling(epochs=6, batch=8, clip_norm=1.5)
    x, y = torch.randn(20, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
    order = torch.stack([torch.randperm(20) for _ in range(plan.epochs)])
    taught, share = plan.train(
        functional(network), residual, {"x": x, "y": y, "order": order, "held_x": x, "held_y": y}
    )

    # torch's own running variance is unbiased, ours as inversion measures it
    variance = torch.ones(4, dtype=torch.float64)

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if network.training:
            variance.lerp_(inputs[0].detach().var((0, 2, 3), correction=0), 0.1)

    network[1].register_forward_pre_hook(note)
    own = network.parameters()
    optimiser = torch.optim.SGD(own, 1e-2, momentum=0.9, weight_decay=5e-4) if residual else torch.optim.Adam(own, 1e-2)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 4, 5], 0.2)
    clipped = 0
    for rows_of_epoch in order:
        for rows in rows_of_epoch.split(8):
            optimiser.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            clipped += int(nn.utils.clip_grad_norm_(network.parameters(), 1.5) > 1.5)
            optimiser.step()
        schedule.step()
    assert 0 < clipped < 18
    for name, value in network.named_parameters():
        # torch clips to limit/(norm + 1e-6)
        torch.testing.assert_close(taught[name], value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(taught["1.running_mean"], network[1].running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(taught["1.running_var"], variance, rtol=1e-4, atol=1e-6)
    network.eval()
    assert share.item() == pytest.approx((network(x).argmax(-1) == y).double().mean().item(), abs=0.05)
