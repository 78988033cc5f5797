"""What the contract suite asks of a cloud beside its driver: to look behind the driver's back, and to misbehave.

A module `tests/support/clouds/rigs/<kind>.py` has

    NEED: str | None          what the machine must have (tests/support/demand.py); None for nothing
    serving() -> context manager of a server or whatever is costly, entered once in a session
    opened(server, tmp_path) -> context manager of a Rig, entered for each test: an account with nothing in it

What a cloud or its stand-in cannot show has a line in `limits`, by the name of the method, and the reason: then the tests
that need it are skipped for this kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

import pytest

from valohai_dagster.capacity.clouds.base import Driver, Trouble
from valohai_dagster.capacity.model import Purchase

DEPLOYMENT = "deployment-of-tests"
GROUP = "workers"
OTHER_GROUP = "others"


class Rig:
    """One account of one cloud. Names of groups and deployment are those above."""

    kind: ClassVar[str]
    zones: ClassVar[
        Sequence[str]
    ] = ()  # some in which machines can be launched; empty: there are none
    spot: ClassVar[bool] = False  # spot machines can be asked for
    limits: ClassVar[Mapping[str, str]] = {}

    def driver(self, *, group: str = GROUP, **changes: Any) -> Driver:
        """A new driver, such as a conductor opens that has just started. `changes`: settings that are otherwise.

        The rig closes it. Two drivers of one group manage the same machines.
        """
        raise NotImplementedError

    def foreign(self) -> str:
        """Makes a machine that somebody else has in the account; its id."""
        raise NotImplementedError

    def alive(self, machine_id: str) -> bool:
        """The cloud has it (stopped ones too), as it knows itself. Machines on their way out are not alive."""
        raise NotImplementedError

    def tags(self, machine_id: str) -> Mapping[str, str]:
        """Tags, labels or metadata of the machine, by the names of `identity_tags`."""
        return self.cannot("tags")

    def user_data(self, machine_id: str) -> str:
        """What the machine would read when it boots."""
        return self.cannot("user_data")

    def protected(self, machine_id: str) -> bool:
        """The cloud's own scaling would leave it alone."""
        return self.cannot("protected")

    def settle(self) -> None:
        """Returns when all that is on its way in the cloud has arrived: machines run, are stopped, are gone."""

    def vanish(self, machine_id: str) -> None:
        """Somebody else, or the cloud itself, destroys the machine."""
        self.cannot("vanish")

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        """Inside it, launches (in the zone, by the purchase) are answered as this cloud does for such a trouble.

        `throttled`, `credentials` and `outage` concern all calls. `room`: machines that can be had before (`capacity`
        and `quota`).
        """
        return self.cannot("refuse")

    def lag(self) -> AbstractContextManager[None]:
        """Inside it, machines that are made do not appear in lists yet."""
        return self.cannot("lag")

    def wrong_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings that `check` must object to, by a word that its objection has to contain."""
        return self.cannot("wrong_settings")

    def cannot(self, what: str) -> NoReturn:
        pytest.skip(f"elsewhere: {self.limits.get(what) or f'{self.kind} cannot show {what}'}")


class RigModule(Protocol):
    """What is in a module of `rigs`."""

    NEED: str | None

    def serving(self) -> AbstractContextManager[Any]: ...

    def opened(self, server: Any, tmp_path: Path) -> AbstractContextManager[Rig]: ...
