"""Refusals that a cloud tells only after it has accepted a launch: kept until the next launch of the same sort asks.

Google Cloud, Azure and OpenStack accept a request for machines and find out later that there is no capacity. The list of machines
shows it; the next launch in that zone, by that purchase, raises it, and so it comes where refusals are dealt with. It is
raised once: after that the cloud is asked again.
"""

from __future__ import annotations

from enum import Enum

from valohai_dagster.capacity.clouds.base import CloudError
from valohai_dagster.capacity.model import Purchase


class Scope(str, Enum):
    """How far a refusal reaches."""

    zone = "zone"  # this zone, by this purchase
    purchase = "purchase"  # all zones, by this purchase
    group = "group"


class Refusals:
    """Those of one group that no launch has raised yet."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Purchase], CloudError] = {}

    def keep(self, zone: str, purchase: Purchase, error: CloudError) -> None:
        self._kept[zone, purchase] = error

    def raise_kept(self, zone: str, purchase: Purchase) -> None:
        error = self._kept.pop((zone, purchase), None)
        if error is not None:
            raise error
