"""`metafleet scale`: what is read from metrics is what was written there, and the command runs."""

from __future__ import annotations

import csv
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main
from cluster.commands import flags
from cluster.fleet import wire, worker
from cluster.fleet.messages import Assignment
from cluster.fleet.worker import Worker
from cluster.operations.scale import Experiment, Measured, Point, _sized, measure, rows, smoothed, time_to, together
from cluster.operations.scale_report import page, plot
from cluster.results import drawing
from cluster.setup import assemble, config
from cluster.training.policy import idle
from learners.base import pack


def lines(step: float, workers: int, compute: float, busiest: float, count: int = 12) -> list[dict[str, Any]]:
    """metrics.jsonl of iterations that take `step` seconds; the first two take ten times as long."""
    found, now = [], 100.0
    for i in range(1, count + 1):
        took = step * (10 if i <= 2 else 1)
        now += took
        times = {"perf/iteration_s": took, "perf/compute_s": compute, "perf/busiest_s": busiest}
        line = {"iteration": i, "kind": "train", "time": now, "fleet/workers": workers, "train/query_loss": 1 / i}
        found.append(line | times | idle(workers, times))
        if i == 6:
            found.append({"iteration": i, "kind": "validation", "time": now})
    return found


def test_shares_of_the_workers_time_add_up_and_the_warmup_does_not_count() -> None:
    # Two workers, 1.0 s an iteration: 1.2 s of computing, of which the busier one has 0.8; so 2 · 0.8 − 1.2 waiting, 2
    # − 1.6 the rest.
    found = measure(lines(1.0, 2, 1.2, 0.8), 6, 2)
    assert found.seconds == pytest.approx(10.0)
    assert found.tasks_per_s == pytest.approx(6.0)
    assert (found.compute, found.waiting, found.communication) == pytest.approx((0.6, 0.2, 0.2))
    assert found.curve[0] == pytest.approx((1.0, 1 / 3))


def test_lines_that_stand_for_several_iterations_count_as_many() -> None:
    whole = lines(1.0, 2, 1.2, 0.8)
    coarse = [line for line in whole if line["iteration"] % 2 == 0]
    assert measure(coarse, 6, 2).compute == pytest.approx(measure(whole, 6, 2).compute)
    assert measure(coarse, 6, 2).tasks_per_s == pytest.approx(6.0)


def test_a_step_without_rounds_has_no_waiting() -> None:
    assert idle(4, {"perf/iteration_s": 1.0, "perf/compute_s": 3.0}) == {
        "perf/waiting_s": 0.0,
        "perf/communication_s": 1.0,
    }
    one_of_two_lost = {"perf/iteration_s": 2.5, "perf/compute_s": 1.5, "perf/busiest_s": 1.0}
    assert idle(1, one_of_two_lost) == {"perf/waiting_s": 0.0, "perf/communication_s": 1.0}


def test_processes_beside_each_other_are_measured_while_all_of_them_work() -> None:
    slow = [{"iteration": i, "time": 10.0 + i} for i in range(5)]  # 1 per second, from 10 to 14
    # 4 per second; 1 once it is alone
    fast = [{"iteration": i, "time": 9.0 + 0.25 * i if i < 20 else 14.0 + i - 20} for i in range(30)]
    assert together([slow, fast]) == pytest.approx(1 + 4, rel=0.05)


def test_a_straggler_takes_as_many_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, params = assemble.recipe(replace(config.load("sinusoid"), execution="loop"))
    ticks, slept = iter([5.0, 7.0, 7.0, 7.0]), []
    straggler, at = Worker(parts, "w", slower=3.0), wire.broadcast(pack(params, {}))
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: next(ticks), sleep=slept.append))
    straggler.run(wire.encode_assignment(Assignment(0, 0, "gradient", 1, None, "train", 0, 1, 0)), at, None)
    assert slept == [4.0]  # of 2 s of work


def test_time_to_a_loss_is_that_of_a_mean_of_five() -> None:
    curve = [(float(i), float(v)) for i, v in enumerate([9, 1, 9, 9, 9, 2, 2, 2, 2, 2, 0])]
    assert smoothed(curve)[0][0] == 4.0
    assert time_to(curve, 2.0) == 9.0
    assert math.isnan(time_to(curve, 1.0))
    assert smoothed([(1.0, 3.0), (2.0, 5.0)]) == ([2.0], [4.0])


def point(workers: int, rate: float, scaling: str = "strong") -> Point:
    curve = [(float(i) / rate, 1.0 / (i + 1)) for i in range(10)]
    measured = Measured(10 / rate, rate, 0.8, 0.1, 0.1, curve)
    return Point(scaling, "sync", workers, 8, 3.0, measured, 1.1 * rate, 1 / 1.1)  # type: ignore[arg-type]


def test_efficiency_is_throughput_per_worker_over_the_smallest_fleets(tmp_path: Path) -> None:
    one, two, weak = rows([point(1, 10.0), point(2, 16.0), point(4, 5.0, "weak")])
    assert (one["efficiency"], two["efficiency"], weak["efficiency"]) == pytest.approx((1.0, 0.8, 1.0))
    assert two["speedup"] == pytest.approx(1.6)
    assert one["time_to_target_s"] / two["time_to_target_s"] == pytest.approx(1.6)
    text = page([one, two, weak], Experiment(), {"run": "sinusoid", "seed": 0})
    assert "| strong | sync | 2 | 8 | 3 | 16 | 80% | 91% | 80% | 10% | 10% |" in text
    picture = drawing.save(plot([point(1, 10.0), point(2, 16.0)]), tmp_path / "scale.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 800 < height * 2


def test_weak_scaling_grows_the_meta_batch_and_a_policy_keeps_its_settings() -> None:
    run = replace(config.load("sinusoid", {"policy.name": "asynchronous"}), shard=10)
    assert _sized(run, Experiment(), "weak", "async", 3).meta_batch == 3 * run.meta_batch
    assert _sized(run, Experiment(), "strong", "async", 3).policy is run.policy
    assert type(_sized(run, Experiment(), "strong", "sync", 3).policy).__name__ == "Synchronous"


@pytest.mark.parametrize(("words", "sentence"), [
    (["--workers", "1,x"], "workers='1,x': numbers like 1,2,4 wanted"), (["--workers", "2,2"], "different numbers"),
    (["--workers", "1,8"], "keeps no more than 2 workers busy, 8 are wanted: --shard 6"),
    (["--resize", "true"], "with {workers} in it"), (["--workers", "0"], "numbers of 1 or more"),
    (["--policy", "often"], "sync or async"), (["--measure", "4"], "a warm-up of 1 to half"), (["--iterations", "9"],
    "iterations=9: not a key of an experiment, where --measure says how many"),
    (["--min_workers=2"], "min-workers=2: not a key of an experiment, where all --workers take part"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["scale", "sinusoid", *words])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_runs_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "strong-sync-1").mkdir()
    with pytest.raises(SystemExit):
        main(["scale", "sinusoid", "--dir", str(tmp_path)])
    assert "is not empty: another experiment needs another folder" in " ".join(capsys.readouterr().err.split())


def test_flags_that_mean_something_else_are_taken_out() -> None:
    assert flags.taken(["--a", "1", "--workers", "1,2", "--b"], "--workers", "") == ("1,2", ["--a", "1", "--b"])
    assert flags.taken(["--workers=3"], "--workers", "") == ("3", [])
    assert flags.taken(["--b"], "--workers", "1") == ("1", ["--b"])


@pytest.mark.ray
def test_an_experiment_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "seen").write_text("")
    main(["scale", "sinusoid", "--workers", "1,2", "--policy", "sync,async", "--measure", "12", "--warmup", "2",
          "--execution", "vmap", "--meta-batch", "4", "--shard", "1", "--straggler", "3", "--dir",
          str(tmp_path / "scale"), "--resize", f"sh -c 'echo {{workers}} >> {tmp_path}/seen'",
          "--no-independent"])  # fmt: skip
    with open(tmp_path / "scale" / "scale.csv") as f:
        table = list(csv.DictReader(f))
    assert [(r["policy"], r["workers"]) for r in table] == [
        ("sync", "1"),
        ("sync", "2"),
        ("async", "1"),
        ("async", "2"),
    ]
    assert (tmp_path / "seen").read_text().split() == ["1", "2", "1", "2"]
    for row in table:
        assert float(row["compute"]) + float(row["waiting"]) + float(row["communication"]) == pytest.approx(1.0)
        assert float(row["startup_s"]) > 0.5
    content = json.loads((tmp_path / "scale" / "scale.json").read_text())
    assert len(content["points"][0]["curve"]) == 10
    assert (tmp_path / "scale" / "scale.md").read_text().count("| strong |") == 4
    # A worker that is three times as slow keeps the other one waiting.
    assert float(table[1]["waiting"]) > 0.1
    assert "scaling of sinusoid" in capsys.readouterr().out
