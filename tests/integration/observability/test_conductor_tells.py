"""A real conductor and a real agent: what an operator's Prometheus, collector and log shipper get of them."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.deployment import Deployment
from tests.support.otlp_collector import Collector
from tests.support.ports import wait_for
from tests.support.projects import step_yaml, write_project
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import utcnow
from valohai_dagster.broker.access import control_plane_rules
from valohai_dagster.data.secrets import load_secret_key, set_variable
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.executions.trace_context import trace_id_of, traceparent_of

PASSWORD = secrets.token_urlsafe(16)
SECRET = secrets.token_urlsafe(16)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What was to be seen after one execution."""

    view: ExecutionView
    metrics: str
    conductor_log: str
    agent_log: str
    collector: Collector
    secret_key: str


@pytest.fixture
def told(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Told]:
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "control", *control_plane_rules(), f">{PASSWORD}")
    url = redis_server.unix_url.replace("unix://", f"unix://control:{PASSWORD}@")
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    for name, value in {
        "VALOHAI_REDIS_URL": url,
        "VALOHAI_SECRET_KEY": key,
        "VALOHAI_LOG_FORMAT": "json",
    }.items():
        monkeypatch.setenv(name, value)
    toml = 'http_port = 0\ndefault_group = "far"\n[groups.far]\nkind = "static"\n'
    with Collector() as collector, Deployment(tmp_path / "deployment", toml) as deployment:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield _run(deployment, url, collector, key, tmp_path / "project")


def _run(deployment: Deployment, url: str, collector: Collector, key: str, project: Path) -> Told:
    conductor = deployment.start_conductor()
    agent = deployment.start_agent("far", url, "--runtime", "process", "--log-format", "json")
    command = 'echo "{\\"parent\\": \\"$TRACEPARENT\\"}"; echo $TOKEN > $VH_OUTPUTS_DIR/t.txt'
    records = deployment.client().records
    with records.write() as conn:
        sealing = load_secret_key(deployment.settings)
        set_variable(
            conn, sealing, group="tokens", name="TOKEN", value=SECRET, now=utcnow(), secret=True
        )
    extra = "environment-variable-groups: [tokens]"
    view, _ = deployment.execute(write_project(project, step_yaml(command, extra=extra)))
    page = httpx.get(f"{conductor.url}/metrics", timeout=10)
    page.raise_for_status()
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    wait_for(lambda: len(collector.spans) >= 4, seconds=30, what="the spans")
    return Told(
        view=view,
        metrics=page.text,
        conductor_log=_log_of(deployment, "valohai_dagster"),
        agent_log=agent.log,
        collector=collector,
        secret_key=key,
    )


def _log_of(deployment: Deployment, name: str) -> str:
    return (deployment.root / f"{name}.log").read_text()


def test_metrics_spans_and_logs_of_one_execution(told: Told) -> None:
    assert (told.view.status, told.view.reason) == (ExecutionStatus.complete, None)
    _metrics_tell_it(told)
    _spans_tell_it(told)
    _logs_tell_it(told)
    _nothing_tells_a_secret(told)


def _metrics_tell_it(told: Told) -> None:
    lines = told.metrics.splitlines()
    for line in (
        'valohai_executions_ended_total{group="far",status="complete"} 1.0',
        'valohai_execution_phase_seconds_count{group="far",phase="running"} 1.0',
        'valohai_execution_phase_seconds_count{group="far",phase="queued"} 1.0',
        'valohai_queue_depth{group="far"} 0.0',
        'valohai_reports_applied_total{kind="finished"} 1.0',
        "valohai_shards_held 8.0",
        'valohai_worker_slots{group="far",use="all"} 1.0',
        "valohai_redis_up 1.0",
    ):
        assert line in lines, told.metrics
    assert "process_resident_memory_bytes" in told.metrics


def _spans_tell_it(told: Told) -> None:
    whole = next(span for span in told.collector.spans if not span.parent_span_id)
    below = [span for span in told.collector.spans if span.parent_span_id == whole.span_id]
    assert {"queued", "preparing", "running"} <= {span.name for span in below}
    assert int.from_bytes(whole.trace_id, "big") == trace_id_of(told.view.run_id, told.view.id)
    parent = traceparent_of(told.view.run_id, told.view.id)
    assert told.view.latest_metadata["parent"] == parent
    assert parent.split("-")[2] == whole.span_id.hex()


def _logs_tell_it(told: Told) -> None:
    for text in (told.conductor_log, told.agent_log):
        entries = [json.loads(line) for line in text.splitlines()]
        assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
        assert any(entry.get("execution") == told.view.id for entry in entries)
        ours = [entry for entry in entries if entry["logger"].startswith("valohai")]
        assert [entry for entry in ours if "action" not in entry] == []


def _nothing_tells_a_secret(told: Told) -> None:
    spans = b"".join(span.SerializeToString() for span in told.collector.spans).decode("latin-1")
    for secret in (PASSWORD, SECRET, told.secret_key):
        for text in (told.metrics, told.conductor_log, told.agent_log, spans):
            assert secret not in text
