"""What all jobs of one agent share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from valohai_agent.cache.local import InputCache
from valohai_agent.cache.shared import Share
from valohai_agent.clock import Clock, SystemClock
from valohai_agent.host import Host
from valohai_agent.runtimes.base import Runtime
from valohai_agent.stopping import Patience


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of an agent, for each of its jobs."""

    runtime: Runtime
    work_dir: Path
    worker: str
    host: Host = field(default_factory=Host)
    cache: InputCache | None = None
    share: Share | None = None
    gpus: str = ""
    clock: Clock = field(default_factory=SystemClock)
    patience: Patience = field(default_factory=Patience)
