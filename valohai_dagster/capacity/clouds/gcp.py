"""Google Compute Engine: managed instance groups with instance templates, both made and kept up to date by us.

The group manager makes machines by name and never scales, repairs or replaces on its own. What it accepted and cannot
make (no capacity, no quota) it would try for ever; what ended without being asked to (reclaimed, deleted by hand,
powered off) it keeps as a member. Both are taken out of it when they are seen.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble, fill
from valohai_dagster.capacity.clouds.gcp_api import ComputeApi
from valohai_dagster.capacity.clouds.gcp_check import problems
from valohai_dagster.capacity.clouds.gcp_resources import (
    LAUNCHED_AT,
    base_name,
    ended,
    failed,
    instance_path,
    last,
    machine_names,
    machine_of,
    manager_body,
    manager_name,
    metadata_of,
    purchase_of,
    region_of,
    state_of,
    template_body,
    template_path,
)
from valohai_dagster.capacity.clouds.refusals import Refusals
from valohai_dagster.capacity.clouds.tidying import Tidying
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import GcpGroupSettings

log = logging.getLogger(__name__)

PATIENCE_SECONDS = (
    1.0  # for the first news of machines that were asked for; later ones are in the lists
)
NEWS_SECONDS = 0.25  # between two looks for it
_REQUESTS = uuid.UUID("6f0c1a52-41d8-4d0c-9a55-0f6f6d3c2b11")  # namespace of the ids of requests


@dataclass(frozen=True)
class _Manager:
    """One managed instance group, as it is there."""

    name: str
    zone: str
    template: str


class GcpDriver:
    """Machines of one group: members of its managed instance groups in all zones."""

    kind = "gcp"
    can_stop = True

    def __init__(
        self,
        group: str,
        settings: GcpGroupSettings,
        *,
        deployment: str,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._clock = clock
        self._base = base_name(deployment, group)
        self._api = ComputeApi(group, settings)
        self._ready: set[tuple[str, Purchase]] = set()
        self._homes: dict[str, _Manager] = {}  # of machines, as last listed
        self._refusals = Refusals(clock)
        self._tidying = Tidying(group)

    def check(self) -> Sequence[str]:
        return list(problems(self._api, self._settings))

    def list(self) -> Sequence[Machine]:
        self._homes = {}
        with self._api.translated("list the machines"):
            return [
                machine
                for manager in self._managers()
                for machine in self._tidied(manager, self._members(manager))
            ]

    def launch(self, launch: Launch) -> Sequence[str]:
        doing = f"launch {launch.count} machine(s)"
        place: dict[str, Any] = {"zone": launch.zone or None, "purchase": launch.purchase}
        with self._api.translated(doing, secret=launch.user_data, **place):
            names = machine_names(self._base, launch)
            here = {
                last(member.instance)
                for manager in self._managers()
                for member in self._members(manager)
            }
            return fill(names, here, lambda missing: self._launch(launch, missing))

    def terminate(self, machine_id: str) -> None:
        from google.api_core.exceptions import NotFound

        with self._api.translated(f"terminate {machine_id}"):
            manager = self._home(machine_id)
            if manager is not None:
                with suppress(NotFound):  # the whole group manager went, and its machines with it
                    self._delete(manager, [machine_id])

    def stop(self, machine_id: str) -> None:
        with self._api.translated(f"stop {machine_id}"):
            self._switch(machine_id, "stop", MachineState.running, MachineState.stopped)

    def start(self, machine_id: str) -> None:
        with self._api.translated(f"start {machine_id}"):
            self._switch(machine_id, "start", MachineState.stopped, MachineState.running)

    def protect(self, machine_id: str, *, on: bool) -> None:
        """The group managers have no autoscaler and take no machine by themselves."""

    def close(self) -> None:
        self._api.close()

    # -- machines --------------------------------------------------------------------------------
    def _managers(self) -> Iterator[_Manager]:
        """In all zones, those that are no longer in the settings too."""
        names = {manager_name(self._base, purchase) for purchase in Purchase}
        filters = " OR ".join(f'(name = "{name}")' for name in sorted(names))
        pages = self._api.call("InstanceGroupManagers", "aggregated_list", filter=filters)
        for _, scoped in pages:
            for one in scoped.instance_group_managers:
                if one.name in names and one.zone:
                    yield _Manager(one.name, last(one.zone), last(one.instance_template))

    def _members(self, manager: _Manager) -> list[Any]:
        found = list(
            self._api.call(
                "InstanceGroupManagers",
                "list_managed_instances",
                zone=manager.zone,
                instance_group_manager=manager.name,
            )
        )
        self._homes |= {last(member.instance): manager for member in found}
        return found

    def _tidied(self, manager: _Manager, members: list[Any]) -> Iterator[Machine]:
        """Machines of the members; what cannot become one, or is none any more, is taken out."""
        lost = [member for member in members if failed(member) or ended(member)]
        for member in lost:
            self._note(manager, member)
        names = [last(member.instance) for member in lost]
        gone = bool(lost) and self._tidying.deleted(
            ", ".join(names), lambda: self._discard(manager, names)
        )
        for member in members:
            tidied = gone and member in lost
            state = MachineState.terminating if tidied else state_of(member)
            metadata = self._metadata(manager, member)
            yield machine_of(
                member,
                zone=manager.zone,
                purchase=purchase_of(self._base, manager.name),
                metadata=metadata,
                created_at=_moment(metadata.get(LAUNCHED_AT)) or self._clock(),
                state=state,
            )

    def _discard(self, manager: _Manager, names: list[str]) -> None:
        with self._api.translated(f"delete {', '.join(names)}"):
            self._delete(manager, names)

    def _metadata(self, manager: _Manager, member: Any) -> Mapping[str, str]:
        """Of a machine that somebody else had the group make, no more than when it was made."""
        ours = dict(member.preserved_state_from_config.metadata)
        if LAUNCHED_AT in ours or not member.instance_status:
            return ours
        found = self._api.call(
            "Instances", "get", zone=manager.zone, instance=last(member.instance)
        )
        return {LAUNCHED_AT: found.creation_timestamp}

    def _note(self, manager: _Manager, member: Any) -> None:
        name = last(member.instance)
        if failed(member):
            purchase = purchase_of(self._base, manager.name)
            self._refusals.keep(manager.zone, purchase, self._refusal(manager, member))
        log.info(
            "%s is taken out of its group: it %s",
            name,
            "could not be made" if failed(member) else "has ended by itself",
            extra={"action": "tidy", "group": self._group, "machine": name},
        )

    def _refusal(self, manager: _Manager, member: Any) -> CloudError:
        error = member.last_attempt.errors.errors[0]
        return self._api.refusal(
            f"make {last(member.instance)} in {manager.zone}",
            error.code,
            error.message,
            zone=manager.zone,
            purchase=purchase_of(self._base, manager.name),
        )

    def _home(self, machine_id: str) -> _Manager | None:
        """None when it is gone; refuses to touch what is not of the group."""
        if machine_id not in self._homes:
            for manager in self._managers():
                self._members(manager)
        if machine_id in self._homes:
            return self._homes[machine_id]
        pages = self._api.call("Instances", "aggregated_list", filter=f'name = "{machine_id}"')
        if any(one.name == machine_id for _, scoped in pages for one in scoped.instances):
            raise CloudError(
                f"The machine {machine_id} is not of the group {self._group!r} of this deployment and was left alone.",
                code="NotOurs",
                trouble=Trouble.invalid,
            )
        return None

    def _switch(
        self, machine_id: str, method: str, before: MachineState, after: MachineState
    ) -> None:
        """Nothing to do on the way to `after`; only from `before` does Google accept it."""
        way = {
            MachineState.stopped: MachineState.stopping,
            MachineState.running: MachineState.starting,
        }
        member, manager = None, self._home(machine_id)
        if manager is not None:
            named = (one for one in self._members(manager) if last(one.instance) == machine_id)
            member = next(named, None)
        if manager is None or member is None:
            raise CloudError(
                f"There is no machine {machine_id} in the group {self._group!r} any more.",
                code="notFound",
                trouble=Trouble.invalid,
            )
        state = state_of(member)
        if state is before:
            if member.current_action != "STARTING":  # else it is tried already
                self._tell(manager, f"{method}_instances", [machine_id])
        elif state not in (after, way[after]):
            raise self._api.refusal(
                f"{method} {machine_id}", "resourceNotReady", f"it is {state.value} just now"
            )

    def _delete(self, manager: _Manager, names: Sequence[str]) -> None:
        """The group becomes smaller by them; those that are going already are passed over."""
        self._tell(manager, "delete_instances", names, skip_instances_on_validation_error=True)

    def _tell(self, manager: _Manager, method: str, names: Sequence[str], **options: Any) -> None:
        body = {"instances": [instance_path(manager.zone, name) for name in names], **options}
        self._api.call(
            "InstanceGroupManagers",
            f"{method}_unary",
            zone=manager.zone,
            instance_group_manager=manager.name,
            **{f"instance_group_managers_{method}_request_resource": body},
        )

    # -- launching -------------------------------------------------------------------------------
    def _launch(self, launch: Launch, names: Sequence[str]) -> Sequence[str]:
        """In the launch's zone, or in the first of the region that has room."""
        zones = [launch.zone] if launch.zone else self._zones()
        for number, zone in enumerate(zones, start=1):
            try:
                with self._api.translated(
                    f"launch {len(names)} machine(s) in {zone}",
                    zone=launch.zone or None,
                    purchase=launch.purchase,
                    secret=launch.user_data,
                ):
                    return self._launch_in(zone, launch, names)
            except CloudError as error:
                last_one = bool(error.made) or number == len(zones)
                if error.trouble is not Trouble.capacity or last_one:
                    if not launch.zone and not error.made:
                        error.zone = None  # all of them
                    raise
        raise CloudError(
            f"No zone of {region_of(self._settings) or 'no region'} has machines of the type "
            f"{self._settings.instance_type!r} for the group {self._group!r}: change instance_type or region.",
            code="notFound",
            trouble=Trouble.invalid,
        )

    def _launch_in(self, zone: str, launch: Launch, names: Sequence[str]) -> Sequence[str]:
        self._refusals.raise_kept(zone, launch.purchase)
        manager = self._ensure(zone, launch.purchase)
        metadata = metadata_of(
            launch,
            deployment=self._deployment,
            group=self._group,
            launched_at=self._clock(),
        )
        try:
            self._create(manager, names, metadata)
        except Exception:
            self._ready.discard((zone, launch.purchase))  # it may have been deleted by hand
            raise
        return self._made(manager, names)

    def _create(self, manager: _Manager, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        """The request has an id of its own, by which Google knows a repetition within the hour."""
        from google.api_core.exceptions import BadRequest, Conflict

        request_id = uuid.uuid5(_REQUESTS, "\0".join((manager.zone, manager.name, *names)))
        state = {"metadata": metadata}
        body = {"instances": [{"name": name, "preserved_state": state} for name in names]}
        try:
            operation = self._api.call(
                "InstanceGroupManagers",
                "create_instances_unary",
                zone=manager.zone,
                instance_group_manager=manager.name,
                request_id=str(request_id),
                instance_group_managers_create_instances_request_resource=body,
            )
        except (BadRequest, Conflict) as error:
            if "already exist" not in error.message:
                raise
            if len(names) > 1:
                for name in names:  # some are there, and lists do not show them yet
                    self._create(manager, [name], metadata)
            return
        self._api.finish(operation)
        log.info(
            "%d machine(s) asked for in %s",
            len(names),
            manager.zone,
            extra={"action": "launch", "group": self._group, "zone": manager.zone},
        )

    def _made(self, manager: _Manager, names: Sequence[str]) -> Sequence[str]:
        """Those that are being made. Refusals come a moment after the request was accepted."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        members: list[Any] = []
        while True:
            try:
                with self._api.translated("look at new machines"):
                    members = [one for one in self._members(manager) if last(one.instance) in names]
            except CloudError:  # the next list tells
                break
            known = all(member.instance_status or failed(member) for member in members)
            if known or time.monotonic() > deadline:
                break
            time.sleep(NEWS_SECONDS)
        lost = [member for member in members if failed(member)]
        refused = {last(member.instance) for member in lost}
        if refused:
            error = self._refusal(manager, lost[0])
            error.made = [name for name in names if name not in refused]
            with suppress(CloudError), self._api.translated("take out what could not be made"):
                self._delete(manager, sorted(refused))  # else the next list does it
            raise error
        return [last(member.instance) for member in members]

    def _ensure(self, zone: str, purchase: Purchase) -> _Manager:
        """The group manager of the zone, with a template of what the settings say now."""
        body = template_body(
            self._settings, deployment=self._deployment, group=self._group, purchase=purchase
        )
        template = body["name"]
        manager = _Manager(manager_name(self._base, purchase), zone, template)
        if (zone, purchase) in self._ready:
            return manager
        there = {one.zone: one for one in self._managers() if one.name == manager.name}.get(zone)
        if there is None or there.template != template:
            self._ensure_template(body)
        if there is None:
            self._make_manager(manager, purchase)
        elif there.template != template:
            self._set_template(manager, old=there.template)
        self._ready.add((zone, purchase))
        return manager

    def _ensure_template(self, body: Mapping[str, Any]) -> None:
        from google.api_core.exceptions import Conflict

        try:
            operation = self._api.call(
                "InstanceTemplates", "insert_unary", instance_template_resource=dict(body)
            )
        except Conflict:
            return  # named after its content
        self._api.finish(operation)

    def _make_manager(self, manager: _Manager, purchase: Purchase) -> None:
        from google.api_core.exceptions import Conflict

        body = manager_body(
            self._base, purchase, project=self._settings.project, template=manager.template
        )
        try:
            operation = self._api.call(
                "InstanceGroupManagers",
                "insert_unary",
                zone=manager.zone,
                instance_group_manager_resource=body,
            )
        except Conflict:
            return  # somebody else has just made it
        self._api.finish(operation)

    def _set_template(self, manager: _Manager, *, old: str) -> None:
        """Machines that are there stay as they are. The old template goes when no other zone has it."""
        from google.api_core.exceptions import GoogleAPICallError

        path = template_path(self._settings.project, manager.template)
        operation = self._api.call(
            "InstanceGroupManagers",
            "set_instance_template_unary",
            zone=manager.zone,
            instance_group_manager=manager.name,
            instance_group_managers_set_instance_template_request_resource={
                "instance_template": path
            },
        )
        self._api.finish(operation)
        try:
            self._api.call("InstanceTemplates", "delete_unary", instance_template=old)
        except GoogleAPICallError:
            log.info(
                "the template %s is still in use",
                old,
                extra={"action": "keep_template", "group": self._group},
            )

    def _zones(self) -> list[str]:
        """Of the region, those that have the machine type; all for types of one's own making."""
        region, wanted = region_of(self._settings), self._settings.instance_type
        if not region:
            return []
        pages = self._api.call("MachineTypes", "aggregated_list", filter=f'name = "{wanted}"')
        zones = {last(one.zone) for _, scoped in pages for one in scoped.machine_types if one.zone}
        found = sorted(zone for zone in zones if zone.rpartition("-")[0] == region)
        if found or "-custom-" not in wanted:
            return found
        return sorted(last(url) for url in self._api.call("Regions", "get", region=region).zones)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
