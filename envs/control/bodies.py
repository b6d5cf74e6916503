"""Bodies and goals, each a table; the MuJoCo models behind them.

The two physics are different worlds whose returns cannot be compared, hence the names: `…_v5` is Gymnasium's, `…_paper`
is that of the MAML paper (rllab: frame skip 1, another time step, velocity of the whole body's centre of mass, other
costs).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays

log = logging.getLogger("metafleet")

Floats = NDArray[np.floating]
BodyName = Literal["half_cheetah_v5", "half_cheetah_paper", "ant_v5", "ant_paper", "hopper_v5", "walker2d_v5"]
GoalName = Literal["direction", "velocity", "position", "direction_2d", "parameters"]


@dataclass(frozen=True)
class Body:
    """A robot in one of the two physics."""

    asset: str
    """Gymnasium's model file."""
    actions: int
    frame_skip: int
    timestep: float
    goals: tuple[GoalName, ...]
    """What it can be asked to do."""
    paper: bool = False
    """rllab's physics: Gaussian reset, centre-of-mass velocity, observation and velocity of the new state."""
    hidden: int = 1
    """Leading coordinates that a policy does not see, unless its goal is a place."""
    fastest: float = 0.0
    """Upper end of goal velocities."""
    control_cost: float = 1e-3
    contact_cost: float = 0.0
    """Above 0 where the body feels contact forces."""
    alive: float = 0.0
    """Reward of each time step; in Gymnasium's physics not of the one in which the body falls."""
    heights: tuple[float, float] | None = None
    """Range of the torso's height outside of which an episode ends."""
    upright: float = np.inf
    """Largest angle of a planar torso."""
    noise: tuple[float, float] = (0.1, 0.1)
    """Scale of the first position's noise (uniform; the paper's: Gaussian) and of the first velocity's (Gaussian)."""
    uniform: bool = False
    """The first velocity's noise is uniform too, and velocities are seen clipped to ±10."""


_CHEETAH: tuple[GoalName, ...] = ("direction", "velocity")
_ANT: tuple[GoalName, ...] = ("direction", "velocity", "position", "direction_2d")

BODIES: dict[BodyName, Body] = {
    "half_cheetah_v5": Body("half_cheetah.xml", 6, 5, 0.01, _CHEETAH, fastest=2.0, control_cost=0.05),
    "half_cheetah_paper": Body("half_cheetah.xml", 6, 1, 0.01, _CHEETAH, True, fastest=2.0, control_cost=0.05,
    noise=(0.01, 0.1)), "ant_v5": Body(
        "ant.xml", 8, 5, 0.01, _ANT, hidden=2, fastest=3.0, control_cost=0.005, contact_cost=5e-4, alive=0.05,
        heights=(0.2, 1.0)
    ),
    "ant_paper": Body(
        "ant.xml", 8, 1, 0.02, _ANT, True, hidden=0, fastest=3.0, control_cost=0.005, contact_cost=5e-4, alive=0.05,
        heights=(0.2, 1.0), noise=(0.01, 0.1),
    ),
    "hopper_v5": Body(
        "hopper.xml", 3, 4, 0.002, ("parameters",), alive=1.0, heights=(0.7, np.inf), upright=0.2, noise=(5e-3, 5e-3),
        uniform=True
    ),
    "walker2d_v5": Body(
        "walker2d_v5.xml", 6, 4, 0.002, ("parameters",), alive=1.0, heights=(0.8, 2.0), upright=1.0, noise=(5e-3, 5e-3),
        uniform=True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What a body is to do."""

    draw: Callable[[np.random.Generator, Body], Arrays]
    """A task."""
    reward: Callable[[Floats, Floats, Floats, Body], Floats]
    """(goals [t, 1, …], velocities [t, k, 2], places [t, k, 2], body) → reward [t, k] before costs; x and y, metres and
    seconds."""


def _direction(goal: Floats, velocity: Floats, place: Floats, body: Body) -> Floats:
    along: Floats = goal * velocity[..., 0]
    return along


def _velocity(goal: Floats, velocity: Floats, place: Floats, body: Body) -> Floats:
    # A bonus keeps a body that can fall from falling on purpose.
    return (1.0 if body.heights else 0.0) - np.abs(velocity[..., 0] - goal)


def _position(goal: Floats, velocity: Floats, place: Floats, body: Body) -> Floats:
    near: Floats = 4.0 - np.abs(place - goal).sum(-1)
    return near


def _direction_2d(goal: Floats, velocity: Floats, place: Floats, body: Body) -> Floats:
    along: Floats = (goal * velocity).sum(-1)
    return along


def _forward(goal: Floats, velocity: Floats, place: Floats, body: Body) -> Floats:
    return velocity[..., 0]


def _unit_vector(rng: np.random.Generator) -> Floats:
    v = rng.standard_normal(2)
    unit: Floats = v / np.linalg.norm(v)
    return unit


def _parameters(rng: np.random.Generator, body: Body) -> Arrays:
    """Factors of every mass, inertia and friction coefficient, 1.5^U(−3, 3), and damping, 1.3^U(−3, 3)."""
    model = load(body)
    return {name: base ** rng.uniform(-3, 3, getattr(model, name).shape) for name, base in RANDOM.items()}


RANDOM = {"body_mass": 1.5, "body_inertia": 1.5, "geom_friction": 1.5, "dof_damping": 1.3}

# direction and velocity: Finn et al. 2017; position: cbfinn/maml_rl; direction_2d: Rothfuss et al. 2019 (with the
# paper's costs); parameters: dennisl88/rand_param_envs, where the task is the model itself.
GOALS: dict[GoalName, Goal] = {
    "direction": Goal(lambda rng, body: {"goal": np.asarray(rng.choice([-1.0, 1.0]))}, _direction),
    "velocity": Goal(lambda rng, body: {"goal": np.asarray(rng.uniform(0, body.fastest))}, _velocity),
    "position": Goal(lambda rng, body: {"goal": rng.uniform(-3, 3, 2)}, _position),
    "direction_2d": Goal(lambda rng, body: {"goal": _unit_vector(rng)}, _direction_2d),
    "parameters": Goal(_parameters, _forward),
}

PUBLISHED = 40


def published(name: BodyName, goal: GoalName, index: int) -> Arrays:
    """Test task `index`, modulo 40, of the MAML paper, from NumPy's seeds 1 and (the ant's directions) 2.

    Raises ValueError for a goal that the paper did not test.
    """
    if goal not in ("direction", "velocity"):
        raise ValueError(f"test_tasks='paper': the paper tested direction and velocity, not {goal}")
    body = BODIES[name]
    seed = 2 if goal == "direction" and body.asset == "ant.xml" else 1
    number = np.random.RandomState(seed).uniform(0, body.fastest, PUBLISHED)[index % PUBLISHED]
    if goal == "direction":
        return {"goal": np.asarray(-1.0 if number < body.fastest / 2 else 1.0)}
    return {"goal": np.asarray(number)}


@cache
def load(body: Body) -> Any:
    """The body's MuJoCo model: Gymnasium's file, changed in code for the paper's physics. One per process; nobody
    changes it.
    """
    import gymnasium
    import mujoco

    # Without a handler MuJoCo writes its warnings into a file in the current folder.
    mujoco.set_mju_user_warning(_warn)
    path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / body.asset
    model = mujoco.MjModel.from_xml_path(str(path))
    model.opt.timestep = body.timestep
    if body.paper and body.asset == "ant.xml":
        model.geom_solref[:] = (0.02, 1.0)
        model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)
    return model


def changed(model: Any, task: Arrays) -> Any:
    """A copy of `model` with the parameters of `RANDOM` multiplied by the task's factors."""
    import mujoco

    other = copy.copy(model)
    for name in RANDOM:
        getattr(other, name)[:] *= task[name]
    mujoco.mj_setConst(other, mujoco.MjData(other))
    return other


def _warn(message: str) -> None:
    if "settotalmass" not in message:  # of Gymnasium's model file; nothing to be done about it here
        log.warning("MuJoCo: %s", message)
