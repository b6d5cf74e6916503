"""Physics against Gymnasium itself and against MuJoCo's own functions; sampling against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from envs.control.bodies import BODIES, GOALS, RANDOM, load
from envs.control.locomotion import Locomotion
from envs.control.navigation import Navigation, PointWorld
from envs.control.planar import PlanarWorld
from envs.control.rollout import collect, collect_finished
from envs.control.world import LocomotionWorld

gymnasium = pytest.importorskip("gymnasium")
mujoco = pytest.importorskip("mujoco")

KWARGS: dict[str, tuple[str, dict]] = {
    "half_cheetah_v5": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "ant_v5": ("Ant-v5", {"ctrl_cost_weight": 0.005, "contact_cost_weight": 5e-4, "healthy_reward": 0.05}),
    "hopper_v5": ("Hopper-v5", {}),
    "walker2d_v5": ("Walker2d-v5", {}),
}


def nominal(name: str) -> dict[str, np.ndarray]:
    """The task of a body with random parameters in which none is changed."""
    return {k: np.ones((1, *getattr(load(BODIES[name]), k).shape)) for k in RANDOM}


@pytest.mark.parametrize("name", KWARGS)
def test_gymnasiums_bodies_step_to_the_same_bits(name: str) -> None:
    ident, kwargs = KWARGS[name]
    can_fall = {"terminate_when_unhealthy": False} if BODIES[name].heights else {}
    environment = gymnasium.make(ident, **kwargs, **can_fall)
    asked = "parameters" if "parameters" in BODIES[name].goals else "velocity"
    world = LocomotionWorld(BODIES[name], GOALS[asked])
    goal, rng = 1.3, np.random.default_rng(0)
    wanted, _ = environment.reset(seed=7)
    task = {"goal": np.array([goal])} if asked == "velocity" else nominal(name)
    got = world.reset(task, [1], [np.random.Generator(np.random.PCG64(np.random.SeedSequence(7)))])
    np.testing.assert_array_equal(got[0, 0], wanted)
    fell = 0
    for _ in range(250):
        action = rng.uniform(-1.2, 1.2, BODIES[name].actions).astype(np.float32)
        wanted, theirs, _, _, info = environment.step(action)
        got, reward, over = world.step(action[None, None], np.ones((1, 1), bool))
        np.testing.assert_array_equal(got[0, 0], wanted)
        if BODIES[name].heights:
            assert bool(over[0, 0]) == (not environment.unwrapped.is_healthy)
        if asked == "velocity":
            bonus = float(BODIES[name].heights is not None)
            theirs += bonus - abs(info["x_velocity"] - goal) - info["reward_forward"]
        assert reward[0, 0] == pytest.approx(theirs, abs=1e-6)
        fell += int(over[0, 0])
    assert fell or not BODIES[name].heights


def test_random_parameters_make_another_model_of_each_task() -> None:
    tasks = Locomotion(body="hopper_v5", goal="parameters")
    drawn = [tasks.sample("train", np.random.default_rng(i)) for i in range(200)]
    for name, base in RANDOM.items():
        logs = np.log(np.stack([t[name] for t in drawn])) / np.log(base)
        assert -3 <= logs.min() < -2.9
        assert 2.9 < logs.max() <= 3
    world, before = (
        LocomotionWorld(BODIES["hopper_v5"], GOALS["parameters"]),
        load(BODIES["hopper_v5"]).body_mass.copy(),
    )
    both = {k: np.stack([drawn[0][k], drawn[1][k]]) for k in RANDOM}
    world.reset(both, [2, 2], [np.random.default_rng(0)] * 2)
    for t in (0, 1):
        np.testing.assert_array_equal(world._models[2 * t].body_mass, before * drawn[t]["body_mass"])
        assert world._models[2 * t].body_subtreemass[1] == pytest.approx((before * drawn[t]["body_mass"])[1:].sum())
    np.testing.assert_array_equal(load(BODIES["hopper_v5"]).body_mass, before)


@pytest.mark.parametrize("name", ["ant_v5", "ant_paper"])
def test_places_and_directions_in_the_plane_are_rewarded_by_their_formulas(name: str) -> None:
    body, rng, ones = BODIES[name], np.random.default_rng(0), np.ones((1, 2), bool)
    goals = {"position": np.array([[1.5, -2.0]]), "direction_2d": np.array([[0.6, -0.8]]), "direction": np.array([1.0])}
    worlds = {kind: LocomotionWorld(body, GOALS[kind]) for kind in goals}
    seen = {kind: w.reset({"goal": goals[kind]}, [2], [np.random.default_rng(5)]) for kind, w in worlds.items()}
    # who looks for a place must know where it is
    assert seen["position"].shape[-1] == (107 if name == "ant_v5" else 125)
    for _ in range(10):
        action = rng.uniform(-1, 1, (1, 2, 8))
        data = worlds["position"]._copies[1]
        before = data.xpos[1, :2].copy()
        rewards = {kind: w.step(action, ones)[1][0, 1] for kind, w in worlds.items()}
        velocity = data.subtree_linvel[1, :2] if body.paper else (data.xpos[1, :2] - before) / 0.05
        place = data.subtree_com[1, :2] if body.paper else data.xpos[1, :2]
        rest = rewards["direction"] - velocity[0]
        assert rewards["direction_2d"] - rest == pytest.approx(0.6 * velocity[0] - 0.8 * velocity[1], abs=1e-9)
        assert rewards["position"] - rest == pytest.approx(4 - abs(place[0] - 1.5) - abs(place[1] + 2), abs=1e-9)


def test_the_published_test_tasks() -> None:
    """18 of 40 cheetahs and 15 of 40 ants forward; standing still costs 40.1 in navigation (reference: the paper's own
    data).
    """
    for body, forward in (("half_cheetah_paper", 18), ("ant_paper", 15)):
        tasks = Locomotion(body=body, test_tasks="paper")
        assert sum(float(tasks.fixed("test", i)["goal"]) > 0 for i in range(40)) == forward
        assert tasks.fixed("validation", 0) is None
        assert tasks.groups[tasks.group(tasks.fixed("test", 0))] == (
            "forward" if tasks.fixed("test", 0)["goal"] > 0 else "backward"
        )
    goals = np.array([Navigation(test_tasks="paper").fixed("test", i)["goal"] for i in range(40)])
    assert 100 * np.linalg.norm(goals, axis=1).mean() == pytest.approx(40.1, abs=0.05)
    np.testing.assert_array_equal(Navigation(test_tasks="paper").fixed("test", 41)["goal"], goals[1])
    with pytest.raises(ValueError, match="not position"):
        Locomotion(body="ant_v5", goal="position", test_tasks="paper")


def test_impossible_locomotion_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="goal='position': half_cheetah_v5 has direction, velocity"):
        Locomotion(body="half_cheetah_v5", goal="position")
    with pytest.raises(ValueError, match="ant_v5 wants 'exact'"):
        Locomotion(body="ant_v5", backend="rollout")


def test_the_oracle_sees_the_goal_and_lives_through_the_same_world() -> None:
    tasks = {"goal": np.array([[0.3, -0.2], [0.1, 0.4]])}

    def act(which, observations, noise):
        return 0.1 * noise

    blind, told = (
        Navigation(rollouts=2, horizon=5, known=known).rollout(
            tasks, act, [np.random.default_rng(i) for i in (0, 1)], testing=False
        )
        for known in (False, True)
    )
    assert Navigation(known=True).inputs == (4,)
    assert Locomotion(known=True).inputs == (21,)
    np.testing.assert_array_equal(told["observations"][..., :2], blind["observations"])
    np.testing.assert_allclose(told["observations"][1, :10, 2:], np.tile([0.1, 0.4], (10, 1)), rtol=1e-6)
    np.testing.assert_array_equal(told["rewards"], blind["rewards"])


@pytest.mark.parametrize("name", ["half_cheetah_paper", "ant_paper"])
def test_the_papers_bodies_follow_their_formulas(name: str) -> None:
    body = BODIES[name]
    world = LocomotionWorld(body, GOALS["direction"])
    assert world.model.opt.timestep == (0.01 if "cheetah" in name else 0.02)
    rngs = [np.random.default_rng(i) for i in (1, 2)]
    observation = world.reset({"goal": np.array([1.0, -1.0])}, [2, 2], rngs)
    assert observation.shape == (2, 2, 20 if "cheetah" in name else 125)
    data, rng = mujoco.MjData(world.model), np.random.default_rng(3)
    actions = rng.uniform(-1.5, 1.5, (30, 2, 2, body.actions))
    for action in actions:
        source = world._copies[3]
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
    worlds = [kind(BODIES[name], GOALS["velocity"]) for kind in (LocomotionWorld, PlanarWorld)]
    starts = [
        w.reset({"goal": np.array([0.5, 1.5])}, [3, 3], [np.random.default_rng(i) for i in (1, 2)]) for w in worlds
    ]
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
        return 10 * (goals[which][:, None] - observations) + 0.3 * noise

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
        at = recorded["observations"][t, :n] + 0.1 * np.clip(recorded["actions"][t, :n], -1, 1)
        np.testing.assert_allclose(rewards, -np.linalg.norm(at - goals[t], axis=1), atol=1e-6)
        near = (np.abs(at - goals[t]) < 0.01).all(1)
        assert all(near[s + k - 1] or k == 25 for s, k in zip(starts, lengths, strict=True))


def test_a_tasks_episodes_do_not_depend_on_the_other_tasks() -> None:
    goals = np.array([[0.3, -0.2], [0.05, 0.02]])
    both = collect(PointWorld(), {"goal": goals}, toward(goals), [np.random.default_rng(i) for i in range(2)], 3, 20)
    alone = collect(PointWorld(), {"goal": goals[1:]}, toward(goals[1:]), [np.random.default_rng(1)], 3, 20)
    for name in set(alone) - {"physics_s", "policy_s"}:
        np.testing.assert_array_equal(both[name][1], alone[name][0])


class Clockwork:
    """Episodes whose lengths are drawn at the reset; every step pays 1."""

    observations, actions, ends = 1, 1, True

    def reset(self, tasks, counts, rngs):
        self.lengths = np.stack([rng.integers(1, 12, max(counts)) for rng in rngs])
        self.t = 0
        return np.zeros((*self.lengths.shape, 1))

    def step(self, actions, alive):
        self.t += 1
        return np.zeros((*self.lengths.shape, 1)), np.ones(self.lengths.shape), self.t >= self.lengths


def test_rllabs_sampler_counts_the_episodes_that_finish_first() -> None:
    """Against rllab's own loop, step by step: all copies move, those that end begin anew, until finished ones hold the
    budget.
    """
    copies, horizon = 5, 10
    got = collect_finished(
        Clockwork(),
        {"x": np.zeros(3)},
        lambda w, o, noise: noise,
        [np.random.default_rng(i) for i in range(3)],
        copies,
        horizon,
    )
    for t in range(3):
        rng, lengths = np.random.default_rng(t), []
        for _ in range(30):
            rng.standard_normal((copies, horizon, 1), np.float32)
            lengths.append(np.minimum(rng.integers(1, 12, copies), horizon))
        episode, age, done = np.zeros(copies, int), np.zeros(copies, int), []
        while sum(done) < copies * horizon:
            age += 1
            for k in range(copies):
                if age[k] == lengths[episode[k]][k]:
                    done.append(int(age[k]))
                    episode[k], age[k] = episode[k] + 1, 0
        n = int(got["mask"][t].sum())
        starts = np.flatnonzero(got["time"][t, :n] == 0)
        assert list(np.diff([*starts, n])) == done
        assert got["return"][t] == pytest.approx(np.mean(done))
