"""What the proxy keeps in memcached, kept in the one proxy process: a filter for Swift's pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class MemoryCache:
    """The part of Swift's memcached client that the proxy calls; entries vanish when their time has passed."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, float]] = {}

    def get(self, key: str, *_arguments: Any, **_options: Any) -> Any:
        value, until = self._entries.get(key, (None, 0.0))
        return None if until and until < time.time() else value

    def set(self, key: str, value: Any, *_arguments: Any, time: float = 0, **_options: Any) -> None:
        self._entries[key] = (value, _now() + time if time else 0.0)

    def delete(self, key: str, *_arguments: Any, **_options: Any) -> None:
        self._entries.pop(key, None)

    def incr(self, key: str, delta: int = 1, time: float = 0, **_options: Any) -> int:
        value = max(0, int(self.get(key) or 0) + delta)
        self.set(key, value, time=time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0, **_options: Any) -> int:
        return self.incr(key, -delta, time)

    def set_multi(
        self, mapping: Mapping[str, Any], *_arguments: Any, time: float = 0, **_options: Any
    ) -> None:
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: Iterable[str], *_arguments: Any, **_options: Any) -> list[Any]:
        return [self.get(key) for key in keys]


def _now() -> float:
    return time.time()


def filter_factory(_settings: Any, **_local: Any) -> Callable[[Any], Any]:
    cache = MemoryCache()

    def wrap(app: Any) -> Any:
        def call(environment: dict[str, Any], start_response: Any) -> Any:
            environment["swift.cache"] = cache
            return app(environment, start_response)

        return call

    return wrap
