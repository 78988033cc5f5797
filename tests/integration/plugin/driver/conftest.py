"""`same`: runs a scenario on Dagster's engine and through the conductor, and compares what each left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.plugin.driver.exclusions import IN_PROCESS
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import DEFS, Code, EngineSide, Side
from tests.support.observed_runs import AtOnce, Exclusions, Observed, differences, observe
from tests.support.postgres_server import PostgresServer
from tests.support.redis_server import RedisServer
from tests.support.sim_worker import Play, Plays

Scenario = Callable[[Side], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One definition and what is done with it; the same on both sides."""

    yaml: str
    scenario: Scenario
    plays: Plays | Callable[[], Plays] = field(default_factory=dict)
    defs: str = DEFS
    options: Mapping[str, Any] = field(default_factory=dict)  # of dagster.yaml
    exclusions: Exclusions = IN_PROCESS
    at_once: AtOnce = ""
    engine: type[Side] = EngineSide
    conductor: type[Side] = ConductorSide


class Comparison:
    """Calling it with a case runs both sides; what the engine left is returned for further looks."""

    def __init__(
        self,
        tmp_path: Path,
        redis_server: RedisServer,
        new_database: Callable[[], str] | None = None,
    ) -> None:
        self._root, self._redis, self._new_database = tmp_path, redis_server, new_database

    def __call__(self, case: Case) -> Observed:
        code = Code.write(self._root / "code", case.yaml, defs=case.defs)
        engine = self.observed(case, code, case.engine)
        ours = self.observed(case, code, case.conductor)
        found = differences(engine, ours, at_once=case.at_once)
        assert not found, f"engine (-) and conductor (+) differ:\n{found}"
        return engine

    def observed(self, case: Case, code: Code, kind: type[Side]) -> Observed:
        plays = case.plays() if callable(case.plays) else case.plays
        n = len(list(self._root.glob("side-*")))
        root = self._root / f"side-{n}"
        options = {"new_database": self._new_database, **case.options}
        with kind(root, code, plays, self._redis, **options) as side:
            case.scenario(side)
            return observe(side.instance, side.request(), side.service.records, case.exclusions)


@pytest.fixture
def same(tmp_path: Path, redis_server: RedisServer) -> Comparison:
    return Comparison(tmp_path, redis_server)


@pytest.fixture
def same_on_postgres(
    tmp_path: Path, redis_server: RedisServer, _postgres_server: PostgresServer
) -> Comparison:
    """Dagster's storage and our records in Postgres, a database each."""
    return Comparison(tmp_path, redis_server, _postgres_server.fresh_database)


__all__ = ["Case", "Comparison", "Play"]
