"""Who gets which job: the worker that holds a job's inputs goes first, within bounds, on a real server (LESSONS 15)."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis
import redis.asyncio as aioredis

from tests.support.redis_server import RedisServer
from tests.support.sim_agent import SimAgent
from valohai_agent.protocol import (
    MAX_INPUT_MARKS,
    Checksums,
    Job,
    JobFile,
    JobInput,
    Keys,
    content_mark,
)
from valohai_dagster.broker.access import agent_rules
from valohai_dagster.broker.connection import load_functions
from valohai_dagster.executions.dispatch import Dispatch, QueueEntry, input_marks
from valohai_dagster.executions.outbox import Outbox

KEYS = Keys("d")
GROUP = "g"
MAX_PASSED = 8


@pytest.fixture
def client(redis_client: redis.Redis) -> redis.Redis:
    load_functions(redis_client)
    return redis_client


def name_of(content: str) -> str:
    return f"sha256:{content:0>64}"


def job(execution_id: str, *contents: tuple[str, int], **fields: Any) -> Job:
    files = [
        JobFile(
            id=f"0.{n}", name=f"f{n}", uri=f"datum://{n}", size=size, cache_key=name_of(content)
        )
        for n, (content, size) in enumerate(contents)
    ]
    inputs = [JobInput(name="data", input_id="data", files=files)]
    return Job(
        execution_id=execution_id,
        group=GROUP,
        project_id="p",
        project_name="p",
        step="s",
        commit="c",
        archive_sha256="0" * 64,
        image="i",
        commands=["true"],
        inputs=inputs if contents else [],
        **fields,
    )


def with_dispatch(server: RedisServer, do: Callable[[Dispatch], Awaitable[object]]) -> None:
    async def run() -> None:
        async with aioredis.Redis(
            unix_socket_path=str(server.socket), decode_responses=True
        ) as client:
            await do(Dispatch(client, KEYS))

    asyncio.run(run())


def enqueue(server: RedisServer, *entries: QueueEntry) -> None:
    with_dispatch(server, lambda dispatch: dispatch.enqueue(*entries))


def agent(client: redis.Redis, name: str, *contents: str) -> SimAgent:
    found = SimAgent(client, KEYS, group=GROUP, name=name)
    found.heartbeat(cached=",".join(content_mark(name_of(content)) for content in contents))
    return found


def taken(worker: SimAgent) -> str | None:
    lease = worker.try_take()
    return lease.job.execution_id if lease else None


def test_a_worker_gets_the_job_of_which_it_holds_most_bytes(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    enqueue(
        redis_server,
        QueueEntry(job=job("nothing")),
        QueueEntry(job=job("little", ("a", 10))),
        QueueEntry(job=job("much", ("a", 10), ("b", 500), ("c", 9000))),
        QueueEntry(job=job("other", ("c", 100))),
    )
    worker = agent(client, "w", "a", "b")
    assert [taken(worker) for _ in range(5)] == ["much", "little", "nothing", "other", None]


def test_without_its_inputs_anywhere_the_first_job_is_taken_first(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    enqueue(redis_server, *(QueueEntry(job=job(f"e{n}", (f"{n}", 10))) for n in range(4)))
    assert taken(agent(client, "empty")) == "e0"
    assert taken(agent(client, "elsewhere", "ff")) == "e1"


def test_priority_and_class_come_before_what_a_worker_holds(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    enqueue(
        redis_server,
        QueueEntry(job=job("mine", ("a", 10))),
        QueueEntry(job=job("urgent"), priority=5),
        QueueEntry(job=job("lost"), front=True),
    )
    worker = agent(client, "w", "a")
    assert [taken(worker) for _ in range(3)] == ["lost", "urgent", "mine"]


def test_no_job_is_passed_over_more_often_than_the_bound(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    enqueue(redis_server, QueueEntry(job=job("poor-1")), QueueEntry(job=job("poor-2")))
    worker = agent(client, "w", "a")
    order: list[str | None] = []
    for n in range(30):  # there is always one behind them that would be preferred
        enqueue(redis_server, QueueEntry(job=job(f"rich-{n}", ("a", 10))))
        order.append(taken(worker))
    assert order[:MAX_PASSED] == [f"rich-{n}" for n in range(MAX_PASSED)]
    assert order[MAX_PASSED : MAX_PASSED + 2] == ["poor-1", "poor-2"]
    assert not client.hkeys(KEYS.passed(GROUP))


def test_every_job_is_taken_once_by_someone_who_then_holds_its_lease(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    jobs = [job(f"e{n}", (f"{n % 7}", 100 + n)) for n in range(120)]
    enqueue(redis_server, *(QueueEntry(job=one) for one in jobs))
    found: dict[str, tuple[str, str]] = {}
    twice: list[str] = []
    guard = threading.Lock()

    def work(name: str, *contents: str) -> None:
        with redis_server.client() as own:
            worker = agent(own, name, *contents)
            while (lease := worker.try_take()) is not None:
                with guard:
                    twice.extend([lease.job.execution_id] * (lease.job.execution_id in found))
                    found[lease.job.execution_id] = (name, lease.token)

    threads = [threading.Thread(target=work, args=(f"w{n}", str(n), str(n + 1))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not twice
    assert found.keys() == {one.execution_id for one in jobs}
    for execution_id, (name, token) in found.items():
        lease = client.hmget(KEYS.lease(GROUP, execution_id), "worker", "token")
        assert lease == [name.encode(), token.encode()]
    assert client.zcard(KEYS.ready(GROUP)) == 0


def test_a_job_that_is_leased_or_gone_is_no_choice(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    enqueue(redis_server, *(QueueEntry(job=job(f"e{n}", ("a", n + 1))) for n in range(3)))
    client.hset(KEYS.lease(GROUP, "e2"), "token", "somebody")
    client.delete(KEYS.job(GROUP, "e0"))
    worker = agent(client, "w", "a")
    assert taken(worker) == "e1"
    assert taken(worker) is None


def test_an_older_control_plane_says_nothing_about_inputs(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    """It calls the same function without the last argument."""
    for n in range(2):
        one = job(f"e{n}", ("a", n))
        keys = (KEYS.ready(GROUP), KEYS.job(GROUP, one.execution_id))
        rest = (KEYS.lease(GROUP, one.execution_id), KEYS.sequence(GROUP), KEYS.bell(GROUP))
        arguments = (one.execution_id, one.model_dump_json(), 1, 1, 0, "0")
        client.fcall("vh1_enqueue", 5, *keys, *rest, *arguments)
    assert taken(agent(client, "w", "a")) == "e0"


def test_an_agent_whose_user_may_not_count_gets_the_first_job(
    client: redis.Redis, redis_server: RedisServer
) -> None:
    """As users of agents are that an older release has made."""
    enqueue(redis_server, QueueEntry(job=job("e0")), QueueEntry(job=job("e1", ("a", 10))))
    password = secrets.token_hex(8)
    rules = [rule for rule in agent_rules(KEYS, GROUP) if KEYS.passed(GROUP) not in rule]
    client.execute_command("ACL", "SETUSER", "old", *rules, f">{password}")
    url = f"redis://old:{password}@127.0.0.1:{redis_server.port}/0"
    with redis.Redis.from_url(url) as own:
        worker = agent(own, "w", "a")
        assert [taken(worker) for _ in range(3)] == ["e0", "e1", None]


def test_an_ended_execution_leaves_no_count(client: redis.Redis, redis_server: RedisServer) -> None:
    enqueue(redis_server, QueueEntry(job=job("e0")), QueueEntry(job=job("e1", ("a", 10))))
    assert taken(agent(client, "w", "a")) == "e1"
    assert client.hgetall(KEYS.passed(GROUP)) == {b"e0": b"1"}
    with_dispatch(redis_server, lambda d: d.deliver(Outbox(ended=[(GROUP, "e0", 1)])))
    assert client.hgetall(KEYS.passed(GROUP)) == {}


def test_only_the_largest_inputs_that_are_fetched_are_named(redis_client: redis.Redis) -> None:
    many = job("e", *((f"{n}", n + 1) for n in range(200)))
    marks = input_marks(many).split(",")
    assert len(marks) == MAX_INPUT_MARKS
    assert marks[0] == f"{content_mark(name_of('199'))} 200"
    file = JobFile(id="1", name="a", uri="s3://b/a", size=5, checksums=Checksums(sha256="AB"))
    lazy = JobInput(name="x", input_id="x", files=[file], download="on-demand")
    eager = JobInput(name="y", input_id="y", files=[file])
    assert input_marks(job("e").model_copy(update={"inputs": [lazy]})) == ""
    expected = f"{content_mark('sha256:ab')} 5"
    assert input_marks(job("e").model_copy(update={"inputs": [eager]})) == expected
