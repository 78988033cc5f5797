"""What every kind of cloud can do for a worker group, and how it says no.

Calls are blocking (SDKs are) and run in threads; a driver is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from valohai_dagster.capacity.model import Machine, Purchase
from valohai_dagster.errors import ValohaiError


class Trouble(str, Enum):
    """What kind of no it was. The table of holds says what follows from it."""

    capacity = "capacity"  # none left there just now
    quota = "quota"  # the account may not have more
    throttled = "throttled"  # too many calls
    credentials = "credentials"  # unknown, expired or not allowed
    invalid = "invalid"  # unknown image, network, instance type: waiting does not help
    outage = "outage"  # no answer, 5xx


class CloudError(ValohaiError):
    """`code`: as the cloud calls it. `retry_after`: seconds that it asked to wait. `made`: ids of machines that a refused
    launch has all the same. The text holds no secret."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        trouble: Trouble,
        zone: str | None = None,
        purchase: Purchase | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.trouble = code, trouble
        self.zone, self.purchase, self.retry_after = zone, purchase, retry_after
        self.made: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`token` names this launch: the same one a second time makes no second machine. `user_data` holds no secret that
    outlives the machine's first minutes."""

    token: str
    count: int = 1
    zone: str = ""
    purchase: Purchase = Purchase.on_demand
    user_data: str = field(default="", repr=False)
    tags: Mapping[str, str] = field(default_factory=dict)


def identity_tags(deployment: str, group: str, launch: Launch) -> dict[str, str]:
    """What marks a machine as ours, for the clouds' tags, labels or metadata (E-41).

    `valohai-launch` is the launch's token, by which a repeated call finds what the first one made.
    """
    return {
        "valohai": "1",
        "valohai-deployment": deployment,
        "valohai-group": group,
        "valohai-launch": launch.token,
        **launch.tags,
    }


def fill(
    names: Sequence[str],
    here: Container[str],
    make: Callable[[Sequence[str]], Collection[str]],
) -> Sequence[str]:
    """For clouds where a launch names its machines: makes those that are not `here`, and tells which are there then.

    `make` gives those that it made; what it raises says so of all.
    """
    missing = [name for name in names if name not in here]
    try:
        made = make(missing) if missing else ()
    except CloudError as error:
        error.made = [name for name in names if name in here or name in error.made]
        raise
    return [name for name in names if name in here or name in made]


class Driver(Protocol):
    """Machines of one group. All methods raise CloudError."""

    kind: str
    can_stop: bool

    def check(self) -> Sequence[str]:
        """What is wrong with the settings (credentials, image, network, quota), in words; empty when all is well."""
        ...

    def list(self) -> Sequence[Machine]:
        """All machines that carry the group's tags, those that nobody here remembers too, and those that are going."""
        ...

    def launch(self, launch: Launch) -> Sequence[str]:
        """Asks for machines; ids of those that are known at once. Repeated with the same token it asks for no more.

        One that is filled in part raises why there are not more, with `made`.
        """
        ...

    def terminate(self, machine_id: str) -> None:
        """This one and no other; the group gets no replacement. One that is gone already is fine."""
        ...

    def stop(self, machine_id: str) -> None: ...

    def start(self, machine_id: str) -> None: ...

    def protect(self, machine_id: str, *, on: bool) -> None:
        """Keeps the cloud's own scaling from taking a busy machine, where it has such a thing (E-05)."""
        ...

    def close(self) -> None: ...
