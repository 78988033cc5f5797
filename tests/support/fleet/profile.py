"""How the executions of a simulated fleet go."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from valohai_agent.protocol import RENEW_SECONDS, Phase

ALL_PHASES = tuple(phase.value for phase in Phase)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is random is a function of seed and execution, so another attempt goes the same way."""

    seed: int = 1
    agents: int = 4
    slots: int = 100  # of all agents together
    takes_per_second: float | None = None  # None: as fast as jobs are to be had
    phases: tuple[str, ...] = ALL_PHASES
    hold: bool = False  # commands run until the fleet is told to let them end
    running_seconds: tuple[float, float] = (0.0, 0.0)  # shortest and longest command
    metadata: int = 1  # reports of metrics while the command runs
    outputs: int = 1
    output_bytes: int = 64
    logs: bool = True  # store a complete log at the end, as a real agent does
    fail_share: float = 0.0  # share of commands that end with exit code 1
    renew_seconds: float = RENEW_SECONDS

    @classmethod
    def from_json(cls, text: str) -> Profile:
        return cls().evolve(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def evolve(self, **changes: Any) -> Profile:
        pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return replace(self, **pairs)

    def fails(self, execution_id: str) -> bool:
        return self._random(execution_id, "fail").random() < self.fail_share

    def seconds(self, execution_id: str) -> float:
        """How long the command of that execution runs."""
        return self._random(execution_id, "seconds").uniform(*self.running_seconds)

    def _random(self, execution_id: str, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{what}/{execution_id}")
