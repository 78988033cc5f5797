"""A stand-in for Azure (`tests/support/clouds/azure_compute.py`); the real client libraries sign in at it and call it."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from tests.support.clouds.azure_compute import (
    CLIENT,
    PLACE,
    REGION,
    SECRET,
    SUBNET,
    SUBSCRIPTION,
    TENANT,
    ZONES,
    AzureCompute,
    Machine,
    Refusal,
    World,
)
from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from tests.support.tls import Authority
from valohai_dagster.capacity.clouds.azure import AzureDriver
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AzureGroupSettings

NEED = None


class AzureRig(Rig):
    """A resource group of its own in a region of three zones."""

    kind: ClassVar[str] = "azure"
    zones: ClassVar[Sequence[str]] = ZONES
    spot: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, str]] = {
        "protected": "the scale set has no scaling of its own",
        "remembers": "Azure knows a repeated request by its machine's name, while the machine is there",
    }

    def __init__(self, server: AzureCompute) -> None:
        self._server = server
        self._drivers: list[AzureDriver] = []

    @property
    def world(self) -> World:
        return self._server.world

    def driver(self, *, group: str = GROUP, **changes: Any) -> AzureDriver:
        values: dict[str, Any] = {
            "kind": "azure",
            "subscription_id": SUBSCRIPTION,
            "resource_group": PLACE,
            "region": REGION,
            "instance_type": "Standard_D2s_v5",
            "subnets": [SUBNET],
            "tenant_id": TENANT,
            "client_id": CLIENT,
            "client_secret": SECRET,
            "endpoint_url": self._server.url,
        }
        settings = AzureGroupSettings.model_validate({**values, **changes})
        self._drivers.append(AzureDriver(group, settings, deployment=DEPLOYMENT))
        return self._drivers[-1]

    def foreign(self) -> str:
        name = "somebodys-machine"
        self.world.machines[name] = Machine(name, {"location": REGION, "properties": {}})
        return name

    def alive(self, machine_id: str) -> bool:
        one = self.world.machines.get(machine_id)
        return one is not None and one.alive

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return self.world.machines[machine_id].body["tags"]

    def user_data(self, machine_id: str) -> str:
        system = self.world.machines[machine_id].body["properties"]["osProfile"]
        return base64.b64decode(system["customData"]).decode()

    def settle(self) -> None:
        self.world.settle()

    def vanish(self, machine_id: str) -> None:
        self.world.vanish(machine_id)

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        spot = None if purchase is None else purchase is Purchase.spot
        return self.world.refusing(Refusal(trouble.value, zone, spot, room))

    def lag(self) -> AbstractContextManager[None]:
        return self.world.lag()

    def wrong_settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            "Standard_Nothing": {"instance_type": "Standard_Nothing"},
            "'9'": {"zones": ["9"]},
            "nowhere": {"region": "nowhere"},
            "no-such-group": {"resource_group": "no-such-group"},
            "region is not set": {"region": ""},
            "subnets is not set": {"subnets": []},
            "no-such-subnet": {"subnets": [SUBNET.replace("workers", "no-such-subnet")]},
            "no-such-image": {"image": "Canonical:ubuntu:no-such-image:latest"},
            "gets no token": {"client_secret": "wrong"},
            "docs/clouds.md": {"tenant_id": "22222222-0000-0000-0000-000000000001"},
        }

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()


@contextmanager
def serving() -> Iterator[AzureCompute]:
    with tempfile.TemporaryDirectory(prefix="vt-") as directory:
        certificate = Authority(Path(directory)).issue("azure")
        with AzureCompute(certificate) as server:
            trust = {
                "REQUESTS_CA_BUNDLE": str(certificate.authority),
                "AZURE_AUTHORITY_HOST": server.url,
            }
            with patch.dict(os.environ, trust):
                yield server


@contextmanager
def opened(server: AzureCompute, tmp_path: Path) -> Iterator[AzureRig]:
    server.world = World()
    rig = AzureRig(server)
    yield rig
    rig.close()
