"""The commands as people use them, and what each of them prints and leaves behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import cli
from cluster.operations import launch
from cluster.operations.existing_run import begun
from cluster.record.checkpoint import Checkpoints
from cluster.setup import config
from cluster.training.identity import digest
from learners.outer.descent import Descent, Group
from tests.commands import TINY, metafleet, refusal


def test_a_run_directory_holds_what_one_wants_to_see(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "run.toml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "journal",
        "status.json",
        "evaluation.json",
        "adaptation.png",
    }
    with Image.open(finished / "adaptation.png") as image:
        assert image.size[0] > 800
    results = json.loads((finished / "evaluation.json").read_text())
    assert results["tasks"] == 10
    assert len(results["mean"]["mse"]) == len(results["ci95"]["mse"]) == 11
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"train/query_loss", "validation/mse_step1", "test/mse_step10", "perf/tasks_per_s"} <= set(
        events.Tags()["scalars"]
    )
    assert "test/adaptation" in events.Tags()["images"]
    assert [e.step for e in events.Scalars("train/query_loss")] == [1, 2, 3, 4, 5, 6]


def test_evaluate_export_status_and_compare(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metafleet(
        "evaluate",
        str(finished),
        "--tasks",
        "10",
        "--steps",
        "10",
        "--pool",
        "local",
        "--json",
        str(tmp_path / "e.json"),
    )
    first = json.loads((finished / "evaluation.json").read_text())
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["mean"] == first["mean"]
    metafleet("export", str(finished), str(tmp_path / "theta.safetensors"))
    with safe_open(tmp_path / "theta.safetensors", "pt") as file:
        state = Checkpoints(finished / "checkpoints").newest()
        assert state is not None
        assert all(torch.equal(file.get_tensor(k), v) for k, v in state.meta.params.items())
        assert 'name = "maml"' in file.metadata()["metafleet"]
    metafleet("status", str(finished))
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "many"), "--seeds", "2", *TINY, "--learner.order", "1")
    metafleet(
        "compare",
        str(finished),
        str(tmp_path / "many/seed-0"),
        str(tmp_path / "many/seed-1"),
        "--out",
        str(tmp_path / "c.png"),
    )
    output = capsys.readouterr().out
    assert "finished" in output
    assert "many (2 seeds)" in output
    assert Image.open(tmp_path / "c.png").size[0] > 800


def test_evaluate_takes_another_rate_at_test(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metafleet(
        "evaluate",
        str(finished),
        "--tasks",
        "10",
        "--pool",
        "local",
        "--inner-lr",
        "0",
        "--json",
        str(tmp_path / "e.json"),
    )
    curve = json.loads((tmp_path / "e.json").read_text())["mean"]["mse"]
    assert curve == pytest.approx([curve[0]] * 11, rel=1e-6)
    metafleet("train", "sinusoid", "--learner.name", "meta_sgd", "--dir", str(tmp_path / "r"), *TINY)
    assert "MetaSGD has no such rate" in refusal(capsys, "evaluate", str(tmp_path / "r"), "--inner-lr", "0.1")
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert {"rate/linear0.weight", "rate/head.bias"} <= set(events.Tags()["histograms"])
    assert {"train/support_loss_step0", "train/query_loss"} <= set(events.Tags()["scalars"])


GLYPHS = ["--task.source.characters", "40", "--task.source.size", "16", "--model.width", "4", "--meta-batch", "2",
          "--shard", "2", "--evaluation.tasks", "4", "--evaluation.steps", "1", "--evaluation.validation-tasks", "0",
          "--pool", "local"]  # fmt: skip


def test_a_robust_run_ends_with_its_table_and_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data_folder: Path
) -> None:
    words = [
        "--learner.name",
        "adml",
        "--evaluation.robustness.eps",
        "0.1",
        "--iterations",
        "2",
        "--evaluation.norms",
        "transductive",
    ]
    metafleet("train", "glyphs", "--dir", str(tmp_path / "r"), *words, *GLYPHS)
    printed = " ".join(capsys.readouterr().err.split())
    assert "accuracy transductive under attack, ε = 0.1, after 1 inner steps (4 tasks" in printed
    assert "pgd-20 query" in printed
    mean = json.loads((tmp_path / "r" / "evaluation.json").read_text())["robustness"]["mean"]
    assert {
        f"{s}/{q}/accuracy_transductive" for s in ("clean", "fgsm") for q in ("clean", "fgsm", "pgd-20")
    } <= mean.keys()
    with Image.open(tmp_path / "r" / "adversarial.png") as image:
        assert image.size[0] > 800
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert "test/adversarial" in events.Tags()["images"]
    assert "test/clean/pgd-20/accuracy_transductive" in events.Tags()["scalars"]
    metafleet("evaluate", str(tmp_path / "r"), "--tasks", "4", "--steps", "1", "--json", str(tmp_path / "e.json"))
    assert json.loads((tmp_path / "e.json").read_text())["robustness"]["mean"] == mean
    metafleet(
        "evaluate",
        str(tmp_path / "r"),
        "--tasks",
        "4",
        "--steps",
        "1",
        "--eps",
        "0",
        "--json",
        str(tmp_path / "e.json"),
    )
    assert "robustness" not in json.loads((tmp_path / "e.json").read_text())


COMPARISON = """extends = "sinusoid"
passes = 300
meta_batch = 10
shard = 5
[evaluation]
tasks = 4
validation_tasks = 0
[runs.maml]
[runs.reptile]
learner = { name = "reptile", batch = 5, inner_steps = 2 }
[runs.after-maml]
init_from = "maml"
iterations = 1
[runs.after-reptile]
init_from = "reptile"
iterations = 1
"""


def test_a_comparison_trains_its_runs_at_equal_budget_and_draws_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(COMPARISON)
    for trained in (4, 0):
        metafleet("compare", str(tmp_path / "c.toml"), "--dir", str(tmp_path / "c"), "--pool", "local")
        captured = capsys.readouterr()
        assert captured.err.count("Held-out test tasks") == trained
    table = (tmp_path / "c" / "comparison.txt").read_text()
    assert [line.split()[1] for line in table.splitlines() if "300" in line] == ["maml", "reptile"]
    assert [line.split()[1] for line in table.splitlines() if "330" in line] == ["after-maml", "after-reptile"]
    assert [
        json.loads((tmp_path / "c" / n / "evaluation.json").read_text())["iteration"] for n in ("maml", "reptile")
    ] == [10, 15]
    assert Image.open(tmp_path / "c" / "comparison.png").size[0] > 800
    assert "is a comparison of 4 runs: metafleet compare" in refusal(capsys, "train", str(tmp_path / "c.toml"))
    assert "is not a comparison" in refusal(capsys, "compare", "sinusoid")


def test_results_of_fewer_iterations_do_not_outlive_a_resume(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "r")
    run = config.load(str(tmp_path / "r" / "run.toml"))
    launch.prepared(run, tmp_path / "r", begun(tmp_path / "r", run))
    assert (tmp_path / "r" / "evaluation.json").exists()
    launch.prepared(replace(run, iterations=9), tmp_path / "r", begun(tmp_path / "r", run))
    assert not (tmp_path / "r" / "evaluation.json").exists()


def test_a_changed_comparison_does_not_take_old_results_for_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(COMPARISON)
    words = ["compare", str(tmp_path / "c.toml"), "--dir", str(tmp_path / "c"), "--pool", "local"]
    metafleet(*words)
    (tmp_path / "c.toml").write_text(COMPARISON + "learner.inner_lr = 0.5\n")
    assert "learner.inner_lr was 0.01 when this run began and is 0.5 now" in refusal(capsys, *words)


def test_another_choice_leaves_the_tables_of_the_old_one_behind(capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("show", "data-free-glyphs", "--learner.name", "proto_net")
    output = capsys.readouterr().out
    assert 'name = "proto_net"' in output
    assert "inversion_steps" not in output


def test_groups_come_and_go_on_the_command_line_as_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = '[{match = "head.*", lr = 0.001}, {match = "a \\"b\\"", weight_decay = 0.0}]'
    metafleet("show", "sinusoid", "--outer.groups", given)
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    wanted = (Group("head.*", lr=0.001), Group('a "b"', weight_decay=0.0))
    assert config.load(str(tmp_path / "run.toml")).outer.groups == wanted
    metafleet("show", str(tmp_path / "run.toml"), "--outer.lr", "0.5")  # flags beside it leave it as it is
    (tmp_path / "other.toml").write_text(capsys.readouterr().out)
    assert config.load(str(tmp_path / "other.toml")).outer == Descent("adam", 0.5, "cosine", groups=wanted)
    metafleet("show", str(tmp_path / "run.toml"), "--outer.groups", "[]")
    (tmp_path / "none.toml").write_text(capsys.readouterr().out)
    assert config.load(str(tmp_path / "none.toml")).outer.groups == ()


def test_list_show_and_every_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("list")
    output = capsys.readouterr().out
    assert "omniglot-20way-5shot" in output
    assert "MAML" in output
    metafleet("show", "omniglot-5way-1shot", "--learner.inner-lr", "0.25")
    output = capsys.readouterr().out
    assert "inner_lr = 0.25" in output
    assert 'scale = "sum_over_shots"' in output
    for command in cli.COMMANDS:
        metafleet(command, "--help")
        assert "usage: metafleet" in capsys.readouterr().out
    metafleet("train", "omniglot-5way-1shot", "--help")
    assert "--task.source.folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "claim"),
    [
        (["sinusoid"], "is second order"),
        (["sinusoid-fomaml"], "is first order"),
        (["sinusoid-reptile"], "is θ − φ"),
        (["sinusoid-reptile", "--learner.update", "last_gradient"], "is φ′ − φ"),
        (["glyphs", "--learner.name", "reptile", "--learner.moments", "carry"], "(checked with SGD inside)"),
        (["sinusoid", "--learner.name", "meta_sgd"], "is second order"),
        (["sinusoid", "--learner.name", "meta_curvature", "--learner.order", "1"], "is first order"),
        (["sinusoid", "--learner.name", "maml_plus_plus", "--learner.second-order-from", "2"], "is first order"),
        (["sinusoid", "--learner.name", "imaml"], "is implicit"),
        (["glyphs", "--learner.name", "adml"], "is second order"),
        (
            [
                "glyphs",
                "--objective.norm",
                "support_plus_one",
                "--objective.scale",
                "sum_over_shots",
                "--learner.inner-lr",
                "0.1",
            ],
            "is second order",
        ),
    ],
)
def test_check_names_the_gradient(words, claim, capsys: pytest.CaptureFixture[str], data_folder: Path) -> None:
    metafleet("check", *words, "--execution", "loop")
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith("OK: ")
    assert claim in output


def test_check_finds_a_gradient_that_is_not_what_it_claims(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The classic mistake, planted: inner gradients that are constants although second order is claimed.
    from learners import inner

    real = inner.differentiate
    monkeypatch.setattr(inner, "differentiate", lambda loss, at, again=False: real(loss, at, False))
    metafleet("check", "sinusoid", "--execution", "loop", expect=1)
    assert capsys.readouterr().out.startswith("WRONG: ")


def test_train_on_an_existing_directory_resumes_the_same_run_and_refuses_another(
    finished: Path, tmp_path: Path, capsys
) -> None:
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "r"), *TINY)
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "r"), *TINY[2:], "--iterations", "9")
    assert Checkpoints(tmp_path / "r" / "checkpoints").newest().iteration == 9
    text = refusal(capsys, "train", "sinusoid", "--dir", str(finished), *TINY, "--learner.inner-lr", "0.5")
    assert "learner.inner_lr was 0.01 when this run began and is 0.5 now: it cannot change on resume" in text
    text = refusal(capsys, "resume", str(finished), "--seed", "3")
    assert "seed was 0 when this run began and is 3 now" in text


def test_resuming_says_when_nothing_is_left_to_do_or_the_schedule_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "r"), *TINY)
    assert "iterations=3: " in refusal(capsys, "resume", str(tmp_path / "r"), "--iterations", "3")
    metafleet("resume", str(tmp_path / "r"), "--iterations", "8")
    assert "the outer rate's schedule ended at iteration 6" in capsys.readouterr().err
    # A first start that failed before anything was learnt does not bind the next.
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "run.toml").write_text((tmp_path / "r" / "run.toml").read_text().replace("seed = 0", "seed = 5"))
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "s"), *TINY)


def test_learned_rates_go_along_with_theta(tmp_path: Path) -> None:
    words = ["train", "sinusoid", "--learner.name", "meta_sgd", *TINY]
    metafleet(*words, "--dir", str(tmp_path / "a"))
    metafleet(
        *words, "--dir", str(tmp_path / "b"), "--init-from", str(tmp_path / "a"), "--outer.lr", "0.0", "--seed", "3"
    )
    ends = [Checkpoints(tmp_path / d / "checkpoints").newest().meta for d in "ab"]
    assert any(k.startswith("alpha/") for k in ends[0].params)
    assert digest(ends[0]) == digest(ends[1])


def test_a_running_mean_is_what_is_exported_evaluated_and_begun_from_and_replay_is_of_theta(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "sinusoid", *TINY]
    groups = '[{match = "head.*", lr = 0.01, weight_decay = 0.1}]'
    metafleet(*words, "--dir", str(tmp_path / "m"), "--outer.ema", "0.5", "--outer.optimizer", "adamw",
              "--outer.lr", "0.05", "--outer.groups", groups)  # fmt: skip
    state = Checkpoints(tmp_path / "m" / "checkpoints").newest()
    mean = {k.removeprefix("averaged/"): v for k, v in state.outer.items() if k.startswith("averaged/")}
    assert mean.keys() == state.meta.params.keys()
    assert not any(torch.equal(mean[k], v) for k, v in state.meta.params.items())
    metafleet("export", str(tmp_path / "m"), str(tmp_path / "theta.safetensors"))
    with safe_open(tmp_path / "theta.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(k), v) for k, v in mean.items())
    metafleet("evaluate", str(tmp_path / "m"), "--pool", "local", "--json", str(tmp_path / "e.json"))
    again = json.loads((tmp_path / "e.json").read_text())["mean"]
    assert again == json.loads((tmp_path / "m" / "evaluation.json").read_text())["mean"]
    metafleet(*words, "--dir", str(tmp_path / "n"), "--init-from", str(tmp_path / "m"), "--outer.lr", "0.0")
    begun_from = Checkpoints(tmp_path / "n" / "checkpoints").newest().meta.params
    assert all(torch.equal(begun_from[k], v) for k, v in mean.items())
    assert json.loads((tmp_path / "n" / "evaluation.json").read_text())["mean"] == again
    capsys.readouterr()
    metafleet("replay", str(tmp_path / "m"))
    assert "end in the recorded bits" in capsys.readouterr().out
    metafleet("resume", str(tmp_path / "m"), "--iterations", "8")
    assert Checkpoints(tmp_path / "m" / "checkpoints").newest().iteration == 8


def test_a_run_starts_from_the_theta_of_another(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metafleet(
        "train", "sinusoid", "--dir", str(tmp_path / "w"), *TINY, "--init-from", str(finished), "--outer.lr", "0.0"
    )
    ends = [Checkpoints(d / "checkpoints").newest() for d in (finished, tmp_path / "w")]
    assert digest(ends[0].meta) == digest(ends[1].meta)
    metafleet("replay", str(tmp_path / "w"))
    assert "end in the recorded bits" in capsys.readouterr().out
    # One that is killed before its first checkpoint begins there again.
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "run.toml").write_bytes((tmp_path / "w" / "run.toml").read_bytes())
    metafleet("resume", str(tmp_path / "k"))
    assert digest(Checkpoints(tmp_path / "k" / "checkpoints").newest().meta) == digest(ends[0].meta)
    text = refusal(
        capsys,
        "train",
        "sinusoid",
        "--dir",
        str(tmp_path / "x"),
        *TINY,
        "--init-from",
        str(finished),
        "--model.hidden",
        "7",
    )
    assert "its model has no parameter linear0.weight of shape (7, 1)" in text
