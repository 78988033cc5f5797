"""Redis by TLS, with certificates on both sides and ACL users: a whole execution by real processes, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from tests.support.deployment import Deployment
from tests.support.ports import free_port
from tests.support.projects import step_yaml, write_project
from tests.support.tls import Authority, TlsRedis
from valohai_agent.protocol import Keys
from valohai_dagster.broker.access import control_plane_rules, set_agent_user
from valohai_dagster.broker.connection import connect
from valohai_dagster.errors import BrokerUnavailable, ConfigurationError
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings

PASSWORD = "sesame-open"


@pytest.fixture
def control_url(tls_redis: TlsRedis) -> str:
    tls_redis.root.execute_command(
        "ACL", "SETUSER", "control", *control_plane_rules(), f">{PASSWORD}"
    )
    return tls_redis.url("control", PASSWORD)


@pytest.fixture
def deployment(tmp_path: Path, control_url: str) -> Iterator[Deployment]:
    toml = f"""
    redis_url = "{control_url}"
    http_port = {free_port()}
    default_group = "far"
    [groups.far]
    kind = "static"
    """
    with Deployment(tmp_path / "deployment", toml) as deployment:
        yield deployment


def agent_user(deployment: Deployment, tls_redis: TlsRedis, group: str, password: str) -> str:
    records = open_records(deployment.settings)
    keys = Keys(records.deployment_id)
    records.close()
    set_agent_user(tls_redis.root, keys, group, username=f"{group}-agents", password=password)
    return records.deployment_id


def test_a_whole_execution_by_tls_with_the_least_rights_on_both_sides(
    deployment: Deployment, tls_redis: TlsRedis, tmp_path: Path
) -> None:
    deployment_id = agent_user(deployment, tls_redis, "far", "far-pass")
    deployment.start_conductor()
    url = tls_redis.url("far-agents", "far-pass")
    options = ("--runtime", "process", "--deployment", deployment_id)
    agent = deployment.start_agent("far", url, *options)
    yaml = step_yaml("echo hello; echo made > $VH_OUTPUTS_DIR/made.txt; echo '{\"loss\": 1}'")
    view, _ = deployment.execute(write_project(tmp_path / "project", yaml))
    assert (view.status, view.reason) == (ExecutionStatus.complete, None)
    assert [output.name for output in view.outputs] == ["made.txt"]
    assert view.latest_metadata["loss"] == 1
    assert "far-pass" not in agent.log
    conductor_log = (deployment.root / "valohai_dagster.log").read_text()
    assert PASSWORD not in conductor_log
    assert tls_redis.root.acl_log() == [], "a right is missing, or somebody tries what it may not"


# -- the control plane's own user --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("CONFIG", "SET", "maxmemory", "1mb"),
        ("SHUTDOWN",),
        ("GET", "another:application"),
        ("ACL", "LIST"),
        ("PUBLISH", "channel", "text"),
    ],
)
def test_the_control_planes_user_cannot_harm_others_on_the_server(
    control_url: str, command: tuple[str, ...]
) -> None:
    with (
        redis.Redis.from_url(control_url) as client,
        pytest.raises(NoPermissionError),
    ):
        client.execute_command(*command)


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, url: str) -> str:
    with pytest.raises((ConfigurationError, BrokerUnavailable)) as caught:
        connect(Settings(state_dir=tmp_path, redis_url=url))
    assert PASSWORD not in str(caught.value)
    assert "valohai-dagster doctor" in str(caught.value)
    return str(caught.value)


def test_a_wrong_authority_is_named(tls_redis: TlsRedis, control_url: str, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").certificate
    url = tls_redis.url("control", PASSWORD, authority=other)
    text = refused(tmp_path, url)
    assert "does not trust the certificate" in text
    assert f"ssl_ca_certs={other}" in text


def test_a_missing_client_certificate_is_said(
    tls_redis: TlsRedis, control_url: str, tmp_path: Path
) -> None:
    text = refused(tmp_path, tls_redis.url("control", PASSWORD, certificate=False))
    assert "ssl_certfile" in text


def test_a_file_of_certificates_that_is_not_there_is_named(
    tls_redis: TlsRedis, control_url: str, tmp_path: Path
) -> None:
    url = tls_redis.url("control", PASSWORD, authority=tmp_path / "nothing.crt")
    assert f"{tmp_path / 'nothing.crt'} cannot be read" in refused(tmp_path, url)


def test_a_wrong_password_by_tls_is_said(
    tls_redis: TlsRedis, control_url: str, tmp_path: Path
) -> None:
    text = refused(tmp_path, tls_redis.url("control", "wrong-one"))
    assert "refuses the user or password" in text
    assert "wrong-one" not in text


def test_an_agent_with_a_wrong_authority_or_password_ends_with_the_reason(
    deployment: Deployment, tls_redis: TlsRedis, tmp_path: Path
) -> None:
    deployment_id = agent_user(deployment, tls_redis, "far", "far-pass")
    options = ("--runtime", "process", "--deployment", deployment_id)
    other = Authority(tmp_path / "other").certificate
    url = tls_redis.url("far-agents", "far-pass", authority=other)
    agent = deployment.start_agent("far", url, *options)
    assert agent.wait() == 2
    assert "does not trust the certificate" in agent.log
    assert str(other) in agent.log
    wrong = deployment.start_agent("far", tls_redis.url("far-agents", "wrong-one"), *options)
    assert wrong.wait() == 2
    assert "refuses this agent" in wrong.log
    assert "wrong-one" not in wrong.log
    assert "far-pass" not in wrong.log + agent.log


def test_an_agent_of_another_group_ends_with_the_reason(
    deployment: Deployment, tls_redis: TlsRedis
) -> None:
    deployment_id = agent_user(deployment, tls_redis, "near", "near-pass")
    url = tls_redis.url("near-agents", "near-pass")
    options = ("--runtime", "process", "--deployment", deployment_id)
    agent = deployment.start_agent("far", url, *options)
    assert agent.wait() == 2
    assert "does not let this user work for the group 'far'" in agent.log
    assert "Traceback" not in agent.log
