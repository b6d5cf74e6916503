"""MAML's kin and the baselines of few-shot papers against plain autograd and closed forms, written by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.setup import config, equal_budget
from envs.images.pretraining import Pretraining
from envs.sources.glyphs import Glyphs
from learners.algorithms.baseline_plus_plus import BaselinePlusPlus
from learners.algorithms.cavia import CAVIA
from learners.algorithms.linear_probe import LinearProbe
from learners.algorithms.nearest_centroid import NearestCentroid
from learners.algorithms.proto_maml import ProtoMAML
from learners.algorithms.proto_net import ProtoNet
from learners.base import Data, Learner, Meta, Params, pack, unpack
from learners.engine.execution import Execution
from learners.models.context import ContextConv4, ContextMLP
from learners.models.networks import MLP, Conv4
from learners.models.resnet import ResNet
from learners.models.unit import Unit, UnitFeatures
from learners.modules.functional import Functional, functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

MODES = ("loop", "vmap")
INPUTS, WIDTH, CLASSES, SHOWN = 3, 5, 4, (0, 1, 3)  # class 2 is in no support set and in no query set
ALPHA, STEPS = 0.3, 3


@pytest.fixture
def model() -> Functional:
    torch.manual_seed(0)
    return functional(MLP((WIDTH,), activation="tanh").build((INPUTS,), CLASSES).double())


def classification(count: int = 2) -> Data:
    """Stacked tasks of three of the four classes."""
    torch.manual_seed(1)
    labels = torch.tensor(SHOWN)
    data = {"support_x": torch.randn(count, 6, INPUTS).double(), "query_x": torch.randn(count, 9, INPUTS).double()}
    return data | {"support_y": labels.repeat(count, 2), "query_y": labels.repeat(count, 3)}


def task(data: Data, i: int) -> Data:
    return {k: v[i] for k, v in data.items()}


def summed(learner: Learner, objective: Supervised, theta: Params, data: Data, mode: str) -> Params:
    """The gradient verb's sum over stacked tasks."""
    run = common_verbs(learner, objective, 1)["gradient"].run
    return unpack(Execution(mode, backend="aot_eager").run(run, pack(theta, {}), {}, data).total).params


def by_hand(loss: Callable[[Params, Data], Tensor], theta: Params, data: Data) -> Params:
    """Σ ∇ loss over tasks, by plain autograd."""
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    total = sum((loss(leaves, task(data, i)) for i in range(len(data["support_x"]))), torch.zeros(()).double())
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def close(got: Params, wanted: Params) -> None:
    assert got.keys() == wanted.keys()
    for k, v in wanted.items():
        torch.testing.assert_close(got[k], v, rtol=0, atol=1e-9)


def body(p: Params, x: Tensor) -> Tensor:
    """Features, written out."""
    return torch.tanh(x @ p["linear0.weight"].t() + p["linear0.bias"])


def distances(p: Params, data: Data) -> Tensor:
    """A prototypical network's query loss over the classes that there are."""
    z, q = body(p, data["support_x"]), body(p, data["query_x"])
    means = torch.stack([z[data["support_y"] == c].mean(0) for c in SHOWN])
    among = torch.searchsorted(torch.tensor(SHOWN), data["query_y"])
    return F.cross_entropy(-(torch.cdist(q, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2), among)


@pytest.mark.parametrize("mode", MODES)
def test_a_class_that_the_support_does_not_show_is_as_if_it_were_not_there(model: Functional, mode: str) -> None:
    data, objective, theta = classification(), Supervised(model, "cross_entropy"), model.params()
    close(summed(ProtoNet(), objective, theta, data, mode), by_hand(distances, theta, data))
    phi = ProtoNet().adapt(Meta(theta, {}), objective, task(data, 0), 1)
    probabilities = torch.softmax(model(phi, 100 * torch.randn(50, INPUTS).double()), 1)
    assert (probabilities[:, 2] == 0).all()
    query_of_it = task(data, 0) | {"query_y": torch.full((9,), 2)}
    assert torch.isfinite(objective.query(phi, query_of_it))


@pytest.mark.parametrize("learner", [ProtoNet(), ProtoMAML(ALPHA, 0)])
def test_rows_that_pad_a_support_set_are_in_no_prototype(model: Functional, learner: Learner) -> None:
    data, objective, theta = classification(), Supervised(model, "cross_entropy"), model.params()
    padding = {"support_x": torch.full((2, 3, INPUTS), 9.0).double(), "support_y": torch.tensor([[0, 2, 3]] * 2)}
    padded = data | {k: torch.cat([data[k], v], 1) for k, v in padding.items()}
    padded["support_mask"] = torch.tensor([[1.0] * 6 + [0.0] * 3] * 2).double()
    for mode in MODES:
        close(summed(learner, objective, theta, padded, mode), by_hand(distances, theta, data))


def outputs(p: Params, x: Tensor) -> Tensor:
    return body(p, x) @ p["head.weight"].t() + p["head.bias"]


def stepped(p: Params, names: list[str], loss: Callable[[Params], Tensor], rate: float, order: int) -> Params:
    """One step of gradient descent on some of p, its gradient a constant in first order."""
    grads = torch.autograd.grad(loss(p), [p[k] for k in names], create_graph=True)
    return p | {k: p[k] - rate * (g if order == 2 else g.detach()) for k, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adapts", ["*", "head*"])
def test_proto_maml_is_differentiated_through_its_steps_and_its_beginning(model, mode, order, adapts) -> None:
    data, theta = classification(), model.params()

    def loss(p: Params, data: Data) -> Tensor:
        x, y = data["support_x"], data["support_y"]
        z = body(p, x)
        means = torch.stack([z[y == c].mean(0) if c in SHOWN else 0 * z[0] for c in range(CLASSES)])
        bias = torch.stack([-(means[c] ** 2).sum() if c in SHOWN else -1e30 + 0 * z[0, 0] for c in range(CLASSES)])
        phi = {k: v.clone() for k, v in p.items()} | {"head.weight": 2 * means, "head.bias": bias}
        names = list(p) if adapts == "*" else ["head.weight", "head.bias"]
        for _ in range(STEPS):
            phi = stepped(phi, names, lambda q: F.cross_entropy(outputs(q, x), y), ALPHA, order)
        return F.cross_entropy(outputs(phi, data["query_x"]), data["query_y"])

    learner = ProtoMAML(ALPHA, STEPS, order=order, adapts=(adapts,))
    got = summed(learner, Supervised(model, "cross_entropy"), theta, data, mode)
    close(got, by_hand(loss, theta, data))
    assert not got["head.weight"].any()
    assert not got["head.bias"].any()
    other = summed(replace(learner, order=3 - order), Supervised(model, "cross_entropy"), theta, data, mode)
    assert (other["linear0.weight"] - got["linear0.weight"]).abs().max() > 1e-4


def test_proto_maml_without_steps_is_a_prototypical_network(model: Functional) -> None:
    data, objective, theta = classification(), Supervised(model, "cross_entropy"), model.params()
    close(summed(ProtoMAML(ALPHA, 0), objective, theta, data, "vmap"), by_hand(distances, theta, data))
    phi = ProtoMAML(ALPHA, 5).adapt(Meta(theta, {}), objective, task(data, 0), 0)
    close(phi, ProtoNet().adapt(Meta(theta, {}), objective, task(data, 0), 1))


def test_proto_maml_does_not_mind_the_order_of_classes(model: Functional) -> None:
    data, objective, theta = classification(), Supervised(model, "cross_entropy"), model.params()
    order = torch.tensor([3, 0, 2, 1])
    renamed = data | {k: order[data[k]] for k in ("support_y", "query_y")}
    learner = ProtoMAML(ALPHA, STEPS)
    close(summed(learner, objective, theta, renamed, "loop"), summed(learner, objective, theta, data, "loop"))


class Shifted(nn.Module):
    """w·x + c."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -1.3]))
        self.context = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.context


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cavia_of_a_shifted_line_matches_its_closed_form(mode: str, steps: int) -> None:
    # c_K = r · mean(y − w·x) over the support, r = 1 − (1 − 2α)^K; first order: c_K is a constant.
    shifted = functional(Shifted().double())
    torch.manual_seed(2)
    data = {"support_x": torch.randn(3, 6, 2), "query_x": torch.randn(3, 4, 2)}
    data |= {"support_y": torch.randn(3, 6), "query_y": torch.randn(3, 4)}
    data = {k: v.double() for k, v in data.items()}
    w, r = shifted.params()["w"], 1 - (1 - 2 * ALPHA) ** steps
    context = r * (data["support_y"] - data["support_x"] @ w).mean(1)
    error = data["query_x"] @ w + context[:, None] - data["query_y"]
    through = data["query_x"] - r * data["support_x"].mean(1, keepdim=True)
    for order, slope in ((2, through), (1, data["query_x"])):
        learner = CAVIA(ALPHA, steps, order=order)
        got = summed(learner, Supervised(shifted, "mse"), shifted.params(), data, mode)
        wanted = (2 * error[..., None] * slope).mean(1).sum(0)
        close(got, {"w": wanted, "context": torch.zeros(()).double()})
    phi = CAVIA(ALPHA, steps).adapt(Meta(shifted.params(), {}), Supervised(shifted, "mse"), task(data, 0), steps)
    close(phi, {"w": w, "context": context[0]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
def test_cavia_moves_nothing_but_the_context_of_its_network(mode: str, order: int) -> None:
    torch.manual_seed(3)
    net = functional(ContextMLP((WIDTH,), "tanh", size=2).build((1,), 1).double())
    theta = {k: v + 0.3 for k, v in net.params().items()}  # the context too, which must not matter
    data = {k: torch.randn(2, 5, 1).double() for k in ("support_x", "support_y", "query_x", "query_y")}

    def predicted(p: Params, context: Tensor, x: Tensor) -> Tensor:
        w, b = p["linear0.weight"], p["linear0.bias"]
        z = torch.tanh(x @ w[:, :1].t() + w[:, 1:] @ context + b)
        return z @ p["head.weight"].t() + p["head.bias"]

    def loss(p: Params, data: Data) -> Tensor:
        context = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            error = F.mse_loss(predicted(p, context, data["support_x"]), data["support_y"])
            (slope,) = torch.autograd.grad(error, context, create_graph=True)
            context = context - ALPHA * (slope if order == 2 else slope.detach())
        return F.mse_loss(predicted(p, context, data["query_x"]), data["query_y"])

    got = summed(CAVIA(ALPHA, 2, order=order), Supervised(net, "mse"), theta, data, mode)
    close(got, by_hand(loss, theta, data))
    assert not got["concatenated.context"].any()
    begun = CAVIA().init(theta, np.random.default_rng(0))
    close(begun.params, theta | {"concatenated.context": torch.zeros(2).double()})


def test_cavia_of_a_model_without_context_is_refused(model: Functional) -> None:
    with pytest.raises(ValueError, match=r"matches none of the parameters linear0.weight"):
        CAVIA().init(model.params(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="size=0: at least 1 context parameter wanted"):
        ContextMLP(size=0)
    with pytest.raises(ValueError, match="network=MLP: Conv4 wanted"):
        ContextConv4(MLP())


@pytest.mark.parametrize("name", ["cavia", "baseline-plus-plus"])
def test_a_run_with_a_model_in_its_model_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    run = equal_budget.comparison("comparison-glyphs")[name]
    (tmp_path / "run.toml").write_text(config.to_toml(run))
    assert config.load(str(tmp_path / "run.toml")) == run


def test_the_context_of_a_conv4_scales_and_shifts_its_third_block_before_the_relu() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 1, 16, 16)
    spec = Conv4(width=3)
    contextual, plain = ContextConv4(spec, size=2).build((1, 16, 16), 5), spec.build((1, 16, 16), 5)
    state = contextual.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if "film" not in k})
    film = contextual.get_submodule("block2.film")
    film.linear.weight.data.normal_()
    film.linear.bias.data.zero_()
    torch.testing.assert_close(contextual(x), plain(x))
    film.context.data = torch.tensor([0.5, -1.0])
    gamma, beta = (film.linear.weight @ film.context).split(3)
    h = x
    for i in range(4):
        block = plain.get_submodule(f"block{i}")
        h = block.norm(block.conv(h))
        if i == 2:
            h = h + gamma.view(1, 3, 1, 1) * h + beta.view(1, 3, 1, 1)
        h = h.clamp(min=0)
    torch.testing.assert_close(contextual(x), plain.head(h.mean((2, 3))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_probe_is_gradient_descent_on_a_linear_head(model: Functional, mode: str, order: int, loss: str) -> None:
    data, theta, objective = classification(), model.params(), Supervised(model, loss)
    if loss == "mse":
        data |= {"support_y": torch.randn(2, 6, CLASSES).double(), "query_y": torch.randn(2, 9, CLASSES).double()}
    apart = getattr(F, loss if loss == "cross_entropy" else "mse_loss")

    def fitted(p: Params, data: Data) -> Params:
        bias = torch.zeros(CLASSES, dtype=torch.float64)
        if loss == "cross_entropy":
            bias[2] = -1e30
        head = {"head.weight": 0 * p["head.weight"], "head.bias": bias.requires_grad_()}
        if not head["head.weight"].requires_grad:
            head["head.weight"].requires_grad_()
        z = body(p, data["support_x"])
        for _ in range(STEPS):
            head = stepped(
                head, list(head),
                lambda h: apart(z @ h["head.weight"].t() + h["head.bias"], data["support_y"]), ALPHA, order,
            )  # fmt: skip
        return p | head

    def queried(p: Params, data: Data) -> Tensor:
        return apart(outputs(fitted(p, data), data["query_x"]), data["query_y"])

    learner = LinearProbe(ALPHA, STEPS, order=order)
    phi = learner.adapt(Meta(theta, {}), objective, task(data, 0), STEPS)
    close({k: v.detach() for k, v in phi.items()}, {k: v.detach() for k, v in fitted(theta, task(data, 0)).items()})
    close(summed(learner, objective, theta, data, mode), by_hand(queried, theta, data))


def test_adam_fits_a_probe_as_torchs_own(model: Functional) -> None:
    data, theta = task(classification(), 0), model.params()
    learner = LinearProbe(0.05, inner_optimizer="adam")
    phi = learner.adapt(Meta(theta, {}), Supervised(model, "cross_entropy"), data, 4)
    z, shown = body(theta, data["support_x"]), list(SHOWN)
    head = nn.Linear(WIDTH, CLASSES).double()
    head.weight.data.zero_()
    head.bias.data.zero_()
    adam = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(4):
        adam.zero_grad()
        logits = head(z)
        F.cross_entropy(logits[:, shown], torch.searchsorted(torch.tensor(SHOWN), data["support_y"])).backward()
        adam.step()
    torch.testing.assert_close(phi["head.weight"][shown], head.weight.data[shown], rtol=0, atol=1e-9)
    torch.testing.assert_close(phi["head.bias"][shown], head.bias.data[shown], rtol=0, atol=1e-9)


def unit_model() -> Functional:
    torch.manual_seed(0)
    return functional(Unit(MLP((WIDTH,), activation="tanh")).build((INPUTS,), CLASSES).double())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, STEPS])
def test_baseline_plus_plus_is_descent_on_cosines(mode: str, order: int, steps: int) -> None:
    model = unit_model()
    data, theta, objective = classification(), model.params(), Supervised(model, "cross_entropy")

    def cosines(z: Tensor, v: Tensor) -> Tensor:
        return 10 * torch.stack([F.cosine_similarity(z, v[c].expand_as(z)) for c in range(CLASSES)], 1)

    def loss(p: Params, data: Data) -> Tensor:
        q, y = body(p, data["query_x"]), data["query_y"]
        if not steps:
            return F.cross_entropy(cosines(q, p["head.weight"]), y)
        z = body(p, data["support_x"])
        unit = z / z.norm(dim=1, keepdim=True)
        v = torch.stack([unit[data["support_y"] == c].mean(0) for c in SHOWN])
        among = torch.searchsorted(torch.tensor(SHOWN), data["support_y"])

        def shown(z: Tensor, v: Tensor) -> Tensor:
            return 10 * torch.stack([F.cosine_similarity(z, w.expand_as(z)) for w in v], 1)

        for _ in range(steps):
            v = stepped({"v": v}, ["v"], lambda h: F.cross_entropy(shown(z, h["v"]), among), ALPHA, order)["v"]
        return F.cross_entropy(shown(q, v), torch.searchsorted(torch.tensor(SHOWN), y))

    learner = BaselinePlusPlus(ALPHA, steps, order=order)
    close(summed(learner, objective, theta, data, mode), by_hand(loss, theta, data))


def test_cosines_want_features_of_length_one(model: Functional) -> None:
    data = task(classification(), 0)
    with pytest.raises(ValueError, match="features of length 1 wanted"):
        BaselinePlusPlus().gradient(Meta(model.params(), {}), Supervised(model, "cross_entropy"), data)
    with pytest.raises(ValueError, match="a classification task wanted"):
        BaselinePlusPlus().gradient(Meta(unit_model().params(), {}), Supervised(unit_model(), "mse"), data)


@pytest.mark.parametrize("spec", [MLP((4,)), Conv4(width=3), ResNet(10, 2)])
def test_unit_features_are_the_others_at_length_one(spec: MLP | Conv4 | ResNet) -> None:
    torch.manual_seed(5)
    x, plain = torch.randn(3, 1, 16, 16), spec.build((1, 16, 16), 4)
    torch.manual_seed(5)
    torch.randn(3, 1, 16, 16)
    unit = Unit(spec).build((1, 16, 16), 4)
    assert list(unit.state_dict()) == list(plain.state_dict())
    seen: list[Tensor] = []
    plain.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain(x)
    wanted = (seen[0] / seen[0].pow(2).sum(1, keepdim=True).sqrt()) @ plain.head.weight.t() + plain.head.bias
    torch.testing.assert_close(unit(x), wanted)


def test_features_that_are_all_zero_have_finite_derivatives() -> None:
    layers = OrderedDict(first=nn.Linear(INPUTS, WIDTH), relu=nn.ReLU(), unit=UnitFeatures(), head=nn.Linear(WIDTH, 4))
    model = functional(nn.Sequential(layers).double())
    theta = model.params() | {"first.bias": torch.full((WIDTH,), -1.0).double()}
    data = task(classification(), 0)
    data = {k: torch.cat([0 * v[:1], v[1:]]) for k, v in data.items()}  # the first of each gives features 0
    assert not model.features(theta, data["support_x"])[0].any()
    for learner in (BaselinePlusPlus(0.1, 2), ProtoMAML(0.1, 2)):
        grads = learner.gradient(Meta(theta, {}), Supervised(model, "cross_entropy"), data).grads
        assert all(torch.isfinite(g).all() for g in grads.values())


def test_a_centroid_is_the_nearest_and_training_knows_of_none() -> None:
    model = unit_model()
    data, theta, objective = classification(), model.params(), Supervised(model, "cross_entropy")
    one = task(data, 0)
    phi = NearestCentroid().adapt(Meta(theta, {}), objective, one, 3)
    z, q = (F.normalize(body(theta, one[k])) for k in ("support_x", "query_x"))
    means = torch.stack([z[one["support_y"] == c].mean(0) for c in SHOWN])
    nearest = torch.tensor(SHOWN)[torch.cdist(q, means).argmin(1)]
    assert model(phi, one["query_x"]).argmax(1).tolist() == nearest.tolist()

    def plain(p: Params, data: Data) -> Tensor:
        logits = F.normalize(body(p, data["query_x"])) @ p["head.weight"].t() + p["head.bias"]
        return F.cross_entropy(logits, data["query_y"])

    for learner in (NearestCentroid(), LinearProbe()):
        close(summed(learner, objective, theta, data, "vmap"), by_hand(plain, theta, data))
    with pytest.raises(ValueError, match="inner_steps=1: 0 wanted"):
        NearestCentroid(inner_steps=1)


@pytest.mark.parametrize(
    "learner", [ProtoNet(), ProtoMAML(ALPHA, 2), CAVIA(ALPHA, 2, adapts=("head.bias",)), BaselinePlusPlus(ALPHA, 2)]
)
def test_compiled_they_are_the_same(learner: Learner) -> None:
    model = unit_model()
    data, theta, objective = classification(), model.params(), Supervised(model, "cross_entropy")
    # the right-hand side is held to autograd by hand above
    close(*(summed(learner, objective, theta, data, mode) for mode in ("compiled", "vmap")))


@pytest.mark.parametrize("learner", [LinearProbe(1.0), LinearProbe(1.0, inner_optimizer="adam"), BaselinePlusPlus(1.0)])
def test_a_new_head_never_chooses_a_class_that_it_was_not_shown(learner: Learner) -> None:
    model = unit_model()
    phi = learner.adapt(Meta(model.params(), {}), Supervised(model, "cross_entropy"), task(classification(), 0), 20)
    logits = model(phi, 100 * torch.randn(200, INPUTS).double())
    assert torch.isfinite(logits).all()
    assert set(logits.argmax(1).tolist()) == set(SHOWN)


def test_users_may_normalise_features_themselves() -> None:
    layers = OrderedDict(first=nn.Linear(INPUTS, WIDTH), unit=UnitFeatures(), head=nn.Linear(WIDTH, CLASSES))
    model = functional(nn.Sequential(layers).double())
    result = BaselinePlusPlus(0.1, 2).gradient(
        Meta(model.params(), {}), Supervised(model, "cross_entropy"), task(classification(), 0)
    )
    assert result.grads["first.weight"].abs().max() > 0


def test_pretraining_labels_training_images_by_class_and_judges_by_episodes(data_folder: Path) -> None:
    source = Glyphs(characters=20, drawings=6, size=16)
    tasks = Pretraining(source, ways=3, shots=1, queries=2, test_queries=2, classes=12, batch=200)
    tasks.prepare()
    images, drawn = source.load(), tasks.sample("train", np.random.default_rng(0))
    known = images.classes("train")
    assert tasks.outputs == len(known) == 12
    assert set(drawn["query_y"].tolist()) == set(range(12))
    for x, y in zip(drawn["query_x"], drawn["query_y"], strict=True):
        of_class = np.stack([images.images[r] for r in images.rows(known[y])]) / 255
        assert np.isclose(of_class, x, atol=1e-6).all((1, 2, 3)).any()
    held_out = tasks.sample("test", np.random.default_rng(0))
    assert held_out["support_y"].tolist() == [0, 1, 2]
    assert held_out["query_x"].shape == (6, 1, 16, 16)
    with pytest.raises(ValueError, match="classes=11, but the training split has 12"):
        replace(tasks, classes=11).prepare()
