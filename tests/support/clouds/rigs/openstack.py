"""OpenStack: the stand-in of `openstack_api.py`, or real servers when `VALOHAI_TEST_OPENSTACK` is their Keystone's address.

The real ones must have a project `admin` whose user `admin` has the password `pw`, an image `ubuntu`, a flavor `small`
and a network `machines`, and nothing else in the project. Launches, their repetition, tags, user data, termination, stop
and start, foreign servers and a full cloud were seen there with Keystone 30.0, Nova 34.0 (its fake hypervisor), Placement
16.0, Glance 33.0 and Neutron 29.0. These take a minute to set up, and on SQLite they lose requests when two servers are made
at once, so every day has the stand-in.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

from tests.support.clouds import openstack_api as api
from tests.support.clouds.openstack_api import OpenStack, Refusal
from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import Driver, Trouble
from valohai_dagster.capacity.clouds.openstack import LOOK_BACK, OpenStackDriver
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import OpenStackGroupSettings

NEED = None
REAL = os.environ.get("VALOHAI_TEST_OPENSTACK")

_REFUSALS = {
    Trouble.throttled: Refusal(429, "Too many requests", **{"Retry-After": "7"}),
    Trouble.credentials: Refusal(401, "The request you have made requires authentication."),
    Trouble.outage: Refusal(503, "The server is currently unavailable."),
}


class OpenStackRig(Rig):
    """One project."""

    kind: ClassVar[str] = "openstack"
    zones: ClassVar[Sequence[str]] = () if REAL else api.ZONES
    limits: ClassVar[Mapping[str, str]] = {
        "spot": "OpenStack has no spot machines",
        "lag": "Nova lists what it has accepted",
        "protected": "Nova scales nothing",
    }

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}
        self._drivers: list[Driver] = []
        # Other tests have launches of the same name, which must not be looked back to.
        begin = utcnow() + timedelta(seconds=1)
        self.clock: Callable[[], datetime] = lambda: begin + LOOK_BACK

    def driver(self, *, group: str = GROUP, **changes: Any) -> Driver:
        values = {
            "kind": "openstack",
            "image": "ubuntu",
            "instance_type": "small",
            "network": "machines",
            **self.defaults,
        }
        settings = OpenStackGroupSettings.model_validate({**values, **changes})
        made = OpenStackDriver(group, settings, deployment=DEPLOYMENT, clock=self.clock)
        self._drivers.append(made)
        return self._drivers[-1]

    def wrong_settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            "no-such-image": {"image": "no-such-image"},
            "no-such-flavor": {"instance_type": "no-such-flavor"},
            "no-such-network": {"network": "no-such-network"},
            "no-such-group": {"security_groups": ["no-such-group"]},
            "no-such-zone": {"zones": ["no-such-zone"]},
            "quota is 10": {"max_machines": 99},
            "spot": {"spot": True},
            "authentication": {"password": "wrong"},
            "127.0.0.1:9": {"auth_url": "http://127.0.0.1:9/v3"},
        }

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()


class StandInRig(OpenStackRig):
    """In this process."""

    def __init__(self, cloud: OpenStack) -> None:
        super().__init__()
        self.cloud = cloud
        self.defaults = {
            "auth_url": cloud.auth_url,
            "username": api.USER,
            "password": api.PASSWORD,
            "project": api.PROJECT,
            "region": api.REGION,
        }

    def foreign(self) -> str:
        server = self.cloud.add("theirs", {"valohai": "1", "valohai-deployment": "another"})
        self.cloud.settle()
        return server["id"]

    def alive(self, machine_id: str) -> bool:
        server = self.cloud.servers[machine_id]
        going = server["OS-EXT-STS:task_state"] == "deleting"
        return not going and server["status"] in ("BUILD", "ACTIVE", "SHUTOFF")

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return self.cloud.servers[machine_id]["metadata"]

    def user_data(self, machine_id: str) -> str:
        sent = self.cloud.servers[machine_id]["OS-EXT-SRV-ATTR:user_data"]
        return base64.b64decode(sent).decode()

    def settle(self) -> None:
        self.cloud.settle()

    def vanish(self, machine_id: str) -> None:
        self.cloud.servers[machine_id]["status"] = "DELETED"

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        cloud = self.cloud
        if trouble is Trouble.capacity:
            return _while(lambda: cloud.full.update({zone or "": room}), cloud.full.clear)
        if trouble is Trouble.invalid:
            return _while(lambda: cloud.missing.add("images"), cloud.missing.clear)
        if trouble is Trouble.quota:
            return _while(
                lambda: setattr(cloud, "quota", room), lambda: setattr(cloud, "quota", api.QUOTA)
            )

        def refuse(method: str, path: str) -> None:
            anybody = method == "GET" and path.startswith("/identity")  # may ask for versions
            if trouble is Trouble.outage or not anybody:
                raise _REFUSALS[trouble]

        return _while(
            lambda: setattr(cloud, "refuse", refuse),
            lambda: setattr(cloud, "refuse", lambda method, path: None),
        )


class RealRig(OpenStackRig):
    """Real services, looked at and spoilt as their administrator."""

    limits: ClassVar[Mapping[str, str]] = {
        **OpenStackRig.limits,
        "zones": "it has one zone",
        "room": "its hypervisor has room for all",
        **dict.fromkeys(("throttled", "credentials", "outage"), "the stand-in shows it"),
    }

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._cloud = connection
        self.defaults = {"auth_url": REAL, "username": "admin", "password": "pw"}
        self.defaults["project"] = "admin"

    def foreign(self) -> str:
        compute = self._cloud.compute
        image, flavor = self._cloud.image.find_image("ubuntu"), compute.find_flavor("small")
        server = compute.create_server(
            name="theirs", image_id=image.id, flavor_id=flavor.id, networks="none"
        )
        self.settle()
        return server.id

    def _server(self, machine_id: str) -> Any | None:
        return next((one for one in self._cloud.compute.servers() if one.id == machine_id), None)

    def alive(self, machine_id: str) -> bool:
        server = self._server(machine_id)
        return server is not None and server.task_state != "deleting"

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return self._server(machine_id).metadata  # pyright: ignore[reportOptionalMemberAccess]

    def user_data(self, machine_id: str) -> str:
        return base64.b64decode(self._cloud.compute.get_server(machine_id).user_data).decode()

    def settle(self) -> None:
        deadline = time.monotonic() + 60
        while any(one.status == "BUILD" or one.task_state for one in self._cloud.compute.servers()):
            assert time.monotonic() < deadline, "the servers do not settle"
            time.sleep(0.2)

    def vanish(self, machine_id: str) -> None:
        self._cloud.compute.delete_server(machine_id)

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        compute, image = self._cloud.compute, self._cloud.image.find_image("ubuntu")
        project = self._cloud.current_project_id
        if trouble is Trouble.capacity:
            if room:
                self.cannot("room")
            service = next(one for one in compute.services() if one.binary == "nova-compute")
            return _while(
                lambda: compute.disable_service(service), lambda: compute.enable_service(service)
            )
        if trouble is Trouble.quota:
            return _while(
                lambda: compute.update_quota_set(project, instances=room),
                lambda: compute.update_quota_set(project, instances=10),
            )
        if trouble is Trouble.invalid:
            return _while(
                lambda: self._cloud.image.update_image(image, name="renamed"),
                lambda: self._cloud.image.update_image(image, name="ubuntu"),
            )
        return self.cannot(trouble.value)

    def clear(self) -> None:
        for server in self._cloud.compute.servers():
            self._cloud.compute.delete_server(server.id)
        self.settle()


@contextmanager
def _while(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    begin()
    try:
        yield
    finally:
        end()


@contextmanager
def serving() -> Iterator[Any]:
    if not REAL:
        with OpenStack() as cloud:
            yield cloud
        return
    import openstack

    names = dict.fromkeys(("user_domain_name", "project_domain_name"), "Default")
    auth = {"auth_url": REAL, "username": "admin", "password": "pw", "project_name": "admin"}
    with openstack.connect(auth_type="password", auth={**auth, **names}) as connection:
        yield connection


@contextmanager
def opened(server: Any, tmp_path: Path) -> Iterator[OpenStackRig]:
    if isinstance(server, OpenStack):
        server.reset()
        rig: OpenStackRig = StandInRig(server)
    else:
        RealRig(server).clear()
        time.sleep(2)  # of two servers in one second nobody can tell which was changed first
        rig = RealRig(server)
    try:
        yield rig
    finally:
        rig.close()
