"""The driver on an in-process pool: learning, exactness of resume, rounds, randomness, slots, faults."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from cluster.fleet import seeds
from cluster.fleet.messages import Contribution, Event, Failure, RunStopped
from cluster.fleet.pool import LocalPool, Pool
from cluster.fleet.recipe import Recipe
from cluster.record import journal
from cluster.record.checkpoint import Checkpointing, Checkpoints
from cluster.results.curves import Curves
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest, told
from cluster.training.synchronous import Synchronous
from envs.images.augmentation import Augmentation
from envs.images.episodes import Episodes
from envs.sources.image_folder import ImageFolder
from learners.base import Meta
from learners.outer.descent import Descent, Group
from tests.fakes import Newton, Noisy, ScriptedPool, quadratic_recipe, shuffled, start

FEW = Evaluation(every=4, validation_tasks=6, tasks=5, steps=2, pictures=0)


def run(recipe: Recipe, directory: Path, pool: Pool | None = None, iterations: int = 6, **options) -> Meta:
    return Driver(recipe, start(), pool or LocalPool(recipe), directory, iterations=iterations, meta_batch=6, shard=2,
                  evaluation=FEW, **options).run()  # fmt: skip


def test_one_newton_step_over_the_pool_reaches_the_closed_form_minimum(tmp_path: Path) -> None:
    # Multi-round outer step: gradient, then one round per CG iteration with a broadcast operand.
    recipe = quadratic_recipe(outer=Newton())
    recipe = replace(recipe, learner=replace(recipe.learner, inner_lr=0.0))
    meta = run(recipe, tmp_path, iterations=1)
    tasks = [recipe.tasks.sample("train", seeds.generator(0, "train", i, "task")) for i in range(6)]
    minimum = np.linalg.solve(sum(t["B"] for t in tasks), sum(t["B"] @ t["b"] for t in tasks))
    np.testing.assert_allclose(meta.params["theta"].numpy(), minimum, rtol=1e-9)


def test_randomness_and_slots_belong_to_the_tasks(tmp_path: Path) -> None:
    recipe = quadratic_recipe(learner=Noisy(), outer=Descent(optimizer="sgd", lr=0.1))
    meta = run(recipe, tmp_path, iterations=2)
    theta, trace = start()["theta"].numpy(), 0.0
    for iteration in range(2):
        indices = range(6 * iteration, 6 * iteration + 6)
        tasks = [recipe.tasks.sample("train", seeds.generator(0, "train", i, "task")) for i in indices]
        noise = [seeds.generator(0, "train", i, "draw").normal(size=3) for i in indices]
        theta = theta - 0.1 * np.mean([t["B"] @ (theta - t["b"]) + n for t, n in zip(tasks, noise, strict=True)], 0)
        trace = np.mean([trace / 2 + n.mean() for n in noise])
    np.testing.assert_allclose(meta.params["theta"].numpy(), theta, rtol=1e-12)
    np.testing.assert_allclose(meta.slots["trace"].item(), trace, rtol=1e-12)


@pytest.mark.parametrize("outer", [Descent(), Descent(optimizer="sgd", momentum=0.9), Newton(rounds=2)])
@pytest.mark.parametrize("learner", [quadratic_recipe().learner, Noisy()])
def test_arrival_order_failures_and_duplicates_do_not_change_a_bit(tmp_path: Path, outer, learner) -> None:
    recipe = quadratic_recipe(outer=outer, learner=learner)
    calm = run(recipe, tmp_path / "calm")
    wild = run(
        recipe, tmp_path / "wild", ScriptedPool(recipe, shuffled(3)), policy=Synchronous(max_attempts=50, quarantine=50)
    )
    assert digest(calm) == digest(wild)


AVERAGING = Descent("adamw", 0.1, weight_decay=0.1, ema=0.9, groups=(Group("th*", lr=0.3),))


@pytest.mark.parametrize("outer", [Descent(schedule="cosine", horizon=8), Newton(rounds=2), AVERAGING])
def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_bits(tmp_path: Path, outer) -> None:
    recipe = quadratic_recipe(outer=outer, learner=Noisy())
    whole = run(recipe, tmp_path / "whole", iterations=8)
    for stop in (0, 3, 11, 20):
        asked = iter(range(10**6))
        directory = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(recipe, directory, iterations=8, interrupted=lambda asked=asked, stop=stop: next(asked) >= stop)
        assert digest(run(recipe, directory, iterations=8)) == digest(whole)
        ends = [Checkpoints(d / "checkpoints").newest().used for d in (directory, tmp_path / "whole")]
        assert digest(ends[0]) == digest(ends[1])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line["iteration"] for line in lines if line["kind"] == "train"]
    assert trained == sorted(set(trained)) == list(range(1, 9))


def test_the_journal_says_what_was_dispatched_and_applied(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    meta = run(recipe, tmp_path, iterations=3)
    records = list(journal.read(tmp_path / "journal"))
    dispatched = [r for r in records if r["kind"] == "dispatch"]
    applied = [r for r in records if r["kind"] == "apply"]
    assert [(r["start"], r["stop"]) for r in dispatched] == [(i, i + 2) for i in range(0, 18, 2)]
    assert [t for r in applied for t in r["tickets"]] == [r["ticket"] for r in dispatched]
    assert applied[-1]["theta"] == digest(meta)
    assert Checkpoints(tmp_path / "checkpoints").newest().counts["dispatched"] >= 9


def non_finite(start_task: int, how: str):
    """A script that spoils the shard that begins at a task: always, or only the first time it is asked."""
    seen: dict[int, int] = {}

    def script(answer: Contribution) -> list[Event]:
        first_ticket = start_task // 2
        if answer.ticket != first_ticket:
            return [answer]
        seen[answer.ticket] = seen.get(answer.ticket, 0) + 1
        if how == "once" and seen[answer.ticket] > 1:
            return [answer]
        return [replace(answer, vector=np.full_like(answer.vector, np.nan))]

    return script


def test_a_shard_that_is_never_finite_is_rejected_and_the_mean_is_over_the_rest(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(optimizer="sgd", lr=0.1))
    pool = ScriptedPool(recipe, non_finite(2, "always"))
    meta = run(recipe, tmp_path, pool, iterations=1, policy=Synchronous(max_rejected=0.5))
    grads = [
        recipe.learner.gradient(
            Meta(start(), {}),
            recipe.objective,
            recipe.tensors(recipe.tasks.sample("train", seeds.generator(0, "train", i, "task"))),
        )
        for i in (0, 1, 4, 5)
    ]
    mean = torch.stack([g.grads["theta"] for g in grads]).mean(0)
    torch.testing.assert_close(meta.params["theta"], start()["theta"] - 0.1 * mean, rtol=1e-12, atol=1e-12)
    rejected = [r for r in journal.read(tmp_path / "journal") if r["kind"] == "reject"]
    assert [(r["start"], r["stop"]) for r in rejected] == [(2, 4)]


def test_a_rejected_shard_ends_once_in_the_journal(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    run(
        recipe,
        tmp_path,
        ScriptedPool(recipe, non_finite(2, "always")),
        iterations=1,
        policy=Synchronous(max_rejected=0.5),
    )
    ended: Counter[int] = Counter()
    for record in journal.read(tmp_path / "journal"):
        ended.update(record.get("tickets", []))
        ended.update([record["ticket"]] if record["kind"] == "reject" else [])
    assert ended
    assert set(ended.values()) == {1}


def test_too_many_rejections_stop_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    with pytest.raises(RunStopped, match="the run diverges"):
        run(recipe, tmp_path, ScriptedPool(recipe, non_finite(2, "always")))
    assert digest(run(recipe, tmp_path)) == digest(run(recipe, tmp_path / "undisturbed"))


def test_a_wrong_answer_that_does_not_repeat_counts_as_corruption_and_changes_nothing(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    meta = run(recipe, tmp_path / "bad", ScriptedPool(recipe, non_finite(2, "once")))
    assert digest(meta) == digest(run(recipe, tmp_path / "good"))
    assert Checkpoints(tmp_path / "bad" / "checkpoints").newest().counts["corrupted"] == 1


def test_a_shard_that_always_fails_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    recipe = quadratic_recipe()

    def script(answer: Contribution) -> list[Event]:
        return [Failure(answer.ticket, answer.attempt, "w7", "error", "ValueError: no such file")]

    with pytest.raises(RunStopped, match=r"tasks 0–1 \(train, gradient\) failed 3 times.*w7.*no such file"):
        run(recipe, tmp_path, ScriptedPool(recipe, script), policy=Synchronous(max_attempts=3))


def test_the_best_on_validation_is_kept_beside_the_newest(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(optimizer="sgd", lr=1.0))  # oscillates: the last is not the best
    run(recipe, tmp_path, iterations=12)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["iteration"]: line["curve"]["loss"][-1] for line in lines if line["kind"] == "validation"}
    best = Checkpoints(tmp_path / "checkpoints").best()
    assert best.iteration == min(scores, key=scores.__getitem__)
    assert best.iteration < 12


def test_the_final_evaluation_may_be_of_the_best(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(optimizer="sgd", lr=1.0))
    Driver(recipe, start(), LocalPool(recipe), tmp_path, iterations=12, meta_batch=6, shard=2,
           evaluation=replace(FEW, checkpoint="best")).run()  # fmt: skip
    best = Checkpoints(tmp_path / "checkpoints").best()
    assert json.loads((tmp_path / "evaluation.json").read_text())["iteration"] == best.iteration < 12


def test_runs_that_began_before_a_field_was_there_are_the_same_runs() -> None:
    # As checkpoints of 26 November 2026, 16:00, have it.
    assert told(Descent(lr=0.003, schedule="cosine", horizon=6)) == (
        "Descent(optimizer='adam', lr=0.003, schedule='cosine', final_lr=0.0, horizon=6, beta1=0.9, beta2=0.999, "
        "eps=1e-08, momentum=0.0, clip_value=0.0, clip_norm=0.0)"
    )
    assert told(Episodes(ImageFolder("/a", 32), ways=3)) == (
        "Episodes(source=ImageFolder(folder='/a', size=32), ways=3, shots=1, queries=15, test_queries=15, "
        "train_shots=0, rotations='none')"
    )
    changed = [Descent(), Descent(weight_decay=0.1), Descent(ema=0.5), Descent(groups=(Group("*", lr=0.1),)),
               Descent(groups=(Group("*", lr=0.2),)), Episodes(ImageFolder()), Episodes(ImageFolder(splits="b")),
               Episodes(ImageFolder(), augment=Augmentation(crop=1)), Episodes(ImageFolder(), min_ways=2)]  # fmt: skip
    assert len(set(map(told, changed))) == len(changed)


def test_what_is_evaluated_is_the_running_mean_of_theta(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=AVERAGING)
    meta = run(recipe, tmp_path)
    state = Checkpoints(tmp_path / "checkpoints").newest()
    assert digest(state.meta) == digest(meta) != digest(state.used)

    def loss(meta: Meta, split: str, count: int) -> float:
        theta = meta.params["theta"].numpy()
        tasks = [recipe.tasks.sample(split, seeds.generator(0, split, i, "task")) for i in range(count)]
        return float(np.mean([(theta - t["b"]) @ t["B"] @ (theta - t["b"]) / 2 for t in tasks]))

    table = json.loads((tmp_path / "evaluation.json").read_text())
    assert table["mean"]["loss"][0] == pytest.approx(loss(state.used, "test", 5), rel=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["iteration"]: line["curve"]["loss"][0] for line in lines if line["kind"] == "validation"}
    best = Checkpoints(tmp_path / "checkpoints").best()
    assert scores[best.iteration] == pytest.approx(loss(best.used, "validation", 6), rel=1e-9)
    assert scores[best.iteration] != pytest.approx(loss(best.meta, "validation", 6), rel=1e-3)


def test_held_out_tasks_do_not_depend_on_the_runs_seed_nor_on_the_shard(tmp_path: Path) -> None:
    curves = []
    for name, seed, shard in (("a", 0, 2), ("b", 1, 3)):
        recipe = quadratic_recipe(seed=seed, outer=Descent(optimizer="sgd", lr=0.0))
        Driver(
            recipe, start(), LocalPool(recipe), tmp_path / name, iterations=1, meta_batch=6, shard=shard, evaluation=FEW
        ).run()
        curves.append(json.loads((tmp_path / name / "evaluation.json").read_text())["mean"]["loss"])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-12)


def test_confidence_intervals_follow_the_field() -> None:
    rows = {"accuracy": np.array([[0.2, 0.4], [0.4, 0.8], [0.6, 0.6]])}
    curves = Curves.of(rows)
    np.testing.assert_allclose(curves.mean["accuracy"], [0.4, 0.6])
    np.testing.assert_allclose(curves.ci95["accuracy"], [1.96 * 0.2 / np.sqrt(3)] * 2)
    assert curves.score() == pytest.approx(0.6)
    assert curves.beats(0.5)
    assert not curves.beats(0.7)
    assert curves.beats(None)
    assert not Curves.of({"mse": np.full((2, 3), np.nan)}).beats(None)


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    recipe = quadratic_recipe()
    real = Checkpoints.save
    calls = []

    def save(self: Checkpoints, state):
        calls.append(state.iteration)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "save", save)
    meta = run(recipe, tmp_path, checkpoint=Checkpointing(seconds=0.0))
    assert "No space left on device" in caplog.text
    assert digest(meta) == digest(Checkpoints(tmp_path / "checkpoints").newest().meta)


@pytest.mark.parametrize(("batch", "shard"), [(6, 4), (0, 1), (4, 0)])
def test_a_meta_batch_that_does_not_divide_into_shards_is_refused(tmp_path: Path, batch: int, shard: int) -> None:
    recipe = quadratic_recipe()
    with pytest.raises(ValueError, match=f"meta_batch={batch} is not a positive multiple of shard={shard}"):
        Driver(recipe, start(), LocalPool(recipe), tmp_path, iterations=1, meta_batch=batch, shard=shard)


def test_python_code_that_changes_the_learner_does_not_go_on_with_the_old_run(tmp_path: Path) -> None:
    run(quadratic_recipe(), tmp_path)
    changed = quadratic_recipe(learner=replace(quadratic_recipe().learner, order=1))
    with pytest.raises(ValueError, match=r"holds a run with learner = MAML\(.*order=2.*this one has MAML\(.*order=1"):
        run(changed, tmp_path)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Checkpoints, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(OSError, match="No space left"):
        run(quadratic_recipe(), tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"].startswith("failed: ")


def test_a_kill_leaves_tickets_that_the_next_attempt_abandons(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    run(recipe, tmp_path, iterations=2)
    book = journal.Journal(tmp_path / "journal")  # as if two shards had been under way when the process died
    for ticket in (40, 41):
        book.write("dispatch", ticket=ticket, attempt=0, verb="gradient", at=1, split="train", start=0, stop=2)
    book.close()
    run(recipe, tmp_path, iterations=4)
    records = list(journal.read(tmp_path / "journal"))
    abandoned = [i for i, r in enumerate(records) if r["kind"] == "abandon"]
    assert [records[i]["tickets"] for i in abandoned] == [[40, 41]]
    assert min(r["ticket"] for r in records[abandoned[0] :] if r["kind"] == "dispatch") == 42
    assert journal.unfinished(tmp_path / "journal")[0] == []


def test_a_journal_damaged_in_the_middle_stops_no_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = quadratic_recipe()
    run(recipe, tmp_path / "r", iterations=2)
    path = tmp_path / "r" / "journal"
    damaged = bytearray(path.read_bytes())
    damaged[14] ^= 1
    path.write_bytes(damaged)
    resumed = run(recipe, tmp_path / "r", iterations=4)
    assert "set aside" in caplog.text
    assert digest(resumed) == digest(run(recipe, tmp_path / "whole", iterations=4))


def test_an_evaluation_cut_off_by_a_stop_is_made_up_for(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    asked = iter(range(10**6))
    for stop in range(12, 20):  # somewhere in here the evaluation of iteration 4 is under way
        with pytest.raises(KeyboardInterrupt):
            run(
                recipe,
                tmp_path / str(stop),
                iterations=8,
                interrupted=lambda asked=asked, stop=stop: next(asked) >= stop,
            )
        asked = iter(range(10**6))
        run(recipe, tmp_path / str(stop), iterations=8)
        lines = [json.loads(line) for line in (tmp_path / str(stop) / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines if line["kind"] == "validation"] == [4, 8]


def test_a_run_stopped_within_a_validation_goes_on_without_any(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    for stop in range(12, 20):
        asked = iter(range(10**6))
        with pytest.raises(KeyboardInterrupt):
            run(
                recipe,
                tmp_path / str(stop),
                iterations=8,
                interrupted=lambda asked=asked, stop=stop: next(asked) >= stop,
            )
        Driver(recipe, start(), LocalPool(recipe), tmp_path / str(stop), iterations=8, meta_batch=6, shard=2,
               evaluation=replace(FEW, validation_tasks=0)).run()  # fmt: skip
        assert Checkpoints(tmp_path / str(stop) / "checkpoints").newest().iteration == 8


@pytest.mark.parametrize("change", [{"validation_tasks": 0}, {"steps": 0}, {"steps": 1}])
def test_evaluations_may_be_small_or_off(tmp_path: Path, change) -> None:
    recipe = quadratic_recipe(evaluation_steps=change.get("steps", 2))
    Driver(
        recipe,
        start(),
        LocalPool(recipe),
        tmp_path,
        iterations=2,
        meta_batch=2,
        shard=2,
        evaluation=replace(FEW, every=1, **change),
    ).run()
    with pytest.raises(ValueError, match="tasks=0: at least 1 wanted"):
        Evaluation(tasks=0)
    with pytest.raises(ValueError, match="keep=0: at least 1 wanted"):
        Checkpointing(keep=0)


def test_a_process_takes_no_more_threads_than_it_was_given(tmp_path: Path) -> None:
    run(quadratic_recipe(), tmp_path, iterations=1)
    assert {pool["num_threads"] for pool in threadpool_info()} == {1}
