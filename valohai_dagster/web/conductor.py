"""The conductor process: hosts the execution service and the HTTP server until told to go, or idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from valohai_dagster.broker.connection import broker_url, connect_async
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.embedded.conductor import conductor_lock, info_path, is_kept_alive, spawn
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.executions.core import run_all
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.observability.hub import observing
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.registry import Stores, open_stores
from valohai_dagster.web.joining import Joining
from valohai_dagster.web.service_app import make_app
from valohai_dagster.web.settings_watch import InUse

if TYPE_CHECKING:
    from valohai_dagster.plugin.driver.driver import RunDriver

log = logging.getLogger(__name__)

IDLE_LOOK_SECONDS = 1.0
AGENT_STOP_SECONDS = 10.0


class Ending(Enum):
    """Why a conductor ended."""

    taken = "another one serves"
    told = "told to"
    idle = "idle"
    changed = "the settings have changed"
    failed = "a part of it has failed"


def run_conductor(settings: Settings, *, on_demand: bool) -> Ending:
    """Serves until SIGTERM or SIGINT; ends at once when another conductor serves this state directory.

    Started on demand, it also ends by itself after `idle_exit_seconds` without work, and takes the idle agents and
    the embedded Redis with it; so it does for a changed settings file once nothing runs, and starts its successor.
    Told to go earlier, it leaves both: running executions go on without it.
    """
    with conductor_lock(settings) as mine:
        if not mine:
            return Ending.taken
        info_path(settings).unlink(missing_ok=True)
        try:
            ending = asyncio.run(_serve(settings, on_demand))
        finally:
            info_path(settings).unlink(missing_ok=True)
    if ending is Ending.changed:
        spawn(load_settings())
    return ending


LEAVES_NOTHING = (Ending.idle, Ending.changed)


async def _serve(settings: Settings, on_demand: bool) -> Ending:
    records, stores = open_records(settings), open_stores(settings)
    broker = await connect_async(settings)
    secret_key = load_secret_key(settings)
    service = ExecutionService(
        settings,
        records=records,
        broker=broker,
        broker_url=broker_url(settings),
        stores=stores,
        secret_key=secret_key,
    )
    joining = Joining(settings, records=records, stores=stores, secret_key=secret_key)
    listener = _listen(settings)
    driving = Driving(settings, service, records, stores)
    with observing(service, lambda: driving.driver) as hub:
        app = make_app(
            records,
            stores,
            host=settings.http_host,
            metrics=hub.render,
            webserver_url=lambda: settings.webserver_address,
            further=joining.routes(),
        )
        ending = await _serve_until_told(
            settings, service, driving, _http_server(app), listener, on_demand=on_demand
        )
    await broker.aclose()
    records.close()
    if ending in LEAVES_NOTHING and settings.redis_url is None:
        EmbeddedRedis(settings).stop(only_if_unused=True)
    return ending


async def _serve_until_told(
    settings: Settings,
    service: ExecutionService,
    driving: Driving,
    server: uvicorn.Server,
    listener: socket.socket,
    *,
    on_demand: bool,
) -> Ending:
    stop = _stop_event()
    in_use = InUse(settings, on_demand=on_demand)
    tasks = [
        asyncio.create_task(_serve_executions(service, driving)),
        asyncio.create_task(server.serve([listener])),
        asyncio.create_task(stop.wait()),
    ]
    changed = asyncio.create_task(
        in_use.until_changed(
            lambda: service.working or service.packager.busy or driving.busy,
            every=IDLE_LOOK_SECONDS,
        )
    )
    endings = {changed: Ending.changed}
    if on_demand:
        endings[asyncio.create_task(_until_idle(service, driving, settings))] = Ending.idle
    tasks += endings
    in_use.announce()
    log.info("serving at %s", settings.base_url, extra={"action": "serve"})
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if any(task.cancelled() or task.exception() for task in done):
        ending = Ending.failed  # whatever runs goes on without it
    else:
        ending = next((why for task, why in endings.items() if task in done), Ending.told)
    await _wind_down(settings, service, server, tasks, ending)
    return ending


async def _serve_executions(service: ExecutionService, driving: Driving) -> None:
    """Both end together, the driver first: it needs the service to the last."""
    try:
        await run_all(service.run(), driving.run())
    finally:
        await driving.close()


class Driving:
    """The run driver, imported beside the service's start: it needs all of Dagster, the service nothing of it."""

    def __init__(
        self, settings: Settings, service: ExecutionService, records: Records, stores: Stores
    ) -> None:
        self._parts = (settings, service, records, stores)
        self._driver: RunDriver | None = None

    @property
    def driver(self) -> RunDriver | None:
        """None while it is being imported."""
        return self._driver

    @property
    def busy(self) -> bool:
        return self._driver is not None and self._driver.busy

    async def run(self) -> None:
        self._driver = await asyncio.to_thread(self._make)
        await self._driver.run()

    def _make(self) -> RunDriver:
        from valohai_dagster.plugin.driver.driver import RunDriver

        return RunDriver(*self._parts)

    async def close(self) -> None:
        if self._driver is not None:
            await self._driver.close()


async def _wind_down(
    settings: Settings,
    service: ExecutionService,
    server: uvicorn.Server,
    tasks: list[asyncio.Task[None]],
    ending: Ending,
) -> None:
    info_path(settings).unlink(missing_ok=True)
    failed = next((task for task in tasks if task.done() and task.exception()), None)
    if ending in LEAVES_NOTHING:
        await service.groups.stop_all(AGENT_STOP_SECONDS)
    server.should_exit = True
    for task in (tasks[0], *tasks[2:]):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    log.info("the conductor goes: %s", ending.value, extra={"action": "exit"})
    if failed is not None:
        raise failed.exception() or RuntimeError("a task of the conductor ended")


async def _until_idle(service: ExecutionService, driving: Driving, settings: Settings) -> None:
    patience = timedelta(seconds=settings.idle_exit_seconds)
    while (
        service.idle_for() < patience
        or service.packager.busy
        or driving.busy
        or is_kept_alive(settings)
    ):
        await asyncio.sleep(IDLE_LOOK_SECONDS)


def _stop_event() -> asyncio.Event:
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def _listen(settings: Settings) -> socket.socket:
    """The service's socket. An embedded service whose port is taken picks a free one and keeps it for good."""
    candidates = [settings.port]
    if settings.redis_url is None and settings.public_url is None:
        candidates.append(0)
    family = socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET
    for port in candidates:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.http_host, port))
            listener.listen()  # who is told the address at once need not wait for the server: it answers when it is up
        except OSError:
            listener.close()
            continue
        settings.port_file.write_text(str(listener.getsockname()[1]))
        return listener
    raise ConfigurationError(
        f"cannot listen on {settings.http_host}:{settings.port}; set http_host and http_port to a free address"
    )


def _http_server(app: Starlette) -> uvicorn.Server:
    """Its log goes where ours goes, in the same form."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010 - signals: see _stop_event
    return server
