"""The doctor finds what has been known to be wrong, and says what to do."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import cli
from cluster.fleet.machine import environment
from cluster.operations import doctor
from cluster.operations.doctor import Node
from cluster.setup import config
from cluster.training.asynchronous import Asynchronous

NOW = (time.time(), time.time() + 1)


def node(**changes) -> Node:
    return replace(Node("host:1", environment(), {}, NOW[0] + 0.5, ""), **changes)


def findings(nodes: list[Node], resources: dict[str, float] | None = None, **keys) -> dict[str, list[str]]:
    run = replace(config.load("sinusoid"), **keys)
    found: dict[str, list[str]] = {"ok": [], "warning": [], "wrong": []}
    for f in doctor.fleet(run, "2.60.0", resources or {"CPU": 4.0}, nodes, NOW):
        found[f.verdict].append(f"{f.what} | {f.hint}")
    return found


def test_an_even_fleet_is_fine() -> None:
    found = findings([node(), node(where="host:2")])
    assert not found["wrong"]
    assert not found["warning"]
    assert "Ray 2.60.0, 2 nodes" in found["ok"][0]


def test_other_versions_clocks_and_too_few_processors_are_found() -> None:
    other = node(where="host:2", environment=environment() | {"torch": "1.0"}, clock=NOW[0] - 40)
    found = findings([node(), other], workers=8)
    assert any("torch" in line and "bits would depend" in line and "the same image" in line for line in found["wrong"])
    assert any("clock of host:2 is -40.0 s off" in line and "NTP" in line for line in found["warning"])
    assert any("8 workers of 1 CPUs: room for 4" in line for line in found["warning"])
    assert any("room for 1" in line for line in findings([node()], {"CPU": 1.0}, workers=3, min_workers=2)["wrong"])


def test_workers_without_a_shard_are_found() -> None:
    run = replace(config.load("sinusoid"), meta_batch=100, shard=50, workers=4)
    (finding,) = doctor._shards(run)
    assert finding.what == "a meta-batch of 100 in shards of 50 keeps 2 of 4 workers busy"
    assert finding.hint == "--shard 25"
    assert next(doctor._shards(replace(run, workers=3))).hint == "--shard 25"  # 33 does not divide 100
    fine = [{"workers": 2}, {"pool": "local"}, {"policy": Asynchronous()}]
    assert not [f for keys in fine for f in doctor._shards(replace(run, **keys))]


def test_the_command_says_it_line_by_line_and_fails_where_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor", "sinusoid", "--pool", "local", "--dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines)
    assert any("in one step" in line for line in lines)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "sinusoid", "--pool", "local", "--dir", str(tmp_path / "file" / "runs")])
    assert stop.value.code == 1
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.ray
def test_a_cluster_is_asked_node_by_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    with pytest.raises(SystemExit):
        cli.main(["doctor", "sinusoid", "--address", "127.0.0.1:9", "--dir", str(tmp_path)])
    assert "no Ray cluster answers" in capsys.readouterr().out
    cli.main(["doctor", "sinusoid", "--workers", "1", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "1 node" in out
    assert "1 workers of 1 CPUs: room for 1" in out
    assert os.listdir(tmp_path) == []
