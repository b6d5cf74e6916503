"""A two-armed bandit, where everything has a closed form: each inner loss has the curvature that theory gives it.

The action is a number from N(μ, σ²); the right arm is pulled where it is positive. With rewards r₀, r₁ and Φ, ϕ the
normal distribution and density,  J(μ) = r₀ + (r₁ − r₀) Φ(μ/σ),  J' = (r₁ − r₀) ϕ(μ/σ)/σ,  J'' = −(r₁ − r₀) (μ/σ³)
ϕ(μ/σ). Expectations are exact up to the grid: actions are the distribution's quantiles.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from learners.algorithms.maml import MAML
from learners.base import Data, Meta, Params
from learners.modules.functional import Functional, functional
from learners.objectives import policy_gradient
from learners.objectives.control import Control
from learners.objectives.policy_gradient import InnerLoss, inner_loss

SIGMA, LEFT, RIGHT, RATE = 0.8, 1.0, 3.0, 0.4
N = 40_000
QUANTILES = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(N, dtype=torch.float64) + 0.5) / N)


class Arm(nn.Module):
    """N(μ, σ²), whatever is observed."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.mu.expand(len(x)), torch.full((len(x),), math.log(SIGMA), dtype=torch.float64)], -1)


def density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def value(mu: float) -> float:
    return LEFT + (RIGHT - LEFT) * 0.5 * (1 + math.erf(mu / SIGMA / math.sqrt(2)))


def slope(mu: float) -> float:
    return (RIGHT - LEFT) * density(mu / SIGMA) / SIGMA


def curvature(mu: float) -> float:
    return -(RIGHT - LEFT) * mu / SIGMA**3 * density(mu / SIGMA)


def lived(policy: Functional, means: list[float]) -> Data:
    """What bandits with these means meet, one pull an episode; the advantage is the reward."""
    actions = torch.stack([m + SIGMA * QUANTILES for m in means]).unsqueeze(-1)
    old_log_p = torch.stack(
        [torch.distributions.Normal(m, SIGMA).log_prob(a[:, 0]) for m, a in zip(means, actions, strict=True)]
    )
    ones = torch.ones(len(means), N, dtype=torch.float64)
    return {
        "observations": ones.unsqueeze(-1), "actions": actions, "mask": ones, "old_log_p": old_log_p,
        "advantages": torch.where(actions[..., 0] > 0, RIGHT, LEFT).double(),
        "first": torch.arange(N).expand(len(means), N),
        "old": torch.stack([policy({"mu": torch.tensor(m, dtype=torch.float64)}, ones[0].unsqueeze(-1))
        for m in means]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inner_loss", "of_the_inner_loss"),
    [
        ("log_likelihood", lambda mu: -value(mu) / SIGMA**2),  # samples held still: only E[R ∇² log π]
        ("likelihood_ratio", curvature),
        ("dice", curvature),
    ],
)
def test_the_meta_gradient_of_a_bandit(inner_loss: str, of_the_inner_loss) -> None:
    mu = 0.3
    phi = mu + RATE * slope(mu)
    policy = functional(Arm(mu))
    control = Control(policy, rollouts=None, inner_loss=inner_loss)  # type: ignore[arg-type]
    data, theta = lived(policy, [mu, phi]), policy.params()
    got_phi = MAML(RATE).adapt(Meta(theta, {}), control, data, 1)["mu"]
    assert float(got_phi) == pytest.approx(phi, abs=1e-4)
    got = MAML(RATE).gradient(Meta(theta, {}), control, data).grads["mu"]
    assert float(got) == pytest.approx(-slope(phi) * (1 + RATE * of_the_inner_loss(mu)), rel=2e-3)


def test_sums_within_episodes_are_numpys() -> None:
    rng = np.random.default_rng(0)
    lengths, values = [1, 7, 4, 1, 16], rng.standard_normal(29)
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    wanted = np.concatenate([np.cumsum(part) for part in np.split(values, np.cumsum(lengths)[:-1])])
    got = policy_gradient.running_sums(torch.from_numpy(values), torch.from_numpy(first))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)


def test_only_dice_has_the_curvature_between_two_pulls_of_an_episode() -> None:
    """The reward comes at the end and is the product of both arms': J = V², J' = 2 V V', J'' = 2 V V'' + 2 V'². With
    returns to go for advantages all three losses have J'; a ratio per time step lacks the last term, DiCE has all.
    """
    mu = 0.3
    # the arms change between two points of the grid
    z = -mu / SIGMA + 0.015 * (torch.arange(-400, 400, dtype=torch.float64) + 0.5)
    both = torch.cartesian_prod(mu + SIGMA * z, mu + SIGMA * z)  # all pairs of pulls, with the density as their weight
    weights = torch.exp(-0.5 * torch.cartesian_prod(z, z).square().sum(-1))
    rewards = torch.where(both > 0, RIGHT, LEFT).double().prod(-1) * weights / weights.mean()
    steps = torch.arange(2 * len(both))
    data = {
        "mask": torch.ones(len(steps), dtype=torch.float64),
        "advantages": rewards.repeat_interleave(2),
        "first": steps - steps % 2,
    }
    at = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    v, dv, ddv = value(mu), slope(mu), curvature(mu)
    wanted: dict[InnerLoss, float] = {
        "dice": 2 * v * ddv + 2 * dv * dv, "likelihood_ratio": 2 * v * ddv, "log_likelihood": -2 * v * v / SIGMA**2,
    }  # fmt: skip
    for kind, second_wanted in wanted.items():
        log_p = torch.distributions.Normal(at, torch.tensor(SIGMA, dtype=torch.float64)).log_prob(both.reshape(-1))
        loss = 2 * inner_loss(kind, log_p, log_p.detach(), data)  # two time steps an episode
        (first,) = torch.autograd.grad(loss, at, create_graph=True)
        (second,) = torch.autograd.grad(first, at)
        assert -float(first.detach()) == pytest.approx(2 * v * dv, rel=5e-3), kind
        assert -float(second) == pytest.approx(second_wanted, rel=1e-2), kind


def bandit() -> tuple[Control, Params, Data]:
    policy = functional(Arm(0.3))
    return Control(policy, rollouts=None), policy.params(), lived(policy, [0.3, 0.5])  # type: ignore[arg-type]


def test_the_meta_loss_is_of_what_the_adapted_policy_sampled() -> None:
    control, theta, data = bandit()
    nothing = data | {"advantages": torch.stack([data["advantages"][0], torch.zeros(N, dtype=torch.float64)])}
    assert float(MAML(RATE).gradient(Meta(theta, {}), control, nothing).grads["mu"]) == 0
    unmoved = data | {"advantages": torch.stack([torch.zeros(N, dtype=torch.float64), data["advantages"][1]])}
    assert float(MAML(RATE).gradient(Meta(theta, {}), control, unmoved).grads["mu"]) != 0


def test_the_exploration_term_credits_the_first_pulls_with_the_return_after_adaptation() -> None:
    _, theta, data = bandit()
    control = Control(functional(Arm(0.3)), rollouts=None, exploration=0.5)  # type: ignore[arg-type]
    data |= {"return": torch.tensor([1.0, 9.0], dtype=torch.float64)}
    slots = {
        f"exploration/{k}": torch.tensor(v).double() for k, v in (("mean", 2.5), ("square", 14.5), ("weight", 0.5))
    }
    data["actions"] = data["actions"] + 0.2  # so that the mean score is not zero
    plain = MAML(RATE).gradient(Meta(theta, {}), Control(control.policy, rollouts=None), data).grads["mu"]
    got = MAML(RATE).gradient(Meta(theta, slots), control, data)
    score = 0.2 / SIGMA**2  # mean ∇ log π of actions that lie 0.2 above their mean
    assert float(got.grads["mu"] - plain) == pytest.approx(-0.5 * (9 - 5) / 2 * score, rel=1e-6)
    followed = {"mean": 0.9 * 2.5 + 0.1 * 9, "square": 0.9 * 14.5 + 0.1 * 81, "weight": 0.9 * 0.5 + 0.1}
    for name, wanted in followed.items():
        assert float(got.slots[f"exploration/{name}"]) == pytest.approx(wanted)
    nothing = {k: torch.zeros_like(v) for k, v in slots.items()}  # before the first iteration
    torch.testing.assert_close(MAML(RATE).gradient(Meta(theta, nothing), control, data).grads["mu"], plain)
