"""2-D navigation: a point robot that must find a goal it cannot see (Finn et al. 2017, §5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays, Predict, check_split
from envs.control.rollout import Act, Floats, Told, check_sizes, collect, collect_finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.1
NEAR = 0.01
PUBLISHED = np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2))


class PointWorld:
    """position ← position + 0.1 · clip(action, ±1);  reward −‖position − goal‖₂ at the new position.

    The factor is that of the paper's code, whose actions are normalised before they reach the robot. An episode begins
    at the origin and ends where both coordinates are within 0.01 of the goal.
    """

    observations = actions = 2
    ends = True

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._goal = tasks["goal"].astype(np.float64)[:, None]
        self._at = np.zeros((len(rngs), max(counts), 2))
        return self._at

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        self._at = self._at + STEP * np.clip(actions, -1, 1)
        away = self._at - self._goal
        return self._at, -np.linalg.norm(away, axis=-1), np.all(np.abs(away) < NEAR, axis=-1)


@dataclass(frozen=True)
class Navigation:
    """Goals from U(−0.5, 0.5)²; policies see their position only. Horizon 100.

    Validation and test tasks are drawn as training tasks are, unless the paper's are asked for.
    """

    rollouts: int = 20
    """Episodes per task and step (K)."""
    horizon: int = 100
    """Time steps of an episode (H)."""
    test_steps: int = 4000
    """Time steps per task and step at validation and test."""
    test_tasks: Literal["drawn", "paper"] = "drawn"
    """Test goals: drawn with the evaluation's seed, or the paper's 40."""
    test_sampler: Literal["begun", "finished"] = "begun"
    """Which episodes count at validation and test: those that begin first; or, as rllab samples, those that finish
    first, of which short ones are over-represented."""
    known: bool = False
    """Append the goal to the observations: no adaptation is needed then (the paper's oracle)."""

    def __post_init__(self) -> None:
        check_sizes(rollouts=self.rollouts, horizon=self.horizon, test_steps=self.test_steps)

    @property
    def kind(self) -> Literal["control"]:
        return "control"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (4 if self.known else 2,)

    @property
    def outputs(self) -> int:
        return 2

    def prepare(self) -> None:
        pass

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        return {"goal": rng.uniform(-0.5, 0.5, 2)}

    def fixed(self, split: str, index: int) -> Arrays | None:
        return {"goal": PUBLISHED[index % len(PUBLISHED)]} if split == "test" and self.test_tasks == "paper" else None

    def picture(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> Figure:
        """Paths without noise from the origin, after each number of steps; a cross is the goal."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(tasks), 3.4), layout="constrained")
        for axes, task, say in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, predict, strict=True):
            goal = np.asarray(task["goal"], np.float64)
            at = np.zeros((len(steps), 2))
            path = [at]
            for _ in range(self.horizon):
                seen = np.concatenate([at, np.tile(goal, (len(steps), 1))], 1) if self.known else at
                actions = say(seen.astype(np.float32))
                at = at + STEP * np.clip([actions[i][i] for i in range(len(steps))], -1, 1)
                path.append(at)
            for i, step in enumerate(steps):
                axes.plot(
                    *np.array(path)[:, i].T,
                    ".-",
                    markersize=3,
                    linewidth=0.8,
                    label=f"after {step} step{'s' * (step != 1)}",
                )
            axes.plot(*goal, "kx", markersize=9)
            axes.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), aspect="equal")
        axes.legend(fontsize="small")
        return figure

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        episodes = -(-self.test_steps // self.horizon) if testing else self.rollouts
        world = Told(PointWorld(), 2) if self.known else PointWorld()
        gather = collect_finished if testing and self.test_sampler == "finished" else collect
        return gather(world, tasks, act, rngs, episodes, self.horizon)
