"""Connecting to Redis: the configured server or the embedded one, with our functions loaded."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from valohai_agent.redis_url import redact, scheme_hint, tls_trouble
from valohai_dagster.broker.access import control_plane_rules
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.errors import BrokerUnavailable, ConfigurationError
from valohai_dagster.settings import Settings

LIBRARY = "valohai_v1"
CONNECT_SECONDS = 5.0
SOCKET_SECONDS = 60.0  # longer than any blocking read that we send
_RETRIES = 2
_HINT = "`valohai-dagster doctor` checks it"


def connect(settings: Settings) -> redis.Redis:
    """A checked client; texts come decoded, so binary fields are only ever written.

    Starts the embedded server when no URL is set. Raises `BrokerUnavailable` when the server cannot be reached and
    `ConfigurationError` when it refuses us or is too old.
    """
    url = settings.redis_url
    embedded = EmbeddedRedis(settings) if url is None else None
    with embedded.starting() if embedded else nullcontext():
        if embedded:
            embedded.ensure_locked()
            url = embedded.url
        client = make_client(str(url))
        try:
            load_functions(client)
        except redis.RedisError as error:
            client.close()
            raise explain(error, str(url)) from error
    return client


async def connect_async(settings: Settings) -> redis.asyncio.Redis:
    """The same for asyncio. The check itself is short and synchronous."""
    connect(settings).close()
    return redis.asyncio.Redis.from_url(
        broker_url(settings), **_options(), retry=AsyncRetry(_backoff(), _RETRIES)
    )


def broker_url(settings: Settings) -> str:
    """The URL that local agents get; for the embedded server it is its unix socket."""
    return settings.redis_url or EmbeddedRedis(settings).url


def make_client(url: str) -> redis.Redis:
    """A client with this package's options; connects on first use."""
    try:
        client = redis.Redis.from_url(url, **_options(), retry=Retry(_backoff(), _RETRIES))
        client.connection_pool.make_connection()  # does not connect; refuses unknown options
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ConfigurationError(
            f"redis_url: {redact(url)} is not a Redis URL ({error}); expected redis://user:password@host:6379/0, "
            "rediss://... or unix:///path/to/socket"
        ) from error
    return client


def load_functions(client: redis.Redis) -> None:
    """Loads `functions.lua` unless exactly this text is loaded already."""
    known = client.function_list(library=LIBRARY, withcode=True)
    if library_source() not in _texts(known):
        client.function_load(library_source(), replace=True)


@cache
def library_source() -> str:
    return resources.files("valohai_dagster.broker").joinpath("functions.lua").read_text("utf-8")


def explain(error: redis.RedisError, url: str) -> BrokerUnavailable | ConfigurationError:
    """What a client error means for the operator, without the password."""
    shown = redact(url)
    text = str(error)
    if isinstance(error, redis.AuthenticationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        return ConfigurationError(
            f"Redis at {shown} refuses the user or password: {text}; check redis_url. {_HINT}"
        )
    if isinstance(error, NoPermissionError):
        return ConfigurationError(
            f"Redis at {shown} does not let this user work: {text}; the control plane needs "
            f"`ACL SETUSER ... {' '.join(control_plane_rules())}`. {_HINT}"
        )
    if isinstance(error, redis.ResponseError) and "unknown command" in text.lower():
        return ConfigurationError(
            f"the server at {shown} is too old or not Redis ({text}); Redis 7 or newer, or Valkey, is needed. {_HINT}"
        )
    if trouble := tls_trouble(error, url):
        return ConfigurationError(
            f"Redis at {shown} cannot be used: {trouble}; check redis_url. {_HINT}"
        )
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        text += scheme_hint(error, url)
        return BrokerUnavailable(
            f"Redis at {shown} cannot be reached: {text}; check redis_url (VALOHAI_REDIS_URL), that the server is up "
            f"and that no firewall is between. Nothing was lost; try again when it is back. {_HINT}"
        )
    return BrokerUnavailable(f"Redis at {shown} answered with an error: {text}. {_HINT}")


def _options() -> dict[str, Any]:
    return {
        "decode_responses": True,
        "encoding_errors": "replace",
        "protocol": 2,  # the same answer shapes with every version of the client
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": SOCKET_SECONDS,
        "health_check_interval": 30,
    }


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.1, cap=1.0)


def _texts(answer: Any) -> list[str]:
    """All strings in a nested answer; its shape differs between client versions."""
    if isinstance(answer, dict):
        return [text for pair in answer.items() for item in pair for text in _texts(item)]
    if isinstance(answer, (list, tuple)):
        return [text for item in answer for text in _texts(item)]
    return [answer.decode() if isinstance(answer, bytes) else str(answer)]
