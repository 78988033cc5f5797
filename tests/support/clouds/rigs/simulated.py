"""The simulated cloud as it ships, with a clock of the test's. Its machines have no agents here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import Driver, Launch, Trouble
from valohai_dagster.capacity.clouds.simulated import SimulatedDriver, weather_of
from valohai_dagster.capacity.clouds.simulated_cloud import OVER, Spell, Weather
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import SimulatedGroupSettings

NEED: str | None = None
FOREIGN_GROUP = "somebody-elses"


class SimulatedRig(Rig):
    kind: ClassVar[str] = "simulated"
    zones: ClassVar[Sequence[str]] = ("a", "b")
    spot: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, str]] = {
        "user_data": "its machines are on this host and need none",
        "protected": "nobody else scales it",
        "room": "its quotas are of all or nothing",
        "wrong_settings": "whatever is set is right",
    }

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._later = timedelta(0)
        self._drivers: list[SimulatedDriver] = []
        self._changed: dict[str, Any] = {}  # of the weather, for all drivers

    def driver(self, *, group: str = GROUP, **changes: Any) -> Driver:
        return self._open(group, **changes)

    def _open(self, group: str, **changes: Any) -> SimulatedDriver:
        values = {"kind": "simulated", "boot_delay_seconds": 0, **changes}
        settings = SimulatedGroupSettings.model_validate(values)
        driver = SimulatedDriver(
            group, settings, deployment=DEPLOYMENT, state_dir=self._state_dir, clock=self._clock
        )
        driver.cloud.weather = replace(weather_of(settings), **self._changed)
        self._drivers.append(driver)
        return driver

    def _clock(self) -> datetime:
        return utcnow() + self._later

    def foreign(self) -> str:
        return self._open(FOREIGN_GROUP).launch(Launch(token="theirs"))[0]

    def alive(self, machine_id: str) -> bool:
        for driver in self._all():
            machine = driver.cloud.machines.get(machine_id)
            if machine is not None:
                return machine.state(self._clock()) not in (None, *OVER)
        return False

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return next(
            driver.cloud.machines[machine_id].tags
            for driver in self._all()
            if machine_id in driver.cloud.machines
        )

    def settle(self) -> None:
        self._later += timedelta(seconds=31)

    def vanish(self, machine_id: str) -> None:
        with self._open(GROUP)._opened() as cloud:
            cloud.end(machine_id)

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        always = Spell(start=self._clock(), end=self._clock() + timedelta(days=1))
        if room:
            return (
                self._weather(partial_rate=1.0)
                if trouble is Trouble.capacity
                else self.cannot("room")
            )
        if trouble is Trouble.capacity:
            return self._weather(droughts=(replace(always, zone=zone, purchase=purchase),))
        if trouble is Trouble.throttled:
            return self._weather(throttle_rate=1.0)
        if trouble is Trouble.outage:
            return self._weather(outages=(always,), seed=1)
        return self._weather(refuses=frozenset({trouble}))

    def lag(self) -> AbstractContextManager[None]:
        return self._weather(delivery=(20.0, 30.0))

    @contextmanager
    def _weather(self, **changes: Any) -> Iterator[None]:
        before = {id(driver): driver.cloud.weather for driver in self._drivers}
        self._changed = changes
        for driver in self._drivers:
            driver.cloud.weather = replace(driver.cloud.weather, **changes)
        try:
            yield
        finally:
            self._changed = {}
            for driver in self._drivers:
                driver.cloud.weather = before.get(id(driver), Weather())

    def _all(self) -> Iterator[SimulatedDriver]:
        for group in {one.stem for one in (self._state_dir / "simulated").glob("*.json")}:
            driver = self._open(group)
            with driver._opened():
                yield driver


@contextmanager
def serving() -> Iterator[None]:
    yield


@contextmanager
def opened(server: None, tmp_path: Path) -> Iterator[SimulatedRig]:
    yield SimulatedRig(tmp_path)
