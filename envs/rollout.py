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

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        """Begin `counts[t]` episodes of task t; observations [tasks, max(counts), o], those beyond a task's count idle."""

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """(observations, rewards [tasks, rollouts], whether the episode has ended here); only those `alive` need to move."""


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
        # As many episodes as will be enough if they last as long as this task's have so far: no other task has a say.
        counts = [int(np.ceil((budget - filled[t]) / (filled[t] / numbers[t]))) if numbers[t] else episodes for t in open_]
        wave = _wave(world, {k: v[open_] for k, v in tasks.items()}, open_, act, [rngs[t] for t in open_], counts, horizon)
        for row, t in enumerate(open_):
            for k in range(counts[row]):
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
    world: World, tasks: Arrays, which: NDArray[np.intp], act: Act, rngs: list[np.random.Generator], counts: list[int], horizon: int
) -> Arrays:
    """`counts[t]` episodes of each task side by side, each to its end or to the horizon."""
    shape = (len(rngs), max(counts))
    noise = np.zeros((*shape, horizon, world.actions), np.float32)
    for t, rng in enumerate(rngs):
        noise[t, : counts[t]] = rng.standard_normal((counts[t], horizon, world.actions), np.float32)
    observation = world.reset(tasks, counts, rngs)
    observations = np.zeros((*shape, horizon, world.observations), np.float32)
    actions = np.zeros((*shape, horizon, world.actions), np.float32)
    rewards, lengths = np.zeros((*shape, horizon)), np.zeros(shape, int)
    alive = np.arange(shape[1]) < np.array(counts)[:, None]
    for time in range(horizon):
        observations[:, :, time] = observation
        actions[:, :, time] = act(which, observations[:, :, time], noise[:, :, time])
        observation, rewards[:, :, time], ended = world.step(actions[:, :, time], alive)
        lengths += alive
        alive &= ~ended
        if not alive.any():
            break
    return {"observations": observations, "actions": actions, "rewards": rewards, "lengths": lengths}
