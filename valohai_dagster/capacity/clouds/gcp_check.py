"""Looks at what a group's settings name on Google Cloud, and says what is wrong in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.clouds.gcp_api import ComputeApi
from valohai_dagster.capacity.clouds.gcp_resources import (
    image_of,
    last,
    network_path,
    region_of,
    subnet_path,
)
from valohai_dagster.settings_groups import GcpGroupSettings


def problems(api: ComputeApi, settings: GcpGroupSettings) -> Iterator[str]:
    """Stops at the first that concerns everything: no region, no credentials, no answer."""
    region = region_of(settings)
    if not region:
        yield "Neither region nor zones is set; set one, such as region = 'europe-north1'."
        return
    try:
        with api.translated(f"look at the region {region!r}"):
            found = api.call("Regions", "get", region=region)
    except CloudError as error:
        yield str(error)
        return
    zones = {last(url) for url in found.zones}
    yield from (
        f"zones: {zone!r} is not in the region {region!r}, which has {', '.join(sorted(zones))}."
        for zone in settings.zones
        if zone not in zones
    )
    yield from _quotas(settings, {quota.metric: quota.limit for quota in found.quotas})
    if settings.spot_max_price is not None:
        yield "spot_max_price: Google Cloud has no such limit, the price of spot machines is fixed; leave it out."
    places = [zone for zone in settings.zones if zone in zones] or sorted(zones)
    yield from _machine_type(api, settings, places)
    for what, look in _looks(api, settings):
        try:
            with api.translated(f"find {what}"):
                look()
        except CloudError as error:
            yield str(error)


def _quotas(settings: GcpGroupSettings, limits: dict[str, float]) -> Iterator[str]:
    """Of those that the region lists, the ones that allow nothing at all."""
    metrics = ["PREEMPTIBLE_CPUS"] if settings.spot else ["CPUS"]
    if settings.accelerator:
        gpu = settings.accelerator.removeprefix("nvidia-").removeprefix("tesla-").upper()
        prefix = "PREEMPTIBLE_NVIDIA" if settings.spot else "NVIDIA"
        metrics.append(f"{prefix}_{gpu.replace('-', '_')}_GPUS")
    for metric in metrics:
        # A quota of 0 for preemptible CPUS means that the ordinary one counts.
        if limits.get(metric) == 0 and metric != "PREEMPTIBLE_CPUS":
            yield (
                f"The quota {metric} of the project {settings.project!r} is 0 in {region_of(settings)!r}: "
                "ask Google for more (IAM & Admin, Quotas)."
            )


def _machine_type(api: ComputeApi, settings: GcpGroupSettings, places: list[str]) -> Iterator[str]:
    """Zones that were chosen by name must have it; else any of the region's."""
    lacking: list[str] = []
    for zone in places:
        try:
            with api.translated(f"find the machine type {settings.instance_type!r} in {zone}"):
                api.call("MachineTypes", "get", zone=zone, machine_type=settings.instance_type)
        except CloudError as error:
            if error.trouble is not Trouble.invalid:
                yield str(error)
                return
            lacking.append(zone)
    if lacking and (settings.zones or lacking == places):
        yield (
            f"instance_type: there are no machines of the type {settings.instance_type!r} in {', '.join(lacking)}."
        )


def _looks(
    api: ComputeApi, settings: GcpGroupSettings
) -> Iterator[tuple[str, Callable[[], object]]]:
    image = image_of(settings)
    parts = image.split("/")
    project = _project_of(image)
    if "family" in parts:
        yield (
            f"the image {image!r}",
            lambda: api.call_in(project, "Images", "get_from_family", family=parts[-1]),
        )
    else:
        yield f"the image {image!r}", lambda: api.call_in(project, "Images", "get", image=parts[-1])
    subnet = subnet_path(settings)
    if subnet:
        region = region_of(settings)
        yield (
            f"the subnet {subnet!r}",
            lambda: api.call_in(
                _project_of(subnet), "Subnetworks", "get", region=region, subnetwork=last(subnet)
            ),
        )
    else:
        network = network_path(settings)
        yield (
            f"the network {network!r}",
            lambda: api.call_in(_project_of(network), "Networks", "get", network=last(network)),
        )


def _project_of(path: str) -> str:
    """Images and networks may be another project's."""
    parts = path.split("/")
    return parts[parts.index("projects") + 1]
