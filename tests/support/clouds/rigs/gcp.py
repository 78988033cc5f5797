"""A stand-in for Google Compute Engine (`tests/support/clouds/gce.py`); the real client library signs real tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tests.support.clouds.gce import REGION, ZONES, Gce, Machine, Refusal, World
from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from tests.support.servers.google_key import write_key
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.gcp import GcpDriver
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import GcpGroupSettings

NEED = None


class GcpRig(Rig):
    """A project of its own, three zones."""

    kind: ClassVar[str] = "gcp"
    zones: ClassVar[Sequence[str]] = ZONES
    spot: ClassVar[bool] = True

    def __init__(self, server: Gce, key: Path) -> None:
        self._server, self.key = server, key
        self._drivers: list[GcpDriver] = []

    @property
    def world(self) -> World:
        return self._server.world

    def driver(self, *, group: str = GROUP, **changes: Any) -> GcpDriver:
        values: dict[str, Any] = {
            "kind": "gcp",
            "project": "project-of-tests",
            "region": REGION,
            "instance_type": "e2-standard-2",
            "credentials_file": self.key,
            "endpoint_url": self._server.url,
        }
        settings = GcpGroupSettings.model_validate({**values, **changes})
        self._drivers.append(GcpDriver(group, settings, deployment=DEPLOYMENT))
        return self._drivers[-1]

    def foreign(self) -> str:
        self.world.machines.append(Machine("somebodys-machine", ZONES[0]))
        return "somebodys-machine"

    def alive(self, machine_id: str) -> bool:
        return any(one.alive for one in self.world.machines if one.name == machine_id)

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return self.world.machine(machine_id).metadata

    def user_data(self, machine_id: str) -> str:
        return self.world.machine(machine_id).metadata["user-data"]

    limits: ClassVar[Mapping[str, str]] = {
        "protected": "the group managers have no scaling of their own"
    }

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
            "no-such-type": {"instance_type": "no-such-type"},
            "no-such-image": {"image": "no-such-image"},
            "family/none": {"image": "projects/ubuntu-os-cloud/global/images/family/none"},
            "no-such-network": {"network": "no-such-network"},
            "no-such-subnet": {"subnets": ["no-such-subnet"]},
            "asia-none1": {"region": "asia-none1"},
            "europe-north1-z": {"zones": ["europe-north1-z"]},
            "Neither region": {"region": ""},
            "spot_max_price": {"spot": True, "spot_max_price": "0.1"},
            "no-such-key.json": {"credentials_file": "/tmp/no-such-key.json"},
        }

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()


@contextmanager
def serving() -> Iterator[tuple[Gce, Path]]:
    with tempfile.TemporaryDirectory(prefix="vt-") as directory:
        key = write_key(Path(directory) / "key.json", token_uri="http://127.0.0.1:9/none")
        private_key = json.loads(key.read_text())["private_key"]
        with Gce(_public(private_key)) as server:
            yield server, key


def _public(private_key: str) -> str:
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(private_key.encode(), None)
    return (
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


@contextmanager
def opened(server: tuple[Gce, Path], tmp_path: Path) -> Iterator[GcpRig]:
    server[0].world = World()
    rig = GcpRig(*server)
    yield rig
    rig.close()
