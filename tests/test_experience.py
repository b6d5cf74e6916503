"""Whom a pool asks and how long it waits, without a pool."""

from __future__ import annotations

from cluster.fleet.messages import Assignment
from cluster.fleet.placement import Deadlines, Experience


def shard(ticket: int, attempt: int = 0, start: int = 0, verb: str = "gradient") -> Assignment:
    return Assignment(ticket, attempt, verb, 1, None, "train", start, start + 4, 0)


def test_deadlines_are_learnt_from_shards_that_need_no_compilation() -> None:
    experience = Experience(Deadlines(factor=10.0, floor=3.0, first=600.0))
    assert experience.deadline("a", "gradient") == 600
    experience.answered("a", shard(0), 100.0)  # its first: perhaps it compiled
    assert experience.deadline("a", "gradient") == 600  # nothing is known yet
    for seconds in (0.5, 0.7, 0.9):
        experience.answered("a", shard(1), seconds)
    assert experience.deadline("a", "gradient") == 7.0
    assert experience.deadline("b", "gradient") == 600  # a newcomer
    for _ in range(64):
        experience.answered("a", shard(1), 0.01)
    assert experience.deadline("a", "gradient") == 3.0
    experience.lost("a")
    assert experience.deadline("a", "gradient") == 600


def test_work_goes_to_who_did_it_before_then_to_the_least_busy_and_again_to_another() -> None:
    experience = Experience(Deadlines())
    assert experience.choose(shard(0), {"a": 1, "b": 0, "c": 2}) == "b"
    experience.answered("c", shard(0, start=8), 1.0)
    assert experience.choose(shard(1, start=8), {"a": 0, "b": 0, "c": 3}) == "c"  # it remembers those tasks
    assert experience.choose(shard(2, start=8), {"a": 0, "b": 1, "c": 4}) == "a"  # but not at any price
    assert experience.choose(shard(0, attempt=1), {"a": 1, "b": 0}) == "a"  # b was asked before
    assert experience.choose(shard(0, attempt=2), {"a": 0}) == "a"  # there is no other
