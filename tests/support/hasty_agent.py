"""The worker agent with little patience, so that no test waits a minute for a connection that is stuck."""

from __future__ import annotations

from valohai_agent import transfer
from valohai_agent.cli import main
from valohai_agent.transfers import retries
from valohai_agent.transfers.wire import Patience


def hasty(**_: object) -> Patience:
    return Patience(connect_seconds=2, read_seconds=1, window_seconds=1, bytes_per_second=1024)


if __name__ == "__main__":
    transfer.Patience = hasty
    retries.BACK_OFF_SECONDS = 0.05
    main()
