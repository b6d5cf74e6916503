"""Complete sampling (policy, rewards, bookkeeping) as a fraction of bare physics on the same core: python
tests/bench/bench_sampling.py
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch

from envs.control.bodies import BODIES, GOALS, BodyName, load
from envs.control.planar import PlanarWorld
from envs.control.rollout import collect
from envs.control.world import LocomotionWorld
from learners.models.networks import GaussianMLP
from learners.modules.functional import functional
from learners.objectives.control import Control
from tests.bench.timing import machine, medians, quiet

TASKS, ROLLOUTS, HORIZON = 10, 20, 100
COPIES = TASKS * ROLLOUTS
PEERS = {"half_cheetah_v5": "HalfCheetah-v5", "ant_v5": "Ant-v5"}
MEASURED: tuple[BodyName, ...] = ("half_cheetah_v5", "half_cheetah_paper", "ant_v5", "ant_paper")
WANTED = {"exact v5": 0.85, "rollout v5": 0.92, "rollout paper": 0.75, "sync": 1.3}


def bare(name: BodyName) -> Any:
    """Physics alone: every copy steps with random torques; for bodies that feel contacts, those too."""
    body, model = BODIES[name], load(BODIES[name])
    copies, rng = [mujoco.MjData(model) for _ in range(COPIES)], np.random.default_rng(0)
    controls = rng.uniform(-1, 1, (HORIZON, COPIES, body.actions))

    def run() -> None:
        for data in copies:
            mujoco.mj_resetData(model, data)
        for step in controls:
            for data, control in zip(copies, step, strict=True):
                data.ctrl[:] = control
                mujoco.mj_step(model, data, body.frame_skip)
                if body.contact_cost:
                    mujoco.mj_rnePostConstraint(model, data)

    return run


def sampler(world: LocomotionWorld) -> Any:
    """Ours, with a policy of its own for each task."""
    torch.manual_seed(0)
    model = functional(GaussianMLP().build((world.observations,), world.actions))
    act = Control(model, rollouts=None)._actor([model.params() for _ in range(TASKS)])  # type: ignore[arg-type]
    tasks = {"goal": np.ones(TASKS)}
    return lambda: collect(world, tasks, act, [np.random.default_rng(i) for i in range(TASKS)], ROLLOUTS, HORIZON)


def peer(ident: str) -> Any:
    """Gymnasium's vector environment with the same policy, one for all."""
    environment = gymnasium.make_vec(ident, COPIES, vectorization_mode="sync")
    torch.manual_seed(0)
    model = functional(
        GaussianMLP().build(environment.single_observation_space.shape, environment.single_action_space.shape[0])
    )
    params = model.params()

    def run() -> None:
        observation, _ = environment.reset(seed=0)
        for _ in range(HORIZON):
            with torch.no_grad():
                mean, log_std = model(params, torch.from_numpy(observation).float()).chunk(2, -1)
            observation, *_ = environment.step((mean + log_std.exp() * torch.randn_like(mean)).numpy())

    return run


def main() -> None:
    quiet()
    print(machine())
    fine = True
    for name in MEASURED:
        body = BODIES[name]
        calls = {"bare physics": bare(name), "exact": sampler(LocomotionWorld(body, GOALS["velocity"]))}
        if not body.contact_cost:
            calls["rollout"] = sampler(PlanarWorld(body, GOALS["velocity"]))
        if name in PEERS:
            calls["sync"] = peer(PEERS[name])
        seconds = medians(calls, 5)
        print(f"\n{name}: {COPIES} copies × {HORIZON} steps")
        for label, t in seconds.items():
            fraction = seconds["bare physics"] / t
            print(f"  {label:14s} {COPIES * HORIZON / t:10.0f} env-steps/s   {fraction:5.2f} of bare physics")
            wanted = WANTED.get(f"{label} {'paper' if body.paper else 'v5'}", 0.0)
            if fraction < wanted:
                print(f"                 wanted {wanted}: MISSED")
                fine = False
        if "sync" in seconds:
            gain = seconds["sync"] / seconds["exact"]
            fine = fine and gain >= WANTED["sync"]
            print(f"  exact is × {gain:.2f} gymnasium's sync vector environment (wanted {WANTED['sync']})")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
