"""A Redis that has forgotten the users of machines gets them back from the service, and nothing that runs is lost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from tests.support.agent_process import AgentProcess
from tests.support.ports import wait_for
from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, running_service, static_settings
from valohai_agent.machine.messages import JoinRequest
from valohai_agent.protocol import utcnow
from valohai_dagster.broker.access import control_plane_rules
from valohai_dagster.capacity.bootstrap.joining import (
    Admission,
    admit_machines,
    agents_passwords,
    fresh_token,
    machines_user,
    make_user,
    redeem,
    redis_address,
    ticket_of,
)
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.executions import machine_users
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings

GROUP = "local"


@pytest.fixture
def service(settings: Settings, own_redis: RedisServer) -> Iterator[RunningService]:
    settings = static_settings(settings, redis_url=own_redis.url)
    with running_service(settings) as service:
        yield service


def joined(service: RunningService) -> str:
    """The address of Redis that a machine of the group got when it joined."""
    token, settings, now = fresh_token(), service.settings, utcnow()
    key, deployment = load_secret_key(settings), service.keys.deployment
    request = JoinRequest(token=token, machine_id="m-1", public_key="0" * 64)
    with service.records.write() as conn:
        admit_machines(conn, token, group=GROUP, uses=1, now=now, life=timedelta(hours=1))
        admission = redeem(conn, request, now=now)
        assert admission == Admission(group=GROUP, machine_id="m-1")
        ticket_of(conn, key, admission, request.public_key, now=now)
        passwords = agents_passwords(conn, key, deployment, GROUP)
    make_user(settings, service.keys, GROUP, passwords)
    address, _ = redis_address(settings, machines_user(deployment, GROUP), passwords.current)
    return address


def opens(address: str) -> bool:
    with redis.Redis.from_url(address) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


@pytest.mark.slow
def test_what_runs_on_a_joined_machine_goes_on_when_redis_was_restarted(
    service: RunningService, own_redis: RedisServer, namespaces: None, tmp_path: Path
) -> None:
    flag = tmp_path / "end"
    command = f"echo begun; while [ ! -e {flag} ]; do sleep 0.1; done"
    project = write_project(tmp_path / "project", step_yaml(command))
    address = joined(service)
    options = ("--queue", GROUP, "--deployment", service.keys.deployment)
    agent = AgentProcess(address, tmp_path / "work", *options)
    try:
        spec = spec_of(project, "run", service.settings, environment=GROUP)
        service.client.submit(spec)
        log = service.keys.log(GROUP, spec.execution_id, 1)
        with own_redis.client() as client:
            wait_for(lambda: client.xlen(log), seconds=30, what="the command's output")
        own_redis.restart()
        wait_for(lambda: opens(address), what="the machine's user")
        flag.touch()
        told = service.events(spec.execution_id, lambda e: e.kind is EventKind.final, timeout=30)
        view = ExecutionView.model_validate(told[-1].data)
        assert (view.status, view.attempt) == (ExecutionStatus.complete, 1), agent.log
    finally:
        agent.stop()


def test_a_service_that_starts_makes_the_users_of_machines_that_have_joined(
    service: RunningService, own_redis: RedisServer
) -> None:
    address = joined(service)
    service.leave()
    own_redis.restart(empty=True)
    assert not opens(address)
    service.start()
    wait_for(lambda: opens(address), what="the machine's user")


def test_a_user_that_somebody_removed_comes_back(
    service: RunningService, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_users, "ANYWAY_SECONDS", 0.5)
    address = joined(service)
    with own_redis.client() as client:
        client.acl_deluser(machines_user(service.keys.deployment, GROUP))
    wait_for(lambda: opens(address), what="the machine's user")


@pytest.mark.parametrize("further", ["+info", "-info"])
def test_a_control_plane_that_may_not_make_users_says_so_and_goes_on(
    service: RunningService,
    own_redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
    further: str,
) -> None:
    joined(service)
    service.leave()
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "control", *control_plane_rules(), further, ">pw")
    url = own_redis.url.replace("redis://", "redis://control:pw@")
    settings = Settings(**{**service.settings.model_dump(), "redis_url": url})
    with running_service(settings) as limited:
        wait_for(lambda: "may not make the user" in caplog.text, what="words about it")
        wait_for(lambda: limited.held, what="a service that goes on")
    assert "pw@" not in caplog.text
