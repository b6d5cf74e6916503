"""bfloat16 and gradient checkpointing: what they compute, against plain autograd, and what memory they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cluster.setup import assemble, config
from learners.algorithms.maml import MAML
from learners.algorithms.meta_sgd import MetaSGD
from learners.algorithms.reptile import Reptile
from learners.base import Data, Learner, pack
from learners.engine.execution import Execution
from learners.models.networks import Conv4
from learners.models.resnet import ResNet
from learners.modules.functional import Functional, functional
from learners.modules.precision import Precision
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs

pytestmark = pytest.mark.kernels

RATE, STEPS = 0.1, 2
PLAIN = MAML(RATE, STEPS)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def data(count: int = 2, shape: tuple[int, ...] = (4,), classes: int = 0) -> Data:
    torch.manual_seed(1)
    task: Data = {}
    for part in ("support", "query"):
        y = torch.arange(12).remainder(classes).expand(count, 12) if classes else torch.randn(count, 12, 1)
        task |= {f"{part}_x": torch.randn(count, 12, *shape), f"{part}_y": y}
    return task


def gradient(model: Functional, tasks: Data, mode: Any = "loop", learner: Learner = PLAIN,
             checkpointing: bool = False, loss: str = "mse") -> dict[str, Tensor]:  # fmt: skip
    objective = Supervised(model, loss)
    meta = learner.init(model.params(), np.random.default_rng(0))
    verb = common_verbs(learner, objective, 1)["gradient"]
    total = Execution(mode, 0, checkpointing, "aot_eager").run(verb.run, pack(*meta), {}, tasks).total
    return {k.removeprefix("params/"): v for k, v in total.items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5
    return difference / sum(float(v.double().square().sum()) for v in b.values()) ** 0.5


@pytest.mark.parametrize("mode", ["loop", "vmap", "compiled"])
def test_mixed_is_plain_autograd_under_autocast(mode: str) -> None:
    net, tasks = mlp(), data()
    theta = dict(net.named_parameters())
    wanted = {k: torch.zeros_like(p) for k, p in theta.items()}

    def loss(phi: dict[str, Tensor], i: int, part: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = functional_call(net, phi, (tasks[f"{part}_x"][i],))
        assert y.dtype == torch.bfloat16
        return F.mse_loss(y.float(), tasks[f"{part}_y"][i])

    for i in range(2):
        phi = dict(theta)
        for _ in range(STEPS):
            grads = torch.autograd.grad(loss(phi, i, "support"), list(phi.values()), create_graph=True)
            phi = {k: p - RATE * g for (k, p), g in zip(phi.items(), grads, strict=True)}
        for k, g in zip(theta, torch.autograd.grad(loss(phi, i, "query"), list(theta.values())), strict=True):
            wanted[k] += g
    got = gradient(functional(net, precision="bfloat16-mixed"), tasks, mode)
    full = gradient(functional(net), tasks, mode)
    assert all(v.dtype == torch.float32 for v in got.values())
    assert apart(got, wanted) <= (0 if mode == "loop" else 0.02)
    assert 1e-4 < apart(got, full) < 0.1


@pytest.mark.parametrize("precision", ["bfloat16-mixed", "bfloat16"])
@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("made", "shape", "within"),
    [
        (lambda: Conv4(width=8).build((1, 16, 16), 3), (1, 16, 16), 0.25),
        (lambda: ResNet().build((3, 16, 16), 3), (3, 16, 16), 0.4),  # of ten layers, and their kinks
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3)),
         (2, 8, 8), 0.02),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 3)), (2, 8), 0.02),
        (lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
                               nn.Flatten(), nn.Linear(16, 3)), (16,), 0.02),
        (lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)),
         (16,), 0.02),
    ],
    ids=["conv4", "resnet", "conv2d", "conv1d", "transformer", "group norm"],
)  # fmt: skip
def test_networks_in_half_the_digits_have_nearly_the_same_gradient(
    made: Callable[[], nn.Module], shape: tuple[int, ...], within: float, mode: str, precision: Precision
) -> None:
    torch.manual_seed(0)
    module, tasks = made(), data(2, shape, 3)
    example = tasks["support_x"][0]
    full = gradient(functional(module, example), tasks, mode, MAML(0.01, 1), loss="cross_entropy")
    half = functional(module, example, precision=precision)
    got = gradient(half, tasks, mode, MAML(0.01, 1), loss="cross_entropy")
    assert all(v.dtype == torch.float32 for v in got.values())
    assert 1e-5 < apart(got, full) < within
    assert half.params().keys() == functional(module).params().keys()
    assert all(v.dtype == torch.float32 for v in half.params().values())


@pytest.mark.parametrize("precision", ["bfloat16-mixed", "bfloat16"])
def test_second_derivatives_of_a_convolution_are_right_where_torchs_are_not(precision: Precision) -> None:
    torch.manual_seed(0)
    net, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(12, 8, 16, 16)
    direction = torch.randn(12, 8, 16, 16)

    def curvature(model: Functional) -> dict[str, Tensor]:
        theta = {k: v.requires_grad_() for k, v in model.params().items()}
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((model(theta, point) * direction).sum(), point, create_graph=True)
        return dict(zip(theta, torch.autograd.grad(slope.square().sum(), list(theta.values())), strict=True))

    assert apart(curvature(functional(net, precision=precision)), curvature(functional(net))) < 0.02


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_constants_take_the_precision_of_a_run_whatever_they_come_in(mode: str) -> None:
    net = mlp()
    net[0].requires_grad_(False)
    net[2].register_buffer("offset", torch.ones(32))
    net[2].register_forward_hook(lambda m, _x, y: y + m.offset)
    double = {k: v.double() if v.is_floating_point() else v for k, v in data().items()}
    model, wide = functional(net), functional(net.double())

    def at(model: Functional) -> dict[str, Tensor]:
        verb = common_verbs(PLAIN, Supervised(model, "mse"), 1)["gradient"]
        theta = {f"params/{k}": v.double() for k, v in model.params().items()}
        return Execution(mode).run(verb.run, theta, {}, double).total  # type: ignore[arg-type]

    before, theta = model.summary(), model.params()
    assert apart(at(model), at(wide)) == 0
    assert model.summary() == before
    assert all(v.dtype == torch.float32 for v in theta.values())
    assert {k: v.dtype for k, v in model.params().items()} == dict.fromkeys(theta, torch.float32)


def test_in_bfloat16_everything_inside_is_and_constants_keep_their_hash() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    seen: list[torch.dtype] = []
    net[1].register_forward_hook(lambda _m, x, y: seen.extend((x[0].dtype, y.dtype)))
    model = functional(net, precision="bfloat16")
    before = model.summary()
    y = model(model.params(), torch.randn(5, 4))
    assert set(seen[-2:]) == {torch.bfloat16}
    assert y.dtype == torch.float32
    assert model.summary() == before
    assert before.endswith("bfloat16")
    assert functional(net).summary() == before.removesuffix(", bfloat16")
    with pytest.raises(ValueError, match="precision='half' is not one of full, bfloat16-mixed, bfloat16"):
        functional(net, precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("learner", [MAML(RATE, 4), MetaSGD(4), MAML(RATE, 4, order=1), Reptile(0.01, 3)])
def test_inner_steps_computed_again_have_the_same_bits(learner: Learner) -> None:
    net = nn.Sequential(mlp(), nn.Dropout(0.5))
    model = functional(net, torch.zeros(3, 4))
    tasks = data() | {"draws": torch.tensor([3, 4])}
    if isinstance(learner, Reptile):
        rows = learner.draw({"support_x": np.zeros(12)}, np.random.default_rng(0), 3)["batches"]
        tasks["batches"] = torch.from_numpy(rows).expand(2, -1, -1)
    assert apart(gradient(model, tasks, "loop", learner, True), gradient(model, tasks, "loop", learner)) == 0


def kept(run: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps at most at a time while `run` builds its graph, each storage once."""
    storages: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        storages[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        run()
    return sum(storages.values())


def test_inner_steps_computed_again_take_the_memory_of_few() -> None:
    torch.manual_seed(0)
    width, rows = 8, 4000
    net = nn.Sequential(nn.Linear(4, width), *(m for _ in range(6) for m in (nn.Tanh(), nn.Linear(width, width))))
    model = functional(nn.Sequential(net, nn.Linear(width, 1)), torch.zeros(3, 4))
    objective = Supervised(model, "mse")
    x, y = torch.randn(rows, 4), torch.randn(rows, 1)
    task = {"support_x": x, "support_y": y, "query_x": x[:5], "query_y": y[:5]}

    def peak(steps: int, checkpointing: bool) -> int:
        from learners.engine.memory import recomputing
        from learners.inner import last, model_params

        theta = {k: v.requires_grad_() for k, v in model.params().items()}
        learner = MAML(0.01, steps)
        meta = learner.init(theta, None)  # type: ignore[arg-type]

        def build() -> object:
            with recomputing(checkpointing):
                point = last(learner.points(meta, objective, task, steps))
            return objective.query(model_params(point.params), task)

        return kept(build)

    assert peak(8, False) > 1.8 * peak(4, False)
    assert peak(8, True) < peak(8, False) / 4


def test_a_run_says_how_it_computes() -> None:
    run = replace(config.load("sinusoid"), precision="bfloat16-mixed", execution="loop")
    parts, params = assemble.recipe(run)
    assert "bfloat16-mixed" in parts.summary()
    assert all(v.dtype == torch.float32 for v in params.values())
    assert assemble.recipe(replace(run, precision="float64"))[0].dtype == "float64"
    with pytest.raises(ValueError, match="gradient_checkpointing with execution='vmap'"):
        replace(run, execution="vmap", gradient_checkpointing=True)


def test_files_of_older_runs_are_read(tmp_path: Any) -> None:
    (tmp_path / "old.toml").write_text('extends = "sinusoid"\ndtype = "float64"\n')
    assert config.load(str(tmp_path / "old.toml")).precision == "float64"
