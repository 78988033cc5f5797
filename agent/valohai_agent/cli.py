"""The command `valohai-agent`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from valohai_agent.errors import AgentError
from valohai_agent.machine.commands import add_commands
from valohai_agent.machine.program import (
    BUSY_MARK,
    EXIT_REFUSED,
    EXIT_UPDATE,
    SUPERVISED_VARIABLE,
)
from valohai_agent.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from valohai_agent.version import __version__

if TYPE_CHECKING:
    from valohai_agent.cache.local import InputCache
    from valohai_agent.cache.shared import Share
    from valohai_agent.host import Host
    from valohai_agent.redis_link import RedisLink
    from valohai_agent.session import AgentIdentity
    from valohai_agent.worker import WorkerLoop

logger = logging.getLogger(__name__)

EXIT_NAME_TAKEN = 3

app = typer.Typer(
    name="valohai-agent",
    help="Leases executions from a queue in Redis and runs them in containers or processes.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


class LogFormat(str, Enum):
    text = "text"
    json = "json"


class CloudName(str, Enum):
    """Whose notices of a reclaim to look for."""

    auto = "auto"
    none = "none"
    aws = "aws"
    gcp = "gcp"
    azure = "azure"


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """What `run` was asked for."""

    queue: str
    redis_url: str
    deployment: str | None
    name: str
    slots: int
    work_dir: Path
    runtime: str
    gpus: str
    once: bool
    idle_exit_seconds: float | None
    cache: CacheOptions
    cloud: CloudName = CloudName.auto
    metadata_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What of input files is kept, and where (I-33 to I-35)."""

    max_gb: float | None
    disk_percent: float
    shared: Path | None
    shared_copy: bool


def default_name() -> str:
    """The host's name and something random, so that no two agents meet under one name by accident."""
    return f"{socket.gethostname()}-{secrets.token_hex(3)}"


def default_work_dir() -> Path:
    base = (
        Path("/var/lib")
        if os.geteuid() == 0
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    )
    return (
        base / "valohai-agent"
        if os.access(base, os.W_OK)
        else Path(tempfile.gettempdir()) / "valohai-agent"
    )


@app.command()
def run(
    queue: Annotated[
        str, typer.Option(help="Worker group whose jobs to take.", envvar="VALOHAI_AGENT_QUEUE")
    ],
    redis: Annotated[
        str,
        typer.Option(
            help="redis://, rediss:// or unix:// URL. Put it into the variable rather than on the command line, where "
            "everybody on the host can read its password.",
            envvar="VALOHAI_AGENT_REDIS",
            show_envvar=True,
        ),
    ],
    deployment: Annotated[
        Optional[str],
        typer.Option(
            help="Id of the deployment (`valohai-dagster doctor` prints it); found in Redis when only one uses it.",
            envvar="VALOHAI_AGENT_DEPLOYMENT",
        ),
    ] = None,
    name: Annotated[
        Optional[str],
        typer.Option(
            help="Unique within the group; made up if absent.", envvar="VALOHAI_AGENT_NAME"
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="Executions at the same time.", envvar="VALOHAI_AGENT_SLOTS")
    ] = 1,
    work_dir: Annotated[
        Optional[Path],
        typer.Option(
            help="Private directories and the input cache.", envvar="VALOHAI_AGENT_WORK_DIR"
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="auto, docker or process.", envvar="VALOHAI_AGENT_RUNTIME")
    ] = "auto",
    gpus: Annotated[
        str,
        typer.Option(help="all, none, or comma-separated device ids.", envvar="VALOHAI_AGENT_GPUS"),
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Run one execution, then exit.")] = False,
    idle_exit: Annotated[
        Optional[float],
        typer.Option(help="Exit after so many idle seconds.", envvar="VALOHAI_AGENT_IDLE_EXIT"),
    ] = None,
    cache_max_gb: Annotated[
        Optional[float],
        typer.Option(
            min=0,
            help="Input files that are kept, in GB (10^9 bytes); without it as many as the disk allows.",
            envvar="VALOHAI_AGENT_CACHE_MAX_GB",
        ),
    ] = None,
    cache_disk_percent: Annotated[
        float,
        typer.Option(
            min=1,
            max=100,
            help="How full the disk of the work directory may get before kept input files go.",
            envvar="VALOHAI_AGENT_CACHE_DISK_PERCENT",
        ),
    ] = 80.0,
    shared_cache: Annotated[
        Optional[Path],
        typer.Option(
            help="Directory of a file server that several workers share: inputs are kept and used there.",
            envvar="VALOHAI_AGENT_SHARED_CACHE",
        ),
    ] = None,
    shared_cache_copy: Annotated[
        bool,
        typer.Option(
            help="Copy inputs from the shared cache to this machine's disk before they are used.",
            envvar="VALOHAI_AGENT_SHARED_CACHE_COPY",
        ),
    ] = False,
    cloud: Annotated[
        CloudName,
        typer.Option(
            help="Whose notices to look for that this machine goes away (spot reclaims, maintenance); auto asks the "
            "firmware.",
            envvar="VALOHAI_AGENT_CLOUD",
        ),
    ] = CloudName.auto,
    metadata_url: Annotated[
        Optional[str],
        typer.Option(
            help="Base URL of the cloud's metadata service; its usual address if absent.",
            envvar="VALOHAI_AGENT_METADATA_URL",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat,
        typer.Option(help="Lines for people, or JSON objects.", envvar="VALOHAI_AGENT_LOG_FORMAT"),
    ] = LogFormat.text,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Takes jobs of one queue until told to stop.

    SIGTERM drains: what runs is finished, nothing new is taken, exit code 0. A second SIGTERM, or SIGINT, stops the
    running commands softly; a third one at once.
    """
    from valohai_agent.json_logging import set_up_logging

    set_up_logging(as_json=log_format is LogFormat.json, verbose=verbose)
    _warn_about_password(redis)
    options = AgentOptions(
        queue=queue,
        redis_url=redis,
        deployment=deployment,
        name=name or default_name(),
        slots=slots,
        work_dir=(work_dir or default_work_dir()).absolute(),
        runtime=runtime,
        gpus=gpus,
        once=once,
        idle_exit_seconds=idle_exit,
        cache=CacheOptions(
            max_gb=cache_max_gb,
            disk_percent=cache_disk_percent,
            shared=shared_cache.absolute() if shared_cache else None,
            shared_copy=shared_cache_copy,
        ),
        cloud=cloud,
        metadata_url=metadata_url,
    )
    raise typer.Exit(run_agent(options))


@app.command()
def version() -> None:
    """Prints the version and the protocol versions that this agent speaks."""
    typer.echo(f"valohai-agent {__version__} (protocol {MIN_PROTOCOL_VERSION}..{PROTOCOL_VERSION})")


def run_agent(options: AgentOptions) -> int:
    """Runs until drained; gives the process's exit code, with the reason on the log."""
    from valohai_agent.session import NameTaken

    try:
        update_wanted = _run_agent(options)
    except NameTaken as exc:
        logger.error("%s", exc, extra={"action": "name-taken"})
        return EXIT_NAME_TAKEN
    except (AgentError, ValueError) as exc:
        logger.error("%s", exc, extra={"action": "refused"})
        return EXIT_REFUSED
    return EXIT_UPDATE if update_wanted else 0


def _run_agent(options: AgentOptions) -> bool:
    """Whether it was told to give way to a newer agent."""
    from valohai_agent.cache.keeping import Caretaker
    from valohai_agent.host import observe_host
    from valohai_agent.job import JobRun
    from valohai_agent.redis_link import connect
    from valohai_agent.runtimes import select_runtime
    from valohai_agent.session import Session
    from valohai_agent.surroundings import Surroundings
    from valohai_agent.worker import LoopOptions, WorkerLoop
    from valohai_agent.workspace import reap_leftovers

    signals = Signals()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    runtime = select_runtime(options.runtime, work_dir=options.work_dir, slots=options.slots)
    host = observe_host()
    cache, share = _caches(options)
    reap = functools.partial(
        reap_leftovers,
        options.work_dir,
        remove_containers=runtime.remove_leftovers,
        remove_tree=runtime.remove_tree,
    )
    reap()
    link = connect(options.redis_url, stop=signals.leaving)
    if signals.leaving.is_set():
        return False
    identity = _identity(options, link, runtime.name, host)
    session = Session(link, identity, work_dir=options.work_dir, cached=cache.marks)
    session.register(stop=signals.leaving)
    around = Surroundings(
        runtime=runtime,
        work_dir=options.work_dir,
        worker=options.name,
        host=host,
        cache=cache,
        share=share,
        gpus=options.gpus,
    )
    wanted = LoopOptions(
        slots=options.slots,
        once=options.once,
        idle_exit_seconds=options.idle_exit_seconds,
        busy_mark=options.work_dir / BUSY_MARK,
    )
    loop = WorkerLoop(session, wanted, start_run=lambda lease: JobRun(lease, around), reap=reap)
    caretaker = Caretaker(cache, idle=lambda: session.busy == 0, share=share)
    caretaker.start()
    signals.attach(drain=loop.drain, stop=loop.stop_jobs)
    _log_start(options, runtime.name)
    try:
        with _notices(options, loop, gpus=bool(host.gpus)):
            loop.run()
    finally:
        session.close()
        link.close()
        caretaker.close()
        _close_caches(cache, share)
    logger.info("agent %s is done", options.name, extra={"action": "exit"})
    return loop.update_wanted


def _identity(options: AgentOptions, link: RedisLink, runtime: str, host: Host) -> AgentIdentity:
    from valohai_agent.redis_link import find_deployment
    from valohai_agent.session import AgentIdentity

    return AgentIdentity(
        deployment=options.deployment or find_deployment(link),
        group=options.queue,
        name=options.name,
        slots=options.slots,
        runtime=runtime,
        host=host,
        supervised=SUPERVISED_VARIABLE in os.environ,
    )


@contextlib.contextmanager
def _notices(options: AgentOptions, loop: WorkerLoop, *, gpus: bool) -> Iterator[None]:
    """Meanwhile the loop is told when the cloud is going to take the machine away."""
    from valohai_agent.metadata_service import Cloud, cloud_of_host
    from valohai_agent.preemption import PreemptionWatch, notices_of

    named = options.cloud not in (CloudName.auto, CloudName.none)
    cloud = Cloud(options.cloud.value) if named else cloud_of_host()
    if cloud is None or options.cloud is CloudName.none:
        yield
        return
    watch = PreemptionWatch(
        notices_of(cloud, options.metadata_url, gpus=gpus),
        on_notice=loop.preempt,
        directory=options.work_dir,
    )
    try:
        watch.start()
        yield
    finally:
        watch.close()


def _caches(options: AgentOptions) -> tuple[InputCache, Share | None]:
    from valohai_agent.cache.local import InputCache
    from valohai_agent.cache.shared import Share

    kept, mark = options.cache, options.cache.disk_percent / 100
    limit = None if kept.max_gb is None else int(kept.max_gb * 10**9)
    directory = options.work_dir / "cache"
    try:
        cache = InputCache(directory, max_bytes=limit, disk_mark=mark)
    except (OSError, sqlite3.Error) as exc:
        raise AgentError(
            f"The input cache {directory} cannot be opened: {exc}. Check the disk and the rights on it, or give this "
            "agent another --work-dir."
        ) from exc
    if kept.shared is None:
        return cache, None
    return cache, Share(kept.shared, copy=kept.shared_copy, disk_mark=mark)


def _close_caches(cache: InputCache, share: Share | None) -> None:
    cache.close()
    if share is not None:
        share.close()


class Signals:
    """SIGTERM drains; SIGINT, or a second SIGTERM, also stops the running commands; the next one kills them."""

    def __init__(self) -> None:
        self.leaving = threading.Event()
        self._stops = 0
        self._drain: Callable[[], None] = lambda: None
        self._stop: Callable[..., None] = lambda **_: None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def attach(self, *, drain: Callable[[], None], stop: Callable[..., None]) -> None:
        self._drain, self._stop = drain, stop
        if self.leaving.is_set():
            drain()

    def _received(self, number: int, frame: object) -> None:
        again = self.leaving.is_set()
        self.leaving.set()
        self._drain()
        if again or number == signal.SIGINT:
            self._stops += 1
            self._stop(hard=self._stops > 1)


def _warn_about_password(url: str) -> None:
    from valohai_agent.redis_link import has_password

    if has_password(url) and any(url in argument for argument in sys.argv):
        logger.warning(
            "the Redis password is on the command line, where every user of this host can read it; set "
            "VALOHAI_AGENT_REDIS instead",
            extra={"action": "password-on-argv"},
        )


def _log_start(options: AgentOptions, runtime: str) -> None:
    extra = {"action": "start", "worker": options.name, "group": options.queue, "runtime": runtime}
    text = "agent %s %s takes jobs of %s in %d slots, %s runtime, working in %s"
    values = (options.name, __version__, options.queue, options.slots, runtime, options.work_dir)
    logger.info(text, *values, extra=extra)


add_commands(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
