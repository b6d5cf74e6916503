"""What one sees of a fleet: Prometheus, histograms and events in TensorBoard, the summary of `metafleet status`."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.operations import status
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from tests.fakes import quadratic_recipe, start
from tests.training.test_asynchronous import LatePool

FEW = Evaluation(every=100, validation_tasks=0, tasks=4, steps=1, pictures=0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_an_asynchronous_run_shows_staleness_shares_queue_and_fleet(tmp_path: Path) -> None:
    recipe, port, seen = quadratic_recipe(), free_port(), []

    def look() -> bool:
        if not seen and holder[0].iteration == 10:
            seen.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode())
        return False

    driver = Driver(recipe, start(), LatePool(recipe, 6), tmp_path, iterations=12, meta_batch=4, shard=2,
                    evaluation=FEW, policy=Asynchronous(), prometheus_port=port, interrupted=look)  # fmt: skip
    holder = [driver]
    driver.run()

    served = {s.name: (f.type, s.value) for f in text_string_to_metric_families(seen[0]) for s in f.samples}
    assert served["metafleet_fleet_applied_total"][0] == "counter"
    assert served["metafleet_fleet_applied_total"][1] == 20  # ten steps of two shards
    assert served["metafleet_fleet_workers"] == ("gauge", 1.0)
    assert served["metafleet_share"] == ("gauge", 1.0)
    assert {"metafleet_fleet_in_flight", "metafleet_fleet_queued", "metafleet_async_staleness_mean"} <= set(served)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    staleness = [s for line in lines if line["kind"] == "train" for s in line["async/staleness"]]
    shown = events.Histograms("async/staleness")
    assert len(staleness) == 24
    assert max(staleness) >= 2
    assert sum(h.histogram_value.num for h in shown) == 24
    assert sum(h.histogram_value.sum for h in shown) == sum(staleness)
    assert "joined: local" in events.Tensors("fleet/text_summary")[0].tensor_proto.string_val[0].decode()
    assert any(line["kind"] == "fleet" and "joined: local" in line["event"] for line in lines)

    table = status.status(tmp_path)
    rows = dict(zip(table.columns[0]._cells, table.columns[1]._cells, strict=True))
    assert rows["state"] == "finished"
    assert "26 applied" in rows["tickets"]  # two of them of test tasks
    assert "async/staleness_mean" in rows


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    recipe = quadratic_recipe()
    from cluster.fleet.pool import LocalPool

    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        driver = Driver(
            recipe,
            start(),
            LocalPool(recipe),
            tmp_path,
            iterations=1,
            meta_batch=2,
            shard=2,
            evaluation=FEW,
            prometheus_port=port,
        )
        with pytest.raises(OSError, match=f"prometheus_port={port} cannot be served"):
            driver.run()
