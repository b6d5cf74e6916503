"""Mistakes and misfortunes: one clear sentence for each, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from cluster import cli
from cluster.record.checkpoint import Checkpoints
from cluster.training.identity import digest
from tests.commands import HELD_OUT, PATIENCE, SIZE, TINY, metafleet, refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_one_clear_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "train", "sinusoid", "--dir", str(tmp_path / "r"), *TINY, "--device", "cuda")
    assert "device='cuda', but this torch sees no CUDA device" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "metafleet train wants a RUN first"),
        (["train", "sinusid"], "RUN='sinusid' is neither a preset nor a .toml file; did you mean sinusoid?"),
        (["train", "sinusoid", "--meta-batch", "7"], "meta_batch=7 is not a multiple of shard=50"),
        (["train", "sinusoid", "--learner.name", "mamal"], "did you mean maml?"),
        (
            ["train", "miniimagenet-5way-1shot"],
            "task.source.folder='' does not exist: a folder or a zip of images is wanted",
        ),
        (["train", "glyphs", "--task.ways", "99", "--pool", "local"], "ways=99 exceeds the"),
        (["train", "sinusoid", "--seeds", "0"], "seeds=0: at least 1 wanted"),
        (
            ["train", "omniglot", "--task.source.folder", "nowhere"],
            "nowhere holds neither images_background.zip nor its unpacked folder",
        ),
        (
            ["train", "sinusoid", "--pool", "local", "--outer.groups", '[{match = "haed.*", lr = 0.1}]'],
            "groups: match='haed.*' matches none of the parameters; did you mean head.",
        ),
        (["resume", "nowhere"], "nowhere has no run.toml: not a run directory, or one that a Driver of one's own made"),
        (["evaluate", "nowhere"], "nowhere has no run.toml"),
        (["status", "nowhere"], "nowhere has no status.json"),
        (["train", "navigation", "--evaluation.robustness.eps", "0.1"], "RL tasks have none"),
        (["train", "navigation", "--learner.name", "adml"], "ADML wants labelled examples, and RL tasks have none"),
        (["train", "sinusoid", "--learner.name", "adml"], "--learner.attack.low=-inf --learner.attack.high=inf wanted"),
        (
            ["train", "sinusoid", "--evaluation.robustness.eps", "0.1"],
            "evaluation.robustness keeps inputs within [0, 1], as pixels are",
        ),
        (["teachers", "glyphs", "--dir", "s3://bucket/pool"], "dir=s3://bucket/pool: a folder on this machine wanted"),
        (["compare"], "metafleet compare wants run directories, or one comparison"),
        (["compare", "comparison-glyphs", "--seeds", "0"], "seeds=0: at least 1 wanted"),
        (["compare", "a", "b", "--workers", "4"], "workers=4: of a comparison that is to be trained"),
        (["compare", "a", "b", "--out", "s3://bucket/c.png"], "out=s3://bucket/c.png: a file on this machine wanted"),
        (["compare", "nowhere"], "RUN='nowhere' is neither a preset nor a .toml file"),
        (["compare", "nowhere", "neither"], "nowhere has no evaluation.json"),
        (["export", "nowhere", "x"], "nowhere has no checkpoint yet"),
    ],
)
def test_each_mistake_is_one_clear_sentence(
    words, sentence, capsys, tmp_path: Path, monkeypatch, data_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = refusal(capsys, *words)
    assert sentence in text
    assert text.count("\n") == 0


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["--learner.inner-lrr", "3"], ["--learner.inner-lrr", "--learner.inner-lr"]),
        (["--iterations", "many"], ["many", "--iterations INT"]),
        (["--learner.inner-lr", "-1"], ["inner_lr=-1.0: 0 or more wanted"]),
        (["--outer.lr", "-1"], ["lr=-1.0: 0 or more wanted"]),
        (["--outer.groups", "head"], ["outer.groups='head' is not valid TOML"]),
        (["--outer.groups", "[{match = 1}]"], ["outer.groups[0].match=1: should be a valid string"]),
        (["--task.amplitude", "5", "0.1"], ["amplitude=(5.0, 0.1): the lower end first wanted"]),
    ],
)
def test_wrong_flags_name_the_nearest_the_type_or_the_limit(words, hints, capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("train", "sinusoid", *words, expect=2)
    output = "".join(capsys.readouterr())
    assert all(hint in output for hint in hints)
    assert "Traceback" not in output


def test_an_unknown_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    metafleet("trian", expect=2)
    assert "no command 'trian'" in capsys.readouterr().err
    metafleet()
    assert "metafleet train RUN" in capsys.readouterr().out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="sinusid"):
        cli.main(["train", "sinusid", "--debug"])


def test_no_permission_is_one_clear_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(capsys, "train", "sinusoid", "--dir", str(tmp_path / "file" / "run"), *TINY)
    assert "Not a directory" in text
    locked = Path(tempfile.mkdtemp(dir="/tmp"))
    locked.chmod(0o555)
    root = os.geteuid() == 0  # who may write anywhere, so for a moment we are somebody else
    if root:
        os.seteuid(65534)
    try:
        text = refusal(capsys, "train", "sinusoid", "--dir", str(locked / "run"), *TINY)
    finally:
        if root:
            os.seteuid(0)
    assert f"Permission denied: '{locked / 'run'}'" in text


def test_a_run_made_in_python_is_not_taken_for_another(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "r")
    (tmp_path / "r" / "run.toml").unlink()
    text = refusal(capsys, "train", "sinusoid", "--dir", str(tmp_path / "r"), *TINY)
    assert "holds a run that a Driver of one's own made" in text


def test_a_damaged_newest_checkpoint_falls_back_and_ends_in_the_same_bits(
    finished: Path, tmp_path: Path, capsys
) -> None:
    metafleet("train", "sinusoid", "--dir", str(tmp_path / "d"), *TINY, "--checkpoint.seconds", "0")
    newest = sorted((tmp_path / "d" / "checkpoints").glob("0*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    capsys.readouterr()
    metafleet("resume", str(tmp_path / "d"))
    assert "is cut short" in capsys.readouterr().err
    ends = [Checkpoints(d / "checkpoints").newest() for d in (finished, tmp_path / "d")]
    assert digest(ends[0].meta) == digest(ends[1].meta)


def test_a_full_disk_stops_the_run_which_resumes_once_there_is_room(tmp_path: Path) -> None:
    """A real file system of 400 KiB: checkpoints and metrics fail with a warning, the journal with an end."""
    small, command = tmp_path / "small", [sys.executable, "-m", "cluster.cli"]
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here (needs root)")
    words = [
        "train",
        "sinusoid",
        *SIZE[2:],
        *HELD_OUT,
        "--iterations",
        "400",
        "--pool",
        "local",
        "--checkpoint.seconds",
        "0.2",
    ]
    try:
        full = subprocess.run(
            [*command, *words, "--dir", str(small / "r")], capture_output=True, text=True, timeout=PATIENCE
        )
        assert full.returncode == 1
        assert "error: [Errno 28] cannot write to" in full.stderr
        assert "the run stops and can be resumed" in full.stderr
        assert "Traceback" not in full.stderr
        stopped = Checkpoints(small / "r" / "checkpoints").newest()
        assert stopped is not None
        assert 0 < stopped.iteration < 400
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        subprocess.run([*command, "resume", str(small / "r")], check=True, capture_output=True, timeout=PATIENCE)
        subprocess.run(
            [*command, *words, "--dir", str(tmp_path / "roomy")], check=True, capture_output=True, timeout=PATIENCE
        )
        ends = [Checkpoints(d / "checkpoints").newest() for d in (small / "r", tmp_path / "roomy")]
        assert digest(ends[0].meta) == digest(ends[1].meta)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_checkpoints_and_exits_with_its_code(tmp_path: Path, number: int, code: int) -> None:
    words = [sys.executable, "-m", "cluster.cli", "train", "sinusoid", "--pool", "local", "--dir", str(tmp_path / "r")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "r" / "metrics.jsonl").exists() or not (tmp_path / "r" / "metrics.jsonl").read_text():
            time.sleep(0.05)
            assert run.poll() is None
        second = subprocess.run([*words, "--debug"], capture_output=True, text=True, timeout=PATIENCE)
        assert "BlockingIOError" in second.stderr
        assert f"in use by process {run.pid}" in second.stderr
        run.send_signal(number)
        began = time.monotonic()
        _, text = run.communicate(timeout=PATIENCE)
    assert run.returncode == code
    assert time.monotonic() - began < 10
    assert "stopping after a checkpoint" in text
    assert "Traceback" not in text
    assert Checkpoints(tmp_path / "r" / "checkpoints").newest().iteration > 0
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "interrupted"
