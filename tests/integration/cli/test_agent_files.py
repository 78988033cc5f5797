"""`valohai-dagster agents publish|releases|use|update|join|join-token|new-password`, on the records, a store and Redis."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from typer.testing import CliRunner

from tests.support.machines import small_agent_file
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import Command, Keys
from valohai_agent.redis_link import connect
from valohai_agent.session import AgentIdentity, Session
from valohai_agent.version import __version__
from valohai_dagster.broker import connection as broker
from valohai_dagster.capacity.bootstrap.joining import digest_of
from valohai_dagster.cli import agents
from valohai_dagster.errors import RefusedError
from valohai_dagster.records.capacity_tables import agent_releases, join_tokens
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def deployment(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.url)
    Path("valohai.toml").write_text('[groups.local]\n[groups.gpu]\nkind = "static"\n')
    small_agent_file(Path("agent.pyz"))
    records = open_records(load_settings())
    records.close()
    broker.connect(load_settings()).close()  # what agents call is loaded by then
    return records.deployment_id


def run(*arguments: str) -> str:
    result = RUNNER.invoke(agents.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def worker(url: str, deployment: str, work_dir: Path, *, supervised: bool) -> Iterator[Session]:
    link = connect(url)
    name = "kept" if supervised else "lone"
    identity = AgentIdentity(deployment=deployment, group="gpu", name=name, supervised=supervised)
    session = Session(link, identity, work_dir=work_dir)
    session.register()
    try:
        yield session
    finally:
        session.close()
        link.close()


def told(client: redis.Redis, deployment: str, name: str) -> list[str]:
    entries = client.xrange(Keys(deployment).command("gpu", name))
    return [Command.model_validate_json(fields[b"c"]).kind for _, fields in entries]  # pyright: ignore


def test_publishing_twice_keeps_one_file_and_going_back_is_possible(deployment: str) -> None:
    first = json.loads(run("publish", "agent.pyz", "--json"))
    assert json.loads(run("publish", "agent.pyz", "--json"))["key"] == first["key"]
    assert (first["version"], first["current"]) == (__version__, True)
    records = open_records(load_settings())
    with records.write() as conn:  # one that was published by an earlier release
        values = {key: first[key] for key in ("store", "key", "size", "protocol", "protocol_min")}
        older = {"version": "0.0.9", "sha256": "b" * 64, "current": False}
        ctime = datetime.fromisoformat(first["ctime"])
        conn.execute(agent_releases.insert().values(**values, **older, ctime=ctime))
    records.close()
    assert json.loads(run("use", "0.0.9", "--json"))["current"]
    listed = {one["version"]: one["current"] for one in json.loads(run("releases", "--json"))}
    assert listed == {__version__: False, "0.0.9": True}
    current = [line.split() for line in run("releases").splitlines() if line.startswith("*")]
    assert [line[1] for line in current] == ["0.0.9"]
    with pytest.raises(RefusedError, match=r"published: 0\.0\.9, "):
        run("use", "7")


def test_only_agents_that_somebody_starts_again_are_told_to_make_way(
    deployment: str, redis_server: RedisServer, redis_client: redis.Redis, tmp_path: Path
) -> None:
    url = redis_server.url
    with (
        worker(url, deployment, tmp_path, supervised=True),
        worker(url, deployment, tmp_path, supervised=False),
    ):
        assert "no agent has to be told" in run("publish", "agent.pyz")  # they are of this version
        assert json.loads(run("update", "gpu", "--restart", "--json")) == {"told": ["kept"]}
        assert told(redis_client, deployment, "kept") == ["update"]
        with zipfile.ZipFile("agent.pyz", "a") as another:  # of the same version
            another.writestr("more", "")
        assert json.loads(run("publish", "agent.pyz", "--json"))["told"] == ["kept"]
        assert json.loads(run("publish", "agent.pyz", "--json"))["told"] == []
        assert told(redis_client, deployment, "lone") == []


def test_a_join_token_is_printed_once_with_what_to_type(deployment: str) -> None:
    line = run("join-token", "gpu", "--uses", "3")
    assert line.startswith("VALOHAI_JOIN_TOKEN=vhj_")
    assert " valohai-agent join http://127.0.0.1:" in line
    data = json.loads(run("join-token", "gpu", "--json"))
    assert data["group"] == "gpu"
    with pytest.raises(RefusedError, match="no worker group 'other'"):
        run("join-token", "other")


def test_this_machine_joins_by_the_agents_own_command_without_secrets_in_its_arguments_or_environment(
    deployment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's side has tests of its own: what it would be started with is caught here."""
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, env: started.append((command, env)))
    run("join", "gpu", "--service", "none")
    ((command, environment),) = started
    assert command[1:4] == ["-m", "valohai_agent", "join"]
    assert command[5:8] == ["--group", "gpu", "--token-file"]
    assert command[9:] == ["--service", "none"]
    file = Path(command[8])
    token = file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    file.unlink()
    assert not [name for name in environment if name.startswith("VALOHAI_")]
    records = open_records(load_settings())
    with records.read() as conn:
        (known,) = conn.execute(sa.select(join_tokens.c.digest, join_tokens.c.uses_left)).all()
    records.close()
    assert tuple(known) == (digest_of(token), 1)


def test_the_script_for_a_bare_machine_needs_a_published_agent(deployment: str) -> None:
    with pytest.raises(RefusedError, match="no agent is published"):
        run("join-token", "gpu", "--script")
    run("publish", "agent.pyz")
    script = run("join-token", "gpu", "--script")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert "give_up_seconds=0\n" in script  # somebody's own machine is not powered off


def test_a_new_password_is_made_for_the_machines_of_a_group(
    deployment: str, redis_client: redis.Redis
) -> None:
    run("new-password", "gpu")
    users = redis_client.acl_list()
    assert any(b"gpu-machines" in str(user).encode() for user in users)
