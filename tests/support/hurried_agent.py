"""The worker agent with all its times divided by TIME_FACTOR, so that minutes of silence take seconds."""

from __future__ import annotations

import os

from valohai_agent import commands, redis_link, session, worker
from valohai_agent.cli import main
from valohai_agent.protocol import LEASE_SECONDS, RENEW_SECONDS

LEAST_SECONDS = 0.5  # for an answer: the machine is as slow as ever


def hurry(factor: float) -> None:
    defaults = session.Session.__init__.__kwdefaults__
    assert defaults is not None
    defaults |= {"renew_seconds": RENEW_SECONDS / factor, "lease_seconds": LEASE_SECONDS / factor}
    block = redis_link.BLOCK_SECONDS / factor
    for module in (commands, redis_link, session, worker):
        setattr(module, "BLOCK_SECONDS", block)  # noqa: B010 - of several modules
    redis_link.SOCKET_SECONDS = max(LEAST_SECONDS, redis_link.SOCKET_SECONDS / factor)
    redis_link.CONNECT_SECONDS = max(LEAST_SECONDS, redis_link.CONNECT_SECONDS / factor)
    usual = redis_link.Backoff()
    pauses = (usual.first / factor, usual.longest / factor, 0.0)
    redis_link.Backoff.__init__.__defaults__ = pauses


if __name__ == "__main__":
    hurry(float(os.environ["TIME_FACTOR"]))
    main()
