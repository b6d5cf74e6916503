"""Attacks, ADML and adversarial querying against the closed forms of a linear model (algorithms: FGSM, sign(0) = 0, no
clamp).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.algorithms.adml import ADML
from learners.algorithms.adversarial_querying import AdversarialQuerying
from learners.algorithms.maml import MAML
from learners.base import Data, Learner, Meta, Params, pack, unpack
from learners.engine.execution import Execution
from learners.modules.functional import functional
from learners.objectives.attack import Attack, SupportAttacked, attacked_query
from learners.objectives.robustness import Robustness
from learners.objectives.supervised import Supervised
from learners.verbs import common_verbs
from tests.quadratics import stack, tensors

MODES = ("loop", "vmap", "compiled")
OBJECTIVE = Supervised(functional(torch.nn.Linear(2, 1, bias=False).double()), "mse")
W = tensors(weight=[[0.5, -0.05]])
DATA = tensors(support_x=[[1, 2], [3, -1]], support_y=[[1], [2]], query_x=[[2, 0], [-1, 1]], query_y=[[0], [1]])
FGSM = Attack(0.1, low=-np.inf, high=np.inf)
LEARNER = ADML(0.1, adversarial_lr=0.1, attack=FGSM)


def close(got: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64).reshape(got.shape), rtol=0, atol=1e-9)


def gradient(learner: Learner, mode: str = "loop", data: Data = DATA, at: Params = W) -> torch.Tensor:
    run = common_verbs(learner, OBJECTIVE, 1)["gradient"].run
    result = Execution(mode, backend="aot_eager").run(run, pack(at, {}), {}, stack(data))
    return unpack(result.total).params["weight"]


def test_fgsm_moves_the_support_as_on_paper() -> None:
    attacked = SupportAttacked(OBJECTIVE, FGSM).attacked(W, DATA, 0)
    close(attacked["support_x"], [[0.9, 2.1], [2.9, -0.9]])
    close(OBJECTIVE.support(W, DATA, 0), 0.28125)
    close(OBJECTIVE.support(W, attacked, 0), 0.342025)
    adapted = LEARNER.adapt(Meta(W, {}), SupportAttacked(OBJECTIVE, FGSM), DATA, 1)
    close(adapted["weight"].detach(), (0.7054, 0.0421))
    close(LEARNER.adapt(Meta(W, {}), OBJECTIVE, DATA, 1)["weight"].detach(), (0.695, 0.025))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("changes", "clean", "adversarial", "both"),
    [
        ({}, (0.2300646, -0.4721446), (-0.14216, -0.21216), (0.0439523, -0.3421523)),
        ({"attack_at": "init"}, (0.2300646, -0.4721446), (-0.20564, -0.53116), (0.0122123, -0.5016523)),
        ({"order": 1}, (4.4849, -1.6633), (4.9864, -1.4216), (4.73565, -1.54245)),
        ({"order": 1, "attack_at": "init"}, (4.4849, -1.6633), (4.9704, -2.0564), (4.72765, -1.85985)),
    ],
)
def test_adml_matches_its_closed_form(changes, clean, adversarial, both, mode) -> None:
    learner = replace(LEARNER, **changes)
    close(gradient(replace(learner, clean_query_weight=1.0), mode), clean)
    close(gradient(replace(learner, clean_query_weight=0.0), mode), adversarial)
    close(gradient(learner, mode), both)


def test_crossed_arms_are_not_matched_arms() -> None:
    matched = replace(LEARNER, pairing="matched")
    close(gradient(matched), (0.06176405, -0.35221555))
    close(gradient(replace(matched, clean_query_weight=0.0)), (0.2905281, -0.3144311))
    close(gradient(replace(matched, clean_query_weight=1.0)), (-0.167, -0.39))
    assert (gradient(matched) - gradient(LEARNER)).abs().max() > 0.005


@pytest.mark.parametrize("mode", MODES)
def test_adversarial_querying_is_the_clean_adapted_arm(mode: str) -> None:
    close(gradient(AdversarialQuerying(0.1, 1, attack=FGSM), mode), (-0.14216, -0.21216))


@pytest.mark.parametrize("steps", [1, 2])
def test_an_attack_without_radius_leaves_maml(steps: int) -> None:
    none = replace(FGSM, eps=0.0)
    wanted = gradient(MAML(0.1, steps))
    for learner in (ADML(0.1, steps, attack=none, adversarial_lr=0.1), AdversarialQuerying(0.1, steps, attack=none)):
        torch.testing.assert_close(gradient(learner), wanted, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 20]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_an_attack_stays_in_its_ball_and_in_the_pixels_and_hurts(seed: int, steps: int, random_start: bool) -> None:
    rng = np.random.default_rng(seed)
    attack = Attack(0.1, steps, random_start=random_start)
    data = {"query_x": torch.from_numpy(rng.random((5, 2))), "query_y": torch.from_numpy(rng.random((5, 1)))}
    data["query_start"] = torch.from_numpy(attack.draw(data["query_x"].numpy(), rng))
    params = {"weight": torch.from_numpy(rng.normal(size=(1, 2)))}
    x = attacked_query(attack, OBJECTIVE, params, data)["query_x"]
    assert (x - data["query_x"]).abs().max() <= 0.1 + 1e-12
    assert x.min() >= 0
    assert x.max() <= 1
    if not random_start:
        assert OBJECTIVE.query(params, data | {"query_x": x}) >= OBJECTIVE.query(params, data) - 1e-12


def test_twenty_steps_find_what_one_step_does_on_a_linear_model() -> None:
    # For a linear model the worst point of the ball is a corner: loss mean (|r| + ε ‖w‖₁)².
    params, far = {"weight": torch.tensor([[1.5, -0.7]]).double()}, {"low": -np.inf, "high": np.inf}
    residual = (DATA["query_x"] @ params["weight"].T - DATA["query_y"]).abs()
    worst = ((residual + 0.1 * 2.2) ** 2).mean()
    for attack in (Attack(0.1, **far), Attack(0.1, 20, 0.1 / 8, **far)):
        torch.testing.assert_close(OBJECTIVE.query(params, attacked_query(attack, OBJECTIVE, params, DATA)), worst)


def test_the_table_judges_each_query_by_the_model_that_answers_it() -> None:
    how = Robustness(0.1, low=-np.inf, high=np.inf)
    verb = common_verbs(MAML(0.1), OBJECTIVE, 1, how)["robustness"]
    rows = Execution("vmap").run(verb.run, pack(W, {}), {}, stack(DATA)).rows
    assert float(rows["fgsm/clean/mse"]) == pytest.approx(2.378461765, abs=1e-9)  # φ_adv on the clean query
    assert float(rows["clean/fgsm/mse"]) == pytest.approx(2.586004, abs=1e-9)  # φ_c on the query attacked at φ_c
    assert float(rows["clean/pgd-20/mse"]) == pytest.approx(2.586004, abs=1e-9)
    clean = {"weight": tensors(w=[[0.695, 0.025]])["w"]}
    assert float(rows["clean/clean/mse"]) == pytest.approx(float(OBJECTIVE.query(clean, DATA)), abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "sentence"), [({"eps": -0.1}, "eps=-0.1"), ({"steps": 0}, "steps=0"), ({"low": 1.0}, "low=1.0")]
)
def test_nonsense_attacks_are_refused(fields, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        Attack(**fields)
