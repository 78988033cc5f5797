"""Reads the commands that the control plane sends to this agent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pydantic import ValidationError

from valohai_agent.protocol import Command, speaks
from valohai_agent.redis_link import BLOCK_SECONDS, RedisLink

logger = logging.getLogger(__name__)


class CommandReader:
    """One thread that follows the command stream and hands each command to `dispatch(command, own)`.

    It starts at the server's present time: what was meant for an earlier process of the same name is not ours. After a
    forced change of name the old stream is followed too, since running leases still carry the old name; `own` is False
    for commands that came that way.
    """

    def __init__(
        self, link: RedisLink, key: str, dispatch: Callable[[Command, bool], None]
    ) -> None:
        self._link, self._dispatch = link, dispatch
        self._own = key
        self._positions: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)

    def start(self) -> None:
        """Notes the server's time, then follows in the background."""
        self._positions = {self._own: f"{self._link.server_ms()}-0"}
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def rename(self, key: str) -> None:
        """Follows `key` as well, from its beginning: the name is fresh."""
        self._positions = {**self._positions, key: "0-0"}
        self._own = key

    def _run(self) -> None:
        while not self._stop.is_set():
            found = self._link.persist(self._read, give_up=self._stop.is_set, wake=self._stop)
            for raw_key, entries in found or []:
                self._take(raw_key.decode(), entries)

    def _read(self) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
        self._step_back_if_behind()
        found = self._link.client.xread(dict(self._positions), block=int(BLOCK_SECONDS * 1000))
        return list(found.items()) if isinstance(found, dict) else found

    def _step_back_if_behind(self) -> None:
        """A server that replaced a lost one may have an earlier clock; its entries would stay unseen for ever."""
        now_ms = self._link.server_ms()
        for key, position in self._positions.items():
            if int(position.partition("-")[0]) > now_ms + 1000:
                self._positions[key] = f"{now_ms - 1000}-0"

    def _take(self, key: str, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        for entry_id, fields in entries:
            self._positions[key] = entry_id.decode()
            try:
                command = Command.model_validate_json(fields.get(b"c", b""))
            except ValidationError as exc:
                logger.warning(
                    "ignored a command that cannot be read: %s",
                    exc,
                    extra={"action": "command-ignored"},
                )
                continue
            if not speaks(command.v):
                text = "ignored a command of protocol version %s"
                logger.warning(text, command.v, extra={"action": "command-ignored"})
                continue
            self._dispatch(command, key == self._own)
