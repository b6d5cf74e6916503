"""Our layers against torch's own; anyone's module as a function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learners.models.networks import MLP, Conv4
from learners.modules.convolution import PatchConv
from learners.modules.functional import Functional, functional
from learners.modules.normalisation import BatchNorm, Normalising, Statistics, normalising
from learners.objectives.supervised import Supervised

pytestmark = pytest.mark.kernels

torch.manual_seed(0)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 5),
    ).double()  # fmt: skip


def test_anyones_module_computes_the_same_as_a_function(caplog: pytest.LogCaptureFixture) -> None:
    module, x = net(), torch.randn(7, 1, 8, 8).double()
    model = functional(module)
    assert "replaced BatchNorm layers 1, 4, 9" in caplog.text
    torch.testing.assert_close(model(model.params(), x), module.train()(x), rtol=1e-12, atol=1e-12)
    assert isinstance(module[1], nn.BatchNorm2d)  # the user's module is left alone
    assert set(model.params()) == {k for k, _ in module.named_parameters()}


def test_first_derivatives_equal_torchs() -> None:
    module, x = net(), torch.randn(7, 1, 8, 8).double()
    model = functional(module)
    params = {k: v.requires_grad_() for k, v in model.params().items()}
    ours = torch.autograd.grad(model(params, x).square().mean(), list(params.values()))
    theirs = torch.autograd.grad(module.train()(x).square().mean(), list(module.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_frozen_statistics_are_torchs_evaluation_mode() -> None:
    module, x = net(), torch.randn(7, 1, 8, 8).double()
    for _ in range(5):
        module.train()(torch.randn(16, 1, 8, 8).double() * 2 + 1)
    model = functional(module)
    got = model(model.params() | model.running(), x, Statistics("frozen"))
    torch.testing.assert_close(got, module.eval()(x), rtol=1e-12, atol=1e-12)


def test_statistics_of_the_first_rows_and_of_groups() -> None:
    norm, x = BatchNorm(3).double(), torch.randn(12, 3, 2, 2).double()
    known = x[:5]
    wanted = (x - known.mean((0, 2, 3))[:, None, None]) / (
        known.var((0, 2, 3), correction=0)[:, None, None] + 1e-5
    ).sqrt()
    with normalising(Normalising(Statistics("first", reference=5))):
        torch.testing.assert_close(norm(x), wanted)
    wanted = torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(3)])
    with normalising(Normalising(Statistics(groups=4))):
        torch.testing.assert_close(norm(x), wanted)


def test_support_plus_one_predicts_each_query_as_if_it_were_alone() -> None:
    model = functional(net())
    data = {"support_x": torch.randn(5, 1, 8, 8).double(), "query_x": torch.randn(9, 1, 8, 8).double()}
    objective = Supervised(model, "cross_entropy", norm="support_plus_one")
    got = objective.predict(model.params(), data, data["query_x"])
    for i, x in enumerate(data["query_x"]):
        alone = model(model.params(), torch.cat([data["support_x"], x[None]]))[-1]
        torch.testing.assert_close(got[i], alone, rtol=1e-12, atol=1e-12)
    # and it is not what the transductive mode says
    both = Supervised(model, "cross_entropy").predict(model.params(), data, data["query_x"])
    assert (got - both).abs().max() > 1e-3


def test_frozen_statistics_follow_the_tasks() -> None:
    model = functional(net())
    objective = Supervised(model, "cross_entropy", norm="frozen", momentum=1.0)
    x = torch.randn(6, 1, 8, 8).double() * 3
    tracked = objective.track(objective.slots() | model.params(), {"support_x": x})
    before = F.conv2d(x, model.params()["0.weight"], model.params()["0.bias"], stride=2, padding=1)
    torch.testing.assert_close(tracked["1.running_mean"], before.mean((0, 2, 3)))
    torch.testing.assert_close(tracked["1.running_var"], before.var((0, 2, 3), correction=0))


@pytest.mark.parametrize(
    ("stride", "padding", "bias", "channels"), [(1, 1, True, 1), (2, 1, False, 3), (2, 0, True, 2)]
)
def test_patch_convolution_is_convolution(stride, padding, bias, channels) -> None:
    conv = nn.Conv2d(channels, 8, 3, stride, padding, bias=bias).double()
    x = torch.randn(4, channels, 9, 7).double()
    assert PatchConv.suits(conv)
    torch.testing.assert_close(PatchConv(conv)(x), conv(x), rtol=1e-12, atol=1e-12)
    assert not PatchConv.suits(nn.Conv2d(64, 64, 3))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.InstanceNorm1d(4, track_running_stats=True), r"layer '1' \(InstanceNorm1d\) keeps state between calls"),
        (nn.FractionalMaxPool2d(2, output_ratio=0.5), r"layer '1' \(FractionalMaxPool2d\) draws random numbers"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "SpectralNorm"),
    ],
)
def test_layers_that_are_no_functions_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional(nn.Sequential(nn.Linear(4, 4), layer))


def test_stateless_normalisation_of_others_is_welcome() -> None:
    functional(nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(4)))


def test_a_missing_parameter_is_an_error_not_the_initial_value() -> None:
    model = functional(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="the model's parameter 'bias' is missing among weight"):
        model({"weight": torch.zeros(1, 2)}, torch.zeros(1, 2))


def count(model: Functional) -> int:
    return sum(v.numel() for v in model.params().values())


def test_the_published_networks_have_the_published_sizes() -> None:
    # Omniglot: four strided blocks of 64, mean over space. MiniImagenet: 32 channels, 84 → 5 pixels, 800 features.
    omniglot = functional(Conv4().build((1, 28, 28), 5))
    assert count(omniglot) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 64 * 5 + 5
    mini = functional(Conv4(width=32, halving="pool", features="flat").build((3, 84, 84), 5))
    assert mini.params()["head.weight"].shape == (5, 800)
    reptile = functional(Conv4(width=32, halving="pool_same", features="flat", norm_scale=True).build((3, 84, 84), 5))
    assert reptile.params()["head.weight"].shape == (5, 6 * 6 * 32)
    assert count(functional(MLP().build((1,), 1))) == 40 + 40 + 1600 + 40 + 40 + 1
    assert mini(mini.params(), torch.zeros(2, 3, 84, 84)).shape == (2, 5)


def test_images_too_small_for_four_halvings_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 8×8 are too small"):
        Conv4(halving="pool").build((1, 8, 8), 5)
    with pytest.raises(ValueError, match="Conv4 wants images"):
        Conv4().build((1,), 1)


def test_targets_that_would_be_broadcast_and_missing_queries_are_refused() -> None:
    model = functional(MLP().build((1,), 1))
    objective = Supervised(model, "mse")
    with pytest.raises(ValueError, match=r"targets of shape \(10,\) do not fit outputs of shape \(10, 1\)"):
        objective.support(model.params(), {"support_x": torch.zeros(10, 1), "support_y": torch.zeros(10)}, 0)
    with pytest.raises(ValueError, match="a task with query_x and query_y is wanted here, this one has support_x"):
        objective.query(model.params(), {"support_x": torch.zeros(10, 1)})
