"""A conductor and agents on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agent_conductor import DEPLOYMENT, GROUP, Conductor
from tests.support.agent_sessions import LEASE_SECONDS, RENEW_SECONDS, OpenSession
from tests.support.redis_server import RedisServer
from valohai_agent.redis_link import RedisLink, connect
from valohai_agent.session import AgentIdentity, Session


@pytest.fixture
def conductor(redis_server: RedisServer, tmp_path: Path) -> Iterator[Conductor]:
    with Conductor(redis_server.unix_url, tmp_path) as conductor:
        yield conductor


@pytest.fixture
def own_conductor(own_redis: RedisServer, tmp_path: Path) -> Iterator[Conductor]:
    with Conductor(own_redis.unix_url, tmp_path) as conductor:
        yield conductor


@pytest.fixture
def open_session(tmp_path: Path) -> Iterator[OpenSession]:
    """Opens registered sessions with a short lease; all are closed after the test."""
    opened: list[tuple[Session, RedisLink]] = []

    def open_one(url: str, name: str = "w1", *, register: bool = True, **identity: Any) -> Session:
        link = connect(url)
        session = Session(
            link,
            AgentIdentity(deployment=DEPLOYMENT, group=GROUP, name=name, **identity),
            work_dir=tmp_path,
            renew_seconds=RENEW_SECONDS,
            lease_seconds=LEASE_SECONDS,
        )
        opened.append((session, link))
        if register:
            session.register()
        return session

    yield open_one
    for session, link in opened:
        session.close()
        link.close()
