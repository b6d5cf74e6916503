"""Policy gradients: returns, baseline, advantages, and the losses that an adapting policy descends."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

InnerLoss = Literal["log_likelihood", "likelihood_ratio", "dice"]
Floats = NDArray[np.floating]

RIDGE = 1e-5
EPS = 1e-8


def discounted(rewards: Floats, starts: NDArray[np.bool_], discount: float) -> Floats:
    """Σ_{s ≥ t} γ^{s−t} r_s within each episode; `starts` marks an episode's first step. Arrays [n]; the time limit
    ends an episode.
    """
    out, total = np.zeros(len(rewards)), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        total = rewards[t] + discount * total
        out[t] = total
        if starts[t]:
            total = 0.0
    return out


def baseline(observations: Floats, time: NDArray[np.integer], targets: Floats) -> Floats:
    """Predictions [n] of a least-squares fit to the same `targets`, ridge 1e-5, in float64.

    Features as in rllab's linear baseline (Duan et al. 2016): o clipped to ±10, o², t/100 and its square and cube, 1;
    time within the episode. Not a number where the inputs are not.
    """
    o = np.clip(observations.astype(np.float64), -10, 10)
    t = time.astype(np.float64)[:, None] / 100
    features = np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], 1)
    gram, moment = features.T @ features, features.T @ targets
    if not (np.isfinite(gram).all() and np.isfinite(moment).all()):
        return np.full(len(features), np.nan)
    weights = np.linalg.lstsq(gram + RIDGE * np.eye(len(gram)), moment, rcond=None)[0]
    predicted: Floats = features @ weights
    return predicted


def advantages(rewards: Floats, values: Floats, starts: NDArray[np.bool_], discount: float, gae: float) -> Floats:
    """Generalised advantage estimates (Schulman et al. 2016) with value 0 behind an episode's last step, standardised
    over the task.
    """
    last = np.append(starts[1:], True)
    following = np.where(last, 0.0, np.append(values[1:], 0.0))
    raw = discounted(rewards + discount * following - values, starts, discount * gae)
    standard: Floats = (raw - raw.mean()) / (raw.std() + EPS)
    return standard


def log_prob(distribution: Tensor, actions: Tensor) -> Tensor:
    """log π(a|s) [n], summed over the action's dimensions; `distribution` [n, 2a] is means and log standard
    deviations.
    """
    mean, log_std = distribution.chunk(2, -1)
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * float(np.log(2 * np.pi))).sum(-1)


def kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(old ‖ new) [n] of diagonal normal distributions, summed over dimensions."""
    (m0, s0), (m1, s1) = old.chunk(2, -1), new.chunk(2, -1)
    return (s1 - s0 + (torch.exp(2 * s0) + (m0 - m1) ** 2) / (2 * torch.exp(2 * s1)) - 0.5).sum(-1)


def inner_loss(kind: InnerLoss, log_p: Tensor, old_log_p: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The loss of an inner step, a mean over valid time steps.

    log_likelihood     −mean log π(a|s) · A   (REINFORCE, as in the MAML paper)
    likelihood_ratio   −mean π(a|s)/π_old(a|s) · A   (the same gradient at π_old; a curvature of lower variance:
                       Rothfuss et al. 2019, and the importance weight that a candidate θ needs)
    dice               −mean (D_t − D_{t−1}) · A,  D_t = Π_{s ≤ t} π/π_old  within each episode (Foerster et al. 2018,
                       with advantages as in Farquhar et al. 2019): where A are returns to go, unbiased to all orders
    """
    mask, advantage = data["mask"], data["advantages"]
    if kind == "log_likelihood":
        weighted = log_p * advantage
    elif kind == "likelihood_ratio":
        weighted = torch.exp(log_p - old_log_p) * advantage
    else:
        ratio = (log_p - old_log_p) * mask
        within = running_sums(ratio, data["first"])
        weighted = (torch.exp(within) - torch.exp(within - ratio)) * advantage
    return -masked_mean(weighted, mask)


def running_sums(values: Tensor, first: Tensor) -> Tensor:
    """Σ of values [n] from an episode's first step, whose number is `first` [n], to each of its steps.

    By doubling, in log₂ n additions: float `cumsum` has no deterministic kernel on a GPU.
    """
    n = len(values)
    place = torch.arange(n, device=values.device) - first
    distance = 1
    while distance < n:
        before = torch.cat([torch.zeros_like(values[:distance]), values[:-distance]])
        values = values + torch.where(place >= distance, before, 0)
        distance *= 2
    return values


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the time steps that are there."""
    return (values * mask).sum() / mask.sum()
