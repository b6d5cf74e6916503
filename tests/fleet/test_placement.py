"""Whom a pool asks and how long it waits, without a pool."""

from __future__ import annotations

from cluster.fleet.deadlines import Deadlines, Patience
from cluster.fleet.messages import Assignment
from cluster.fleet.placement import Placement


def shard(ticket: int, attempt: int = 0, start: int = 0) -> Assignment:
    return Assignment(ticket, attempt, "gradient", 1, None, "train", start, start + 4, 0)


def test_deadlines_are_learnt_from_shards_that_need_no_compilation() -> None:
    patience = Patience(Deadlines(factor=10.0, floor=3.0, first=600.0))
    assert patience.deadline("a", "gradient") == 600
    patience.answered("a", "gradient", 100.0)  # its first: perhaps it compiled
    assert patience.deadline("a", "gradient") == 600  # nothing is known yet
    for seconds in (0.5, 0.7, 0.9):
        patience.answered("a", "gradient", seconds)
    assert patience.deadline("a", "gradient") == 7.0
    assert patience.deadline("b", "gradient") == 600  # a newcomer
    for _ in range(64):
        patience.answered("a", "gradient", 0.01)
    assert patience.deadline("a", "gradient") == 3.0
    patience.lost("a")
    assert patience.deadline("a", "gradient") == 600


def test_work_goes_to_who_did_it_before_then_to_the_least_busy_and_again_to_another() -> None:
    placement = Placement()
    assert placement.choose(shard(0), {"a": 1, "b": 0, "c": 2}) == "b"
    placement.answered("c", shard(0, start=8))
    assert placement.choose(shard(1, start=8), {"a": 0, "b": 0, "c": 3}) == "c"  # it remembers those tasks
    assert placement.choose(shard(2, start=8), {"a": 0, "b": 1, "c": 4}) == "a"  # but not at any price
    assert placement.choose(shard(0, attempt=1), {"a": 1, "b": 0}) == "a"  # b was asked before
    assert placement.choose(shard(0, attempt=2), {"a": 0}) == "a"  # there is no other
