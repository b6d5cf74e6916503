"""What every learner must keep to, on numbers and on images: a new learner is one line in LEARNERS and one in
LIMITS.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections import deque
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.fleet import wire
from cluster.fleet.messages import Assignment, Event
from cluster.fleet.pool import LocalPool
from cluster.fleet.recipe import Recipe
from cluster.fleet.wire import decode_sum, encode_sum
from cluster.fleet.worker import Worker
from cluster.setup import catalog
from cluster.training.aggregate import Tree
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from envs.base import Arrays, TaskFamily
from envs.images.episodes import Episodes
from envs.sinusoid import Sinusoid
from envs.sources.glyphs import Glyphs
from learners.algorithms.adml import ADML
from learners.algorithms.adversarial_querying import AdversarialQuerying
from learners.algorithms.baseline_plus_plus import BaselinePlusPlus
from learners.algorithms.cavia import CAVIA
from learners.algorithms.imaml import IMAML
from learners.algorithms.linear_probe import LinearProbe
from learners.algorithms.maml import MAML
from learners.algorithms.maml_plus_plus import MAMLPlusPlus
from learners.algorithms.meta_curvature import MetaCurvature
from learners.algorithms.meta_sgd import MetaSGD
from learners.algorithms.nearest_centroid import NearestCentroid
from learners.algorithms.proto_maml import ProtoMAML
from learners.algorithms.proto_net import ProtoNet
from learners.algorithms.reptile import Reptile
from learners.base import Data, Learner, Meta, Params, Sum, pack
from learners.engine.execution import Execution
from learners.inner import InnerLoop
from learners.models.networks import MLP, Conv4
from learners.models.unit import Unit
from learners.modules.functional import functional
from learners.objectives.attack import Attack
from learners.objectives.robustness import Robustness
from learners.objectives.supervised import Supervised
from learners.outer.descent import Descent
from learners.purer.calibration import Calibration, DataFreeMAML
from tests.fleet.test_padding import check_together

ATTACK = Attack(0.05, low=-10.0, high=10.0)
LEARNERS: dict[str, Learner] = {
    "maml": MAML(0.05, 2),
    "fomaml": MAML(0.05, 2, order=1),
    "anil": MAML(0.05, 2, adapts=("head*",)),
    "meta_sgd": MetaSGD(2),
    "meta_curvature": MetaCurvature(0.05, 2),
    "maml_plus_plus": MAMLPlusPlus(0.05, 2, epoch=2, multi_step_epochs=1, second_order_from=1),
    "imaml": IMAML(0.05, 3, solver_steps=2),
    "reptile": Reptile(0.01, 3, batch=4, test_batch=2),
    "reptile carry": Reptile(0.01, 3, batch=4, test_batch=2, moments="carry", adam_style="tf1"),
    "reptile last": Reptile(0.01, 3, "sgd", batch=3, update="last_gradient", tail=2),
    "adml": ADML(0.05, 2, adversarial_lr=0.05, attack=dataclasses.replace(ATTACK, random_start=True)),
    "adversarial_querying": AdversarialQuerying(0.05, 1, attack=dataclasses.replace(ATTACK, steps=3)),
    "proto_net": ProtoNet(),
    "proto_maml": ProtoMAML(0.05, 2),
    "fo_proto_maml": ProtoMAML(0.05, 2, order=1),
    "cavia": CAVIA(0.05, 2, adapts=("head.bias",)),
    "linear_probe": LinearProbe(0.05),
    "linear_probe by episodes": LinearProbe(0.05, 2),
    "baseline_plus_plus": BaselinePlusPlus(0.05),
    "baseline_plus_plus by episodes": BaselinePlusPlus(0.05, 2),
    "nearest_centroid": NearestCentroid(),
    "data_free_maml": DataFreeMAML(0.05, 2, calibration=Calibration("off")),
}
ANEW = {ProtoMAML: "head.*", CAVIA: "head.bias", BaselinePlusPlus: "head.*"}
"""Parameters that a task begins with values of its own for, where θ's are not used."""
OF_CLASSES = (ProtoNet, ProtoMAML, BaselinePlusPlus)


@dataclasses.dataclass(frozen=True)
class World:
    """A family of tasks, and a small smooth model for it."""

    tasks: TaskFamily
    objective: Supervised

    def recipe(self, learner: Learner, mode: str = "loop") -> Recipe:
        if isinstance(learner, OF_CLASSES) and self.objective.loss == "mse":
            pytest.skip("prototypes and cosines are of classes")
        return Recipe(
            self.tasks, learner, self.objective, Descent(), dtype="float64", evaluation_steps=2, execution=mode
        )

    def meta(self, learner: Learner) -> Meta:
        meta = learner.init(self.objective.model.params(), np.random.default_rng(0))
        return Meta(meta.params, meta.slots | self.objective.slots())

    def data(self, recipe: Recipe, count: int, verb: str = "gradient") -> Data:
        tasks = [recipe.tensors(recipe.task("train", i, recipe.verbs(self.objective)[verb])) for i in range(count)]
        return {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}


@pytest.fixture(params=["sinusoid", "glyphs"])
def world(request: pytest.FixtureRequest, data_folder: Path) -> World:
    torch.manual_seed(0)
    if request.param == "sinusoid":
        return World(
            Sinusoid(shots=5, queries=5),
            Supervised(functional(MLP((6,), activation="tanh").build((1,), 1).double()), "mse"),
        )
    tasks = Episodes(Glyphs(characters=30, drawings=6, size=16), ways=3, shots=2, queries=2, test_queries=2)
    tasks.prepare()
    conv4 = Conv4(width=3)
    unit = str(request.node.callspec.params.get("name")).lower().startswith("baseline")
    model = functional((Unit(conv4) if unit else conv4).build((1, 16, 16), 3).double())
    return World(tasks, Supervised(model, "cross_entropy"))


def total(world: World, learner: Learner, mode: str, count: int) -> Sum:
    recipe = world.recipe(learner)
    run = recipe.verbs(world.objective)["gradient"].run
    return Execution(mode).run(run, pack(*world.meta(learner)), {}, world.data(recipe, count))


def test_every_learner_is_held_to_this() -> None:
    assert {type(learner) for learner in LEARNERS.values()} == set(catalog.LEARNERS.values())
    no_rate = {ProtoNet}
    assert {type(learner) for learner, _ in LIMITS.values()} == set(catalog.LEARNERS.values()) - no_rate


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_is_a_value(name: str) -> None:
    learner = LEARNERS[name]
    copy = pickle.loads(pickle.dumps(learner))
    assert copy == learner
    assert hash(copy) == hash(learner)
    with pytest.raises(dataclasses.FrozenInstanceError):
        learner.inner_steps = 7
    assert learner.passes() > 0
    assert learner.claim()


@pytest.mark.parametrize("name", LEARNERS)
def test_shapes_are_those_of_theta(world: World, name: str) -> None:
    learner = LEARNERS[name]
    meta, recipe = world.meta(learner), world.recipe(learner)
    task = {k: v[0] for k, v in world.data(recipe, 1).items()}
    result = learner.gradient(meta, world.objective, task)
    for got, like in ((result.grads, meta.params), (result.slots, meta.slots)):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in like.items()}
    assert all(
        v.dtype == torch.float64 and not v.requires_grad for v in [*result.grads.values(), *result.slots.values()]
    )
    assert all(v.shape == () for v in result.metrics.values())
    theta = world.objective.model.params()
    task = {k: v[0] for k, v in world.data(recipe, 1, "evaluate").items()}
    path = list(learner.at_test().path(meta, world.objective, task, 2))
    assert [{k: v.shape for k, v in phi.items()} for phi in path] == [{k: v.shape for k, v in theta.items()}] * 3
    anew = ANEW.get(type(learner), "")
    assert [k for k, v in theta.items() if not torch.equal(path[0][k], v)] == [k for k in theta if fnmatchcase(k, anew)]


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The tasks of a family, each without some of its examples, but one of every class."""

    tasks: TaskFamily

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        task = self.tasks.sample(split, rng)
        for part in ("support", "query"):
            y = task[f"{part}_y"]
            kept = rng.random(len(y)) < 0.6
            kept[np.unique(y, return_index=True)[1][:3]] = True
            task |= {f"{part}_{kind}": task[f"{part}_{kind}"][kept] for kind in "xy"}
        return task


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", LEARNERS)
def test_padded_tasks_are_the_tasks_one_by_one(world: World, name: str, mode: str) -> None:
    learner = LEARNERS[name]
    recipe = dataclasses.replace(world.recipe(learner), tasks=Ragged(world.tasks))
    for verb in ("gradient", "evaluate"):
        function = recipe.verbs(world.objective)[verb]
        tasks = [recipe.task("train", i, function) for i in range(3)]
        assert len({len(t["support_y"]) for t in tasks}) > 1 < len({len(t["query_y"]) for t in tasks})
        check_together(recipe, function, pack(*world.meta(learner)), tasks, mode)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_attack_makes_any_adapted_model_worse(world: World, name: str) -> None:
    how = Robustness(0.1, steps=4, low=-np.inf, high=np.inf)
    recipe = dataclasses.replace(world.recipe(LEARNERS[name]), robustness=how)
    verb = recipe.verbs(world.objective)["robustness"]
    data = world.data(recipe, 3, "robustness")
    rows = {
        k: float(v.mean())
        for k, v in Execution("loop").run(verb.run, pack(*world.meta(LEARNERS[name])), {}, data).rows.items()
    }
    loss = "mse" if world.objective.loss == "mse" else "loss_transductive"
    assert rows[f"clean/clean/{loss}"] < rows[f"clean/fgsm/{loss}"]
    assert rows[f"clean/clean/{loss}"] < rows[f"clean/pgd-4/{loss}"]
    assert rows[f"fgsm/clean/{loss}"] != rows[f"clean/clean/{loss}"]


@pytest.mark.parametrize("name", LEARNERS)
def test_loop_and_vmap_agree(world: World, name: str) -> None:
    loop, vmap = (total(world, LEARNERS[name], mode, 3) for mode in ("loop", "vmap"))
    for k, v in loop.total.items():
        torch.testing.assert_close(vmap.total[k], v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LEARNERS)
def test_order_and_sharding_of_tasks_do_not_matter(world: World, name: str) -> None:
    learner = LEARNERS[name]
    recipe = world.recipe(learner)
    run, data, at = recipe.verbs(world.objective)["gradient"].run, world.data(recipe, 4), pack(*world.meta(learner))

    def added(order: list[int], shard: int) -> Params:
        tree = Tree(4 // shard)
        for i in range(0, 4, shard):
            part = Execution("loop").run(run, at, {}, {k: v[order[i : i + shard]] for k, v in data.items()})
            a = Assignment(0, 0, "gradient", 1, None, "train", i, i + shard, 0)
            tree.add(i // shard, decode_sum(*encode_sum(a, "w", 0.0, part)))
        return tree.total().total

    reference = added([0, 1, 2, 3], 4)
    for order, shard in (([0, 1, 2, 3], 1), ([3, 1, 0, 2], 2)):
        for k, v in added(order, shard).items():
            torch.testing.assert_close(v, reference[k], rtol=1e-12, atol=1e-12)


class Fleet(LocalPool):
    """Several workers in this process, which take turns, and whose answers arrive in random order."""

    def __init__(self, recipe: Recipe, workers: int) -> None:
        super().__init__(recipe)
        self._workers = deque(Worker(recipe, f"w{i}") for i in range(workers))
        self._rng = np.random.default_rng(workers)
        self._held: list[Event] = []

    def poll(self, timeout: float) -> list[Event]:
        self._workers.rotate(1)
        self._worker = self._workers[0]
        self._held += super().poll(timeout)
        if self._waiting and self._rng.random() < 0.7:
            return []
        events, self._held = self._held, []
        self._rng.shuffle(events)
        return events


@pytest.mark.parametrize("name", LEARNERS)
def test_the_number_of_workers_does_not_change_a_bit(world: World, name: str, tmp_path: Path) -> None:
    ends = []
    for workers in (1, 3):
        recipe = world.recipe(LEARNERS[name])
        driver = Driver(
            recipe, world.objective.model.params(), Fleet(recipe, workers), tmp_path / str(workers), iterations=3,
            meta_batch=4, shard=1, evaluation=Evaluation(validation_tasks=0, tasks=1, steps=2, pictures=0),
        )  # fmt: skip
        ends.append(wire.flatten(pack(*driver.run()))[1])
    np.testing.assert_array_equal(ends[0], ends[1])


# What remains of each learner when the inner loop does not move: its formula, from gradients at θ alone.


@dataclasses.dataclass(frozen=True)
class AtTheta:
    """A task seen from θ, by plain autograd."""

    objective: Supervised
    theta: Params
    data: Data

    def grad(self, loss: Callable[[Params], Tensor]) -> Params:
        leaves = {k: v.clone().requires_grad_() for k, v in self.theta.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    @property
    def support(self) -> Params:
        """g_S = ∇L_S(θ)."""
        return self.grad(lambda p: self.objective.support(p, self.data, 0))

    @property
    def query(self) -> Params:
        """g_Q = ∇L_Q(θ)."""
        return self.grad(lambda p: self.objective.query(p, self.data))

    @property
    def attacked(self) -> Params:
        """∇L(θ; Q + ε sign ∇_x L)."""
        x = self.data["query_x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.objective.query(self.theta, self.data | {"query_x": x}), x)
        moved = self.data | {"query_x": (x + ATTACK.eps * slope.sign()).detach()}
        return self.grad(lambda p: self.objective.query(p, moved))


def _meta_sgd(t: AtTheta) -> Params:
    return t.query | {f"alpha/{k}": -v * t.query[k] for k, v in t.support.items()}


def _maml_plus_plus(t: AtTheta) -> Params:
    # w = (½, ½): the first rate acts on both steps' losses, the second on the last one's.
    slopes = {k: -(v * t.query[k]).sum() for k, v in t.support.items()}
    return t.query | {f"rate/{k}": torch.stack([v, v / 2]) for k, v in slopes.items()}


def _meta_curvature(t: AtTheta) -> Params:
    still = MetaCurvature().init(t.theta, np.random.default_rng(0)).params
    return t.query | {k: torch.zeros_like(v) for k, v in still.items() if k.startswith("curvature/")}


def _imaml(t: AtTheta) -> Params:
    # (I + H/λ)⁻¹ g_Q by a dense solve.
    names, sizes = list(t.theta), [v.numel() for v in t.theta.values()]

    def support(flat: Tensor) -> Tensor:
        parts = {k: p.view(t.theta[k].shape) for k, p in zip(names, flat.split(sizes), strict=True)}
        return t.objective.support(parts, t.data, 0)

    flat = torch.cat([v.flatten() for v in t.theta.values()])
    hessian = torch.autograd.functional.hessian(support, flat)
    x = torch.linalg.solve(
        torch.eye(len(flat), dtype=flat.dtype) + hessian / 2000.0, torch.cat([t.query[k].flatten() for k in names])
    )
    return {k: p.view(t.theta[k].shape) for k, p in zip(names, x.split(sizes), strict=True)}


def _mean(t: AtTheta) -> Params:
    return {k: (v + t.attacked[k]) / 2 for k, v in t.query.items()}


def _prototypes(t: AtTheta) -> Params:
    x, y = t.data["support_x"], t.data["support_y"]

    def loss(p: Params) -> Tensor:
        z = t.objective.model.features(p, x)
        means = torch.stack([z[y == c].mean(0) for c in range(len(p["head.bias"]))])
        return t.objective.query(p | {"head.weight": 2 * means, "head.bias": -(means**2).sum(1)}, t.data)

    return _touched(t, loss)


def _touched(t: AtTheta, loss: Callable[[Params], Tensor]) -> Params:
    """∇ of a loss that need not touch all of θ."""
    leaves = {k: v.clone().requires_grad_() for k, v in t.theta.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _without_context(t: AtTheta) -> Params:
    zero = torch.zeros_like(t.theta["head.bias"])
    return _touched(t, lambda p: t.objective.query(p | {"head.bias": zero}, t.data))


def _cosines(t: AtTheta) -> Params:
    def loss(p: Params) -> Tensor:
        w, bias = p["head.weight"], torch.zeros_like(p["head.bias"])
        return t.objective.query(p | {"head.weight": 10 * w / w.norm(dim=1, keepdim=True), "head.bias": bias}, t.data)

    return _touched(t, loss)


LIMITS: dict[str, tuple[Learner, Callable[[AtTheta], Params]]] = {
    "MAML: g_Q": (MAML(0.0, 2), lambda t: t.query),
    "FOMAML: g_Q": (MAML(0.0, 2, order=1), lambda t: t.query),
    "MAML without data: g_Q": (DataFreeMAML(0.0, 2), lambda t: t.query),
    "Meta-SGD: g_Q, and −g_S ∘ g_Q for α": (MetaSGD(1, lowest_rate=0.0, highest_rate=0.0), _meta_sgd),
    "MAML++: g_Q, and −⟨g_S, g_Q⟩ per layer times the weight of later steps": (MAMLPlusPlus(0.0, 2), _maml_plus_plus),
    "Meta-Curvature: g_Q, and 0 for C": (MetaCurvature(0.0, 2), _meta_curvature),
    "iMAML: (I + H/λ)⁻¹ g_Q": (IMAML(0.0, 1, proximal=2000.0, solver_steps=60), _imaml),
    "Reptile: 0": (Reptile(0.0, 2, "sgd", batch=0), lambda t: {k: 0 * v for k, v in t.theta.items()}),
    "ADML: ½ (g_Q + g at the attacked query)": (ADML(0.0, 1, adversarial_lr=0.0, attack=ATTACK), _mean),
    "Proto-MAML: ProtoNet's": (ProtoMAML(0.0, 2), _prototypes),
    "CAVIA: g_Q with the context at 0, and 0 for it": (CAVIA(0.0, 2, adapts=("head.bias",)), _without_context),
    "Linear probe without episodes: g_Q": (LinearProbe(), lambda t: t.query),
    "Linear probe: 0": (LinearProbe(0.0, 2), lambda t: {k: 0 * v for k, v in t.theta.items()}),
    "Baseline++ without episodes: g_Q by cosines": (BaselinePlusPlus(), _cosines),
    "Nearest centroid: g_Q": (NearestCentroid(), lambda t: t.query),
    "Adversarial querying: g at the attacked query": (AdversarialQuerying(0.0, 1, attack=ATTACK), lambda t: t.attacked),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_of_zero_inner_rate(world: World, name: str) -> None:
    learner, limit = LIMITS[name]
    data = {k: v[0] for k, v in world.data(world.recipe(learner), 1).items()}
    grads = learner.gradient(world.meta(learner), world.objective, data).grads
    wanted = limit(AtTheta(world.objective, world.objective.model.params(), data))
    assert grads.keys() == wanted.keys()
    for k, v in wanted.items():
        torch.testing.assert_close(grads[k], v, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", list(LEARNERS))
def test_a_single_outer_loss_is_declared_where_nothing_else_is_descended(name: str) -> None:
    learner = type(LEARNERS[name])
    assert issubclass(learner, InnerLoop)
    own = learner.outer_loss is not InnerLoop.outer_loss or learner.gradient is not InnerLoop.gradient
    assert learner.single_loss == (not own)
