"""What tests of the agent's session share."""

from __future__ import annotations

from collections.abc import Callable

from valohai_agent.session import Session

LEASE_SECONDS = 2.0  # the protocol's 30 s, made short
RENEW_SECONDS = 0.3

OpenSession = Callable[..., Session]
