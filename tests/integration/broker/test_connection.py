"""Connecting to a configured Redis: functions loaded, refusals in words and without passwords."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis

from tests.support.redis_server import RedisServer
from valohai_agent.protocol import Keys
from valohai_dagster.broker.connection import connect, library_source, load_functions
from valohai_dagster.errors import BrokerUnavailable, ConfigurationError
from valohai_dagster.settings import Settings


def settings_for(tmp_path: Path, url: str) -> Settings:
    return Settings(state_dir=tmp_path, redis_url=url)


def test_functions_are_loaded_once_and_again_when_they_were_lost_or_changed(
    settings: Settings, redis_client: redis.Redis
) -> None:
    keys = Keys("d")
    with connect(settings) as client:
        arguments = ("vh1_heartbeat", 1, keys.worker("g", "w"), "inc", "1000")
        assert client.fcall(*arguments) == 1
        before = client.info("commandstats").get("cmdstat_function|load", {}).get("calls")
        connect(settings).close()
        assert client.info("commandstats")["cmdstat_function|load"]["calls"] == before
        client.flushall()
        client.execute_command("FUNCTION", "FLUSH")
        with pytest.raises(redis.ResponseError, match="not found"):
            client.fcall(*arguments)
        connect(settings).close()
        assert client.fcall(*arguments) == 1
        older = library_source().replace("vh1_heartbeat'", "vh1_old'")
        client.function_load(older, replace=True)
        load_functions(client)
        assert client.fcall(*arguments) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:hunter2@127.0.0.1:1/0", r"redis://:\*\*\*@127.0.0.1:1/0 cannot be reached"),
        ("unix:///nowhere/redis.sock", r"unix:///nowhere/redis.sock cannot be reached"),
        (
            "redis://u:hunter2@host.invalid:6379",
            r"redis://u:\*\*\*@host.invalid:6379 cannot be reached",
        ),
    ],
)
def test_redis_down_is_said_within_seconds_with_the_next_step(
    tmp_path: Path, url: str, expected: str
) -> None:
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=expected) as caught:
        connect(settings_for(tmp_path, url))
    assert time.monotonic() - began < 10
    assert "hunter2" not in str(caught.value)
    assert "valohai-dagster doctor" in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h:port", "redis://h:1/db?db=x"])
def test_a_url_that_makes_no_sense_is_a_configuration_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a Redis URL"):
        connect(settings_for(tmp_path, url))


def test_a_server_that_is_no_redis_is_said(tmp_path: Path) -> None:
    import socket
    import threading

    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with pytest.raises(BrokerUnavailable, match=r"cannot be reached|answered with an error"):
            connect(settings_for(tmp_path, f"redis://127.0.0.1:{server.getsockname()[1]}"))
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def test_a_wrong_password_is_a_configuration_error_that_does_not_show_it(
    redis_server: RedisServer, redis_client: redis.Redis, tmp_path: Path
) -> None:
    redis_client.acl_setuser(
        "control", enabled=True, passwords=["+right"], categories=["+@all"], keys=["*"]
    )
    url = f"unix://control:hunter2@{redis_server.unix_url.removeprefix('unix://')}"
    with pytest.raises(ConfigurationError, match="refuses the user or password") as caught:
        connect(settings_for(tmp_path, url))
    assert "hunter2" not in str(caught.value)


def test_missing_permissions_are_named(
    redis_server: RedisServer, redis_client: redis.Redis, tmp_path: Path
) -> None:
    redis_client.acl_setuser(
        "control", enabled=True, passwords=["+pw"], commands=["+ping", "+hello"], keys=["vh:*"]
    )
    url = f"unix://control:pw@{redis_server.unix_url.removeprefix('unix://')}"
    with pytest.raises(ConfigurationError, match=r"does not let this user work.*ACL SETUSER"):
        connect(settings_for(tmp_path, url))
