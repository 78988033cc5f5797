"""The fixtures start real servers."""

from __future__ import annotations

import redis

from tests.support.redis_server import RedisServer


def test_redis_is_empty_for_each_test_and_knows_functions(redis_client: redis.Redis) -> None:
    assert redis_client.dbsize() == 0
    assert redis_client.execute_command("FUNCTION", "LIST") == []


def test_a_killed_server_keeps_its_append_only_data(own_redis: RedisServer) -> None:
    with own_redis.client() as client:
        client.set("k", "v")
        client.execute_command("WAITAOF", 1, 0, 1000)
    own_redis.restart()
    with own_redis.client() as client:
        assert client.get("k") == b"v"
    own_redis.restart(empty=True)
    with own_redis.client() as client:
        assert client.get("k") is None


def test_postgres_gives_each_test_its_own_database(postgres_url: str) -> None:
    import psycopg2

    connection = psycopg2.connect(postgres_url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("select count(*) from pg_tables where schemaname = 'public'")
            assert cursor.fetchone() == (0,)
    finally:
        connection.close()
