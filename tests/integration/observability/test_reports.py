"""What is known of a report's way: how many of which kind were applied, and when the agent made the one that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tests.support.redis_server import RedisServer
from tests.support.service import make_spec, running_service, static_settings
from valohai_agent import protocol as p
from valohai_dagster import telemetry
from valohai_dagster.executions.stream import EventKind
from valohai_dagster.settings import Settings
from valohai_dagster.telemetry import Count, Seconds


class Kinds(Counter[str]):
    def count(self, what: Count, amount: float, labels: Mapping[str, str]) -> None:
        if what is Count.reports:
            self[labels["kind"]] += int(amount)

    def observe(self, what: Seconds, seconds: float, labels: Mapping[str, str]) -> None: ...


def test_each_report_counts_once_and_its_events_know_when_it_was_made(
    settings: Settings, redis_server: RedisServer
) -> None:
    kinds = Kinds()
    with running_service(static_settings(settings)) as service, telemetry.listening(kinds):
        spec = make_spec()
        service.client.submit(spec)
        lease = service.agent(redis_server).take()
        leased = lease.leased()
        lease.wait_grants()
        running = lease.report(p.PhaseChanged(phase=p.Phase.running))
        lease.report(p.PhaseChanged(phase=p.Phase.running), seq=2)  # delivered again
        finished = lease.finish()
        events = service.events(spec.execution_id, lambda e: e.kind is EventKind.final)
        told = {event.reported_at for event in events if event.reported_at is not None}
        assert told == {leased.time, running.time, finished.time}
        assert events[-1].reported_at == finished.time
    assert kinds == {"leased": 1, "phase": 1, "finished": 1}
