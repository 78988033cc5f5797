"""Looks at what a group's settings name on Azure, and says what is wrong in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from valohai_dagster.capacity.clouds.azure_api import ResourceManager
from valohai_dagster.capacity.clouds.azure_resources import NETWORK_API, image_of, subnet_path
from valohai_dagster.capacity.clouds.base import CloudError
from valohai_dagster.settings_groups import AzureGroupSettings


def problems(api: ResourceManager, settings: AzureGroupSettings) -> Iterator[str]:
    """Stops at the first that concerns everything: no region, no credentials, no answer.

    Machine types, quotas and images are things of the subscription. An app registration that has rights in the
    resource group only (E-61) may not look at them, and need not.
    """
    if not settings.region:
        yield "region is not set; set it to the group's location, such as region = 'northeurope'."
        return
    try:
        with api.translated(f"look at the resource group {settings.resource_group!r}"):
            for _ in api.client.virtual_machine_scale_sets.list(settings.resource_group):
                break
    except CloudError as error:
        yield str(error)
        return
    looks = [lambda: _of_subscription(api, settings), lambda: _image(api, settings)]
    subnet = subnet_path(settings)
    if subnet is None:
        yield "subnets is not set: Azure has no default network; name one subnet, with `network`, or by its whole path."
    else:
        looks.append(lambda: _subnet(api, subnet))
    for look in looks:
        try:
            yield from look()
        except CloudError as error:
            if error.code != "AuthorizationFailed":
                yield str(error)


def _of_subscription(api: ResourceManager, settings: AzureGroupSettings) -> Iterator[str]:
    with api.translated(f"look at the machine types of {settings.region!r}"):
        found = api.client.resource_skus.list(filter=f"location eq '{settings.region}'")
        types = [sku for sku in found if sku.resource_type == "virtualMachines"]
    sku = next((one for one in types if one.name == settings.instance_type), None)
    yield from _machine_type(settings, sku, region_has_any=bool(types))
    with api.translated(f"look at the quotas of {settings.region!r}"):
        yield from _quota(api, settings, sku)


def _machine_type(
    settings: AzureGroupSettings, sku: Any | None, *, region_has_any: bool
) -> Iterator[str]:
    if not region_has_any:
        yield f"region: Azure has no machines in {settings.region!r}, or there is no such location."
    elif sku is None:
        yield f"instance_type: there are no machines of the type {settings.instance_type!r} in {settings.region!r}."
    else:
        zones = {zone for info in sku.location_info or () for zone in info.zones or ()}
        yield from (
            f"zones: there are no machines of the type {settings.instance_type!r} in the zone {zone!r} of "
            f"{settings.region!r}, but in {', '.join(sorted(zones)) or 'none'}."
            for zone in settings.zones
            if zone not in zones
        )
        if any(one.reason_code == "NotAvailableForSubscription" for one in sku.restrictions or ()):
            yield (
                f"instance_type: machines of the type {settings.instance_type!r} are not offered to this "
                f"subscription in {settings.region!r}; ask Microsoft, or choose another."
            )


def _quota(api: ResourceManager, settings: AzureGroupSettings, sku: Any | None) -> Iterator[str]:
    wanted = "lowPriorityCores" if settings.spot else (sku.family if sku else "cores")
    for usage in api.client.usage.list(settings.region):
        if usage.name.value == wanted and usage.limit == 0:
            yield (
                f"The quota {usage.name.localized_value or wanted} of the subscription is 0 in {settings.region!r}: "
                "ask Microsoft for more (Quotas in the portal)."
            )


def _image(api: ResourceManager, settings: AzureGroupSettings) -> Iterator[str]:
    """Of the marketplace only; others are found out by the first launch."""
    image = image_of(settings)
    if "publisher" not in image:
        return
    names = (image["publisher"], image["offer"], image["sku"])
    client = api.client.virtual_machine_images
    with api.translated(f"find the image {':'.join(image.values())!r}"):
        if image["version"] == "latest":
            if not client.list(settings.region, *names, top=1):
                yield f"image: {':'.join(image.values())!r} has no version in {settings.region!r}."
        else:
            client.get(settings.region, *names, image["version"])


def _subnet(api: ResourceManager, subnet: str) -> Iterator[str]:
    with api.translated(f"find the subnet {subnet!r}"):
        api.get(subnet, api_version=NETWORK_API)
    yield from ()
