"""Batched sampling: all tasks × rollouts of a shard step together, one policy call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from envs.base import Array, Arrays

Floats: TypeAlias = NDArray[np.floating]
Act: TypeAlias = Callable[[NDArray[np.intp], Floats, Floats], Floats]
"""(tasks [t], observations [t, k, o], standard normal noise [t, k, a]) → actions [t, k, a]."""


class World(Protocol):
    """Dynamics of many copies side by side, [tasks, rollouts] of them; it holds their state."""

    observations: int
    actions: int
    ends: bool
    """Whether an episode can end before the horizon."""

    def reset(self, tasks: Arrays, rollouts: int, rngs: list[np.random.Generator]) -> Floats:
        """Begin `rollouts` episodes of each task; observations [tasks, rollouts, o]."""

    def step(self, actions: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """(observations, rewards [tasks, rollouts], whether the episode has ended here)."""


def collect(world: World, tasks: Arrays, act: Act, rngs: list[np.random.Generator], episodes: int, horizon: int) -> Arrays:
    """Whole episodes of each task until they hold at least `episodes` · `horizon` time steps.

    Returns arrays [tasks, n, …], n = K·H, or K·H + H where episodes can end early: observations, actions, rewards,
    mask (1 where there is a time step), episode, time; and return, the mean over episodes [tasks]. Episodes are numbered
    as they begin, and the lowest numbers count, never the first that finish: those would be the short ones. Everything
    random about a task comes from its own generator, in an order that no other task changes.
    """
    count, budget = len(rngs), episodes * horizon
    size = budget + (horizon if world.ends else 0)
    record: dict[str, Array] = {
        "observations": np.zeros((count, size, world.observations), np.float32),
        "actions": np.zeros((count, size, world.actions), np.float32),
        "rewards": np.zeros((count, size)),
        "mask": np.zeros((count, size), np.float32),
        "episode": np.zeros((count, size), np.int64),
        "time": np.zeros((count, size), np.int64),
    }
    filled, numbers, sums = np.zeros(count, int), np.zeros(count, int), np.zeros(count)
    while (open_ := np.flatnonzero(filled < budget)).size:
        wave = _wave(world, {k: v[open_] for k, v in tasks.items()}, open_, act, [rngs[t] for t in open_], episodes, horizon)
        for row, t in enumerate(open_):
            for k in range(episodes):
                if filled[t] >= budget:
                    break
                length = int(wave["lengths"][row, k])
                part = slice(filled[t], filled[t] + length)
                for name in ("observations", "actions", "rewards"):
                    record[name][t, part] = wave[name][row, k, :length]
                record["mask"][t, part] = 1
                record["episode"][t, part] = numbers[t]
                record["time"][t, part] = np.arange(length)
                sums[t] += wave["rewards"][row, k, :length].sum(dtype=np.float64)
                filled[t] += length
                numbers[t] += 1
    return record | {"return": sums / numbers}


def _wave(
    world: World, tasks: Arrays, which: NDArray[np.intp], act: Act, rngs: list[np.random.Generator], rollouts: int, horizon: int
) -> Arrays:
    """`rollouts` episodes of each task side by side, each to its end or to the horizon."""
    shape = (len(rngs), rollouts)
    noise = np.stack([rng.standard_normal((rollouts, horizon, world.actions), np.float32) for rng in rngs])
    observation = world.reset(tasks, rollouts, rngs)
    observations = np.zeros((*shape, horizon, world.observations), np.float32)
    actions = np.zeros((*shape, horizon, world.actions), np.float32)
    rewards, lengths, alive = np.zeros((*shape, horizon)), np.zeros(shape, int), np.ones(shape, bool)
    for time in range(horizon):
        observations[:, :, time] = observation
        actions[:, :, time] = act(which, observations[:, :, time], noise[:, :, time])
        observation, rewards[:, :, time], ended = world.step(actions[:, :, time])
        lengths += alive
        alive &= ~ended
        if not alive.any():
            break
    return {"observations": observations, "actions": actions, "rewards": rewards, "lengths": lengths}
