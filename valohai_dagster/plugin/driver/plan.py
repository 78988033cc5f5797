"""One run's way through its plan: Dagster's own state machine, fed with events and asked for steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster import DagsterInstance, DagsterRun

from valohai_dagster.plugin.compat.engine import (
    ActiveExecution,
    DagsterEvent,
    ExecutionStep,
    InstanceConcurrencyContext,
    RetryMode,
    StepDependencyConfig,
    put_back,
)
from valohai_dagster.plugin.driver.facts import JobFacts
from valohai_dagster.plugin.driver.recovery import Past

POOL_MESSAGE_SECONDS = 300.0  # a step that stays blocked says so again after this long


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run's config asks of its executor, as far as it concerns the order of steps."""

    retries: RetryMode = RetryMode.ENABLED
    max_concurrent: int | None = None  # steps at once; None = as many as the plan allows
    tag_limits: tuple[Mapping[str, Any], ...] = ()
    require_upstream_success: bool = True


def limits_of(run_config: Mapping[str, Any]) -> Limits:
    """Of the config with defaults. Steps wait for machines, not for this host's processors, so no limit is implied."""
    config = (run_config.get("execution") or {}).get("config") or {}
    in_process = "in_process" in config
    inner = config.get("multiprocess") or config.get("in_process") or config
    if not isinstance(inner, Mapping):
        return Limits()
    dependency = inner.get("step_dependency_config") or {}
    return Limits(
        retries=RetryMode.from_config(inner.get("retries") or {}) or RetryMode.ENABLED,
        max_concurrent=1 if in_process else inner.get("max_concurrent") or None,
        tag_limits=tuple(inner.get("tag_concurrency_limits") or ()),
        require_upstream_success=dependency.get("require_upstream_step_success", True),
    )


class Plan:
    """Without pools nothing here blocks; with pools `next_steps` and `handle` talk to the database."""

    def __init__(self, facts: JobFacts, limits: Limits) -> None:
        self._limits = limits
        self._active = ActiveExecution(
            facts.plan,
            limits.retries,
            step_dependency_config=StepDependencyConfig(
                require_upstream_step_success=limits.require_upstream_success
            ),
        )
        self._active.__enter__()
        self._pools: InstanceConcurrencyContext | None = None
        self._told_blocked: dict[str, float] = {}

    def resume(self, past: Past) -> list[ExecutionStep]:
        """Replays what the log says; returns the steps whose present try had begun.

        Without limits and pools, since those only decided when a step began. Steps that had not begun go back.
        """
        active = self._active
        active.rebuild_from_events(past.step_events)
        begun = put_back(active, keep=past.begun)
        for key, when in past.retried_at.items():
            waiting = active._waiting_to_retry
            if key in waiting:
                delay = waiting[key] - time.time()
                waiting[key] = when + delay
        return begun

    def limit(self, instance: DagsterInstance, run: DagsterRun, *, pools: bool) -> None:
        """From now on the run's own limits and the instance's pools hold."""
        self._active._max_concurrent = self._limits.max_concurrent
        self._active._tag_concurrency_limits = [dict(limit) for limit in self._limits.tag_limits]
        if pools:
            self._pools = InstanceConcurrencyContext(instance, run)
            self._pools.__enter__()
            self._active._instance_concurrency_context = self._pools

    def claim_again(self, keys: Sequence[tuple[str, str]]) -> None:
        """Claims the pool slots of steps that hold them already: (pool, step key)."""
        for pool, key in keys:
            if self._pools is not None:
                self._pools.claim(pool, key)

    @property
    def complete(self) -> bool:
        return self._active.is_complete

    def previous_attempts(self, step_key: str) -> int:
        return self._active.retry_state.get_attempt_count(step_key)

    def next_steps(self) -> list[ExecutionStep]:
        """Steps to begin now; those that wait for a pool ask it again."""
        if self._pools is not None:
            for key in self._pools.pending_claim_steps():
                self._pools._pending_timeouts[key] = 0.0
        return list(self._active.get_steps_to_execute())

    def blocked(self) -> list[tuple[str, bool]]:
        """Steps to tell that they wait for a pool, and whether for the first time."""
        if self._pools is None:
            return []
        now, out = time.time(), []
        for key in self._pools.pending_claim_steps():
            told = self._told_blocked.get(key)
            if told is None or now - told > POOL_MESSAGE_SECONDS:
                self._told_blocked[key] = now
                out.append((key, told is None))
        return out

    @property
    def waits_for_pool(self) -> list[str]:
        return self._pools.pending_claim_steps() if self._pools is not None else []

    def skips(self) -> list[tuple[ExecutionStep, list[str]]]:
        """Steps to skip now, with the outputs that they miss."""
        out = []
        for step in self._active.get_steps_to_skip():
            out.append((step, list(self._active._skipped_deps[step.key])))
            self._active.mark_skipped(step.key)
        return out

    def abandons(self) -> list[tuple[ExecutionStep, list[str], list[str]]]:
        """Steps that will not run, with the steps before them that failed, and those that were not run either."""
        out = []
        for step in self._active.get_steps_to_abandon():
            failed, abandoned = list[str](), list[str]()
            for item in step.step_inputs:
                failed += self._active._failed & item.dependency_keys
                abandoned += self._active._abandoned & item.dependency_keys
            out.append((step, failed, abandoned))
            self._active.mark_abandoned(step.key)
        return out

    def handle(self, event: DagsterEvent) -> None:
        self._active.handle_event(event)

    def seconds_to_retry(self) -> float | None:
        """Until the next step that waits for its retry may begin; None when none waits."""
        times = self._active._waiting_to_retry.values()
        return max(0.0, min(times) - time.time()) if times else None

    def close(self) -> None:
        """Withdraws the claims that still wait."""
        if self._pools is not None:
            self._pools.__exit__(None, None, None)
