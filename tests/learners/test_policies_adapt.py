"""RL tasks with every kind of learner and outer step: each task adapts from θ alone, and θ moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fleet.pool import LocalPool
from cluster.operations import gradient_guard
from cluster.setup import assemble, config
from cluster.setup.run import Run
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from learners.algorithms.maml import MAML
from learners.base import Meta, Params, pack
from learners.engine import tree
from learners.engine.execution import Execution
from learners.engine.optimisers import Adam
from learners.objectives import policy_gradient as pg
from learners.objectives.control import Control
from learners.outer.promp import ProMP
from learners.verbs import common_verbs
from tests.learners.test_control import N, directions, policy, recorded, slope


def small(**choices: str) -> Run:
    run = config.load("navigation", {k.replace("_", ".", 1): v for k, v in choices.items()})
    task = replace(run.task, rollouts=3, horizon=15, test_steps=60)
    return replace(
        run,
        task=task,
        model=replace(run.model, hidden=(8,)),
        meta_batch=4,
        shard=2,
        iterations=1,
        pool="local",
        execution="loop",
    )


def test_each_task_takes_its_steps_from_theta_and_from_its_own_episodes() -> None:
    run = small()
    run = replace(run, learner=MAML(0.5, 2))
    parts, params = assemble.recipe(run)
    verb = parts.verbs(parts.objective)["gradient"]
    data = [parts.tensors(parts.task("train", i, verb)) for i in range(3)]
    together = verb.record(pack(params, {}), {k: torch.stack([d[k] for d in data]) for k in data[0]})
    alone = verb.record(pack(params, {}), {k: v.unsqueeze(0) for k, v in data[2].items()})
    for name in ("observations", "actions", "advantages", "old", "return"):
        torch.testing.assert_close(together[name][2], alone[name][0], rtol=1e-5, atol=1e-6)
    control = parts.objective
    assert isinstance(control, Control)
    for t in range(3):
        own = {k: v[t] for k, v in together.items()}
        phi: Params = dict(params)
        for k in range(3):
            torch.testing.assert_close(control.policy(phi, own["observations"][k]), own["old"][k], rtol=1e-5, atol=1e-6)
            phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
            log_p = pg.log_prob(control.policy(phi, own["observations"][k]), own["actions"][k])
            loss = -(log_p * own["advantages"][k] * own["mask"][k]).sum() / own["mask"][k].sum()
            grads = torch.autograd.grad(loss, list(phi.values()))
            if k < 2:
                assert float(own["inner_grad_norm"][k]) == pytest.approx(
                    float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-4
                )
            old, new = (
                torch.distributions.Normal(d[:, :2], d[:, 2:].exp())
                for d in (control.policy(params, own["observations"][k]).detach(), own["old"][k])
            )
            apart = (torch.distributions.kl_divergence(old, new).sum(-1) * own["mask"][k]).sum() / own["mask"][k].sum()
            assert float(own["adaptation_kl"][k]) == pytest.approx(float(apart), abs=1e-5)
            phi = {name: (p - 0.5 * g).detach() for (name, p), g in zip(phi.items(), grads, strict=True)}


@pytest.mark.parametrize(
    ("learner", "outer"),
    [("maml", "trust_region"), ("maml", "promp"), ("maml", "descent"), ("meta_sgd", "trust_region"),
    ("meta_sgd", "descent"),
     ("anil", "trust_region"), ("reptile", "descent"), ("maml_plus_plus", "descent")],
)  # fmt: skip
def test_a_run_moves_theta_and_reports_returns(learner: str, outer: str, tmp_path: Path) -> None:
    run = small(outer_name=outer, **({} if learner == "anil" else {"learner_name": learner}))
    if learner == "anil":
        run = replace(run, learner=MAML(0.5, adapts=("*head*", "log_std")))
    parts, params = assemble.recipe(run)
    evaluation = Evaluation(validation_tasks=0, tasks=4, pictures=0)
    driver = Driver(
        parts, params, LocalPool(parts), tmp_path, iterations=1, meta_batch=4, shard=2, evaluation=evaluation
    )
    theta = driver.run()
    assert any(not torch.equal(theta.params[k], v) for k, v in params.items())
    assert all(torch.isfinite(v).all() for v in theta.params.values())
    lines = (tmp_path / "metrics.jsonl").read_text()
    for logged in ("train/return_step1", "train/adaptation_gain", "train/inner_grad_norm_step0",
                   "train/adaptation_kl_step1", "perf/physics_s", "perf/policy_s", "perf/adaptation_s",
                   "perf/env_steps_per_s", "test/return_step3"):  # fmt: skip
        assert f'"{logged}"' in lines
    if outer == "trust_region":
        for logged in ("outer/kl", "outer/kl_before", "outer/tries", "outer/solver_residual", "perf/curvature_s"):
            assert f'"{logged}"' in lines


@pytest.mark.parametrize("learner", ["maml", "meta_sgd", "meta_curvature"])
@pytest.mark.parametrize("outer", ["trust_region", "promp"])
def test_the_guard_checks_policies(learner: str, outer: str) -> None:
    run = small(outer_name=outer, learner_name=learner)
    verdict = gradient_guard.check(
        replace(run, control=replace(run.control, inner_loss="likelihood_ratio", exploration=0.3))
    )
    assert verdict.holds, verdict.sentence
    assert "second order" in verdict.sentence
    assert "mean over tasks" in verdict.sentence


def test_the_guard_checks_dice() -> None:
    run = small()
    verdict = gradient_guard.check(
        replace(run, control=replace(run.control, inner_loss="dice"), outer=replace(run.outer, curvature_every=1))
    )
    assert verdict.holds, verdict.sentence


def test_the_guard_would_find_a_wrong_exploration_term(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small()
    run = replace(run, control=replace(run.control, inner_loss="likelihood_ratio", exploration=0.3))
    real = Control.exploration_loss
    monkeypatch.setattr(
        Control, "exploration_loss", lambda self, theta, data: real(self, tree.apply(torch.Tensor.detach, theta), data)
    )
    assert not gradient_guard.check(run).holds


@pytest.mark.parametrize("outer", ["trust_region", "promp"])
@pytest.mark.parametrize("learner", ["reptile", "maml_plus_plus", "imaml"])
def test_outer_steps_about_the_adapted_loss_refuse_learners_that_descend_something_else(
    learner: str, outer: str
) -> None:
    parts, _ = assemble.recipe(small(outer_name=outer, learner_name=learner))
    with pytest.raises(ValueError, match="wants --outer.name descent"):
        parts.verbs(parts.objective)


def test_dice_and_a_part_of_the_time_steps_are_refused_together() -> None:
    run = small()
    parts, _ = assemble.recipe(replace(run, control=replace(run.control, inner_loss="dice")))
    with pytest.raises(ValueError, match="curvature_every=2: inner_loss='dice' needs every time step"):
        parts.verbs(parts.objective)


def test_a_learner_without_a_place_for_exploration_is_refused() -> None:
    run = small(learner_name="maml_plus_plus")
    with pytest.raises(ValueError, match="MAMLPlusPlus has no place for it"):
        assemble.recipe(replace(run, control=replace(run.control, exploration=1.0)))


@pytest.mark.parametrize("steps", [1, 2])
def test_promps_gradient_is_that_of_its_formula(steps: int) -> None:
    control, theta = policy("likelihood_ratio")
    learner, outer = MAML(0.3, steps), ProMP(clip=0.1, kl_penalty=0.7)
    data = recorded(control, theta, learner)
    d, _ = directions(theta)
    candidate = tree.add(theta, tree.scale(0.05, d))

    def formula(p: Params) -> float:
        """In plain loops."""
        phis = list(learner.path(Meta(p, {}), control, data, steps))
        total = 0.0
        for t in range(N):
            if data["mask"][-1][t]:
                log_p = pg.log_prob(control.policy(phis[-1], data["observations"][-1]), data["actions"][-1])[t]
                ratio, advantage = (
                    float(torch.exp(log_p - data["old_log_p"][-1][t]).detach()),
                    float(data["advantages"][-1][t]),
                )
                total -= min(ratio * advantage, float(np.clip(ratio, 0.9, 1.1)) * advantage) / 10
        for k in range(steps):
            new = control.policy(phis[k], data["observations"][k]).detach()
            old = data["old"][k]
            for t in range(N):
                if data["mask"][k][t]:
                    p0, p1 = (torch.distributions.Normal(x[t, :2], x[t, 2:].exp()) for x in (old, new))
                    total += 0.7 / steps * float(torch.distributions.kl_divergence(p0, p1).sum()) / 10
        return total

    verb = outer.verbs(learner, control)["proximal"]
    share = verb.run(pack(theta, {}), candidate, data)
    assert float(share.row["proximal_loss"]) == pytest.approx(formula(candidate), rel=1e-9)
    assert float(tree.dot(share.total, d)) == pytest.approx(slope(formula, candidate, d, 1e-5), rel=1e-5)
    at_theta = verb.run(pack(theta, {}), theta, data)
    plain = learner.gradient(Meta(theta, {}), control, data).grads
    torch.testing.assert_close(at_theta.total, plain, rtol=1e-9, atol=1e-12)


def test_promp_takes_one_adam_step_per_epoch_on_the_same_episodes() -> None:
    control, theta = policy("likelihood_ratio")
    learner, outer = MAML(0.3, 1), ProMP(lr=0.01, epochs=3)
    data = {k: v.unsqueeze(0) for k, v in recorded(control, theta, learner).items()}
    run = {
        "gradient": common_verbs(learner, control, 1)["gradient"].run,
        "proximal": outer.verbs(learner, control)["proximal"].run,
    }
    asked = []

    def reduce(verb: str, operand):
        asked.append(verb)
        return Execution("loop").run(run[verb], pack(theta, {}), operand or {}, data)

    stepped, _, _ = outer.step(Meta(theta, {}), outer.init(Meta(theta, {})), reduce)
    assert asked == ["gradient", "proximal", "proximal"]
    params, state = theta, Adam().init(theta)
    for epoch in range(3):
        share = run["proximal"](pack(theta, {}), params, {k: v[0] for k, v in data.items()})
        grads = (
            share.total
            if epoch
            else learner.gradient(Meta(theta, {}), control, {k: v[0] for k, v in data.items()}).grads
        )
        params, state = Adam().update(params, grads, state, 0.01)
    torch.testing.assert_close(stepped.params, params, rtol=1e-9, atol=1e-12)
