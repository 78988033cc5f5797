"""The checks of `valohai-dagster doctor`: one function per part, each gives one or more findings.

A check never raises for what it checks: `run_all` turns our errors into findings with the error's own words.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx

from valohai_agent.protocol import Keys
from valohai_agent.redis_url import redact
from valohai_dagster.cli.render import counted
from valohai_dagster.errors import ConfigurationError, ValohaiError
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import CloudGroupSettings, GroupSettings

if TYPE_CHECKING:
    from valohai_dagster.records.engine import Records
    from valohai_dagster.stores.base import Store

Level = Literal["ok", "note", "warn", "fail"]

LOW_DISK_BYTES = 2 * 10**9
MAX_CLOCK_OFFSET_SECONDS = 5.0
HTTP_SECONDS = 3.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check saw; `hint` is the next step when there is one to take."""

    part: str
    level: Level
    text: str
    hint: str | None = None


Check = Callable[[Settings], Iterable[Finding]]


def run_all(settings: Settings, checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """All findings in order; one broken part does not hide the others."""
    for part, check in checks:
        try:
            yield from check(settings)
        except ValohaiError as error:
            yield Finding(part=part, level="fail", text=str(error))


def check_versions(settings: Settings) -> Iterator[Finding]:
    from dagster.version import __version__ as dagster_version

    from valohai_agent.version import __version__ as agent
    from valohai_dagster.version import __version__ as ours

    text = f"valohai-dagster {ours}, agent {agent}, dagster {dagster_version}, Python {platform.python_version()}"
    if agent != ours:
        hint = f"install the same release of both: pip install valohai-agent=={ours}"
        yield Finding(part="versions", level="fail", text=text, hint=hint)
        return
    yield Finding(part="versions", level="ok", text=text)


def check_settings(settings: Settings) -> Iterator[Finding]:
    source = settings.config_file or "no valohai.toml: defaults and VALOHAI_* variables"
    yield Finding(part="settings", level="ok", text=f"{source}")


def check_state_dir(settings: Settings) -> Iterator[Finding]:
    directory = settings.state_dir
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
    except OSError as error:
        hint = "choose another directory: state_dir in valohai.toml, or VALOHAI_STATE"
        yield Finding(
            part="state", level="fail", text=f"{directory} is not writable: {error}", hint=hint
        )
        return
    free = shutil.disk_usage(directory).free
    text = f"{directory}, {free / 1e9:.1f} GB free"
    level: Level = "ok" if free >= LOW_DISK_BYTES else "warn"
    hint = None if level == "ok" else "inputs, outputs and logs need room: free some, or move it"
    yield Finding(part="state", level=level, text=text, hint=hint)


def check_records(settings: Settings) -> Iterator[Finding]:
    from valohai_dagster.records.engine import open_records

    records = open_records(settings)
    kind = records.engine.dialect.name
    text = f"{redact(settings.records_url)} ({kind}), deployment {records.deployment_id}"
    records.close()
    yield Finding(part="records", level="ok", text=text)


def check_redis(settings: Settings) -> Iterator[Finding]:
    from valohai_dagster.broker.connection import broker_url, connect

    client = connect(settings)
    try:
        begun = time.perf_counter()
        client.ping()
        latency = time.perf_counter() - begun
        server: Any = client.info("server")
        now: Any = client.time()
        offset = now[0] + now[1] / 1e6 - time.time()
    finally:
        client.close()
    kind = "embedded" if settings.redis_url is None else redact(broker_url(settings))
    version = server.get("valkey_version") or server.get("redis_version")
    name = server.get("server_name", "redis")
    yield Finding(
        part="redis", level="ok", text=f"{kind}, {name} {version}, {latency * 1000:.1f} ms"
    )
    if abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
        text = f"its clock is {offset:+.1f} s off ours"
        yield Finding(part="redis", level="warn", text=text, hint="switch on NTP on both machines")


def check_stores(settings: Settings) -> Iterator[Finding]:
    """Writes, reads and deletes a small object in every writable store, by signed requests too."""
    from valohai_dagster.stores.registry import make_store

    for name, section in settings.stores.items():
        try:
            yield store_finding(settings, make_store(name, section))
        except ConfigurationError as error:
            yield Finding(part="store", level="fail", text=f"{name} ({section.kind}): {error}")


def store_finding(settings: Settings, store: Store) -> Finding:
    """One line about one store: how it is used, what works, else what does not and why."""
    from valohai_dagster.stores.probe import probe

    uses = [use for use, chosen in store_uses(settings) if chosen == store.name]
    kind = f"{store.kind}, read-only" if store.readonly else store.kind
    label = f"{store.name} ({kind}){': ' + ', '.join(uses) if uses else ''}"
    probed = list(probe(store))
    problem = next((one for one in probed if one.problem is not None), None)
    if problem is not None:
        # Without deleting, only purges and the sweeping of lost uploads fail.
        level: Level = "warn" if problem.what == "delete" else "fail"
        text = f"{label}: {problem.what} failed: {problem.problem}"
        return Finding(part="store", level=level, text=text)
    if uses and store.readonly:
        hint = f"choose a writable store, or take readonly out of [stores.{store.name}]"
        text = f"{label}, {store.uri('')} can be read only"
        return Finding(part="store", level="fail", text=text, hint=hint)
    done = ", ".join(one.what for one in probed)
    return Finding(part="store", level="ok", text=f"{label}, {store.uri('')} ({done})")


def store_uses(settings: Settings) -> list[tuple[str, str]]:
    return [
        ("outputs", settings.default_store),
        ("code", settings.code_store_name),
        ("logs", settings.log_store_name),
        ("agents", settings.binary_store_name),
    ]


def check_service(settings: Settings) -> Iterator[Finding]:
    """The conductor: started here when the deployment starts it on demand."""
    from valohai_dagster.embedded.conductor import (
        START_SECONDS,
        ensure_conductor,
        log_path,
        other_settings,
        other_words,
    )

    info = ensure_conductor(settings)
    url = info.url if info else settings.base_url
    try:
        await_health(url, START_SECONDS if info else 0.0)
    except httpx.HTTPError as error:
        hint = (
            f"its log is {log_path(settings)}"
            if info
            else "start it on the control plane: valohai-dagster conductor"
        )
        text = f"the conductor does not answer at {url}: {error}"
        yield Finding(part="service", level="fail", text=text, hint=hint)
        return
    names = other_settings(settings, info) if info else []
    if info and names:
        text, hint = other_words(info, names)
        yield Finding(part="service", level="warn", text=text, hint=hint)
        return
    who = f"pid {info.pid}, " if info else ""
    yield Finding(part="service", level="ok", text=f"conductor {who}{url}")


def await_health(url: str, seconds: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until the service at `url` says that it is well. One that was just started refuses connections, or is slow, for a
    while: it is asked again for so long. Raises `httpx.HTTPError` with the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx.get(f"{url}/health", timeout=HTTP_SECONDS).raise_for_status()
            return
        except httpx.TransportError:
            if time.monotonic() >= deadline:
                raise
        sleep(POLL_SECONDS)


def check_groups(settings: Settings) -> Iterator[Finding]:
    """Who serves each worker group, and whether those with machines of their own could have some."""
    from valohai_dagster.broker.connection import connect
    from valohai_dagster.capacity.left_behind import left_behind
    from valohai_dagster.records.engine import open_records

    with closing(open_records(settings)) as records, closing(connect(settings)) as client:
        keys = Keys(records.deployment_id)
        with records.read() as conn:
            left = left_behind(conn, settings.groups)
        for one in left:
            yield Finding(part="group", level="warn", text=f"{one.group}: {one.trouble}")
        for name, group in settings.groups.items():
            agents = len(list(client.scan_iter(keys.worker(name, "*"), count=500)))
            if isinstance(group, CloudGroupSettings):
                yield from _machine_findings(records, settings, name, group, agents)
            else:
                yield _group_finding(name, group, agents)


def _machine_findings(
    records: Records, settings: Settings, name: str, group: CloudGroupSettings, agents: int
) -> Iterator[Finding]:
    """Such a group is well without any machine; what its cloud says is told by `groups check`."""
    from valohai_dagster.capacity.overrides import effective
    from valohai_dagster.capacity.reading import machines_of
    from valohai_dagster.cli.group_checks import obstacles

    with records.read() as conn:
        now, there = effective(conn, name, group), len(machines_of(conn, name))
    kind = getattr(group, "kind", "")
    text = f"{name}: {kind}, {there} of {now.max_machines} machines, {_seen(agents)}"
    problems = obstacles(records, settings, name)
    hint = None if kind == "simulated" else f"valohai-dagster groups check {name} asks its cloud"
    yield Finding(part="group", level="warn" if problems else "ok", text=text, hint=hint)
    for problem in problems:
        yield Finding(part="group", level="warn", text=f"{name}: {problem}")


def _seen(agents: int) -> str:
    return f"{counted(agents, 'agent')} checked in"


def _group_finding(name: str, group: GroupSettings, agents: int) -> Finding:
    if group.kind == "local":
        text = f"{name}: local, runtime {group.runtime}, up to {group.max_agents} agents, {_seen(agents)}"
        return Finding(part="group", level="ok", text=text)
    hint = f"on a machine of the group: valohai-agent run --queue {name} (Redis URL in VALOHAI_AGENT_REDIS)"
    return Finding(
        part="group",
        level="ok" if agents else "warn",
        text=f"{name}: {_seen(agents)}",
        hint=None if agents else hint,
    )


def check_docker(settings: Settings) -> Iterator[Finding]:
    """Needed by local groups whose runtime is docker; good to have for `auto`."""
    runtimes = {group.runtime for group in settings.groups.values() if group.kind == "local"}
    if not runtimes & {"auto", "docker"}:
        text = "not used: every local group runs commands as processes"
        yield Finding(part="docker", level="ok", text=text)
        return
    try:
        version = _docker_version()
    except ConfigurationError as error:
        needed = "docker" in runtimes
        hint = "start the Docker engine, or set DOCKER_HOST (Podman's socket works too)"
        level: Level = "fail" if needed else "note"
        more = "" if needed else "; commands run as processes"
        yield Finding(part="docker", level=level, text=f"{error}{more}", hint=hint)
        return
    yield Finding(part="docker", level="ok", text=f"engine {version}")


def _docker_version() -> str:
    import docker
    import docker.errors

    try:
        client = docker.from_env(timeout=5)
        try:
            return str(client.version().get("Version"))
        finally:
            client.close()
    except docker.errors.DockerException as error:
        raise ConfigurationError(f"no Docker engine answers ({error})") from error


def check_dagster_home(settings: Settings) -> Iterator[Finding]:
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        text = "DAGSTER_HOME is not set: Dagster forgets its runs when a command ends (executions are kept)"
        place = settings.state_dir / "dagster"
        hint = f"mkdir -p {place} && export DAGSTER_HOME={place} (`make up` does it)"
        yield Finding(part="dagster", level="note", text=text, hint=hint)
        return
    if not (Path(home) / "dagster.yaml").is_file():
        text = f"{home} has no dagster.yaml: logs of executions do not show in the UI"
        hint = "copy the dagster.yaml of this repository there"
        yield Finding(part="dagster", level="warn", text=text, hint=hint)
        return
    yield from _instance_findings(home)


def _instance_findings(home: str) -> Iterator[Finding]:
    """The instance as Dagster reads it, defaults included."""
    import dagster as dg

    try:
        instance = dg.DagsterInstance.get()
    except Exception as error:  # noqa: BLE001 - whatever Dagster says about its own file
        text = f"{home}/dagster.yaml cannot be used: {error}"
        yield Finding(part="dagster", level="fail", text=text)
        return
    with instance:
        yield Finding(part="dagster", level="ok", text=home)
        yield from monitoring_findings(instance)
        yield from queue_findings(instance)
        manager = type(instance.compute_log_manager).__name__
        if manager != "ValohaiComputeLogManager":
            text = f"compute_logs is {manager}: the UI shows no logs of executions"
            hint = (
                "set compute_logs to valohai_dagster.plugin.compute_logs.ValohaiComputeLogManager"
            )
            yield Finding(part="dagster", level="warn", text=text, hint=hint)


_TIMEOUTS = (
    ("start_timeout_seconds", "ends runs that wait for a machine"),
    ("cancel_timeout_seconds", "marks runs as canceled whose outputs are still being uploaded"),
    ("max_runtime_seconds", "counts waiting as running"),
)


def monitoring_findings(instance: Any) -> Iterator[Finding]:
    """Time-outs of Dagster's run monitoring that would end healthy executions."""
    if not instance.run_monitoring_enabled:
        return
    for name, effect in _TIMEOUTS:
        seconds = getattr(instance, f"run_monitoring_{name}")
        if seconds:
            text = f"run_monitoring.{name} is {seconds}: it {effect}"
            hint = "set it to 0 in dagster.yaml; steps have limits of their own"
            yield Finding(part="dagster", level="warn", text=text, hint=hint)


def queue_findings(instance: Any) -> Iterator[Finding]:
    """Whether runs of steps start at once, and runs of Dagster's own engine stay few."""
    from valohai_dagster.plugin.coordinator import ValohaiRunCoordinator
    from valohai_dagster.plugin.launcher import ValohaiRunLauncher
    from valohai_dagster.plugin.queue_rules import DRIVER_TAG, NO_LIMIT, bounds_engine_runs

    launcher, coordinator = instance.run_launcher, instance.run_coordinator
    if not isinstance(launcher, ValohaiRunLauncher):
        text = f"run_launcher is {type(launcher).__name__}: every run costs a process of its own"
        hint = "set run_launcher to valohai_dagster.plugin.launcher.ValohaiRunLauncher"
        yield Finding(part="dagster", level="warn", text=text, hint=hint)
    if not isinstance(coordinator, ValohaiRunCoordinator):
        text = (
            f"run_coordinator is {type(coordinator).__name__}: no run starts before its next turn"
        )
        hint = "set run_coordinator to valohai_dagster.plugin.coordinator.ValohaiRunCoordinator"
        yield Finding(part="dagster", level="note", text=text, hint=hint)
        return
    config = instance.get_concurrency_config()
    limit = config.run_queue_config.max_concurrent_runs
    if limit != NO_LIMIT:
        text = f"max_concurrent_runs is {limit}: runs of steps count too and go through the queue"
        hint = f"set it to -1 and limit the tag {DRIVER_TAG}=dagster instead"
        yield Finding(part="dagster", level="note", text=text, hint=hint)
    elif not bounds_engine_runs(config):
        text = "nothing limits runs of Dagster's own engine, each of which is a process"
        hint = (
            f"add a limit for the tag {DRIVER_TAG}=dagster, as this repository's dagster.yaml has"
        )
        yield Finding(part="dagster", level="warn", text=text, hint=hint)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", check_versions),
    ("settings", check_settings),
    ("state", check_state_dir),
    ("records", check_records),
    ("redis", check_redis),
    ("store", check_stores),
    ("service", check_service),
    ("group", check_groups),
    ("docker", check_docker),
    ("dagster", check_dagster_home),
)
