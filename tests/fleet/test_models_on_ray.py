"""A user's models on a fleet: dropout, and adapters on a frozen transformer, to the same bits as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cluster.fleet.messages import Contribution
from cluster.fleet.pool import LocalPool
from cluster.fleet.recipe import Recipe
from cluster.training.driver import Driver
from cluster.training.identity import digest
from learners.algorithms.maml import MAML
from learners.modules.functional import functional
from learners.objectives.supervised import KEY, Supervised
from learners.outer.descent import Descent
from learners.verbs import common_verbs
from tests.fleet.runs import FEW

ray = pytest.importorskip("ray")
from cluster.fleet.ray_pool import RayPool  # noqa: E402 - only where Ray is installed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("three_cpus")]

WORDS, LENGTH, CLASSES = 500, 12, 3


class Waves:
    """y = sin(x + b)."""

    def sample(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.uniform(-3, 3, (20, 1)).astype(np.float32)
        y = np.sin(x + rng.uniform(0, 3)).astype(np.float32)
        return {"support_x": x[:10], "support_y": y[:10], "query_x": x[10:], "query_y": y[10:]}


class Keywords:
    """Sentences with a mask; which of three words a task's sentences hold decides the label."""

    def sample(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        words = rng.choice(np.arange(1, WORDS), CLASSES, replace=False)
        task: dict[str, np.ndarray] = {}
        for part in ("support", "query"):
            labels = np.tile(np.arange(CLASSES), 2)
            ids = rng.integers(1, WORDS, (len(labels), LENGTH))
            ids[np.arange(len(labels)), rng.integers(0, 4, len(labels))] = words[labels]
            mask = np.arange(LENGTH) < rng.integers(5, LENGTH + 1, (len(labels), 1))
            task |= {f"{part}_x/input_ids": ids * mask, f"{part}_x/attention_mask": mask.astype(np.int64)}
            task |= {f"{part}_y": labels}
        return task


def trained(recipe: Recipe, params: dict[str, Tensor], pool: Any, directory: Path) -> Driver:
    try:
        driver = Driver(recipe, params, pool, directory, iterations=3, meta_batch=6, shard=2, evaluation=FEW)
        driver.run()
        return driver
    finally:
        pool.close()


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_dropout_gives_the_bits_of_one_process_on_one_and_three_workers(tmp_path: Path, execution: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Dropout(0.3), nn.Linear(20, 20), nn.Tanh(), nn.Dropout1d(0.2))
    model = functional(nn.Sequential(net, nn.Linear(20, 1)), torch.zeros(10, 1))
    recipe = Recipe(Waves(), MAML(0.1, 2), Supervised(model, "mse"), Descent(), execution=execution)
    pools = {"local": LocalPool(recipe), "one": RayPool(recipe, 1), "three": RayPool(recipe, 3)}
    bits = {
        digest(trained(recipe, model.params(), pool, tmp_path / name).meta)
        for name, pool in pools.items()
    }  # fmt: skip
    assert len(bits) == 1
    quiet = functional(nn.Sequential(net, nn.Linear(20, 1)), dropout="off")
    other = Recipe(Waves(), MAML(0.1, 2), Supervised(quiet, "mse"), Descent(), execution=execution)
    assert digest(trained(other, quiet.params(), LocalPool(other), tmp_path / "off").meta) not in bits


def adapters(width: int, dropout: float) -> nn.Module:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * width,
        max_position_embeddings=LENGTH, num_labels=CLASSES, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=dropout)
    net: nn.Module = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    for name, p in net.named_parameters():  # PEFT begins with B = 0, where A has no gradient
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return net


def sentences() -> dict[str, Tensor]:
    one = Keywords().sample("train", np.random.default_rng(0))
    return {k: torch.from_numpy(v) for k, v in one.items()}


def test_second_order_maml_of_adapters_is_plain_autograds() -> None:
    net, data = adapters(16, 0.0).double(), sentences()
    x = {part: {k: data[f"{part}_x/{k}"] for k in ("input_ids", "attention_mask")} for part in ("support", "query")}
    model = functional(net, x["support"])
    theta = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert list(model.params()) == list(theta)
    assert all("lora" in k for k in theta)

    def loss(phi: dict[str, Tensor], part: str) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = functional_call(net, phi, (), x[part]).logits
        return F.cross_entropy(logits, data[f"{part}_y"])

    phi = dict(theta)
    for _ in range(2):
        grads = torch.autograd.grad(loss(phi, "support"), list(phi.values()), create_graph=True)
        phi = {k: p - 0.5 * g for (k, p), g in zip(phi.items(), grads, strict=True)}
    wanted = torch.autograd.grad(loss(phi, "query"), list(theta.values()))
    verb = common_verbs(MAML(0.5, 2), Supervised(model, "cross_entropy"), 1)["gradient"]
    got = verb.run({f"params/{k}": v for k, v in model.params().items()}, {}, data).total
    largest = max(float(w.abs().max()) for w in wanted)
    for k, w in zip(theta, wanted, strict=True):
        assert float((got[f"params/{k}"] - w).abs().max()) <= 1e-9 * largest, k


def test_adapters_on_a_frozen_transformer_train_on_a_fleet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    net = adapters(64, 0.1)
    model = functional(net, {k.partition("/")[2]: v for k, v in sentences().items() if k.startswith("support_x/")})
    objective = Supervised(model, "cross_entropy")
    recipe = Recipe(Keywords(), MAML(0.1, 2), objective, Descent(), execution="loop")
    assert KEY in recipe.task("train", 0, recipe.verbs(objective)["gradient"])
    theta = sum(v.nbytes for v in model.params().values())
    frozen = sum(v.nbytes for v in model.constants().values())
    sent: list[int] = []

    class Weighed(LocalPool):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            sent.extend(e.vector.nbytes for e in events if isinstance(e, Contribution))
            return events

    local = trained(recipe, model.params(), Weighed(recipe), tmp_path / "local")
    fleet = trained(recipe, model.params(), RayPool(recipe, 2), tmp_path / "ray")
    assert digest(local.meta) == digest(fleet.meta)
    assert frozen > 20 * theta
    assert set(sent) == {0, theta}  # evaluations bring no sum
    checkpoint = max(p.stat().st_size for p in (tmp_path / "local" / "checkpoints").iterdir() if p.is_file())
    assert checkpoint < 4 * theta + 20_000  # θ and Adam's two moments, a header
    assert f"constants of {frozen} bytes" in recipe.summary()
    with capsys.disabled():
        print(f"\nLoRA: frozen {frozen} bytes, θ {theta}, a contribution {sent[0]}, a checkpoint {checkpoint}")
