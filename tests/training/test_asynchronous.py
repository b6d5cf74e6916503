"""The asynchronous policy: equal to the synchronous one at its limit, weighed by its formula, replayed to the bit,
balanced.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fleet.messages import Assignment, Contribution, Event, Failure
from cluster.fleet.pool import LocalPool, Pool
from cluster.fleet.recipe import Recipe
from cluster.operations.replay import replay, steps
from cluster.record import journal
from cluster.record.checkpoint import Checkpointing, Checkpoints, Work
from cluster.setup.run import Run
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from learners.algorithms.maml_plus_plus import MAMLPlusPlus
from learners.base import Meta
from learners.outer.descent import Descent, Group
from learners.outer.trust_region import TrustRegion
from tests.fakes import Noisy, ScriptedPool, SleepyPool, quadratic_recipe, start
from tests.training.test_driver import non_finite

FEW = Evaluation(every=4, validation_tasks=6, tasks=5, steps=2, pictures=0)
SGD = Descent(optimizer="sgd", lr=0.1)
AVERAGING = Descent("adamw", 0.05, weight_decay=0.1, groups=(Group("theta", lr=0.1),), ema=0.7)


class LatePool(LocalPool):
    """Answers come `delay` polls after they were asked for, computed by then, in the order of a generator."""

    def __init__(self, recipe: Recipe, slots: int, seed: int = 0) -> None:
        super().__init__(recipe)
        self._slots, self._rng = slots, np.random.default_rng(seed)
        self._held: list[tuple[Assignment, Event]] = []

    def free(self) -> int:
        return self._slots - len(self._held) - len(self._waiting)

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        while self._waiting:
            assignment = self._waiting[0][0]
            for event in super().poll(timeout):
                if isinstance(event, Contribution):
                    self._held.append((assignment, event))
                else:
                    events.append(event)
        if self._held and not self.free():
            events.append(self._held.pop(int(self._rng.integers(len(self._held))))[1])
        elif self._held and not events:
            events.append(self._held.pop(0)[1])
        return events


def run(
    recipe: Recipe,
    directory: Path,
    policy: Policy,
    pool: Pool | None = None,
    iterations: int = 8,
    meta_batch: int = 6,
    **options,
) -> Meta:
    return Driver(recipe, start(), pool or LocalPool(recipe), directory, iterations=iterations, meta_batch=meta_batch,
                  shard=2, evaluation=FEW, policy=policy, **options).run()  # fmt: skip


@pytest.mark.parametrize("outer", [Descent(), Descent(optimizer="sgd", momentum=0.9, lr=0.1), AVERAGING])
@pytest.mark.parametrize("learner", [quadratic_recipe().learner, Noisy()])
@pytest.mark.parametrize("how", [{"power": 0.5}, {"power": 2.0, "damping": 3.0, "compensation": 1.0}])
def test_a_whole_batch_in_flight_is_the_synchronous_run_bit_for_bit(tmp_path: Path, outer, learner, how) -> None:
    recipe = quadratic_recipe(outer=outer, learner=learner)
    wanted = run(recipe, tmp_path / "synchronous", Synchronous())
    for name, pool in (("calm", None), ("late", LatePool(recipe, 3))):
        assert digest(run(recipe, tmp_path / name, Asynchronous(buffer=3, in_flight=3, **how), pool)) == digest(wanted)
    ends = [Checkpoints(tmp_path / name / "checkpoints").newest() for name in ("synchronous", "late")]
    assert digest(ends[0].used) == digest(ends[1].used)


def test_stale_contributions_are_weighed_and_compensated_by_the_formula(tmp_path: Path) -> None:
    """Against the journal's account of who was how late, with gradients of our own."""
    recipe = quadratic_recipe(outer=SGD)
    policy = Asynchronous(buffer=2, power=0.7, damping=2.0, compensation=0.3)
    meta = run(recipe, tmp_path, policy, LatePool(recipe, 5))
    thetas, found = [start()["theta"]], steps(tmp_path / "journal")
    verb = recipe.verbs(recipe.objective)["gradient"]

    def gradient(theta: torch.Tensor, task: int) -> torch.Tensor:
        data = recipe.tensors(recipe.task("train", task, verb))
        return recipe.learner.gradient(Meta({"theta": theta}, {}), recipe.objective, data).grads["theta"]

    assert max(s for step in found for s in step.staleness) >= 2
    for step in found:
        top, bottom, weights = torch.zeros(3, dtype=torch.float64), 0.0, []
        for (_, first, last), s in zip(step.shards, step.staleness, strict=True):
            then = thetas[step.version - 1 - s]
            grads = [gradient(then, i) for i in range(first, last)]
            g = torch.stack(grads).mean(0)
            weights.append((1 + s) ** -0.7)
            top += weights[-1] * len(grads) * (g + 0.3 * g * g * (thetas[-1] - then))
            bottom += weights[-1] * len(grads)
        thetas.append(thetas[-1] - 0.1 * np.mean(weights) ** 2 * top / bottom)
    torch.testing.assert_close(meta.params["theta"], thetas[-1], rtol=1e-10, atol=1e-12)


def test_a_clock_in_the_slots_goes_on_by_one_a_step_however_late_contributions_are(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(), learner=MAMLPlusPlus(0.05, 1))
    meta = run(recipe, tmp_path, Asynchronous(buffer=1), LatePool(recipe, 5), iterations=20)
    assert max(s for step in steps(tmp_path / "journal") for s in step.staleness) >= 2
    assert float(meta.slots["clock"]) == 20
    *_, (_, again) = replay(recipe, start(), Asynchronous(buffer=1), steps(tmp_path / "journal"))
    assert digest(again) == digest(meta)


def test_fewer_in_flight_than_a_step_wants_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in_flight=2 is below the 3 shards of a step"):
        run(quadratic_recipe(outer=SGD), tmp_path, Asynchronous(in_flight=2))


def test_adam_is_slowed_by_staleness_although_it_cancels_scale(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(lr=0.05))
    moved = {}
    for damping in (0.0, 1.0):
        run(recipe, tmp_path / str(damping), Asynchronous(buffer=1, power=1.0, damping=damping), LatePool(recipe, 6))
        lines = [json.loads(line) for line in (tmp_path / str(damping) / "metrics.jsonl").read_text().splitlines()]
        moved[damping] = [line["outer/lr"] for line in lines if line["kind"] == "train"]
    assert set(moved[0.0]) == {0.05}
    assert min(moved[1.0]) < 0.02


@pytest.mark.parametrize("kind", ["gradients", "slots", "rejections"])
def test_replay_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    recipe = quadratic_recipe(outer=Descent(), learner=Noisy() if kind == "slots" else quadratic_recipe().learner)
    policy = Asynchronous(buffer=2, compensation=0.1)
    pool: Pool = LatePool(recipe, 5)
    if kind == "rejections":
        policy, pool = replace(policy, in_flight=4), ScriptedPool(recipe, non_finite(2, "always"))
    meta = run(recipe, tmp_path, policy, pool)
    found = steps(tmp_path / "journal")
    *_, (version, again) = replay(recipe, start(), policy, found)
    assert version == 8
    assert digest(again) == digest(meta)
    wrong = [*found[:-1], replace(found[-1], staleness=[s + 1 for s in found[-1].staleness])]
    with pytest.raises(RuntimeError, match="step 8 ends at"):
        list(replay(recipe, start(), policy, wrong))


def balanced(directory: Path) -> dict[str, int]:
    counts = Checkpoints(directory / "checkpoints").newest().counts
    assert counts["dispatched"] == sum(
        counts[k] for k in ("applied", "dropped", "rejected", "quarantined", "abandoned")
    ), counts
    return counts


def applied_shards(directory: Path) -> list[int]:
    """First tasks of the shards in θ, in no order."""
    return [first for step in steps(directory / "journal") for _, first, _ in filter(None, step.shards)]


def test_what_is_too_stale_is_dropped_and_asked_for_again(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=SGD)
    run(recipe, tmp_path, Asynchronous(buffer=1, max_staleness=2), LatePool(recipe, 6), iterations=20)
    counts = balanced(tmp_path)
    assert counts["dropped"] > 0
    records = list(journal.read(tmp_path / "journal"))
    assert sum(r["kind"] == "drop" for r in records) == counts["dropped"]
    assert all(s <= 2 for step in steps(tmp_path / "journal") for s in step.staleness)
    shards = applied_shards(tmp_path)
    assert len(shards) == len(set(shards)) == 20


@pytest.mark.parametrize("stop", [7, 19, 33])
def test_a_run_stopped_anywhere_goes_on_without_losing_or_repeating_a_task(tmp_path: Path, stop: int) -> None:
    recipe = quadratic_recipe(outer=Descent())
    policy, asked = Asynchronous(buffer=2), iter(range(10**6))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, policy, LatePool(recipe, 5), iterations=30, interrupted=lambda: next(asked) >= stop)
    left = Checkpoints(tmp_path / "checkpoints").newest().work
    assert left.again
    meta = run(recipe, tmp_path, policy, LatePool(recipe, 5, seed=1), iterations=30)
    counts, shards = balanced(tmp_path), applied_shards(tmp_path)
    assert counts["abandoned"] > 0
    assert len(shards) == len(set(shards)) == 60
    end = Checkpoints(tmp_path / "checkpoints").newest().work
    assert set(shards) | {2 * s for s in end.again} == {2 * s for s in range(end.following)}
    *_, (_, again) = replay(recipe, start(), policy, steps(tmp_path / "journal"))
    assert digest(again) == digest(meta)


def test_validation_gets_its_turn_while_training_never_pauses(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=SGD)
    run(
        recipe,
        tmp_path,
        Asynchronous(buffer=1),
        LatePool(recipe, 4),
        iterations=40,
        checkpoint=Checkpointing(seconds=1e6),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "validation"] == list(range(4, 41, 4))


def test_failures_are_repeated_and_late_duplicates_do_no_harm(tmp_path: Path) -> None:
    recipe, held = quadratic_recipe(outer=Descent()), deque[Event]()

    def script(answer: Contribution) -> list[Event]:
        if answer.ticket % 5 == 3 and answer.attempt == 0:
            held.append(answer)  # comes after all, when another attempt has been answered
            return [Failure(answer.ticket, 0, "w", "late", "scripted")]
        return [answer, *(held.pop() for _ in list(held)[:1] if answer.ticket % 5 == 4)]

    policy = Asynchronous(buffer=2, in_flight=6)
    meta = run(recipe, tmp_path, policy, ScriptedPool(recipe, script), iterations=15)
    counts = balanced(tmp_path)
    assert counts["retried"] > 0
    assert counts["duplicates"] > 0
    *_, (_, again) = replay(recipe, start(), policy, steps(tmp_path / "journal"))
    assert digest(again) == digest(meta)


@pytest.mark.parametrize("policy", [Synchronous(max_rejected=0.5), Asynchronous(buffer=3)])
def test_a_shard_that_kills_three_workers_is_quarantined_and_the_run_goes_on(
    tmp_path: Path, policy: Policy, caplog
) -> None:
    recipe = quadratic_recipe(outer=SGD)

    def script(answer: Contribution) -> list[Event]:
        return (
            [Failure(1, answer.attempt, f"w{answer.attempt}", "died", "out of memory")]
            if answer.ticket == 1
            else [answer]
        )

    # Four shards: without the second, the sum of the others is bracketed x₀ + (x₂ + x₃).
    meta = run(recipe, tmp_path, policy, ScriptedPool(recipe, script), iterations=4, meta_batch=8)
    assert balanced(tmp_path)["quarantined"] == 1
    (record,) = [r for r in journal.read(tmp_path / "journal") if r["kind"] == "quarantine"]
    assert (record["start"], record["stop"]) == (2, 4)
    assert "tasks 2–3 (train, gradient) killed 3 workers (the last one w2: out of memory)" in caplog.text
    assert 2 not in applied_shards(tmp_path)
    *_, (_, again) = replay(recipe, start(), policy, steps(tmp_path / "journal"))
    assert digest(again) == digest(meta)


@pytest.mark.parametrize(("meta_batch", "stop", "sentence"), [
    (4, 0, "batch of 4 shards that were not all dispatched"), (1 << 60, 1, "that were not all dispatched"),
    ("many", 1, "meta_batch"),
])  # fmt: skip
def test_a_journal_whose_batch_cannot_be_is_refused(tmp_path: Path, meta_batch, stop: int, sentence: str) -> None:
    book = journal.Journal(tmp_path / "journal")
    book.write("attempt", iteration=0, meta_batch=meta_batch, shard=1)
    for ticket in range(4):
        book.write("dispatch", ticket=ticket, attempt=0, verb="gradient", at=1, split="train", start=0, stop=stop)
    book.write("apply", version=1, tickets=[0], theta="")
    book.close()
    with pytest.raises(ValueError, match=sentence):
        steps(tmp_path / "journal")


def test_a_slow_worker_holds_up_neither_backups_nor_the_asynchronous(tmp_path: Path) -> None:
    """Three workers of 20 ms a shard and one of 200 ms: seconds of ten steps of eight shards, the sum of rates being
    155 shards/s.
    """
    recipe, took, theta = quadratic_recipe(outer=SGD), {}, {}
    policies = {
        "plain": Synchronous(),
        "backups": Synchronous(backups=3.0),
        "asynchronous": Asynchronous(max_staleness=100),
    }
    for name, policy in policies.items():
        pool = SleepyPool(recipe, [0.02, 0.02, 0.02, 0.2])
        driver = Driver(recipe, start(), pool, tmp_path / name, iterations=10, meta_batch=8, shard=1, policy=policy,
                        evaluation=Evaluation(validation_tasks=0, tasks=8, steps=0, pictures=0))  # fmt: skip
        begin = time.perf_counter()
        original = driver._finish
        driver._finish = lambda name=name, begin=begin, end=original: (
            took.update({name: time.perf_counter() - begin}),
            end(),
        )  # type: ignore[method-assign]
        theta[name] = digest(driver.run())
        pool.close()
    assert theta["backups"] == theta["plain"]
    assert took["backups"] < 0.7 * took["plain"]
    assert took["asynchronous"] < 0.5 * took["plain"]


def test_impossible_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="TrustRegion takes several"):
        Run(outer=TrustRegion(), policy=Asynchronous())
    with pytest.raises(ValueError, match="in_flight=2 is below buffer=3"):
        Asynchronous(buffer=3, in_flight=2)
    with pytest.raises(ValueError, match="power=-1: 0 or more"):
        Asynchronous(power=-1)


def test_work_survives_a_checkpoint(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    run(recipe, tmp_path, Synchronous(), iterations=2)
    kept = Checkpoints(tmp_path / "checkpoints")
    state = replace(kept.newest(), iteration=3, work=Work(17, (3, 5)))
    kept.save(state)
    assert kept.newest().work == Work(17, (3, 5))


def test_held_out_tasks_do_not_disturb_the_account(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=SGD)
    run(recipe, tmp_path, Asynchronous(buffer=2), iterations=9)
    assert balanced(tmp_path)["dispatched"] > 18
