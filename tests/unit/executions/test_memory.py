"""What a conductor keeps in memory."""

from __future__ import annotations

import dataclasses

from valohai_dagster.executions.memory import Active, Memory, Recent
from valohai_dagster.executions.stream import ExecutionStatus as Status


def active(name: str = "a", shard: int = 1, status: Status = Status.queued) -> Active:
    return Active(id=name, shard=shard, group="g", status=status)


def memory_with(*actives: Active, shards: tuple[int, ...] = (1,)) -> Memory:
    memory = Memory()
    memory.take_shards(dict.fromkeys(shards, 1), actives)
    return memory


def test_an_execution_that_has_ended_is_forgotten():
    memory = memory_with(active())
    memory.settle({"a": active(status=Status.complete)})
    assert memory.active == {}


def test_an_execution_that_went_to_anothers_shard_is_forgotten():
    memory = memory_with(active())
    memory.settle({"a": active(shard=2)})
    assert memory.active == {}


def test_what_a_transaction_changed_replaces_what_was_known():
    memory = memory_with(active())
    memory.settle({"a": dataclasses.replace(active(), last_seq=7)})
    assert memory.active["a"].last_seq == 7


def test_a_shard_that_goes_takes_its_executions_with_it_and_no_others():
    memory = memory_with(active("a", 1), active("b", 2), shards=(1, 2))
    memory.drop_shard(1)
    assert list(memory.active) == ["b"]
    assert memory.fences == {2: 1}


def test_a_shard_that_is_taken_again_is_known_anew():
    memory = memory_with(active("old"))
    memory.take_shards({1: 2}, [active("new")])
    assert list(memory.active) == ["new"]
    assert memory.fences == {1: 2}


def test_only_what_was_used_last_is_kept():
    recent: Recent[str] = Recent(2)
    recent.put("a", "A")
    recent.put("b", "B")
    assert recent.get("a") == "A"
    recent.put("c", "C")
    assert recent.get("b") is None
    assert (recent.get("a"), recent.get("c")) == ("A", "C")
