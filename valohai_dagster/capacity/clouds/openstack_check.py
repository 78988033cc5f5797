"""What is wrong with the settings of a group on OpenStack, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from valohai_dagster.settings_groups import OpenStackGroupSettings

if TYPE_CHECKING:
    from openstack.connection import Connection


def problems_of(connection: Connection, settings: OpenStackGroupSettings) -> list[str]:
    """Asks the cloud; raises what its SDK raises when it does not answer."""
    return [
        *_machine(connection, settings),
        *_places(connection, settings),
        *_limits(connection, settings),
    ]


def _machine(connection: Connection, settings: OpenStackGroupSettings) -> Iterator[str]:
    if settings.spot:
        yield "spot: OpenStack has no spot machines; remove it."
    if not settings.image:
        yield "image: OpenStack has no default image; name one that has cloud-init."
    elif connection.image.find_image(settings.image) is None:
        yield f"image: the project sees no image {settings.image!r}."
    flavor = connection.compute.find_flavor(settings.instance_type)
    if flavor is None:
        yield f"instance_type: there is no flavor {settings.instance_type!r}."
    elif not flavor.disk and not settings.boot_from_volume:
        yield (
            f"instance_type: the flavor {settings.instance_type!r} has no disk; set boot_from_volume = true "
            "for a volume of `disk_gb`."
        )


def _places(connection: Connection, settings: OpenStackGroupSettings) -> Iterator[str]:
    if settings.network and connection.network.find_network(settings.network) is None:
        yield f"network: the project sees no network {settings.network!r}."
    for name in settings.security_groups:
        if connection.network.find_security_group(name) is None:
            yield f"security_groups: the project has no security group {name!r}."
    if settings.zones:
        known = {zone.name for zone in connection.compute.availability_zones()}
        for zone in settings.zones:
            if zone not in known:
                yield f"zones: there is no availability zone {zone!r}; there are {', '.join(sorted(known))}."


def _limits(connection: Connection, settings: OpenStackGroupSettings) -> Iterator[str]:
    limits = connection.compute.get_limits().absolute
    most = limits.instances
    if most is not None and 0 <= most < settings.max_machines:
        yield (
            f"max_machines = {settings.max_machines}: the project's quota is {most} servers; ask for more of them, "
            "or lower it."
        )
