"""The rules of Dagster's run queue that concern one run. Pure.

The run coordinator asks whether there is any (then the run must queue), `valohai-dagster why` asks which one holds a
queued run back. What the queue's daemon itself does with them: `_daemon/run_coordinator/` of Dagster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from valohai_dagster.executions.waiting import counted

if TYPE_CHECKING:
    from dagster import DagsterRun

    from valohai_dagster.plugin.compat import ConcurrencyConfig, RunOpConcurrency, RunQueueConfig

NO_LIMIT = -1
ENGINE_RUN_LIMIT = 10  # runs of Dagster's engine at once, each a process; Dagster's own default
DRIVER_TAG = "valohai/driver"  # on runs: who drives this one; the coordinator writes it
BY_DAGSTER = "dagster"
BY_CONDUCTOR = "conductor"


@dataclass(frozen=True, kw_only=True)
class QueueRule:
    """A limit that the run counts towards. `limit` is None for pools, whose limits are in the event log storage."""

    kind: Literal["runs", "tag", "pool"]
    text: str
    limit: int | None = None
    name: str = ""  # of the tag or the pool
    value: str | None = None  # of the tag, when only runs with this value count

    def counts(self, run: DagsterRun) -> bool:
        """Whether a run in progress takes one of the places."""
        if self.kind == "runs":
            return True
        if self.kind == "pool":
            pools = run.run_op_concurrency
            return pools is not None and self.name in _all_pools(pools)
        found = run.tags.get(self.name)
        return found is not None and self.value in (None, found)


def rules_for(
    run: DagsterRun, config: ConcurrencyConfig, *, root_pools: bool = False
) -> list[QueueRule]:
    """Every rule that could make this run wait in the queue, whoever else runs now.

    Pools count where they have run granularity. With op granularity a run of ours starts and its steps wait for their
    slots; the queue would hold it back while all its first steps must wait, which `root_pools` adds.
    """
    queue = config.run_queue_config
    if queue is None:
        return []
    found = [_of_runs(queue.max_concurrent_runs)] if queue.max_concurrent_runs != NO_LIMIT else []
    tags = (_of_tag(limit, run.tags) for limit in queue.tag_concurrency_limits or ())
    found += [rule for rule in tags if rule is not None]
    return [*found, *_of_pools(run, config, queue, root_pools)]


def bounds_engine_runs(config: ConcurrencyConfig) -> bool:
    """Whether any rule bounds how many runs of Dagster's own engine, each a process, there are at once."""
    queue = config.run_queue_config
    if queue is None:
        return True  # another coordinator, with rules of its own
    marked = {DRIVER_TAG: BY_DAGSTER}
    return queue.max_concurrent_runs != NO_LIMIT or any(
        _of_tag(limit, marked) is not None for limit in queue.tag_concurrency_limits or ()
    )


def _of_runs(limit: int) -> QueueRule:
    return QueueRule(kind="runs", text=f"at most {counted(limit, 'run')} at once", limit=limit)


def _of_tag(limit: Mapping[str, Any], tags: Mapping[str, str]) -> QueueRule | None:
    """The rule of one entry of `tag_concurrency_limits`, None when the run does not carry the tag."""
    key, value, count = limit["key"], limit.get("value"), limit["limit"]
    carried = tags.get(key)
    if carried is None or (isinstance(value, str) and value != carried):
        return None
    each = isinstance(value, Mapping) and value.get("applyLimitPerUniqueValue")
    only = carried if each or isinstance(value, str) else None
    shown = f"{key}={only}" if only is not None else key
    text = f"at most {counted(count, 'run')} with the tag {shown} at once"
    return QueueRule(kind="tag", text=text, limit=count, name=key, value=only)


def _of_pools(
    run: DagsterRun, config: ConcurrencyConfig, queue: RunQueueConfig, root_pools: bool
) -> Iterator[QueueRule]:
    pools = run.run_op_concurrency
    if pools is None or not queue.should_block_op_concurrency_limited_runs:
        return
    granularity = config.pool_config.pool_granularity
    names: frozenset[str] = frozenset()
    if granularity is not None and granularity.value == "run":
        names = _all_pools(pools)
    elif root_pools and not pools.has_unconstrained_root_nodes:
        names = frozenset(pools.root_key_counts)
    for name in sorted(names):
        yield QueueRule(kind="pool", text=f"the limit of pool {name}", name=name)


def _all_pools(pools: RunOpConcurrency) -> frozenset[str]:
    return frozenset(pools.all_pools or pools.root_key_counts)
