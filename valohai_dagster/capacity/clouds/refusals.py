"""Refusals that a cloud tells only after it has accepted a launch: kept until the next launch of the same sort asks.

Google Cloud, Azure and OpenStack accept a request for machines and find out later that there is no capacity. The list of machines
shows it; the next launch in that zone, by that purchase, raises it, and so it comes where refusals are dealt with. It is
raised once, and not when it is old: then the cloud is asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import Enum

from valohai_dagster.capacity.clouds.base import CloudError
from valohai_dagster.capacity.model import Purchase

FRESH = timedelta(minutes=1)  # how long a refusal says something about the next launch


class Scope(str, Enum):
    """How far a refusal reaches."""

    zone = "zone"  # this zone, by this purchase
    purchase = "purchase"  # all zones, by this purchase
    group = "group"


class Refusals:
    """Those of one group that no launch has raised yet."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._kept: dict[tuple[str, Purchase], tuple[CloudError, datetime]] = {}
        self._raised: dict[tuple[str, Purchase], datetime] = {}

    def keep(self, zone: str, purchase: Purchase, error: CloudError) -> None:
        """Not what was raised just now: lists show the same failed machine until it is gone."""
        raised = self._raised.get((zone, purchase))
        if raised is None or self._clock() - raised >= FRESH:
            self._kept[zone, purchase] = error, self._clock()

    def raise_kept(self, zone: str, purchase: Purchase) -> None:
        error, at = self._kept.pop((zone, purchase), (None, None))
        if error is not None and at is not None and self._clock() - at < FRESH:
            self._raised[zone, purchase] = self._clock()
            raise error
