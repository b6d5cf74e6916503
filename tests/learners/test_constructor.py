"""Anyone's networks by dotted name: built as by hand, kept in TOML, and refused in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.setup import config, teachers
from learners.algorithms.maml import MAML
from learners.base import pack, unpack
from learners.engine.execution import Execution
from learners.models.constructor import Constructor, located
from learners.modules.functional import functional
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests import zoo_sequences
from tests.commands import metafleet

OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, channels, widths=(4,), norm=None):
        layers, c = [], channels
        for w in widths:
            layers += [nn.Conv2d(c, w, 3, padding=1), *([nn.GroupNorm(norm["groups"], w)] if norm else []), nn.ReLU()]
            c = w
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))

def still(num_classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), nn.Dropout(0.5))
    net[2].eval()
    return net

def twice(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), nn.ReLU())

def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def text(num_classes):
    return "a network"

def broken(num_classes):
    raise RuntimeError("no such weights\\nand more")

SIX = 6
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file of networks, by its module's name."""
    (tmp_path / "my_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_networks"


def spec(own: str, **arguments: Any) -> Constructor:
    return Constructor(f"{own}.Net", arguments, outputs="classes", inputs="channels")


def test_a_constructor_is_called_with_the_tasks_sizes_and_its_own_arguments(own: str) -> None:
    torch.manual_seed(3)
    built = spec(own, widths=[6, 8], norm={"groups": 2}).build((2, 8, 8), 5)
    torch.manual_seed(3)
    wanted = importlib.import_module(own).Net(5, 2, (6, 8), {"groups": 2})
    assert [type(m) for m in built] == [type(m) for m in wanted]
    for name, value in wanted.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name


def test_layers_keep_the_mode_that_they_are_made_in(own: str) -> None:
    built = Constructor(f"{own}.still").build((3, 8, 8), 5)
    assert [m.training for m in built] == [True, True, False]
    assert built.training


def test_free_arguments_survive_toml_and_have_flags(own: str, tmp_path: Path) -> None:
    table = f"""
extends = "glyphs"
[model]
name = "constructor"
target = "{own}.Net"
outputs = "classes"
inputs = "channels"
arguments = {{ widths = [6, 8], norm = {{ groups = 2, eps = 1e-3, affine = false, kind = "group" }} }}
"""
    (tmp_path / "mine.toml").write_text(table)
    run = config.load(str(tmp_path / "mine.toml"))
    norm = {"groups": 2, "eps": 1e-3, "affine": False, "kind": "group"}
    assert run.model == spec(own, widths=[6, 8], norm=norm)
    (tmp_path / "again.toml").write_text(config.to_toml(run))
    assert config.load(str(tmp_path / "again.toml")) == run
    where = str(tmp_path / "run")
    words = (
        "--learner.adapts * --iterations 1 --meta-batch 1 --shard 1 --pool local --evaluation.tasks 1 "
        "--evaluation.validation-tasks 0 --evaluation.pictures 0 --model.arguments.widths 2 3 "
        "--model.arguments.norm.groups=1"
    )
    metafleet("train", str(tmp_path / "mine.toml"), "--dir", where, *words.split())
    assert config.load(f"{where}/run.toml").model == spec(own, widths=[2, 3], norm=norm | {"groups": 1})


def test_a_flag_chooses_the_constructor() -> None:
    run = config.load("glyphs", {"model.name": "constructor"})
    assert run.model == Constructor("torchvision.models.resnet18")


@pytest.mark.parametrize(
    ("changed", "inputs", "sentence"),
    [
        ({"target": "resnet18"}, (3, 8, 8), "a dotted name like"),
        ({"target": "my networks.Net"}, (3, 8, 8), "a dotted name like"),
        ({"target": "no_such_package.Net"}, (3, 8, 8), "no module no_such_package; install it, or name its folder"),
        ({"target": "my_networks.Nett"}, (3, 8, 8), "there is no Nett; did you mean Net?"),
        ({"target": "my_networks.SIX"}, (3, 8, 8), "is a int: a class or function wanted"),
        ({"outputs": "num_classes"}, (3, 8, 8), "unexpected keyword argument 'num_classes' (its keywords: classes, "),
        ({"arguments": {"width": 4}}, (3, 8, 8), "unexpected keyword argument 'width'"),
        ({"arguments": {"classes": 4}}, (3, 8, 8), "arguments.classes: the task says this one, as outputs names it"),
        ({}, (7,), "does not take the task's inputs of shape (7,): RuntimeError: "),
        ({"target": "my_networks.pair", "outputs": "num_classes", "inputs": ""}, (3, 8, 8), "gives a tuple for two"),
        ({"target": "my_networks.text", "outputs": "num_classes", "inputs": ""}, (3, 8, 8), "gives a str: an nn.Mod"),
        ({"target": "my_networks.broken", "outputs": "num_classes", "inputs": ""}, (3, 8, 8), "Error: no such weights"),
        ({"head": "fc"}, (3, 8, 8), "head='fc': one of its linear layers wanted (4)"),
        (
            {"target": "torch.nn.Conv2d", "outputs": "out_channels", "inputs": "in_channels",
             "arguments": {"kernel_size": 3}},
            (3, 8, 8), "gives outputs of shape (2, 5, 6, 6) for two inputs: (2, 5) wanted",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(own: str, changed: dict[str, Any], inputs: tuple[int, ...], sentence: str) -> None:
    keys = {"target": f"{own}.Net", "outputs": "classes", "inputs": "channels", **changed}
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        Constructor(**keys).build(inputs, 5)
    assert "\n" not in str(error.value)


def test_a_package_that_does_not_fit_torch_is_named_with_torchs_version(own: str, tmp_path: Path) -> None:
    (tmp_path / "misfit.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(
        ValueError, match=r"misfit cannot be imported \(RuntimeError: operator .*\); a build .* torch 2"
    ):
        located("misfit.Net")


@pytest.mark.parametrize("wrapped", ["{}", '{{ name = "unit", network = {} }}'])
@pytest.mark.parametrize("named", ['{ name = "constructor", target = "theirs.Net" }', '{ name = "theirs:Net" }'])
def test_a_pools_description_names_nothing_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: str, named: str
) -> None:
    architecture = wrapped.format(named)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit('it was run')")
    (tmp_path / "theirs.toml").write_text(f"""
shape = [3, 8, 8]
ways = 5
mean = [0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0]
[[teacher]]
file = "a.safetensors"
architecture = {architecture}
""")
    with pytest.raises(ValueError, match="one of our own wanted, not a name to import"):
        teachers.imported(tmp_path / "theirs.toml", tmp_path / "pool")


@pytest.fixture(scope="module")
def vision() -> None:
    """torchvision, as far as networks need it."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    zoo_sequences._vision()


def by_hand(module: nn.Module, data: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """MAML's gradient of one inner step by plain autograd over the module itself, in training mode."""

    def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = {k: v.clone() for k, v in module.named_buffers()}
        y: Tensor = torch.func.functional_call(module, params | buffers, (x,))
        return y

    theta = {k: v.detach().clone().requires_grad_() for k, v in module.named_parameters()}
    loss = F.cross_entropy(forward(theta, data["support_x"]), data["support_y"])
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    phi = {k: v - rate * g for (k, v), g in zip(theta.items(), grads, strict=True)}
    loss = F.cross_entropy(forward(phi, data["query_x"]), data["query_y"])
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def test_torchvisions_resnet18_has_plain_torchs_meta_gradient(vision: None) -> None:
    torch.manual_seed(0)
    module = Constructor("torchvision.models.resnet18").build((3, 32, 32), 3).double()
    data = {
        "support_x": torch.randn(3, 3, 32, 32).double(), "support_y": torch.arange(3),
        "query_x": torch.randn(6, 3, 32, 32).double(), "query_y": torch.arange(3).repeat(2),
    }  # fmt: skip
    wanted = by_hand(module, data, 0.05)
    model = functional(module)
    verbs = common_verbs(MAML(0.05, 1), Supervised(model, "cross_entropy"), 1)
    one = {k: v.unsqueeze(0) for k, v in data.items()}
    got = unpack(Execution("loop").run(verbs["gradient"].run, pack(model.params(), {}), {}, one).total).params
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, g in wanted.items():
        assert float((got[name] - g).abs().max()) <= 1e-9 * largest, name


def test_a_named_last_layer_becomes_the_head_and_nothing_else_changes(own: str) -> None:
    torch.manual_seed(0)
    plain = spec(own).build((3, 8, 8), 5)
    torch.manual_seed(0)
    model = functional(replace(spec(own), head="4").build((3, 8, 8), 5))
    x = torch.randn(4, 3, 8, 8)
    theta = model.params()
    assert sorted(theta) == ["body.0.bias", "body.0.weight", "head.bias", "head.weight"]
    torch.testing.assert_close(model(theta, x), plain(x))
    torch.testing.assert_close(model.features(theta, x), nn.Sequential(*list(plain)[:4])(x))
    with pytest.raises(ValueError, match=f"head='1' is not the last layer of {own}.twice"):
        Constructor(f"{own}.twice", head="1").build((3, 8, 8), 5)


def test_torchvisions_named_head_is_what_features_reach(vision: None) -> None:
    torch.manual_seed(0)
    plain = Constructor("torchvision.models.resnet18").build((3, 32, 32), 3)
    torch.manual_seed(0)
    headed = Constructor("torchvision.models.resnet18", head="fc").build((3, 32, 32), 3)
    x, seen = torch.randn(4, 3, 32, 32), []
    plain.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    y = plain(x)
    model = functional(headed)
    assert {"head.weight", "head.bias"} <= model.params().keys()
    torch.testing.assert_close(model(model.params(), x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.features(model.params(), x), seen[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="head='layer1': one of its linear layers wanted"):
        Constructor("torchvision.models.resnet18", head="layer1").build((3, 32, 32), 3)
