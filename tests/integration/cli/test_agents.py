"""`valohai-dagster agents acl`: the user that it describes or makes is enough for an agent, and good for one group."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from tests.support.redis_server import RedisServer
from valohai_agent.redis_link import RedisRefused, connect
from valohai_agent.session import AgentIdentity, Session
from valohai_dagster.cli import agents
from valohai_dagster.errors import ConfigurationError, RefusedError

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def deployment(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.url)
    Path("valohai.toml").write_text('[groups.local]\n[groups.gpu]\nkind = "static"\n')


def acl(*arguments: str) -> str:
    result = RUNNER.invoke(agents.app, ["acl", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def check_in(url: str, deployment: str, group: str, work_dir: Path) -> None:
    link = connect(url)
    identity = AgentIdentity(deployment=deployment, group=group, name="w")
    session = Session(link, identity, work_dir=work_dir)
    try:
        session.register()
        session.close()
    finally:
        link.close()


def test_apply_prints_what_the_machines_of_the_group_need(tmp_path: Path) -> None:
    values = dict(line.split("=", 1) for line in acl("gpu", "--apply").splitlines())
    url, deployment = values["VALOHAI_AGENT_REDIS"], values["VALOHAI_AGENT_DEPLOYMENT"]
    check_in(url, deployment, values["VALOHAI_AGENT_QUEUE"], tmp_path)
    with pytest.raises(RedisRefused, match="does not let this user work for the group 'local'"):
        check_in(url, deployment, "local", tmp_path)


def test_a_user_survives_a_restart_of_a_redis_with_an_acl_file(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (short_tmp / "users.acl").write_text("user default on nopass ~* &* +@all\n")
    server = RedisServer(short_tmp / "r", options=("--aclfile", str(short_tmp / "users.acl")))
    server.start()
    try:
        monkeypatch.setenv("VALOHAI_REDIS_URL", server.url)
        values = dict(line.split("=", 1) for line in acl("gpu", "--apply").splitlines())
        server.restart()
        connect(values["VALOHAI_AGENT_REDIS"]).close()
    finally:
        server.stop()


def test_without_an_acl_file_it_is_said_that_the_user_does_not_stay() -> None:
    result = RUNNER.invoke(agents.app, ["acl", "gpu", "--apply"], catch_exceptions=False)
    assert "until it restarts only" in result.stderr


def test_the_printed_command_can_be_typed_into_redis_cli(
    redis_client: redis.Redis, redis_server: RedisServer, tmp_path: Path
) -> None:
    command = acl("gpu", "--username", "far").replace("PASSWORD", "pw")
    redis_client.execute_command(*shlex.split(command))
    deployment = command.split("vh:")[1].split(":")[0]
    url = redis_server.url.replace("redis://", "redis://far:pw@")
    check_in(url, deployment, "gpu", tmp_path)


def test_a_control_plane_that_may_not_make_users_says_so(
    redis_client: redis.Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valohai_dagster.broker.access import control_plane_rules

    redis_client.execute_command("ACL", "SETUSER", "control", *control_plane_rules(), ">pw")
    url = redis_server.url.replace("redis://", "redis://control:pw@")
    monkeypatch.setenv("VALOHAI_REDIS_URL", url)
    with pytest.raises(ConfigurationError, match="run without --apply"):
        acl("gpu", "--apply")
    printed = acl("gpu")
    deployment = printed.split("vh:")[1].split(":")[0]
    assert printed.startswith(f"ACL SETUSER {deployment}-gpu-agents reset on")


def test_an_unknown_group_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RefusedError, match=r"no worker group 'gpus'; valohai.toml has: gpu, local"):
        acl("gpus")
