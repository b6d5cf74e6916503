"""RL mathematics against finite differences, closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learners.algorithms.maml import MAML
from learners.base import Data, Meta, Params, pack, unpack
from learners.engine import tree
from learners.engine.execution import Execution
from learners.models.networks import GaussianMLP
from learners.modules.functional import functional
from learners.objectives import policy_gradient as pg
from learners.objectives.control import Control
from learners.outer.trust_region import TrustRegion

N, OBSERVATIONS, ACTIONS = 12, 3, 2


def policy(inner_loss: str = "log_likelihood") -> tuple[Control, Params]:
    torch.manual_seed(0)
    model = functional(GaussianMLP((5,), activation="tanh", std=0.7).build((OBSERVATIONS,), ACTIONS).double())
    return Control(model, rollouts=None, inner_loss=inner_loss), model.params()


def recorded(control: Control, theta: Params, learner: MAML, seed: int = 0) -> Data:
    """Two episodes of random time steps per inner step, the last two missing, with each φ's own old distributions."""
    rng = np.random.default_rng(seed)
    steps = learner.inner_steps
    time = np.concatenate([np.arange(6), np.arange(4), [0, 0]])
    data: Data = {
        "observations": torch.from_numpy(rng.normal(size=(steps + 1, N, OBSERVATIONS))),
        "actions": torch.from_numpy(rng.normal(size=(steps + 1, N, ACTIONS))),
        "advantages": torch.from_numpy(rng.normal(size=(steps + 1, N))),
        "mask": torch.ones(steps + 1, N, dtype=torch.float64),
        "first": torch.from_numpy(np.arange(N) - time).expand(steps + 1, N),
    }
    data["mask"][:, 10:] = 0
    for name in ("return", "inner_grad_norm", "adaptation_kl", "physics_s", "policy_s", "adaptation_s"):
        data[name] = torch.zeros(steps + 1, dtype=torch.float64)
    data["old"] = torch.zeros(steps + 1, N, 2 * ACTIONS, dtype=torch.float64)
    data["old_log_p"] = torch.zeros(steps + 1, N, dtype=torch.float64)
    with torch.no_grad():
        for k, phi in enumerate(learner.path(Meta(theta, {}), control, data, steps)):
            data["old"][k] = control.policy(phi, data["observations"][k])
            data["old_log_p"][k] = pg.log_prob(data["old"][k], data["actions"][k])
    return data


def directions(theta: Params) -> tuple[Params, Params]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> dict[str, torch.Tensor]:
        return {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in theta.items()}

    return draw(), draw()


def slope(function, at: Params, d: Params, h: float = 1e-4) -> float:
    """Richardson-extrapolated central difference along d."""

    def central(e: float) -> float:
        up, down = (
            torch.as_tensor(function(tree.add(at, tree.scale(s * e, d))), dtype=torch.float64).detach()
            for s in (1.0, -1.0)
        )
        return float(up - down) / (2 * e)

    return (4 * central(h) - central(2 * h)) / 3


@pytest.mark.parametrize("inner_loss", ["log_likelihood", "likelihood_ratio"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_meta_gradient_matches_finite_differences(steps: int, inner_loss: str) -> None:
    control, theta = policy(inner_loss)
    learner = MAML(0.3, steps)
    data = recorded(control, theta, learner)
    grads = learner.gradient(Meta(theta, {}), control, data).grads
    d, _ = directions(theta)
    wanted = slope(lambda p: control.query(learner.adapt(Meta(p, {}), control, data, steps), data), theta, d)
    assert float(tree.dot(grads, d)) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_curvature_product_is_the_hessian_of_the_post_update_kl(steps: int, mode: str) -> None:
    control, theta = policy()
    learner = MAML(0.3, steps)
    data = recorded(control, theta, learner)
    verb = TrustRegion().verbs(learner, control)["curvature"]
    u, v = directions(theta)
    result = Execution(mode).run(verb.run, pack(theta, {}), v, {k: x.unsqueeze(0) for k, x in data.items()})
    assert result.weight == 10

    def divergence(p: Params) -> torch.Tensor:
        phi = learner.adapt(Meta(p, {}), control, data, steps)
        return (pg.kl(data["old"][-1], control.distribution(phi, data)) * data["mask"][-1]).sum()

    assert float(divergence(theta).detach()) == pytest.approx(0, abs=1e-12)
    wanted = slope(lambda p: slope(divergence, p, v, 1e-3), theta, u, 1e-3)
    assert float(tree.dot(result.total, u)) == pytest.approx(wanted, rel=1e-5)


def test_kl_is_old_to_new_and_log_probabilities_sum_over_actions() -> None:
    old = torch.tensor([[0.1, -0.2, 0.3, -0.1]]).double()
    new = torch.tensor([[0.5, 0.4, -0.2, 0.6]]).double()
    p, q = (torch.distributions.Normal(d[:, :2], d[:, 2:].exp()) for d in (old, new))
    torch.testing.assert_close(pg.kl(old, new), torch.distributions.kl_divergence(p, q).sum(-1))
    assert abs(float(pg.kl(old, new) - pg.kl(new, old))) > 0.1
    x = torch.tensor([[0.7, -1.0]]).double()
    torch.testing.assert_close(pg.log_prob(old, x), p.log_prob(x).sum(-1))


def test_returns_and_advantages_stop_at_the_end_of_an_episode() -> None:
    rewards = np.array([1.0, 2.0, 3.0, 10.0, 20.0])
    starts = np.array([True, False, False, True, False])
    np.testing.assert_allclose(pg.discounted(rewards, starts, 0.5), [1 + 1 + 0.75, 2 + 1.5, 3, 20, 20])
    values = np.array([0.5, -1.0, 2.0, 0.0, 3.0])
    delta = np.array([1 + 0.5 * -1 - 0.5, 2 + 0.5 * 2 + 1, 3 - 2, 10 + 0.5 * 3 - 0, 20 - 3])
    raw = np.array(
        [
            delta[0] + 0.2 * (delta[1] + 0.2 * delta[2]),
            delta[1] + 0.2 * delta[2],
            delta[2],
            delta[3] + 0.2 * delta[4],
            delta[4],
        ]
    )
    got = pg.advantages(rewards, values, starts, 0.5, 0.4)
    np.testing.assert_allclose(got, (raw - raw.mean()) / raw.std(), rtol=1e-7)


def test_the_baseline_fits_what_is_linear_in_its_features_and_counts_time_per_episode() -> None:
    rng = np.random.default_rng(0)
    o, time = rng.normal(size=(60, 2)), np.tile(np.arange(20), 3)
    targets = 3 + o @ [1.0, -2.0] + (o**2) @ [0.5, 0.1] + 4 * (time / 100) ** 3
    np.testing.assert_allclose(pg.baseline(o, time, targets), targets, atol=3e-3)
    shifted = pg.baseline(o, np.arange(60), targets)
    assert np.abs(shifted - targets).max() > 0.01


def test_old_episodes_outside_the_mask_change_nothing() -> None:
    control, theta = policy()
    learner = MAML(0.3, 1)
    data = recorded(control, theta, learner)
    noisy = dict(data)
    for name in ("observations", "actions", "advantages"):
        noisy[name] = data[name].clone()
        noisy[name][:, 10:] = 7.0
    a, b = (learner.gradient(Meta(theta, {}), control, d).grads for d in (data, noisy))
    for k, v in a.items():
        torch.testing.assert_close(b[k], v, rtol=1e-10, atol=1e-12)


def test_the_three_inner_losses_agree_in_slope_and_not_in_curvature() -> None:
    theta, slopes, curvatures = policy()[1], [], []
    data = recorded(policy()[0], theta, MAML(0.0, 1))
    d, _ = directions(theta)
    for kind in ("likelihood_ratio", "dice", "log_likelihood"):
        control, _ = policy(kind)
        leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
        grads = torch.autograd.grad(control.support(leaves, data, 0), list(leaves.values()), create_graph=True)
        along = sum((g * d[k]).sum() for k, g in zip(leaves, grads, strict=True))
        again = torch.autograd.grad(along, list(leaves.values()))
        slopes.append(float(along.detach()))
        curvatures.append(float(sum((g * d[k]).sum() for k, g in zip(leaves, again, strict=True))))
    assert slopes[0] == pytest.approx(slopes[1])
    assert slopes[0] == pytest.approx(slopes[2])
    assert len({round(c, 6) for c in curvatures}) == 3


def test_a_trust_region_stays_inside_its_radius_and_gains() -> None:
    control, theta = policy()
    learner, outer = MAML(0.3, 1), TrustRegion(max_kl=0.02)
    data = {
        k: torch.stack([recorded(control, theta, learner, s)[k] for s in (0, 1)])
        for k in recorded(control, theta, learner)
    }
    verbs = outer.verbs(learner, control)
    from learners.verbs import common_verbs

    run = {"gradient": common_verbs(learner, control, 1)["gradient"].run, **{k: v.run for k, v in verbs.items()}}
    meta = Meta(theta, {})

    def reduce(verb: str, operand):
        return Execution("loop").run(run[verb], pack(*meta), operand or {}, data)

    stepped, _, metrics = outer.step(meta, outer.init(meta), reduce)
    assert 0 < metrics["outer/kl"] <= 0.02
    assert metrics["outer/improvement"] > 0

    def loss(m: Meta) -> float:
        tasks = [{k: v[i] for k, v in data.items()} for i in (0, 1)]
        return float(np.mean([float(control.query(learner.adapt(m, control, t, 1), t).detach()) for t in tasks]))

    assert loss(meta) - loss(stepped) == pytest.approx(metrics["outer/improvement"], rel=1e-6)
    assert unpack(reduce("gradient", None).total).params.keys() == theta.keys()
