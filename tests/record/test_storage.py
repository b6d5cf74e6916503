"""Run directories in object stores: the promises of a disk, kept by a real S3 server (moto), by fsspec's memory, and by
a disk.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.fleet.pool import LocalPool
from cluster.record import journal, storage
from cluster.record.checkpoint import Checkpointing, Checkpoints
from cluster.record.journal import Journal
from cluster.record.lease import Fenced, Lease
from cluster.record.mirror import Mirror
from cluster.record.storage import Place
from cluster.training.driver import Driver
from cluster.training.identity import digest
from tests.fakes import Noisy, quadratic_recipe, start
from tests.record.test_checkpoint import state
from tests.training.test_driver import FEW, run

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a server that speaks S3's protocol."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: no S3 server to test against")
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'metafleet[s3]')")
    import boto3

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    settings = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": "http://127.0.0.1:{1}".format(*running.get_host_and_port())}  # fmt: skip
    before = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    running.stop()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture(params=["disk", "memory", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder of each kind of store."""
    if request.param == "disk":
        return tmp_path
    base = request.getfixturevalue("s3") if request.param == "s3" else "memory://test"
    return storage.place(f"{base}/{os.getpid()}-{next(_NUMBERS)}")


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Place:
    """An empty folder of each kind of object store."""
    base = request.getfixturevalue("s3") if request.param == "s3" else "memory://test"
    return storage.place(f"{base}/{os.getpid()}-{next(_NUMBERS)}")


def test_a_file_is_replaced_whole_created_once_and_seen_at_once(home: Place) -> None:
    storage.make_folder(home / "lease")
    storage.write_atomically(home / "status", b"one")
    storage.write_atomically(home / "status", b"two")
    storage.create(home / "lease" / "000001", b"me")
    with pytest.raises(FileExistsError):
        storage.create(home / "lease" / "000001", b"you")
    assert (home / "status").read_bytes() == b"two"
    assert (home / "lease" / "000001").read_bytes() == b"me"
    # Another process' file appears in a listing made before.
    assert [p.name for p in storage.children(home / "lease")] == ["000001"]
    storage.create(storage.place(str(home)) / "lease" / "000002", b"")
    assert [p.name for p in storage.children(home / "lease")] == ["000001", "000002"]
    assert storage.children(home / "nothing") == []


def test_of_many_that_create_at_once_one_wins(home: Place) -> None:
    storage.make_folder(home)
    won: list[int] = []

    def come(number: int) -> None:
        try:
            storage.create(home / "only", str(number).encode())
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=come, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (home / "only").read_bytes() == str(won[0]).encode()


def test_what_cannot_be_opened_or_reached_is_one_sentence(s3: str) -> None:
    with pytest.raises(ValueError, match="ftpx://here/run: no file system for ftpx://"):
        storage.place("ftpx://here/run")
    with pytest.raises(OSError, match="bucket"):
        storage.write_atomically(storage.place("s3://no-such-bucket/run/status"), b"")
    assert storage.place("file:///tmp/run") == Path("/tmp/run")


def test_checkpoints_are_kept_counted_and_damage_is_found(home: Place, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(home / "checkpoints", keep=2)
    for iteration in (1, 2, 3):
        checkpoints.save(state(iteration))
    assert [p.name for p in storage.children(home / "checkpoints")] == ["0000000002.ckpt", "0000000003.ckpt"]
    newest = home / "checkpoints" / "0000000003.ckpt"
    content = newest.read_bytes()
    storage.write_atomically(newest, content[:-1] + bytes([content[-1] ^ 1]))
    found = checkpoints.newest()
    assert found is not None
    assert found.iteration == 2


def test_a_journal_in_segments_reads_like_a_file(store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 100)
    for place in (store / "journal", tmp_path / "journal"):
        for attempt in range(2):
            written = Journal(place)
            for ticket in range(20):
                written.write("dispatch", ticket=20 * attempt + ticket, verb="gradient", split="train", start=0, stop=1)
            written.write("apply", tickets=list(range(20 * attempt + 15)), version=1, theta="x")
            written.sync()
            written.close()
    assert list(journal.read(store / "journal")) == list(journal.read(tmp_path / "journal"))
    unfinished = [journal.unfinished(folder / "journal") for folder in (store, tmp_path)]
    assert unfinished == [([35, 36, 37, 38, 39], 40, [])] * 2
    assert len(storage.children(store / "journal")) > 10


def test_a_damaged_segment_is_set_aside_and_not_overwritten(store: Place, caplog: pytest.LogCaptureFixture) -> None:
    written = Journal(store / "journal")
    written.write("attempt", iteration=0)
    written.sync()
    content = (store / "journal" / "00000000").read_bytes()
    storage.write_atomically(store / "journal" / "00000000", content[:-1])
    again = Journal(store / "journal")
    again.write("attempt", iteration=7)
    again.sync()
    assert [r["iteration"] for r in journal.read(store / "journal")] == [7]
    assert (store / "journal.damaged-0" / "00000000").read_bytes() == content[:-1]


def test_a_driver_that_was_taken_over_adds_no_segment_after_the_newcomers(store: Place) -> None:
    with Lease(store).held() as old:
        slow = Journal(store / "journal", old.check)
        slow.write("attempt", iteration=0)
        slow.sync()
        slow.write("attempt", iteration=1)  # waits for its segment
        with Lease(store).held(take_over=True) as new:
            fast = Journal(store / "journal", new.check)
            storage.create(store / "journal" / "00000001", b"")  # as if the old one had just been faster
            fast.write("attempt", iteration=2)
            fast.sync()
            with pytest.raises(Fenced):
                slow.sync()
    assert [r["iteration"] for r in journal.read(store / "journal")] == [0, 2]
    assert [p.name for p in storage.children(store / "journal")] == ["00000000", "00000001", "00000002"]


def test_a_write_that_was_tried_twice_is_ours(store: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a conditional write got lost, and the library tried again."""
    written = Journal(store / "journal")
    written.write("attempt", iteration=3)
    real = store.fs.pipe_file  # type: ignore[union-attr]

    def twice(path: str, content: bytes, **options: object) -> None:
        real(path, content, **options)
        real(path, content, **options)

    monkeypatch.setattr(store.fs, "pipe_file", twice)  # type: ignore[union-attr]
    written.close()
    monkeypatch.undo()
    assert [r["iteration"] for r in journal.read(store / "journal")] == [3]
    storage.create(store / "lease", b"me")
    storage.create(store / "lease", b"me")
    with pytest.raises(FileExistsError):
        storage.create(store / "lease", b"you")


def test_what_a_store_does_not_take_at_the_end_stays_here(store: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(store)
    (mirror.local / "evaluation.json").write_bytes(b"{}")

    def full(path: str, *words: object, **options: object) -> None:
        raise ConnectionError("503")

    monkeypatch.setattr(store.fs, "pipe_file", full)  # type: ignore[union-attr]
    monkeypatch.setattr(Mirror._copy_last.retry, "wait", lambda state: 0.0)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="does not take this run's last files"):
        mirror.close()
    assert (mirror.local / "evaluation.json").read_bytes() == b"{}"


def test_a_second_driver_is_refused_and_a_released_lease_is_free(store: Place) -> None:
    with Lease(store).held(), pytest.raises(BlockingIOError, match="is in use by process"), Lease(store).held():
        pass
    with Lease(store).held() as lease:
        assert lease.attempt == 2


def test_a_mirror_copies_what_has_changed_until_the_run_is_anothers(store: Place) -> None:
    owned = [True]

    def check() -> None:
        if not owned[0]:
            raise Fenced("taken over")

    storage.write_atomically(store / "metrics.jsonl", b"old\n")
    mirror = Mirror(store, check, kept=("metrics.jsonl", "missing"))
    with open(mirror.local / "metrics.jsonl", "ab") as f:
        f.write(b"new\n")
    (mirror.local / "tensorboard").mkdir()
    (mirror.local / "tensorboard" / "events").write_bytes(b"events")
    mirror.copy()
    assert (store / "metrics.jsonl").read_bytes() == b"old\nnew\n"
    assert (store / "tensorboard" / "events").read_bytes() == b"events"
    owned[0] = False
    (mirror.local / "metrics.jsonl").write_bytes(b"mine")
    mirror.close()
    assert (store / "metrics.jsonl").read_bytes() == b"old\nnew\n"
    assert not mirror.local.exists()


def test_a_killed_run_in_a_store_resumes_to_the_bits_of_one_on_disk(store: Place, tmp_path: Path) -> None:
    recipe = quadratic_recipe(learner=Noisy())
    whole = run(recipe, tmp_path / "whole", iterations=8)

    class Killed(BaseException):
        pass

    class Dies(LocalPool):
        left = 14

        def submit(self, *args, **kwargs):
            self.left -= 1
            if not self.left:
                raise Killed
            return super().submit(*args, **kwargs)

    with pytest.raises(Killed):
        run(recipe, store, Dies(recipe), iterations=8, checkpoint=Checkpointing(seconds=0.0))
    finished = Driver(
        recipe,
        start(),
        LocalPool(recipe),
        store,
        iterations=8,
        meta_batch=6,
        shard=2,
        evaluation=replace(FEW, pictures=1),
    )
    assert digest(finished.run()) == digest(whole)
    records = list(journal.read(store / "journal"))
    assert len([r for r in records if r["kind"] == "attempt"]) == 2
    lines = [json.loads(line) for line in (store / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert json.loads((store / "status.json").read_text())["state"] == "finished"
    assert (
        json.loads((store / "evaluation.json").read_text())["mean"]
        == json.loads((tmp_path / "whole/evaluation.json").read_text())["mean"]
    )
    events = [p for p in storage.children(store / "tensorboard") if "tfevents" in p.name]
    assert len(events) >= 2
    assert all(p.stat().st_size > 100 for p in events)


def test_the_commands_work_on_a_url(s3: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from cluster.cli import main

    url = f"{s3}/runs/{time.time_ns()}"
    main(["train", "sinusoid", "--pool", "local", "--iterations", "20", "--evaluation.tasks", "5", "--dir", url])
    main(["resume", url, "--iterations", "24"])
    main(["status", url])
    main(["evaluate", url, "--tasks", "5", "--steps", "1"])
    main(["replay", url])
    main(["export", url, str(tmp_path / "theta.safetensors")])
    main(["doctor", "--pool", "local", "--dir", url])
    said = capsys.readouterr().out
    assert "24 of 24" in said
    assert "OK: 24 steps" in said
    assert "creates exclusively" in said
    assert (tmp_path / "theta.safetensors").exists()
