"""Azure: virtual machines in a scale set of the flexible kind, which is made by us.

Azure accepts a machine and finds out a little later that there is no room for it; such a machine stays in the list as
failed, and one that powered itself off stays and is paid for. Both are deleted when they are seen.
"""

from __future__ import annotations

import base64
import logging
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from nacl.signing import SigningKey

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.azure_api import ResourceManager
from valohai_dagster.capacity.clouds.azure_check import problems
from valohai_dagster.capacity.clouds.azure_resources import (
    base_name,
    being_made,
    failure,
    is_ours,
    machine_body,
    machine_names,
    machine_of,
    powered_off,
    scale_set_body,
    scale_set_id,
    state_of,
    subnet_path,
)
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble, fill
from valohai_dagster.capacity.clouds.refusals import Refusals
from valohai_dagster.capacity.clouds.tidying import Tidying
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import AzureGroupSettings

log = logging.getLogger(__name__)

PATIENCE_SECONDS = (
    1.0  # for the first news of machines that were asked for; later ones are in the lists
)
NEWS_SECONDS = 0.5  # between two looks for it
SCALE_SET_SECONDS = 120.0  # for the scale set to be made


class AzureDriver:
    """Machines of one group: members of its scale set."""

    kind = "azure"
    can_stop = True

    def __init__(
        self,
        group: str,
        settings: AzureGroupSettings,
        *,
        deployment: str,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._clock = clock
        self._base = base_name(deployment, group)
        self._api = ResourceManager(group, settings)
        self._ready = False
        self._refusals = Refusals(clock)
        self._tidying = Tidying(group)

    def check(self) -> Sequence[str]:
        return list(problems(self._api, self._settings))

    def list(self) -> Sequence[Machine]:
        with self._api.translated("list the machines"):
            return [self._tidied(member) for member in self._members()]

    def launch(self, launch: Launch) -> Sequence[str]:
        place: dict[str, Any] = {"zone": launch.zone or None, "purchase": launch.purchase}
        with self._api.translated(f"launch {launch.count} machine(s)", **place):
            names = machine_names(self._base, launch)
            here = {member.name for member in self._members()}
            return fill(names, here, lambda missing: self._launch(launch, missing))

    def terminate(self, machine_id: str) -> None:
        with self._api.translated(f"terminate {machine_id}"):
            if self._ours(machine_id):
                self._delete(machine_id)

    def stop(self, machine_id: str) -> None:
        """Gives it back to the cloud and keeps its disk: a machine that is only off is paid for."""
        with self._api.translated(f"stop {machine_id}"):
            self._here(machine_id)
            self._machines.begin_deallocate(self._place, machine_id, polling=False)

    def start(self, machine_id: str) -> None:
        with self._api.translated(f"start {machine_id}"):
            self._here(machine_id)
            self._machines.begin_start(self._place, machine_id, polling=False)

    def protect(self, machine_id: str, *, on: bool) -> None:
        """The scale set has no profile and scales nothing."""

    def close(self) -> None:
        self._api.close()

    # -- machines --------------------------------------------------------------------------------
    @property
    def _machines(self) -> Any:
        return self._api.client.virtual_machines

    @property
    def _place(self) -> str:
        return self._settings.resource_group

    def _members(self) -> Sequence[Any]:
        """None while there is no scale set: then it was never made, or deleted with all that was in it."""
        from azure.core.exceptions import ResourceNotFoundError

        home = scale_set_id(self._settings, self._base)
        marks = {"deployment": self._deployment, "group": self._group}
        try:
            found = self._machines.list(
                self._place,
                filter=f"'virtualMachineScaleSet/id' eq '{home}'",
                expand="instanceView",
            )
            return [member for member in found if is_ours(member.tags, **marks)]
        except ResourceNotFoundError as error:
            if error.error is None or error.error.code != "ResourceNotFound":
                raise
            return []

    def _tidied(self, member: Any) -> Machine:
        """The machine; one that could not be made, or has ended by itself, is deleted."""
        state = state_of(member)
        if failure(member) or powered_off(member):
            if failure(member):
                zone, purchase = _where(member)
                self._refusals.keep(zone, purchase, self._refusal(member))
            if self._tidying.deleted(member.name, lambda: self._discard(member)):
                state = MachineState.terminating
        created_at = member.properties.time_created or self._clock()
        return machine_of(member, created_at=created_at, state=state)

    def _discard(self, member: Any) -> None:
        why = "could not be made" if failure(member) else "has powered itself off"
        with self._api.translated(f"delete {member.name}"):
            self._delete(member.name)
        extra = {"action": "tidy", "group": self._group, "machine": member.name}
        log.info("%s is deleted: it %s", member.name, why, extra=extra)

    def _refusal(self, member: Any) -> CloudError:
        code, words = failure(member) or ("", "")
        zone, purchase = _where(member)
        return self._api.refusal(
            f"make {member.name}", code, words, zone=zone or None, purchase=purchase
        )

    def _ours(self, machine_id: str) -> Any | None:
        """None when it is gone; refuses to touch what is not of the group."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            machine = self._machines.get(self._place, machine_id)
        except ResourceNotFoundError as error:
            if error.error is None or error.error.code != "ResourceNotFound":
                raise
            return None
        if not is_ours(machine.tags, deployment=self._deployment, group=self._group):
            raise CloudError(
                f"The machine {machine_id} is not of the group {self._group!r} of this deployment and was left alone.",
                code="NotOurs",
                trouble=Trouble.invalid,
            )
        return machine

    def _here(self, machine_id: str) -> None:
        if self._ours(machine_id) is None:
            raise CloudError(
                f"There is no machine {machine_id} in the group {self._group!r} any more.",
                code="ResourceNotFound",
                trouble=Trouble.invalid,
            )

    def _delete(self, machine_id: str) -> None:
        """With its disk, network interface and address; at once, its agent has been drained."""
        self._machines.begin_delete(self._place, machine_id, force_deletion=True, polling=False)

    # -- launching -------------------------------------------------------------------------------
    def _launch(self, launch: Launch, names: Sequence[str]) -> Sequence[str]:
        if subnet_path(self._settings) is None:
            raise CloudError(
                f"Azure could not launch machines for the group {self._group!r}: it has no default network. "
                "Set subnets, with `network`, or by its whole path.",
                code="NoSubnet",
                trouble=Trouble.invalid,
            )
        self._refusals.raise_kept(launch.zone, launch.purchase)
        self._ensure_scale_set()
        for number, name in enumerate(names):
            try:
                self._create(name, launch)
            except CloudError as error:
                self._ready = False  # the scale set may have been deleted by hand
                error.made = names[:number]
                raise
        return self._made(names)

    def _create(self, name: str, launch: Launch) -> None:
        """One that is there already, unlisted yet, is left as it is."""
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceExistsError

        body = machine_body(
            name,
            launch,
            self._settings,
            deployment=self._deployment,
            group=self._group,
            public_key=_public_key(),
        )
        zone = launch.zone or None
        with self._api.translated(f"launch {name}", zone=zone, purchase=launch.purchase):
            try:
                self._machines.begin_create_or_update(
                    self._place,
                    name,
                    body,
                    match_condition=MatchConditions.IfMissing,
                    polling=False,
                )
            except ResourceExistsError as error:
                if error.status_code != 412:  # 409: the library's word for all conflicts
                    raise
        log.info(
            "%s asked for in %s",
            name,
            launch.zone or "any zone",
            extra={"action": "launch", "group": self._group, "machine": name},
        )

    def _made(self, names: Sequence[str]) -> Sequence[str]:
        """Those that are being made. Refusals come a moment after the request was accepted."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        members: list[Any] = []
        while True:
            try:
                with self._api.translated("look at new machines"):
                    members = [member for member in self._members() if member.name in names]
            except CloudError:  # the next list tells
                break
            if not any(being_made(member) for member in members) or time.monotonic() > deadline:
                break
            time.sleep(NEWS_SECONDS)
        lost = [member for member in members if failure(member)]
        if lost:
            refused = {member.name for member in lost}
            error = self._refusal(lost[0])
            error.made = [name for name in names if name not in refused]
            with suppress(CloudError), self._api.translated("delete what could not be made"):
                for name in sorted(refused):  # else the next list does it
                    self._delete(name)
            raise error
        return [member.name for member in members]

    def _ensure_scale_set(self) -> None:
        """Zones can be added to one that is there, and not be taken from it."""
        from azure.core.exceptions import ResourceNotFoundError

        if self._ready:
            return
        sets, there = self._api.client.virtual_machine_scale_sets, None
        try:
            there = sets.get(self._place, self._base)
        except ResourceNotFoundError as error:
            if error.error is None or error.error.code != "ResourceNotFound":
                raise
        has = set(there.zones or ()) if there else set()
        if there is None or not has.issuperset(self._settings.zones):
            body = scale_set_body(
                self._settings,
                sorted(has.union(self._settings.zones)),
                deployment=self._deployment,
                group=self._group,
            )
            poller = sets.begin_create_or_update(
                self._place, self._base, body, polling_interval=NEWS_SECONDS
            )
            poller.result(SCALE_SET_SECONDS)
        self._ready = True


def _where(member: Any) -> tuple[str, Purchase]:
    spot = member.properties.priority == "Spot"
    return next(iter(member.zones or ()), ""), Purchase.spot if spot else Purchase.on_demand


def _public_key() -> str:
    """Of a key pair whose other half is forgotten at once: nobody can log in with it."""
    kind, key = b"ssh-ed25519", bytes(SigningKey.generate().verify_key)
    content = b"".join(struct.pack(">I", len(part)) + part for part in (kind, key))
    return f"{kind.decode()} {base64.b64encode(content).decode()}"
