"""The small HTTP server behind api.json (K-38, K-39), for this execution's own command only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from valohai_agent.protocol import Grants, JobInput


class LocalApi:
    """Serves set_status_detail, input_request and trigger_catalog under a token that only api.json names.

    `bind_host` and `public_host` are `Runtime.api_hosts(...)`: where to listen, and what the command connects to.
    `input_grants(file_ids)` asks the control plane (kind `input`); files granted as `file://` are served from here,
    since the command cannot see them. Use as a context manager.
    """

    def __init__(
        self,
        *,
        bind_host: str,
        public_host: str,
        inputs: Sequence[JobInput],
        on_status_detail: Callable[[str], None],
        input_grants: Callable[[list[str]], Grants],
    ) -> None:
        raise NotImplementedError

    def endpoints(self) -> dict[str, Any]:
        """Content of api.json."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> LocalApi:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
