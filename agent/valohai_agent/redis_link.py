"""The agent's connection to Redis: opening it, telling troubles apart, and waiting for its return.

The agent must outlive Redis. While it works, every trouble is waited out (`RedisLink.persist`); when it starts, there
are three kinds:

- temporary: no connection, time-out, loading, read-only replica, out of memory, the queue's functions
  not loaded yet because Redis came back empty. Wait and try again.
- refused: wrong password, missing permission. Said in words, and the agent ends.
- anything else: a defect, raised as it is.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError
from redis.retry import Retry

from valohai_agent.errors import AgentError
from valohai_agent.redis_url import redact, scheme_hint, tls_trouble

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 5.0  # longest blocking read; an idle agent looks at the ready set this often anyway
SOCKET_SECONDS = 15.0  # longer than any blocking read
CONNECT_SECONDS = 5.0

_TEMPORARY_WORDS = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY",
    "OOM",
    "MISCONF",
    "NOREPLICAS",
    "Function not found",
)
T = TypeVar("T")


class RedisRefused(AgentError):
    """Redis answers, but not to this user: wrong password or missing permission."""


class NoDeployment(AgentError):
    """Which deployment this agent belongs to is not known."""


def has_password(url: str) -> bool:
    return urlsplit(url).password is not None


def is_transient(error: BaseException) -> bool:
    """Whether waiting can cure it. Missing functions count: the control plane loads them when it sees the loss."""
    if isinstance(error, AuthenticationError):
        return False
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return True
    return isinstance(error, redis.ResponseError) and any(
        word in str(error) for word in _TEMPORARY_WORDS
    )


def is_refusal(error: BaseException) -> bool:
    refusals = (
        AuthenticationError,
        AuthorizationError,
        NoPermissionError,
    )
    return isinstance(error, refusals)


@dataclass
class Backoff:
    """Jittered waits that double from `first` to `longest` seconds."""

    first: float = 0.1
    longest: float = 5.0
    _next: float = 0.0

    def seconds(self) -> float:
        self._next = min(self.longest, max(self.first, self._next * 2))
        return self._next * random.uniform(0.7, 1.0)  # noqa: S311 - jitter, not a secret

    def reset(self) -> None:
        self._next = 0.0


class RedisLink:
    """One pool of connections, shared by all threads of the agent. Values are bytes."""

    def __init__(self, url: str) -> None:
        self.url = redact(url)
        self._full_url = url
        self._client = _make_client(url)
        self._closed = threading.Event()
        self._away_since: float | None = None
        self._lock = threading.Lock()
        self._returns: set[threading.Event] = set()
        self.clock_offset_seconds = 0.0
        """Redis TIME minus this machine's clock, when last measured."""

    @property
    def client(self) -> Any:
        """The synchronous client; typed loosely since its stubs mix in the asynchronous results."""
        return self._client

    @property
    def away(self) -> bool:
        return self._away_since is not None

    def close(self) -> None:
        self._closed.set()
        self._client.close()

    def on_return(self, event: threading.Event) -> None:
        """Sets the event each time Redis is back after an absence."""
        with self._lock:
            self._returns.add(event)

    def off_return(self, event: threading.Event) -> None:
        with self._lock:
            self._returns.discard(event)

    def fcall(self, function: str, keys: list[str], *args: Any) -> Any:
        return self.client.fcall(function, len(keys), *keys, *args)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps `away` true to life, logging each loss and return once."""
        try:
            yield
        except (redis.RedisError, OSError) as exc:
            self._note_loss(exc)
            raise
        self._note_return()

    def persist(
        self,
        operation: Callable[[], T],
        *,
        give_up: Callable[[], bool] = lambda: False,
        wake: threading.Event | None = None,
    ) -> T | None:
        """Repeats until Redis answers; None once `give_up` says so or the link is closed.

        Errors of the server are waited out like its absence: one that returns empty knows its users and functions only
        after the control plane has told it, and an operator can repair the rest while commands run on. Only for
        operations that may be applied twice.
        """
        backoff = Backoff()
        while not (give_up() or self._closed.is_set()):
            try:
                with self.noting():
                    return operation()
            except Exception as exc:
                if self._closed.is_set():
                    return None  # closing pulls the sockets from under blocking reads, which fail in many ways
                if not isinstance(exc, (redis.RedisError, OSError)):
                    raise
            (wake or self._closed).wait(backoff.seconds())
        return None

    def measure_clock(self) -> float:
        """Measures `clock_offset_seconds`; the error is at most half of the round trip."""
        before = time.time()
        seconds, microseconds = self.client.time()
        middle = (before + time.time()) / 2
        self.clock_offset_seconds = seconds + microseconds / 1e6 - middle
        return self.clock_offset_seconds

    def server_ms(self) -> int:
        seconds, microseconds = self.client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def _note_loss(self, error: BaseException) -> None:
        with self._lock:
            if self._away_since is not None or self._closed.is_set():
                return
            self._away_since = time.monotonic()
        logger.warning(
            "Redis at %s does not serve us (%s); running commands go on, reports wait here until it is back",
            self.url,
            f"{error}{scheme_hint(error, self._full_url)}",
            extra={"action": "redis-away"},
        )

    def _note_return(self) -> None:
        with self._lock:
            since, self._away_since = self._away_since, None
            waiting = list(self._returns) if since is not None else []
        for event in waiting:
            event.set()
        if since is not None:
            seconds = time.monotonic() - since
            extra = {"action": "redis-back", "away_seconds": round(seconds, 1)}
            logger.info("Redis at %s is back after %.1f s", self.url, seconds, extra=extra)


def _make_client(url: str) -> redis.Redis:
    """Connects on first use; raises ValueError for a URL that makes no sense."""
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
            # Repeating is decided in `persist`, where it is known what may be repeated.
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            client_name="valohai-agent",
        )
        client.connection_pool.make_connection()  # does not connect; refuses unknown options
    except (ValueError, TypeError) as exc:
        raise ValueError(f"{redact(url)} (VALOHAI_AGENT_REDIS) is not a Redis URL: {exc}") from exc
    return client


def connect(url: str, *, stop: threading.Event | None = None) -> RedisLink:
    """Opens the link, waiting for a server that is not up yet; a supervisor may start us before it.

    Raises RedisRefused when the server is there but does not let us in, ValueError for an unusable URL.
    """
    link = RedisLink(url)
    backoff = Backoff()
    while stop is None or not stop.is_set():
        try:
            with link.noting():
                link.measure_clock()
            return link
        except (redis.RedisError, OSError) as exc:
            if trouble := tls_trouble(exc, url):
                raise RedisRefused(
                    f"Redis at {link.url} cannot be used: {trouble}. The URL is in VALOHAI_AGENT_REDIS."
                ) from exc
            if is_refusal(exc):
                raise RedisRefused(
                    f"Redis at {link.url} refuses this agent: {exc}. Check user and password of the URL "
                    "(VALOHAI_AGENT_REDIS) and the rights of the user."
                ) from exc
            if not is_transient(exc):
                raise
        (stop or threading.Event()).wait(backoff.seconds())
    return link


def find_deployment(link: RedisLink) -> str:
    """The one deployment that uses this server, read from the keys of its service.

    For agents that were started with nothing but a queue and a URL. Raises NoDeployment when there are several, or
    when the user may not look (an agent's own ACL user may not: whoever gave the password gives the id as well).
    """
    try:
        found = {
            key.decode().split(":")[1]
            for pattern in ("vh:*:service", "vh:*:epoch", "vh:*:sequence")
            for key in link.client.scan_iter(match=pattern, count=1000)
        }
    except redis.ResponseError as exc:
        raise NoDeployment(
            f"cannot look for the deployment on {link.url} ({exc}); give --deployment"
        ) from exc
    if len(found) == 1:
        return found.pop()
    if not found:
        raise NoDeployment(
            f"no control plane has used Redis at {link.url} yet; start it, or give --deployment "
            "(`valohai-dagster doctor` prints the id)"
        )
    raise NoDeployment(
        f"several deployments use {link.url}: {', '.join(sorted(found))}; choose with --deployment"
    )
