"""Physics against Gymnasium itself and against MuJoCo's own functions; sampling against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from envs.locomotion import BODIES, Locomotion, LocomotionWorld, PlanarWorld
from envs.navigation import Navigation, PointWorld
from envs.rollout import collect

gymnasium = pytest.importorskip("gymnasium")
mujoco = pytest.importorskip("mujoco")

KWARGS = {
    "half_cheetah_v5": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "ant_v5": ("Ant-v5", {"ctrl_cost_weight": 0.005, "contact_cost_weight": 5e-4, "healthy_reward": 0.05}),
}


@pytest.mark.parametrize("name", KWARGS)
def test_gymnasiums_bodies_step_to_the_same_bits(name: str) -> None:
    ident, kwargs = KWARGS[name]
    environment = gymnasium.make(ident, **kwargs)
    world = LocomotionWorld(BODIES[name], "velocity")
    goal, rng = 1.3, np.random.default_rng(0)
    wanted, _ = environment.reset(seed=7)
    got = world.reset({"goal": np.array([goal])}, [1], [np.random.Generator(np.random.PCG64(np.random.SeedSequence(7)))])
    np.testing.assert_array_equal(got[0, 0], wanted)
    ends = 0
    for _ in range(220):
        action = rng.uniform(-1.2, 1.2, BODIES[name].actions).astype(np.float32)
        wanted, _, ended, _, info = environment.step(action)
        got, reward, over = world.step(action[None, None], np.ones((1, 1), bool))
        np.testing.assert_array_equal(got[0, 0], wanted)
        assert bool(over[0, 0]) == ended
        bonus = BODIES[name].bonus + BODIES[name].alive
        costs = info["reward_ctrl"] + info.get("reward_contact", 0.0)
        assert reward[0, 0] == pytest.approx(bonus - abs(info["x_velocity"] - goal) + costs, abs=1e-6)
        ends += ended
        if ended:
            break
    assert ends or name == "half_cheetah_v5" or _ >= 100


@pytest.mark.parametrize("name", ["half_cheetah_paper", "ant_paper"])
def test_the_papers_bodies_follow_their_formulas(name: str) -> None:
    body = BODIES[name]
    world = LocomotionWorld(body, "direction")
    assert world.model.opt.timestep == (0.01 if "cheetah" in name else 0.02)
    rngs = [np.random.default_rng(i) for i in (1, 2)]
    observation = world.reset({"goal": np.array([1.0, -1.0])}, [2, 2], rngs)
    assert observation.shape == (2, 2, body.observations)
    data, rng = mujoco.MjData(world.model), np.random.default_rng(3)
    actions = rng.uniform(-1.5, 1.5, (30, 2, 2, body.actions))
    for action in actions:
        source = world._live[3]
        data.qpos[:], data.qvel[:], data.ctrl[:] = source.qpos, source.qvel, action[1, 1]
        observation, reward, _ = world.step(action, np.ones((2, 2), bool))
        data.qacc_warmstart[:] = 0
        mujoco.mj_step(world.model, data)
        mujoco.mj_forward(world.model, data)
        mujoco.mj_subtreeVel(world.model, data)
        np.testing.assert_allclose(observation[1, 1, -3:], data.subtree_com[1], atol=1e-12)
        hidden = world.model.nq - body.hidden
        moving = np.concatenate([data.qpos[body.hidden :], data.qvel])
        np.testing.assert_allclose(observation[1, 1, : hidden + world.model.nv], moving, atol=1e-12)
        cost = body.control_cost * np.square(np.clip(action[1, 1], -1, 1)).sum()
        if body.contact_cost:
            mujoco.mj_rnePostConstraint(world.model, data)
            contacts = np.clip(data.cfrc_ext, -1, 1)
            np.testing.assert_allclose(observation[1, 1, 29:113], contacts.ravel(), atol=1e-9)
            cost += body.contact_cost * np.square(contacts).sum()
        assert reward[1, 1] == pytest.approx(-data.subtree_linvel[1, 0] - cost + body.alive, abs=1e-9)


@pytest.mark.parametrize("name", ["half_cheetah_v5", "half_cheetah_paper"])
def test_the_rollout_backend_agrees_with_the_exact_one(name: str) -> None:
    worlds = [kind(BODIES[name], "velocity") for kind in (LocomotionWorld, PlanarWorld)]
    starts = [w.reset({"goal": np.array([0.5, 1.5])}, [3, 3], [np.random.default_rng(i) for i in (1, 2)]) for w in worlds]
    np.testing.assert_allclose(starts[1], starts[0], atol=1e-12)
    rng = np.random.default_rng(3)
    for _ in range(50):
        action = rng.uniform(-1.5, 1.5, (2, 3, 6)).astype(np.float32)
        (a, rewards, _), (b, fast, _) = (w.step(action, np.ones((2, 3), bool)) for w in worlds)
        np.testing.assert_allclose(b, a, atol=1e-7)
        np.testing.assert_allclose(fast, rewards, atol=1e-7)


def test_tasks_are_what_the_paper_draws() -> None:
    rng = np.random.default_rng(0)
    directions = [float(Locomotion().sample("train", rng)["goal"]) for _ in range(200)]
    assert set(directions) == {-1.0, 1.0}
    velocities = [float(Locomotion(body="ant_paper", goal="velocity").sample("train", rng)["goal"]) for _ in range(500)]
    assert min(velocities) >= 0
    assert 2.8 < max(velocities) <= 3
    goals = np.array([Navigation().sample("test", rng)["goal"] for _ in range(500)])
    assert np.abs(goals).max() <= 0.5
    assert np.abs(goals).max() > 0.48


def toward(goals: np.ndarray):
    """A policy that knows the goals and shakes."""

    def act(which, observations, noise):
        return goals[which][:, None] - observations + 0.03 * noise

    return act


def test_whole_episodes_count_in_the_order_in_which_they_began() -> None:
    goals = np.array([[0.3, -0.2], [0.05, 0.02], [0.45, 0.45]])
    rngs = [np.random.default_rng(i) for i in range(3)]
    recorded = collect(PointWorld(), {"goal": goals}, toward(goals), rngs, 4, 25)
    steps = recorded["mask"].sum(1).astype(int)
    assert recorded["mask"].shape == (3, 125)
    assert (steps >= 100).all()
    for t in range(3):
        n = steps[t]
        episode, time, rewards = (recorded[k][t, :n] for k in ("episode", "time", "rewards"))
        starts = np.flatnonzero(time == 0)
        assert list(episode[starts]) == list(range(len(starts)))
        assert starts[-1] < 100  # the budget is not yet reached when the last one begins
        lengths = np.diff([*starts, n])
        totals = [rewards[s : s + k].sum() for s, k in zip(starts, lengths, strict=True)]
        assert recorded["return"][t] == pytest.approx(np.mean(totals))
        at = recorded["observations"][t, :n] + np.clip(recorded["actions"][t, :n], -0.1, 0.1)
        np.testing.assert_allclose(rewards, -np.linalg.norm(at - goals[t], axis=1), atol=1e-6)
        near = (np.abs(at - goals[t]) < 0.01).all(1)
        assert all(near[s + k - 1] or k == 25 for s, k in zip(starts, lengths, strict=True))


def test_a_tasks_episodes_do_not_depend_on_the_other_tasks() -> None:
    goals = np.array([[0.3, -0.2], [0.05, 0.02]])
    both = collect(PointWorld(), {"goal": goals}, toward(goals), [np.random.default_rng(i) for i in range(2)], 3, 20)
    alone = collect(PointWorld(), {"goal": goals[1:]}, toward(goals[1:]), [np.random.default_rng(1)], 3, 20)
    for name, value in alone.items():
        np.testing.assert_array_equal(both[name][1], value[0])
