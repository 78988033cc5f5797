"""Where machines of a group can be, and from which image: looked up once, and again when AWS objects."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from valohai_dagster.capacity.clouds.aws_access import AwsAccess
from valohai_dagster.capacity.clouds.aws_errors import cloud_error
from valohai_dagster.settings_groups import AwsGroupSettings

CANONICAL = "099720109477"  # the account that publishes Ubuntu
UBUNTU = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-{arch}-server-*"
_ARCHITECTURES = {"x86_64": "amd64", "arm64": "arm64"}


@dataclass(frozen=True, kw_only=True)
class Image:
    id: str
    root_device: str
    state: str


class AwsPlaces:
    """Raises CloudError and what botocore raises."""

    def __init__(self, group: str, settings: AwsGroupSettings, access: AwsAccess) -> None:
        self._group, self._settings, self._access = group, settings, access
        self._subnets: dict[str, list[str]] | None = None
        self._image: Image | None = None

    def forget(self) -> None:
        """After an error that says that something of it is wrong."""
        self._subnets = self._image = None

    @property
    def subnets(self) -> dict[str, list[str]]:
        """By zone, in the order of the settings."""
        if self._subnets is None:
            self._subnets = self._find_subnets()
        return self._subnets

    @property
    def image(self) -> Image:
        if self._image is None:
            self._image = self._find_image()
        return self._image

    def zones(self, wanted: str, *, token: str) -> Sequence[str]:
        """The one that is wanted; without one all, beginning with one that the launch's token decides: the same when
        the launch is repeated."""
        zones = list(self.subnets)
        if not wanted:
            start = zlib.crc32(token.encode()) % len(zones)
            return zones[start:] + zones[:start]
        if wanted not in zones:
            raise self._wrong(
                f"there is no subnet in zone {wanted}; set `subnets` or `zones`", wanted
            )
        return [wanted]

    def problems_of_types(self) -> Iterator[str]:
        """What of `instance_type` and `zones` does not go together, in words."""
        settings = self._settings
        for name in dict.fromkeys((settings.instance_type, *settings.instance_types)):
            found = self._access.client("ec2").describe_instance_type_offerings(
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": [name]}],
            )["InstanceTypeOfferings"]
            offered = {one["Location"] for one in found}
            if not offered:
                yield f"instance_type: {self._access.region} has no {name}"
                continue
            for zone in sorted(set(settings.zones) - offered):
                yield f"zones: there is no {name} in {zone}"

    def problems_of_zones(self) -> Iterator[str]:
        """Networks and subnets that are not there are errors."""
        there = self.subnets
        for zone in self._settings.zones:
            if zone not in there:
                yield f"zones: there is no subnet in {zone}"

    def problems_of_security(self) -> Iterator[str]:
        wanted = self._settings.security_groups
        if wanted:
            found = self._access.client("ec2").describe_security_groups(
                Filters=[{"Name": "group-id", "Values": wanted}]
            )["SecurityGroups"]
            for missing in sorted(set(wanted) - {one["GroupId"] for one in found}):
                yield f"security_groups: there is no {missing} in {self._access.region}"

    def problems_of_image(self) -> Iterator[str]:
        if self.image.state != "available":
            yield f"image: {self.image.id} is {self.image.state}"

    def _find_subnets(self) -> dict[str, list[str]]:
        settings, ec2 = self._settings, self._access.client("ec2")
        if settings.subnets:
            found = ec2.describe_subnets(SubnetIds=settings.subnets)["Subnets"]
        elif settings.network:
            filters = [{"Name": "vpc-id", "Values": [settings.network]}]
            found = ec2.describe_subnets(Filters=filters)["Subnets"]
        else:
            filters = [{"Name": "default-for-az", "Values": ["true"]}]
            found = ec2.describe_subnets(Filters=filters)["Subnets"]
        by_zone: dict[str, list[str]] = {}
        for subnet in sorted(found, key=lambda one: one["SubnetId"]):
            chosen = by_zone.setdefault(subnet["AvailabilityZone"], [])
            if settings.subnets or not chosen:
                chosen.append(subnet["SubnetId"])
        order = settings.zones or sorted(by_zone)
        usable = {zone: by_zone[zone] for zone in order if zone in by_zone}
        if not usable:
            place = settings.network or "the default network"
            where = f"zones {', '.join(settings.zones)}" if settings.zones else place
            raise self._wrong(f"there is no subnet in {where}; set `network` or `subnets`")
        return usable

    def _find_image(self) -> Image:
        wanted, ec2 = self._settings.image, self._access.client("ec2")
        if wanted:
            found = ec2.describe_images(ImageIds=[wanted])["Images"]
        else:
            name = UBUNTU.format(arch=self._architecture())
            found = ec2.describe_images(
                Owners=[CANONICAL], Filters=[{"Name": "name", "Values": [name]}]
            )["Images"]
        if not found:
            raise self._wrong(f"there is no image {wanted or 'of Ubuntu LTS'} here; set `image`")
        newest = max(found, key=lambda one: one.get("CreationDate", ""))
        return Image(
            id=newest["ImageId"],
            root_device=newest.get("RootDeviceName") or "/dev/sda1",
            state=newest.get("State", "available"),
        )

    def _architecture(self) -> str:
        described: Any = self._access.client("ec2").describe_instance_types(
            InstanceTypes=[self._settings.instance_type]
        )["InstanceTypes"]
        for one in described[0].get("ProcessorInfo", {}).get("SupportedArchitectures", ()):
            if one in _ARCHITECTURES:
                return _ARCHITECTURES[one]
        return "amd64"

    def _wrong(self, text: str, zone: str | None = None) -> Exception:
        code = "Unsupported" if zone else "NotFound"
        return cloud_error(
            self._group, "find a place for machines", code=code, text=text, zone=zone
        )
