"""Batched sampling: all tasks × rollouts of a shard step together, one policy call per step."""

from __future__ import annotations

import time
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
        """Begin `counts[t]` episodes of task t; observations [tasks, max(counts), o], those beyond a task's count
        idle.
        """

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """(observations, rewards [tasks, rollouts], whether the episode has ended here); only those `alive` need to
        move.
        """


class Told:
    """A world that says what the task is: observations end with its `goal` (the MAML paper's oracle)."""

    def __init__(self, world: World, length: int) -> None:
        """`length`: of a goal."""
        self._world, self.observations, self.actions, self.ends = (
            world,
            world.observations + length,
            world.actions,
            world.ends,
        )

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._goals = np.asarray(tasks["goal"], np.float64).reshape(len(rngs), 1, -1).repeat(max(counts), 1)
        return np.concatenate([self._world.reset(tasks, counts, rngs), self._goals], -1)

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        observation, reward, ended = self._world.step(actions, alive)
        return np.concatenate([observation, self._goals], -1), reward, ended


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a number of rollouts, time steps, … below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1 wanted")


class _Record:
    """Time steps of every task, filled from the front; episodes are numbered in the order they come."""

    def __init__(self, world: World, count: int, size: int) -> None:
        self.arrays: dict[str, Array] = {
            "observations": np.zeros((count, size, world.observations), np.float32),
            "actions": np.zeros((count, size, world.actions), np.float32),
            "rewards": np.zeros((count, size)),
            "mask": np.zeros((count, size), np.float32),
            "episode": np.zeros((count, size), np.int64),
            "time": np.zeros((count, size), np.int64),
        }
        self.filled, self.episodes, self._sums = np.zeros(count, int), np.zeros(count, int), np.zeros(count)
        self.clock = {"physics_s": 0.0, "policy_s": 0.0}

    def append(self, t: np.intp | int, wave: Arrays, row: int, k: int) -> None:
        """Episode k of a wave's row, as the next one of task t."""
        length = int(wave["lengths"][row, k])
        part = slice(self.filled[t], self.filled[t] + length)
        for name in ("observations", "actions", "rewards"):
            self.arrays[name][t, part] = wave[name][row, k, :length]
        self.arrays["mask"][t, part] = 1
        self.arrays["episode"][t, part] = self.episodes[t]
        self.arrays["time"][t, part] = np.arange(length)
        self._sums[t] += wave["rewards"][row, k, :length].sum(dtype=np.float64)
        self.filled[t] += length
        self.episodes[t] += 1

    def result(self) -> Arrays:
        count = len(self.filled)
        shares = {name: np.full(count, seconds / count) for name, seconds in self.clock.items()}
        return self.arrays | {"return": self._sums / self.episodes} | shares


def collect(
    world: World, tasks: Arrays, act: Act, rngs: list[np.random.Generator], episodes: int, horizon: int
) -> Arrays:
    """Whole episodes of each task until they hold at least `episodes` · `horizon` time steps.

    Returns arrays [tasks, n, …], n = K·H, or K·H + H where episodes can end early: observations, actions, rewards, mask
    (1 where there is a time step), episode, time; return, the mean over episodes [tasks]; and `physics_s` and
    `policy_s` [tasks], each task's share of the seconds spent there. Episodes are numbered as they begin, and the
    lowest numbers count, never the first that finish: those would be the short ones. Everything random about a task
    comes from its own generator, in an order that no other task changes.
    """
    budget = episodes * horizon
    record = _Record(world, len(rngs), budget + (horizon if world.ends else 0))
    while (open_ := np.flatnonzero(record.filled < budget)).size:
        # As many episodes as will be enough if they last as long as this task's have so far: no other task has a say.
        # No more than at first, though: a task that ends at once must not need thousands of copies.
        counts = [
            min(episodes, int(np.ceil((budget - f) / (f / n)))) if n else episodes
            for f, n in zip(record.filled[open_], record.episodes[open_], strict=True)
        ]
        wave = _wave(world, tasks, open_, act, rngs, counts, horizon, record.clock)
        for row, t in enumerate(open_):
            for k in range(counts[row]):
                if record.filled[t] < budget:
                    record.append(t, wave, row, k)
    return record.result()


def collect_finished(
    world: World, tasks: Arrays, act: Act, rngs: list[np.random.Generator], episodes: int, horizon: int
) -> Arrays:
    """The same as rllab samples: `episodes` copies that begin anew where they end, until *finished* episodes hold K·H
    time steps.

    Episodes count in the order in which they finish, so short ones are over-represented: for comparison with published
    numbers. n = 2·K·H.
    """
    budget = episodes * horizon
    record = _Record(world, len(rngs), 2 * budget)
    elapsed = np.zeros((len(rngs), episodes), int)
    finished: list[list[tuple[int, int, Arrays, int]]] = [[] for _ in rngs]  # per task: (when, copy, wave, its row)
    enough = np.full(len(rngs), np.iinfo(int).max)
    while (open_ := np.flatnonzero(elapsed.min(1) < enough)).size:
        wave = _wave(world, tasks, open_, act, rngs, [episodes] * open_.size, horizon, record.clock)
        elapsed[open_] += wave["lengths"]
        for row, t in enumerate(open_):
            finished[t] += [(elapsed[t, k], k, wave, row) for k in range(episodes)]
            finished[t].sort(key=lambda e: e[:2])
            held = np.cumsum([w["lengths"][r, k] for _, k, w, r in finished[t]])
            if held[-1] >= budget:
                enough[t] = int(finished[t][int(np.argmax(held >= budget))][0])
    for task, its in enumerate(finished):
        for when, k, wave, row in its:
            if when <= enough[task]:
                record.append(task, wave, row, k)
    return record.result()


def _wave(
    world: World, tasks: Arrays, which: NDArray[np.intp], act: Act, rngs: list[np.random.Generator], counts: list[int],
    horizon: int, clock: dict[str, float],
) -> Arrays:  # fmt: skip
    """`counts[i]` episodes of task `which[i]` side by side, each to its end or to the horizon."""
    shape, own = (which.size, max(counts)), [rngs[t] for t in which]
    noise = np.zeros((*shape, horizon, world.actions), np.float32)
    for i, rng in enumerate(own):
        noise[i, : counts[i]] = rng.standard_normal((counts[i], horizon, world.actions), np.float32)
    began = time.perf_counter()
    observation = world.reset({k: v[which] for k, v in tasks.items()}, counts, own)
    clock["physics_s"] += time.perf_counter() - began
    observations = np.zeros((*shape, horizon, world.observations), np.float32)
    actions = np.zeros((*shape, horizon, world.actions), np.float32)
    rewards, lengths = np.zeros((*shape, horizon)), np.zeros(shape, int)
    alive = np.arange(shape[1]) < np.array(counts)[:, None]
    for t in range(horizon):
        observations[:, :, t] = observation
        began = time.perf_counter()
        actions[:, :, t] = act(which, observations[:, :, t], noise[:, :, t])
        acted = time.perf_counter()
        observation, rewards[:, :, t], ended = world.step(actions[:, :, t], alive)
        clock["policy_s"] += acted - began
        clock["physics_s"] += time.perf_counter() - acted
        lengths += alive
        alive &= ~ended
        if not alive.any():
            break
    return {"observations": observations, "actions": actions, "rewards": rewards, "lengths": lengths}
