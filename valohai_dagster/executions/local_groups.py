"""The service's local groups: agent processes on this host, wired to the queue and to those who wait."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

from valohai_agent.protocol import Command
from valohai_dagster.capacity.clouds.local import LocalGroup
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.stream import EventKind, ExecutionStatus


class LocalGroups(dict[str, LocalGroup]):
    """Local groups by name. Groups of other kinds are served by agents that somebody else starts."""

    def __init__(
        self,
        core: ServiceCore,
        broker_url: str,
        on_gone: Callable[[str, str, str], Awaitable[None]],
    ) -> None:
        """`on_gone` is called with the group and the worker that has died, and how."""
        super().__init__()
        self._core = core
        self._told: dict[str, str | None] = {}  # group -> trouble that its waiting executions know
        for name, group in core.settings.groups.items():
            if group.kind == "local":
                self[name] = LocalGroup(
                    name,
                    group,
                    state_dir=core.settings.state_dir,
                    redis_url=broker_url,
                    deployment=core.records.deployment_id,
                    on_gone=functools.partial(on_gone, name),
                    drain=lambda worker, reason, name=name: self._drain(name, worker, reason),
                    log_format=core.settings.log_format,
                    clock=core.clock,
                )

    def any_alive(self) -> bool:
        return any(group.alive() for group in self.values())

    async def reconcile(self, name: str) -> None:
        """Starts or drains agents of one group; nothing to do for a group that is not local."""
        group, dispatch = self.get(name), self._core.dispatch
        if group is not None:
            await group.reconcile(await dispatch.waiting(name), await dispatch.workers(name))

    async def reconcile_all(self) -> None:
        for name in self:
            await self.reconcile(name)
        await self._tell_trouble()

    def close(self) -> None:
        for group in self.values():
            group.close()

    async def stop_all(self, timeout: float) -> None:
        await asyncio.gather(*(group.drain_all(timeout) for group in self.values()))

    async def _tell_trouble(self) -> None:
        """Those who wait in a group whose agents do not come up are told why, once per reason."""
        core = self._core
        for name, group in self.items():
            known, self._told[name] = self._told.get(name), group.trouble
            if group.trouble is None or known == group.trouble:
                continue
            text = f"waiting, since group {name} has no agent: {group.trouble}"
            for active in core.memory.all():
                if active.group == name and active.status is ExecutionStatus.queued:
                    await core.tell(active.id, text, kind=EventKind.warning)

    async def _drain(self, group: str, worker: str, reason: str) -> None:
        command = Command(kind="drain", reason=reason)
        await self._core.deliver(Outbox(commands=[(group, worker, command)]))
