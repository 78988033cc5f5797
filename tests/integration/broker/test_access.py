"""What an agent's ACL user may do: its own part of the protocol, and nothing of another group."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from tests.support.agent_conductor import DEPLOYMENT, GROUP, Conductor
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent import redis_link
from valohai_agent.protocol import (
    Finished,
    GrantRequest,
    Keys,
    Leased,
    LogLine,
    LogStream,
    Outcome,
)
from valohai_agent.session import AgentIdentity, Session
from valohai_dagster.broker.access import agent_rules, set_agent_user

OTHER = "g2"
KEYS = Keys(DEPLOYMENT)


@pytest.fixture
def url_of(redis_server: RedisServer, redis_client: redis.Redis) -> Callable[[str], str]:
    """Makes the user of a group and gives its URL."""

    def make(group: str) -> str:
        password = secrets.token_hex(8)
        set_agent_user(redis_client, KEYS, group, username=f"agent-{group}", password=password)
        return f"redis://agent-{group}:{password}@127.0.0.1:{redis_server.port}/0"

    return make


@pytest.fixture
def intruder(url_of: Callable[[str], str]) -> Iterator[redis.Redis]:
    """A client with the rights of the other group's agents."""
    with redis.Redis.from_url(url_of(OTHER), decode_responses=True, protocol=2) as client:
        yield client


@pytest.fixture
def conductor(redis_server: RedisServer, tmp_path: Path) -> Iterator[Conductor]:
    with Conductor(redis_server.unix_url, tmp_path) as conductor:
        yield conductor


def test_the_rules_suffice_for_a_whole_execution(
    conductor: Conductor, url_of: Callable[[str], str], tmp_path: Path
) -> None:
    link = redis_link.connect(url_of(GROUP))
    session = Session(
        link,
        AgentIdentity(deployment=DEPLOYMENT, group=GROUP, name="w"),
        work_dir=tmp_path,
        lease_seconds=2.0,
        renew_seconds=0.3,
    )
    session.register()
    execution = conductor.submit("true")
    session.wait_for_bell(0.2)
    lease = session.take()
    assert lease is not None
    lease.start(Leased(runtime="process"))
    assert lease.grants(timeout=10).initial
    wanted = GrantRequest(id="1", kind="output", name="a", size=1)
    assert lease.request_grants([wanted]).uploads
    line = LogLine(s=LogStream.stdout, t="2026-01-01T00:00:00.000000", m="hello", e=6)
    lease.live_log.put([line])
    lease.live_log.close()
    lease.report(Finished(outcome=Outcome.complete))
    assert lease.reporter.flush(10)
    wait_for(lambda: conductor.applied(execution).finished, what="the end")
    lease.close()
    assert conductor.redis.xlen(KEYS.log(GROUP, execution, 1)) == 1
    session.close()
    link.close()


FORBIDDEN = {
    "read the queue": lambda c, k: c.zrange(k.ready(GROUP), 0, -1),
    "read a job": lambda c, k: c.hgetall(k.job(GROUP, "e")),
    "read a job's field": lambda c, k: c.hget(k.job(GROUP, "e"), "job"),
    "read reports": lambda c, k: c.xrange(k.reports(GROUP)),
    "read grants": lambda c, k: c.xread({k.grant(GROUP, "e"): "0"}),
    "read the live log": lambda c, k: c.xread({k.log(GROUP, "e", 1): "0"}),
    "read commands": lambda c, k: c.xread({k.command(GROUP, "w"): "0"}),
    "forge a report": lambda c, k: c.xadd(k.reports(GROUP), {"r": "{}"}),
    "forge a log line": lambda c, k: c.xadd(k.log(GROUP, "e", 1), {"m": "x"}),
    "forge a command": lambda c, k: c.xadd(k.command(GROUP, "w"), {"c": "{}"}),
    "forge a grant": lambda c, k: c.xadd(k.grant(GROUP, "e"), {"g": "x"}),
    "forge a job": lambda c, k: c.hset(k.job(GROUP, "e"), "job", "{}"),
    "forge a lease": lambda c, k: c.hset(k.lease(GROUP, "e"), "token", "mine"),
    "forge a heartbeat": lambda c, k: c.fcall(
        "vh1_heartbeat", 1, k.worker(GROUP, "w"), "x", "1000"
    ),
    "enqueue": lambda c, k: c.fcall(
        "vh1_enqueue",
        3,
        k.ready(GROUP),
        k.job(GROUP, "f"),
        k.lease(GROUP, "f"),
        "f",
        "{}",
        1,
        1,
        1,
        1,
    ),
    "withdraw": lambda c, k: c.fcall("vh1_withdraw", 2, k.ready(GROUP), k.lease(GROUP, "e"), "e"),
    "steal grants": lambda c, k: c.fcall(
        "vh1_collect_grants", 2, k.grant(GROUP, "e"), k.lease(GROUP, "e"), "token"
    ),
    "renew a lease": lambda c, k: c.fcall(
        "vh1_renew", 2, k.lease(GROUP, "e"), k.job(GROUP, "e"), "w", "i", "t", 1, "p", 1000, "x"
    ),
    "erase reports": lambda c, k: c.delete(k.reports(GROUP)),
    "trim reports": lambda c, k: c.xtrim(k.reports(GROUP), maxlen=0),
    "erase grants": lambda c, k: c.delete(k.grant(GROUP, "e")),
    "erase a lease": lambda c, k: c.unlink(k.lease(GROUP, "e")),
    "expire the queue": lambda c, k: c.expire(k.ready(GROUP), 1),
    "empty the queue": lambda c, k: c.zrem(k.ready(GROUP), "e"),
    "swallow the bell": lambda c, k: c.blpop([k.bell(GROUP)], timeout=0.1),
    "rename keys": lambda c, k: c.rename(k.ready(GROUP), k.ready(OTHER)),
    "copy a job": lambda c, k: c.copy(k.job(GROUP, "e"), k.job(OTHER, "e")),
    "list keys": lambda c, k: c.keys("*"),
    "scan keys": lambda c, k: c.scan(0),
    "run a script": lambda c, k: c.eval("return redis.call('GET', KEYS[1])", 1, k.ready(OTHER)),
    "load functions": lambda c, k: c.function_load("#!lua name=x\n", replace=True),
    "delete functions": lambda c, k: c.function_delete("valohai_v1"),
    "empty the server": lambda c, k: c.flushall(),
    "block the server": lambda c, k: c.client_pause(1000),
    "watch the server": lambda c, k: c.execute_command("MONITOR"),
    "subscribe": lambda c, k: c.execute_command("SUBSCRIBE", "x"),
    "change users": lambda c, k: c.acl_setuser("agent-g2", categories=["+@all"]),
    "change the configuration": lambda c, k: c.config_set("maxmemory", "1mb"),
    "read what everyone follows": lambda c, k: c.xread({k.follow("e"): "0"}),
    "submit": lambda c, k: c.xadd(k.submissions(0), {"s": "{}"}),
    "reach another deployment": lambda c, k: c.xadd(Keys("other").reports(OTHER), {"r": "{}"}),
}


@pytest.mark.parametrize("action", sorted(FORBIDDEN))
def test_a_worker_of_one_group_cannot_touch_another(
    conductor: Conductor, redis_client: redis.Redis, intruder: redis.Redis, action: str
) -> None:
    fill(redis_client)
    before = {
        key: redis_client.dump(key)
        for key in sorted(redis_client.keys(f"vh:{DEPLOYMENT}:{{{GROUP}}}:*"))
    }
    with pytest.raises(NoPermissionError):
        FORBIDDEN[action](intruder, KEYS)
    assert {key: redis_client.dump(key) for key in before} == before


def fill(client: redis.Redis) -> None:
    """One of each key of the group, unlike what the conductor of the test reads."""
    client.zadd(KEYS.ready(GROUP), {"e": 1})
    client.hset(KEYS.job(GROUP, "e"), mapping={"job": "{}", "attempt": 1, "v": 1})
    client.hset(KEYS.lease(GROUP, "e"), mapping={"token": "token", "attempt": 1})
    client.rpush(KEYS.bell(GROUP), "1")
    for stream in (KEYS.grant(GROUP, "e"), KEYS.command(GROUP, "w"), KEYS.log(GROUP, "e", 1)):
        client.xadd(stream, {"x": "1"})


def test_a_function_cannot_be_led_to_another_groups_keys_by_its_arguments(
    conductor: Conductor, redis_client: redis.Redis, intruder: redis.Redis
) -> None:
    """`take` builds key names from an argument; the server checks those accesses too."""
    fill(redis_client)
    intruder.fcall("vh1_heartbeat", 1, KEYS.worker(OTHER, "w"), "inc", "10000", "state", "idle")
    redis_client.zadd(KEYS.ready(OTHER), {"e": 1})
    prefix = KEYS.group_prefix(GROUP)
    with pytest.raises(redis.ResponseError, match=r"(?i)acl|permission"):
        intruder.fcall(
            "vh1_take",
            2,
            KEYS.ready(OTHER),
            KEYS.worker(OTHER, "w"),
            prefix,
            "w",
            "inc",
            "t",
            "p",
            1000,
            1,
            1,
        )
    assert redis_client.hget(KEYS.lease(GROUP, "e"), "token") == b"token"


OWN_FORBIDDEN = {
    "forge a job of its own group": lambda c, k: c.hset(k.job(OTHER, "e"), "job", "{}"),
    "read reports of its own group": lambda c, k: c.xrange(k.reports(OTHER)),
    "erase reports of its own group": lambda c, k: c.delete(k.reports(OTHER)),
    "trim reports of its own group": lambda c, k: c.xtrim(k.reports(OTHER), maxlen=0),
    "command others of its own group": lambda c, k: c.xadd(k.command(OTHER, "w"), {"c": "{}"}),
    "enqueue into its own group": lambda c, k: c.fcall(
        "vh1_enqueue",
        3,
        k.ready(OTHER),
        k.job(OTHER, "f"),
        k.lease(OTHER, "f"),
        "f",
        "{}",
        1,
        1,
        1,
        1,
    ),
}


@pytest.mark.parametrize("action", sorted(OWN_FORBIDDEN))
def test_even_in_its_own_group_a_worker_only_plays_its_part(
    conductor: Conductor, intruder: redis.Redis, action: str
) -> None:
    with pytest.raises(redis.ResponseError, match=r"(?i)permission|acl"):
        OWN_FORBIDDEN[action](intruder, KEYS)


def test_groups_whose_names_begin_alike_are_apart() -> None:
    short, long = agent_rules(KEYS, "g"), agent_rules(KEYS, "g2")
    assert not any("{g2}" in rule for rule in short)
    assert not any("{g}" in rule for rule in long)


def test_e05_the_seal_of_a_machine_is_seen_with_the_rights_of_its_workers(
    conductor: Conductor, redis_client: redis.Redis, intruder: redis.Redis
) -> None:
    beat = ("vh1_heartbeat", 1, KEYS.worker(OTHER, "w"), "inc", "10000", "state", "idle")
    intruder.fcall(*beat, "machine_id", "m-1")
    redis_client.zadd(KEYS.ready(OTHER), {"e": 1})
    redis_client.hset(KEYS.job(OTHER, "e"), mapping={"job": "{}", "attempt": 1, "v": 1})
    keys = (KEYS.ready(OTHER), KEYS.worker(OTHER, "w"))
    take = ("vh1_take", 2, *keys, KEYS.group_prefix(OTHER), "w", "inc", "t", "p", 1000, 1, 1)
    redis_client.set(KEYS.sealed(OTHER, "m-1"), "1")
    assert not intruder.fcall(*take)
    redis_client.delete(KEYS.sealed(OTHER, "m-1"))
    assert intruder.fcall(*take)
