"""Time of each learner's meta-gradient relative to MAML's, beside what its passes predict: python
tests/bench/bench_learners.py

Unit: one forward pass of one example. A backward pass costs two (inputs and weights), an attack's one (inputs only),
and differentiating through an inner gradient twice what that gradient cost. S and Q are the examples of support and
query. Work per parameter (the update itself, Adam's moments) is not counted: it is what the sinusoid's tiny batches
show.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from learners.algorithms.adml import ADML
from learners.algorithms.adversarial_querying import AdversarialQuerying
from learners.algorithms.imaml import IMAML
from learners.algorithms.maml import MAML
from learners.algorithms.maml_plus_plus import MAMLPlusPlus
from learners.algorithms.meta_curvature import MetaCurvature
from learners.algorithms.meta_sgd import MetaSGD
from learners.algorithms.reptile import Reptile
from learners.base import Data, Learner, pack
from learners.engine.execution import Execution, Mode
from learners.models.networks import MLP, Conv4, ModelSpec
from learners.modules.functional import Functional, functional
from learners.objectives.attack import Attack
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.bench.timing import machine, medians, quiet

K = 2
SOLVER = 3
PGD = 3
ATTACK = Attack(0.1, PGD, low=-10.0, high=10.0)
FGSM = Attack(0.1, low=-10.0, high=10.0)
WORST = 1.5  # times the prediction


def mode_units(model: Functional, x: torch.Tensor) -> float:
    """Units of one application of Meta-Curvature: its matrix products beside the multiplications of a forward pass."""
    positions: dict[str, int] = {}
    for name, layer in model.module.named_modules():
        if hasattr(layer, "weight") and name:
            layer.register_forward_hook(
                lambda m, i, out, name=name: positions.update({f"{name}.weight": out[0, 0].numel()})
            )
    with torch.no_grad():
        model(model.params(), x)
    weights = {k: v for k, v in model.params().items() if v.ndim > 1}
    products = sum(
        v.numel() * (v.shape[0] + v.shape[1] + (v[0, 0].numel() if v.ndim > 2 else 0)) for v in weights.values()
    )
    return products / sum(v.numel() * positions[k] for k, v in weights.items())


def learners(s: int, q: int, modes: float) -> dict[str, tuple[Learner, float]]:
    """Each learner with its predicted units per task."""
    maml = K * 9 * s + 3 * q
    return {
        "MAML": (MAML(0.01, K), maml),
        "FOMAML": (MAML(0.01, K, order=1), K * 3 * s + 3 * q),
        "ANIL (head only)": (MAML(0.01, K, adapts=("head*",)), K * 3 * s + 3 * q),
        "Meta-SGD": (MetaSGD(K), maml),
        "Meta-Curvature": (MetaCurvature(0.01, K), maml + K * 3 * modes),
        "MAML++ (multi-step loss)": (MAMLPlusPlus(0.01, K), K * 9 * s + K * 3 * q),
        "MAML++ (last step)": (MAMLPlusPlus(0.01, K, multi_step_epochs=0), maml),
        f"iMAML ({SOLVER} solver steps)": (
            IMAML(0.01, K, solver_steps=SOLVER),
            K * 3 * s + 3 * q + (3 + 6 * SOLVER) * s,
        ),
        "Reptile (SGD)": (Reptile(0.01, K, "sgd", batch=0), K * 3 * s),
        "Reptile (Adam)": (Reptile(0.01, K, batch=0), K * 3 * s),
        "ADML (FGSM)": (ADML(0.01, K, attack=FGSM), 2 * maml + K * 2 * s + 2 * q),
        f"adversarial querying (PGD-{PGD})": (AdversarialQuerying(0.01, K, attack=ATTACK), maml + PGD * 2 * q),
    }


def compare(
    title: str, spec: ModelSpec, mode: Mode, tasks: int, s: int, q: int, inputs: tuple[int, ...], ways: int
) -> bool:
    """One table; whether no learner is above its bar."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    classify = ways > 1
    objective = Supervised(functional(spec.build(inputs, ways)), "cross_entropy" if classify else "mse")

    def targets(n: int) -> torch.Tensor:
        labels = torch.arange(ways).repeat(tasks, n // ways)
        return labels if classify else torch.from_numpy(rng.normal(size=(tasks, n, 1))).float()

    data: Data = {
        "support_x": torch.from_numpy(rng.random((tasks, s, *inputs))).float(), "support_y": targets(s),
        "query_x": torch.from_numpy(rng.random((tasks, q, *inputs))).float(), "query_y": targets(q),
    }  # fmt: skip
    table = learners(s, q, mode_units(functional(spec.build(inputs, ways)), torch.zeros(1, *inputs)))
    execution = Execution(mode)
    calls = {}
    for name, (learner, _) in table.items():
        at = pack(*learner.init(objective.model.params(), np.random.default_rng(0)))
        run = common_verbs(learner, objective, 1)["gradient"].run
        calls[name] = lambda run=run, at=at: execution.run(run, at, {}, data)
    seconds = medians(calls)
    print(f"\n{title}; {mode}, {tasks} tasks, K = {K}, {s} support and {q} query examples")
    fine = True
    base_s, base_units = seconds["MAML"], table["MAML"][1]
    for name, (_, units) in table.items():
        measured, predicted = seconds[name] / base_s, units / base_units
        good = measured <= WORST * predicted
        fine = fine and good
        print(f"  {name:34s} {seconds[name] * 1e3:8.2f} ms   x {measured:5.2f}   predicted {predicted:5.2f}   "
              f"ratio {measured / predicted:5.2f}{'' if good else '   ABOVE 1.5'}")  # fmt: skip
    return fine


def main() -> None:
    quiet()
    print(machine())
    # With 10 examples, work per parameter weighs as much as a pass; with 100 it does not. Held to the bar is the
    # second.
    compare("sinusoid, MLP 1-40-40-1", MLP(), "vmap", 100, 10, 10, (1,), 1)
    fine = compare("sinusoid, MLP 1-40-40-1", MLP(), "vmap", 50, 100, 100, (1,), 1)
    fine &= compare("images 28×28, Conv4 64 channels", Conv4(), "loop", 4, 25, 25, (1, 28, 28), 5)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
