"""What a user's module may be, and what of it is a constant: against plain autograd over the module itself."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from learners.algorithms.maml import MAML
from learners.base import Data
from learners.engine.execution import Execution
from learners.modules.convolution import PatchConv
from learners.modules.functional import Functional, functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

pytestmark = pytest.mark.kernels

RATE, STEPS = 0.1, 2


def tasks(inputs: tuple[int, ...], outputs: tuple[int, ...], count: int = 2) -> Data:
    torch.manual_seed(3)
    return {
        f"{part}_{kind}": torch.randn(count, 5, *shape, dtype=torch.float64)
        for part in ("support", "query")
        for kind, shape in (("x", inputs), ("y", outputs))
    }


def by_hand(module: nn.Module, data: Data) -> dict[str, Tensor]:
    """Σ over tasks of ∇θ L_Q(φ_K), every trainable parameter adapting; plain autograd over the user's module."""
    theta = {k: p for k, p in module.named_parameters() if p.requires_grad}
    total = dict.fromkeys(theta, 0.0)
    for i in range(len(data["support_x"])):
        phi = dict(theta)
        for _ in range(STEPS):
            loss = F.mse_loss(functional_call(module, phi, (data["support_x"][i],)), data["support_y"][i])
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {k: p - RATE * g for (k, p), g in zip(phi.items(), grads, strict=True)}
        loss = F.mse_loss(functional_call(module, phi, (data["query_x"][i],)), data["query_y"][i])
        for k, g in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            total[k] = total[k] + g
    return total  # type: ignore[return-value]


def ours(model: Functional, data: Data, mode: str) -> dict[str, Tensor]:
    verb = common_verbs(MAML(RATE, STEPS), Supervised(model, "mse"), 1)["gradient"]
    at = {f"params/{k}": v for k, v in model.params().items()}
    total = Execution(mode).run(verb.run, at, {}, data).total  # type: ignore[arg-type]
    return {k.removeprefix("params/"): v for k, v in total.items()}


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_frozen_parameters_are_constants(mode: str) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    net[0].requires_grad_(False)
    model, data = functional(net), tasks((3,), (1,))
    assert list(model.params()) == ["2.weight", "2.bias"]
    assert set(model.constants()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(ours(model, data, mode), by_hand(net, data), rtol=1e-10, atol=1e-12)


def test_constants_are_in_a_runs_identity_by_their_hash() -> None:
    def summary(seed: int) -> str:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        torch.manual_seed(seed)
        nn.init.normal_(net[0].weight)
        net[0].requires_grad_(False)
        return Supervised(functional(net), "mse").summary()

    assert summary(1) == summary(1) != summary(2)
    assert "2 constants of 128 bytes" in summary(1)


def test_constants_take_the_precision_of_theta() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    net[0].requires_grad_(False)
    model = functional(net)
    y = model({k: v.double() for k, v in model.params().items()}, torch.randn(4, 3).double())
    assert y.dtype == torch.float64


def test_a_module_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of Linear has requires_grad"):
        functional(nn.Linear(2, 1).requires_grad_(False))


class TwoPlaces(nn.Module):
    """One BatchNorm behind each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8)
        self.a, self.b = nn.Sequential(nn.Linear(3, 8), norm), nn.Sequential(nn.Linear(8, 8), norm)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(torch.tanh(self.a(x))))
        return y


def written_out(p: dict[str, Tensor], x: Tensor) -> Tensor:
    def norm(v: Tensor) -> Tensor:
        return F.batch_norm(v, None, None, p["a.1.weight"], p["a.1.bias"], training=True)

    h = torch.tanh(norm(F.linear(x, p["a.0.weight"], p["a.0.bias"])))
    return F.linear(norm(F.linear(h, p["b.0.weight"], p["b.0.bias"])), p["head.weight"], p["head.bias"])


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_one_layer_in_two_places_is_one(mode: str) -> None:
    net, data = TwoPlaces().double(), tasks((3,), (1,))
    model = functional(net)
    assert len(model.params()) == len(list(net.parameters())) == 8

    class Written(nn.Module):  # torch's functional_call misbehaves where one module stands in two places
        def __init__(self) -> None:
            super().__init__()
            for k, v in net.named_parameters():
                self.register_parameter(k.replace(".", "_"), nn.Parameter(v.detach().clone()))

        def forward(self, x: Tensor) -> Tensor:
            return written_out({k: getattr(self, k.replace(".", "_")) for k, _ in net.named_parameters()}, x)

    wanted = dict(zip(model.params(), by_hand(Written(), data).values(), strict=True))
    got = ours(model, data, mode)
    # BatchNorm behind a layer makes the gradient of its bias 0 but for rounding.
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    after = model.to("cpu")
    assert list(after.params()) == list(model.params())
    torch.testing.assert_close(ours(after, data, mode), wanted, rtol=1e-9, atol=1e-12)


def test_a_call_leaves_the_module_as_it_was() -> None:
    model = functional(TwoPlaces())
    before = {k: v.clone() for k, v in model.params().items()}
    model({k: v + 1 for k, v in before.items()}, torch.randn(4, 3))
    assert all(
        isinstance(p, nn.Parameter) for m in model.module.modules() for p in m._parameters.values() if p is not None
    )
    torch.testing.assert_close(model.params(), before, rtol=0, atol=0)


def test_hooks_and_reparametrisations_of_convolutions_and_norms_stay() -> None:
    conv = nn.Conv2d(1, 2, 3)
    conv.register_forward_hook(lambda _module, _inputs, output: output * 0)
    net = nn.Sequential(conv).to(memory_format=torch.channels_last)
    model = functional(net)
    assert not isinstance(model.module[0], PatchConv)
    assert model(model.params(), torch.randn(2, 1, 5, 5)).abs().max() == 0
    norm = nn.BatchNorm1d(3)
    norm.register_forward_hook(lambda _module, _inputs, output: output + 7)
    model = functional(nn.Sequential(norm))
    torch.testing.assert_close(model(model.params(), torch.randn(9, 3)).mean(0), torch.full((3,), 7.0))
    old = nn.utils.spectral_norm(nn.Conv2d(1, 3, 3))
    assert "0.weight_orig" in functional(nn.Sequential(old)).params()
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\) keeps state .* buffer 'weight_u'"):
        functional(nn.Sequential(old), torch.zeros(2, 1, 5, 5))


class Calls(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 4), function
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(self, self.layer(x))
        return y


def _counted(self: nn.Module, h: Tensor) -> Tensor:
    self.count += 1
    return h


def _own_generator(self: nn.Module, h: Tensor) -> Tensor:
    return h + torch.randperm(4).to(h)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_counted, "Calls keeps state between calls: its forward writes the buffer 'count'"),
        (lambda _, h: h * random.random(), "Calls gives different outputs for the same inputs"),
        (lambda _, h: h * float(np.random.rand()), "Calls gives different outputs for the same inputs"),
        (_own_generator, r"the forward of Calls draws random numbers \(aten::randperm\) that nothing stands in for"),
        (lambda _, h: h + torch.randn_like(h), "in evaluation mode too: a draw only where self.training wanted"),
        (lambda _, h: F.gumbel_softmax(h), r"draws random numbers \(aten::exponential_\) that nothing stands in for"),
    ],
)
def test_modules_that_are_no_functions_are_refused_by_name(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional(Calls(function), torch.randn(5, 3))
    model = functional(Calls(function))
    with pytest.raises(ValueError, match=message):
        model(model.params(), torch.randn(5, 3))


def test_a_dry_run_leaves_the_global_generators_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    functional(net, torch.zeros(5, 3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_batchnorm_in_evaluation_mode_is_a_constant_map(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    net(torch.randn(50, 3).double() * 3 + 1)
    net[1].eval()
    model, data = functional(net), tasks((3,), (1,))
    assert "BatchNorm layers 1 are in evaluation mode" in caplog.text
    torch.testing.assert_close(ours(model, data, mode), by_hand(net, data), rtol=1e-10, atol=1e-12)


def test_batchnorm_over_one_value_is_refused_as_torch_does() -> None:
    model = functional(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="BatchNorm over 4 channels gets one value per channel to normalise by"):
        model(model.params(), torch.randn(1, 3))
    images = functional(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    images(images.params(), torch.randn(1, 1, 5, 5))  # nine values


class Flat(nn.Module):
    """`view` wants torch's own memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        h = h + h.view(h.size(0), -1).mean(1)[:, None, None, None]
        y: Tensor = self.head(torch.tanh(self.norm(h)).view(x.size(0), -1))
        return y


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_users_view_finds_torchs_layout(mode: str) -> None:
    net, data = Flat().double(), tasks((3, 6, 6), (2,))
    torch.testing.assert_close(ours(functional(net), data, mode), by_hand(net, data), rtol=1e-8, atol=1e-12)


def test_batchnorm_gives_the_memory_format_it_gets() -> None:
    norm = functional(nn.BatchNorm2d(4))
    last = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert norm(norm.params(), last).is_contiguous(memory_format=torch.channels_last)
    assert norm(norm.params(), last.contiguous()).is_contiguous()
    ours = functional(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    assert ours(ours.params(), last.contiguous()).is_contiguous(memory_format=torch.channels_last)


def test_what_torchs_transforms_do_not_take_names_the_way_out() -> None:
    model = functional(Calls(lambda _, h: h if h.sum() > 0 else -h))
    data = {k: v.float() for k, v in tasks((3,), (4,)).items()}
    ours(model, data, "loop")
    with pytest.raises(ValueError, match="does not run under torch.vmap .* execution = 'loop' wanted"):
        ours(model, data, "vmap")


def test_a_forward_that_writes_a_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer '0' \(Embedding\) writes the parameter 'weight' in its forward"):
        functional(nn.Sequential(nn.Embedding(5, 3, max_norm=0.1)), torch.arange(4))


class Tokens(nn.Module):
    """Keyword inputs, a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = (torch.tanh(self.embedding(ids)) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.head(h), h


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_models_of_several_inputs_and_outputs(mode: str) -> None:
    torch.manual_seed(0)
    net = Tokens().double()
    x = {"ids": torch.randint(0, 7, (6, 5)), "mask": (torch.arange(5) < torch.randint(1, 6, (6, 1))).double()}
    y = torch.randint(0, 2, (6,), dtype=torch.int32)
    one = {f"{part}_x/{k}": v for part in ("support", "query") for k, v in x.items()}
    one |= {"support_y": y, "query_y": y}

    def loss(output, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target.long()) + 0.1 * output[1].square().mean()

    model = functional(net, x)
    objective = Supervised(model, loss, measures={"right": lambda o, t: (o[0].argmax(1) == t).double().mean()})
    theta = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    grads = torch.autograd.grad(loss(functional_call(net, theta, (), x), y), list(theta.values()), create_graph=True)
    phi = {k: p - 0.1 * g for (k, p), g in zip(theta.items(), grads, strict=True)}
    wanted = torch.autograd.grad(loss(functional_call(net, phi, (), x), y), list(theta.values()))
    verb = common_verbs(MAML(0.1, 1), objective, 1)
    stacked = {k: v.unsqueeze(0) for k, v in one.items()}
    at = {f"params/{k}": v for k, v in model.params().items()}
    got = Execution(mode).run(verb["gradient"].run, at, {}, stacked).total  # type: ignore[arg-type]
    torch.testing.assert_close([got[f"params/{k}"] for k in theta], list(wanted), rtol=1e-10, atol=1e-14)
    scores = objective.measure(dict(phi), one)
    assert list(scores) == ["right", "loss"]


def test_partly_attached_parameters_keep_what_they_are_functions_of() -> None:
    # φ = (2a, b), a attached, b not: d/da of (∂/∂φ₀ φ₀²φ₁) = 2 φ₁ · 2
    from learners.engine.derivative import differentiate

    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0)
    grads, _ = differentiate(lambda p: p["u"] ** 2 * p["v"], {"u": 2 * a, "v": b}, again=True)
    (found,) = torch.autograd.grad(grads["u"], a)
    assert float(found) == 20.0


def test_names_with_a_slash_are_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules["a/b"] = nn.Linear(1, 1)

    with pytest.raises(ValueError, match="layer 'a/b': a name without '/' wanted"):
        functional(Named())


def test_what_is_frozen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metafleet")
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    net[0].requires_grad_(False)
    functional(net)
    assert "2 parameters do not require gradients: constants of 128 bytes" in caplog.text


class Sharp(nn.BatchNorm1d):
    """BatchNorm and what comes behind it in one layer, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * super().forward(x))


class Bare(nn.BatchNorm1d):
    """With a forward that asks torch's function itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(2 * F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps))


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def reparametrised() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


class Last(nn.LSTM):
    """An LSTM that reads its input twice as large, and gives its last output."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(2 * x)[0][:, -1]


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [lambda: Sharp(8), lambda: Bare(8), reparametrised, lambda: nn.SyncBatchNorm(8)])
def test_a_batchnorm_with_something_of_its_own_computes_that(layer, training: bool, mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), layer(), nn.Linear(8, 1)).double().train(training)
    model, data = functional(net), tasks((3,), (1,))
    torch.testing.assert_close(ours(model, data, mode), by_hand(net, data), rtol=1e-9, atol=1e-12)


def test_a_recurrent_layer_with_a_forward_of_its_own_is_for_a_loop() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (3, 1)), Last(1, 6, batch_first=True), nn.Linear(6, 1)).double()
    model, data = functional(net), tasks((3,), (1,))
    torch.testing.assert_close(ours(model, data, "loop"), by_hand(net, data), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"layer '1' \(Last\) is recurrent and computes in its own way.*'loop' wanted"):
        ours(model, data, "vmap")


def test_what_nothing_can_stand_in_for_is_refused() -> None:
    scripted = torch.jit.script(nn.Linear(3, 8))
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\) is a torch.jit.ScriptModule"):
        functional(nn.Sequential(scripted, nn.Linear(8, 1)))


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_sparse_embedding_is_the_same_function(mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 1)).double()
    dense = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 1)).double()
    dense.load_state_dict(net.state_dict())
    data = tasks((3,), (1,))
    for part in ("support", "query"):
        data[f"{part}_x"] = torch.randint(0, 7, (2, 5, 3))
    torch.testing.assert_close(ours(functional(net), data, mode), by_hand(dense, data), rtol=1e-9, atol=1e-12)
