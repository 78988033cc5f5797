"""The execution service against a real Redis and real records, with agents that the tests play."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_agent import protocol as p
from valohai_dagster.data.placement import public_url
from valohai_dagster.data.secrets import load_secret_key, set_variable
from valohai_dagster.executions.spec_model import InputSpec, ProjectRef
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import StaticGroupSettings


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


def final_view(service: RunningService, execution_id: str) -> ExecutionView:
    return ExecutionView.model_validate(service.final(execution_id).data)


def test_l01_an_execution_goes_from_created_over_queued_and_started_to_complete(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec(parameters={"epochs": 3, "skip": None})
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    assert lease.job.parameters == {"epochs": 3}  # K-32: no nulls
    lease.leased()
    grants = lease.wait_grants()
    assert grants.initial
    assert grants.archive is not None
    datum_id = lease.store("models/model.pkl", b"weights")
    lease.report(p.MetadataEvents(events=[{"loss": 0.5, "_time": "2026-01-01T00:00:00Z"}]))
    lease.report(p.MetadataEvents(events=[{"accuracy": 0.9}, {"loss": 0.1}]))
    lease.finish(exit_code=0)
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata["loss"] == 0.1
    assert view.latest_metadata["accuracy"] == 0.9
    assert [(o.id, o.name, o.size) for o in view.outputs] == [(datum_id, "models/model.pkl", 7)]
    assert view.outputs[0].url == service.settings.datum_url(datum_id)
    assert view.counter == 1


def test_submitting_twice_makes_one_execution_and_tells_how_it_stands(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    time.sleep(0.3)
    assert agent.try_take() is None
    lease.leased()
    lease.finish()
    service.final(spec.execution_id)
    service.client.submit(spec)
    time.sleep(0.3)
    kinds = [e.kind for e in service.events(spec.execution_id, lambda e: e.kind is EventKind.final)]
    assert kinds.count(EventKind.snapshot) >= 1
    with service.records.read() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(t.executions)).scalar() == 1


def test_a_required_input_that_cannot_be_resolved_refuses_the_execution_with_all_problems(
    service: RunningService,
):
    inputs = [
        InputSpec(name="data", uris=["datum://no-such-alias"]),
        InputSpec(name="more", uris=["store://local/nothing/*.csv"]),
    ]
    spec = make_spec(inputs=inputs)
    service.client.submit(spec)
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.error
    assert "no-such-alias" in str(view.reason)
    assert "nothing/*.csv" in str(view.reason)


def test_an_unknown_environment_runs_in_the_default_group_and_says_so(
    service: RunningService, redis_server: RedisServer
):
    service.client.submit(make_spec(environment="aws-eu-west-1-p3"))
    lease = service.agent(redis_server).take()
    assert any("aws-eu-west-1-p3" in notice for notice in lease.job.notices)


def test_secrets_travel_only_in_sealed_grants(service: RunningService, redis_server: RedisServer):
    key = load_secret_key(service.settings)
    with service.records.write() as conn:
        now = datetime.now(timezone.utc)
        set_variable(conn, key, group="aws", name="TOKEN", value="s3cr3t-token-value", now=now)
        set_variable(conn, key, group="aws", name="REGION", value="eu", now=now, secret=False)
    service.client.submit(make_spec(environment_variable_groups=["aws"]))
    lease = service.agent(redis_server).take()
    lease.leased()
    deadline = time.monotonic() + 5
    stream = service.keys.grant("local", lease.job.execution_id)
    with redis_server.client() as client:
        while not client.exists(stream):
            assert time.monotonic() < deadline
        for found in client.scan_iter():
            kind: Any = client.type(found)
            kind = kind.decode()
            content = repr(client.xrange(found) if kind == "stream" else client.dump(found))
            assert "s3cr3t-token-value" not in content, found
    assert lease.job.environment_variables == {"REGION": "eu"}
    assert lease.wait_grants().secrets == {"TOKEN": "s3cr3t-token-value"}


def test_l02_a_waiting_execution_is_stopped_at_once(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: e.kind is EventKind.snapshot)
    service.client.stop(spec.execution_id, reason="changed my mind")
    view = final_view(service, spec.execution_id)
    assert (view.status, view.reason) == (ExecutionStatus.stopped, "changed my mind")
    assert service.agent(redis_server).try_take() is None


def test_l20_a_stop_reaches_the_worker_and_a_second_one_is_hard(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    service.client.stop(spec.execution_id)
    service.events(spec.execution_id, lambda e: "stop sent to worker" in e.message)
    lease.report(p.StopAcknowledged(signal="SIGINT"))
    service.client.stop(spec.execution_id)
    service.events(spec.execution_id, lambda e: "stop-hard sent" in e.message)
    assert [c.kind for c in agent.commands()] == ["stop", "stop-hard"]
    lease.finish(p.Outcome.complete)  # L-03
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.stopped


def test_reports_under_a_wrong_token_have_no_effect_and_fence_their_sender(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    lease.report(p.Finished(outcome=p.Outcome.error), seq=99, token="stolen")
    lease.report(p.Warned(message="from a fenced one"), seq=98, token="stolen")
    lease.finish()
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.complete
    assert "fence" in [c.kind for c in agent.commands()]


def test_a_report_delivered_twice_applies_once(service: RunningService, redis_server: RedisServer):
    spec = make_spec()
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    report = lease.report(p.MetadataEvents(events=[{"n": 1}]))
    agent.send(report, lease.job.shard)
    lease.finish()
    service.final(spec.execution_id)
    with service.records.read() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(t.metadata_events)).scalar() == 1


def test_an_output_without_a_grant_never_becomes_a_datum(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.report(p.OutputStored(upload_id="forged", name="x", size=1, checksums=p.Checksums()))
    lease.finish()
    assert final_view(service, spec.execution_id).outputs == []


def test_an_output_with_a_line_break_in_its_name_is_told_on_one_line(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    lease.store("new\nline", b"x")
    lease.finish()
    events = list(service.client.follow(spec.execution_id))
    told = [e.message for e in events if e is not None and e.kind is EventKind.output]
    assert told == ["stored output new\\nline"]
    assert [o.name for o in final_view(service, spec.execution_id).outputs] == ["new\nline"]


def test_a_service_that_dies_is_followed_by_one_that_goes_on(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    service.kill()
    lease.report(p.MetadataEvents(events=[{"while": "nobody listens"}]))
    lease.finish(exit_code=0)
    service.start()
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata["while"] == "nobody listens"


def test_an_execution_submitted_while_no_service_runs_is_taken_up_later(
    service: RunningService, redis_server: RedisServer
):
    service.kill()
    spec = make_spec()
    service.client.submit(spec)
    service.start()
    assert service.agent(redis_server).take().job.execution_id == spec.execution_id


def test_a_job_of_a_newer_protocol_stays_in_the_queue_for_an_agent_that_speaks_it(
    service: RunningService, redis_server: RedisServer
):
    service.client.submit(make_spec())
    agent = service.agent(redis_server)
    redis_server.client().blpop([service.keys.bell("local")], timeout=5)
    assert agent.try_take(protocol=(p.PROTOCOL_VERSION + 1, p.PROTOCOL_VERSION + 2)) is None
    assert agent.try_take() is not None


def test_i32_changed_content_under_one_url_is_warned_about(
    service: RunningService, redis_server: RedisServer
):
    agent = service.agent(redis_server)
    for sha in ("a" * 64, "b" * 64):
        spec = make_spec(inputs=[InputSpec(name="data", uris=["http://example.org/data.csv"])])
        service.client.submit(spec)
        lease = agent.take()
        lease.leased()
        lease.wait_grants()
        file = lease.job.inputs[0].files[0]
        checksums = p.Checksums(sha256=sha)
        lease.report(
            p.InputReady(input="data", file_id=file.id, name=file.name, size=3, checksums=checksums)
        )
        lease.finish()
        events = service.events(spec.execution_id, lambda e: e.kind is EventKind.final)
        warned = [e.message for e in events if e.kind is EventKind.warning]
    assert any("http://example.org/data.csv" in text for text in warned)


def test_credentials_in_an_input_url_reach_only_the_agent(
    service: RunningService, redis_server: RedisServer
):
    url = "http://user:hunter22@example.org/data.csv?private_token=hunter22&v=hunter22"
    spec = make_spec(inputs=[InputSpec(name="data", uris=[url])])
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    assert [transfer.url for transfer in lease.wait_grants().inputs.values()] == [url]
    service.kill()
    service.client.submit(spec)  # a submission that nobody has read yet
    with redis_server.client() as client:
        assert not any(b"hunter22" in (client.dump(key) or b"") for key in client.scan_iter())
    with service.records.read() as conn:
        assert "hunter22" not in repr(conn.execute(sa.select(t.executions)).all())
        assert "hunter22" not in repr(conn.execute(sa.select(t.execution_inputs)).all())


def test_an_address_that_is_handed_on_as_it_is_shown_reaches_the_agent_whole(
    service: RunningService, redis_server: RedisServer
):
    """As by an edge from an input to an input: in the same run, and in a later one."""
    url = "http://user:hunter22@example.org/data.csv?page=hunter22"
    agent, shown = service.agent(redis_server), url

    def used(run_id: str) -> str:
        spec = make_spec(inputs=[InputSpec(name="data", uris=[shown])], run_id=run_id)
        service.client.submit(spec)
        lease = agent.take()
        lease.leased()
        assert [transfer.url for transfer in lease.wait_grants().inputs.values()] == [url]
        file = lease.job.inputs[0].files[0]
        sums = p.Checksums(sha256="a" * 64)
        lease.report(
            p.InputReady(input="data", file_id=file.id, name=file.name, size=3, checksums=sums)
        )
        lease.finish()
        return final_view(service, spec.execution_id).inputs[0].uri

    shown = used("one")
    assert "hunter22" not in shown
    assert used("one") == used("two") == shown


def test_an_address_that_this_project_knows_as_it_is_shown_only_is_refused(
    service: RunningService, redis_server: RedisServer
):
    url = "http://example.org/data.csv?page=1"
    first = make_spec(inputs=[InputSpec(name="data", uris=[url])], run_id="one")
    service.client.submit(first)
    service.agent(redis_server).take().leased()
    inputs = [InputSpec(name="data", uris=[public_url(url)])]
    spec = make_spec(inputs=inputs, project=ProjectRef(name="another"), run_id="one")
    service.client.submit(spec)
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.error
    assert "give the whole address" in str(view.reason)


def test_m40_a_metadata_event_that_meets_the_stop_condition_stops_the_execution(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec(stop_condition="metadata.accuracy > parameter.goal", parameters={"goal": 0.9})
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    lease.report(p.MetadataEvents(events=[{"loss": 1}, {"accuracy": 0.5}]))
    lease.report(p.MetadataEvents(events=[{"accuracy": 0.95}, {"accuracy": 0.6}]))
    service.events(spec.execution_id, lambda e: "stop sent to worker" in e.message)
    assert [c.kind for c in agent.commands()] == ["stop"]
    assert agent.commands()[0].reason == f"stop-condition met: {spec.stop_condition}"
    lease.finish(p.Outcome.stopped, reason="stopped on request")
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.stopped
    assert view.reason == f"stop-condition met: {spec.stop_condition}"


def test_m53_a_stop_condition_that_cannot_be_evaluated_is_false_and_said_once(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec(stop_condition="metadata.nothing > 1")
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    for step in range(3):
        lease.report(p.MetadataEvents(events=[{"step": step}]))
    lease.finish()
    events = service.events(spec.execution_id, lambda e: e.kind is EventKind.final)
    assert sum("stop-condition" in e.message for e in events) == 1
    assert final_view(service, spec.execution_id).status is ExecutionStatus.complete


def test_k73_project_variables_stand_between_groups_and_the_step(
    service: RunningService, redis_server: RedisServer
):
    key = load_secret_key(service.settings)
    now = datetime.now(timezone.utc)
    with service.records.write() as conn:
        for group, name in (
            ("g", "A"),
            ("g", "B"),
            ("g", "C"),
            ("project:digits", "B"),
            ("project:digits", "C"),
        ):
            value = f"{name} of {group}"
            set_variable(conn, key, group=group, name=name, value=value, secret=False, now=now)
        secret = "project-secret-1"
        set_variable(conn, key, group="project:digits", name="S", value=secret, now=now)
    values = {"C": "C of the step"}
    service.client.submit(
        make_spec(environment_variable_groups=["g"], environment_variables=values)
    )
    lease = service.agent(redis_server).take()
    assert lease.job.environment_variables == {
        "A": "A of g",
        "B": "B of project:digits",
        "C": "C of the step",
    }
    lease.leased()
    assert lease.wait_grants().secrets == {"S": secret}


def test_k36_execution_json_names_the_environment_that_it_really_runs_in(
    service: RunningService, redis_server: RedisServer
):
    service.client.submit(make_spec(environment="no-such-place"))
    config = service.agent(redis_server).take().job.execution_config
    assert config["valohai.environment-slug"] == "local"
    assert config["valohai.project-name"] == "local/digits"


def test_c22_k51_a_group_can_choose_fail_fast_and_the_images_own_user(
    settings: Settings, redis_server: RedisServer
):
    group = StaticGroupSettings(kind="static", fail_fast=True, respect_image_user=True)
    with running_service(static_settings(settings, groups={"local": group})) as service:
        service.client.submit(make_spec())
        job = service.agent(redis_server).take().job
    assert (job.fail_fast, job.respect_image_user) == (True, True)


def test_k60_the_agent_is_told_the_port_and_the_public_key(
    service: RunningService, redis_server: RedisServer
):
    wanted = p.RemoteDebug(port=2222, key="ssh-ed25519 AAAA")
    service.client.submit(make_spec(remote_debug=wanted))
    assert service.agent(redis_server).take().job.remote_debug == wanted


def test_who_waits_in_a_group_without_workers_is_told_how_to_start_one(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("valohai_dagster.executions.wait_telling.LONG_WAIT", timedelta(0))
    spec = make_spec()
    service.client.submit(spec)
    events = service.events(spec.execution_id, lambda e: e.kind is EventKind.warning)
    assert "valohai-agent run --queue local" in events[-1].message


def test_a_worker_whose_clock_is_an_hour_off_leaves_true_times_in_the_records(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    hour = timedelta(hours=1)
    began = datetime.now(timezone.utc)
    span = p.PhaseSpan(phase="running", started_at=began - hour, ended_at=began - hour)
    report = lease.report(p.Warned(message="next one is late"))
    finished = report.model_copy(
        update={
            "seq": report.seq + 1,
            "clock_offset_seconds": hour.total_seconds(),
            "body": p.Finished(outcome=p.Outcome.complete, phases=[span]),
        }
    )
    agent.send(finished, lease.job.shard)
    view = final_view(service, spec.execution_id)
    assert abs((view.phases[0].started_at - began).total_seconds()) < 1


def test_m12_a_metric_that_is_not_a_number_is_stored(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    lease.report(p.MetadataEvents(events=[{"loss": float("nan"), "epoch": 1}]))
    lease.finish()
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata["epoch"] == 1


def test_o08_metadata_that_comes_to_be_known_later_replaces_that_of_a_live_output(
    service: RunningService, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    datum_id = lease.store("model.pkl", b"weights", epoch=1)
    late = {"epoch": 2, "valohai.alias": "best-model"}
    checksums = p.Checksums()
    lease.report(
        p.OutputStored(
            upload_id=datum_id, name="model.pkl", size=7, checksums=checksums, metadata=late
        )
    )
    lease.finish()
    (output,) = final_view(service, spec.execution_id).outputs
    assert output.metadata == late
    assert output.sha256 is not None
    with service.records.read() as conn:
        assert conn.execute(sa.select(t.datum_aliases.c.datum_id)).scalar_one() == datum_id


def test_garbage_in_the_streams_is_dropped_and_stops_nothing(
    service: RunningService, redis_server: RedisServer
):
    with redis_server.client() as client:
        for entry in (
            {"s": "{broken"},
            {"x": "1"},
            {"s": '{"kind": "dance", "execution_id": "1"}'},
        ):
            client.xadd(service.keys.submissions(0), entry)  # type: ignore[arg-type]
        for entry in ({"r": "{broken"}, {"x": "1"}, {"r": '{"v": 99}'}):
            client.xadd(service.keys.reports("local"), entry)  # type: ignore[arg-type]
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    lease.finish()
    assert final_view(service, spec.execution_id).status is ExecutionStatus.complete


def test_a_defect_of_the_service_ends_the_execution_with_the_reason_instead_of_leaving_it_for_ever(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("valohai_dagster.executions.admission.prepare", broken)
    spec = make_spec()
    service.client.submit(spec)
    view = final_view(service, spec.execution_id)
    assert view.status is ExecutionStatus.crashed
    assert "a defect" in str(view.reason)
