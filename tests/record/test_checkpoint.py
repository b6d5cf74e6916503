"""Checkpoints survive anything that can happen to a file; a run directory has one owner."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.record import journal
from cluster.record.checkpoint import Checkpoints, State, decode, encode
from cluster.record.journal import Journal
from cluster.record.lease import Fenced, Lease
from learners.base import Meta


def state(iteration: int = 3) -> State:
    torch.manual_seed(iteration)
    meta = Meta({"w": torch.randn(3, 2), "b": torch.randn(())}, {"running": torch.randn(2)})
    outer = {"optimizer/m/w": torch.randn(3, 2), "step": torch.tensor(iteration, dtype=torch.float64)}
    return State(
        iteration, meta, outer, 17, 2, {"iteration": 1, "score": 0.5}, {"dispatched": 4}, {"execution": "vmap"}
    )


def same(a: State, b: State) -> bool:
    tensors = [
        (x, y)
        for p, q in ((a.meta.params, b.meta.params), (a.meta.slots, b.meta.slots), (a.outer, b.outer))
        for x, y in zip(p.values(), q.values(), strict=True)
    ]
    return all(torch.equal(x, y) for x, y in tensors) and (a.iteration, a.next_ticket, a.best, a.facts) == (
        b.iteration,
        b.next_ticket,
        b.best,
        b.facts,
    )


def test_a_checkpoint_holds_everything() -> None:
    assert same(decode(encode(state()), "x"), state())


CONTENT = encode(state())


@given(st.integers(0, len(CONTENT) - 1))
@settings(max_examples=200, deadline=None)
def test_a_checkpoint_cut_at_any_byte_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="x"):
        decode(CONTENT[:length], "x")


@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_checkpoint_with_any_byte_changed_is_refused(position: int, change: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[position] ^= change
    with pytest.raises(ValueError, match="x"):
        decode(bytes(damaged), "x")


def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1))
    newest = checkpoints.save(state(2))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert checkpoints.newest().iteration == 1
    assert "0000000002.ckpt is cut short" in caplog.text
    assert "falling back" in caplog.text


def test_when_none_is_good_the_run_does_not_silently_begin_anew(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).newest() is None
    Checkpoints(tmp_path).save(state(1)).write_bytes(b"")
    with pytest.raises(ValueError, match="no good checkpoint"):
        Checkpoints(tmp_path).newest()


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_best(state(1))
    for i in range(1, 6):
        checkpoints.save(state(i))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000004.ckpt", "0000000005.ckpt", "best.ckpt"]
    assert checkpoints.best().iteration == 1
    with pytest.raises(ValueError, match="no checkpoint of iteration 1; there are 4, 5"):
        checkpoints.at(1)


def test_what_is_newer_and_damaged_takes_no_good_ones_place(tmp_path: Path) -> None:
    (tmp_path / "0000000009.ckpt").write_bytes(b"damaged")
    checkpoints = Checkpoints(tmp_path, keep=1)
    for i in (4, 5):
        checkpoints.save(state(i))
    assert checkpoints.newest().iteration == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000005.ckpt", "0000000009.ckpt"]


def test_a_write_that_fails_half_way_leaves_the_last_good_one_and_no_litter(tmp_path: Path) -> None:
    """A real limit on file size, as a full disk would: the write fails after some bytes."""
    program = (
        "import resource, sys, torch; from pathlib import Path; from cluster.record.checkpoint import *\n"
        "from learners.base import Meta\n"
        "c = Checkpoints(Path(sys.argv[1])); c.save(State(1, Meta({'w': torch.zeros(10)}, {}), {}))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try:\n c.save(State(2, Meta({'w': torch.zeros(100000)}, {}), {}))\nexcept OSError as e: print('OSError', "
        "e.errno)\n"
        "print(c.newest().iteration)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["OSError", "27", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001.ckpt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_fresh_lease_refuses_a_second_driver_and_a_released_one_does_not(tmp_path: Path) -> None:
    with Lease(tmp_path).held() as first:
        assert first.attempt == 1
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on"), Lease(tmp_path).held():
            pass
    with Lease(tmp_path).held() as second:
        assert second.attempt == 2


def test_taking_over_fences_the_old_driver_at_its_next_write(tmp_path: Path) -> None:
    with Lease(tmp_path).held() as old:
        book = Journal(tmp_path / "journal", lambda always: old.check())
        book.write("before")
        with Lease(tmp_path).held(take_over=True):
            with pytest.raises(Fenced, match="taken over by attempt 2"):
                book.write("after")
            with pytest.raises(Fenced):
                old.check()
        book.close()
    assert [r["kind"] for r in journal.read(tmp_path / "journal")] == ["before"]


def test_the_lease_of_a_dead_process_or_of_a_silent_host_is_stale(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "lease").mkdir()
    import socket

    owner = {"host": socket.gethostname(), "pid": dead.pid, "renewed": time.time()}
    (tmp_path / "lease" / "000001").write_text(json.dumps(owner))
    with Lease(tmp_path).held() as lease:
        assert lease.attempt == 2
    (tmp_path / "lease" / "000003").write_text(json.dumps(owner | {"host": "elsewhere"}))
    with pytest.raises(BlockingIOError, match="elsewhere"), Lease(tmp_path).held():
        pass
    (tmp_path / "lease" / "000003").write_text(json.dumps(owner | {"host": "elsewhere", "renewed": time.time() - 31}))
    with Lease(tmp_path).held() as lease:
        assert lease.attempt == 4


def test_of_many_drivers_that_come_at_once_one_wins(tmp_path: Path) -> None:
    barrier, winners, losers = threading.Barrier(8), [], []

    def come() -> None:
        barrier.wait()
        try:
            with Lease(tmp_path).held() as lease:
                winners.append(lease.attempt)
                time.sleep(0.5)
        except BlockingIOError:
            losers.append(1)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (winners, len(losers)) == ([1], 7)


def recorded(path: Path, records: int) -> Path:
    """A journal of so many records, closed."""
    book = Journal(path)
    for i in range(records):
        book.write("note", version=i)
    book.close()
    return path


def test_the_journal_drops_a_record_cut_off_by_a_crash_and_goes_on(tmp_path: Path) -> None:
    path = recorded(tmp_path / "journal", 3)
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        book = Journal(path)
        book.write("note", version=9)
        book.close()
        assert [r["version"] for r in journal.read(path)] == [0, 1, 9]


def test_a_journal_with_any_byte_changed_loses_nothing_silently(tmp_path: Path) -> None:
    path = recorded(tmp_path / "journal", 3)
    whole = path.read_bytes()
    last = len(whole) - len(whole) // 3
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        Journal(path).close()
        aside = list(tmp_path.glob("journal.damaged-*"))
        # The last record may be taken for one cut off; whatever stands before it is kept, here or aside.
        kept = [r["version"] for r in journal.read(path)]
        assert aside or kept == [0, 1], position
        assert position >= last or aside
        for file in aside:
            assert file.read_bytes() == bytes(damaged)
            file.unlink()


def test_zeros_that_a_power_failure_left_at_the_end_are_dropped(tmp_path: Path) -> None:
    path = recorded(tmp_path / "journal", 1)
    path.write_bytes(path.read_bytes() + bytes(100))
    Journal(path).close()
    assert [r["version"] for r in journal.read(path)] == [0]
    assert not list(tmp_path.glob("journal.damaged-*"))


def test_a_journal_damaged_in_the_middle_is_set_aside_not_overwritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recorded(tmp_path / "journal", 3)
    damaged = bytearray(path.read_bytes())
    damaged[14] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged at byte 0"):
        list(journal.read(path))
    Journal(path).close()
    assert (tmp_path / "journal.damaged-0").read_bytes() == bytes(damaged)
    assert "set aside" in caplog.text
