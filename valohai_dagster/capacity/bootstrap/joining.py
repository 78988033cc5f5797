"""Join tokens and tickets: who may become a worker of a group, and what such a machine is given.

A token is good for the machines of its launch, once each, for the time that they need to boot; only its digest is kept.
It is derived from the launch, so a launch that is repeated after a crash repeats its token too. A use is bound to the
machine's fresh key: the same request again gets the same answer, sealed to that key, and anybody else is refused: user
code on one machine of a launch reads the token of the others, and must not join in their place. A ticket belongs to one
machine and is renewed by its use.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import redis
import sqlalchemy as sa
from redis.exceptions import NoPermissionError

from valohai_agent.machine.messages import AgentFile, JoinAnswer, JoinRequest
from valohai_agent.protocol import Keys
from valohai_dagster.broker.access import set_agent_user
from valohai_dagster.broker.connection import explain, make_client
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.records.capacity_tables import join_tokens as table
from valohai_dagster.records.capacity_tables import machines
from valohai_dagster.records.store import get_fact, insert_ignore, set_fact
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    AnyGroupSettings,
    AwsGroupSettings,
    AzureGroupSettings,
    CloudGroupSettings,
    DockerGroupSettings,
    GcpGroupSettings,
)

log = logging.getLogger(__name__)

TOKEN_PREFIX, TICKET_PREFIX = "vhj_", "vht_"
TICKET_LIFE = timedelta(days=30)  # since its last use
CA_NAME = "redis-ca.crt"


class NotAdmitted(RefusedError):
    """The token or ticket is unknown, used up or expired. Nothing more is told to somebody who may be a stranger."""

    def __init__(self) -> None:
        super().__init__(
            "this token is not known, used up or expired; make a new one with "
            "`valohai-dagster agents join-token GROUP`"
        )


class NotListed(RefusedError):
    """The token is good, but the cloud has not told yet that the machine is one of its launch."""

    def __init__(self, machine_id: str) -> None:
        super().__init__(
            f"the cloud has not listed a machine {machine_id!r} of this launch yet; asking again will do when it has"
        )


def launch_token(key: SecretKey, group: str, launch: str) -> str:
    """The join token of a launch, the same each time."""
    raw = key.derive(f"join/{group}/{launch}")
    return TOKEN_PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def fresh_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def admit_machines(
    conn: sa.Connection,
    token: str,
    *,
    group: str,
    uses: int,
    now: datetime,
    life: timedelta,
    launch: str | None = None,
) -> None:
    """Makes a token good for `uses` machines. One that is known already is good for longer, not for more."""
    conn.execute(table.delete().where(table.c.expires_at < now - timedelta(days=1)))
    digest, until = digest_of(token), now + life
    values = {"group_name": group, "launch_token": launch, "uses_left": uses, "used_by": []}
    if not insert_ignore(conn, table, digest=digest, expires_at=until, **values):
        conn.execute(table.update().where(table.c.digest == digest).values(expires_at=until))


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A machine that may have what its group has."""

    group: str
    machine_id: str


def redeem(conn: sa.Connection, request: JoinRequest, *, now: datetime) -> Admission:
    """One use of a join token. Machines of one launch that come together wait for each other.

    Raises NotAdmitted, NotListed.
    """
    row = _row(conn, request.token, now)
    if row is None or row.machine_id is not None:
        raise NotAdmitted
    entry = {"machine_id": request.machine_id, "key": request.public_key}
    if entry not in row.used_by:
        if row.uses_left < 1:
            raise NotAdmitted
        if row.launch_token is not None:
            _check_launched(conn, row, request.machine_id)
        values = {"uses_left": row.uses_left - 1, "used_by": [*row.used_by, entry]}
        conn.execute(table.update().where(table.c.digest == row.digest).values(values))
    return Admission(group=row.group_name, machine_id=request.machine_id)


def _check_launched(conn: sa.Connection, row: Any, machine_id: str) -> None:
    if any(used["machine_id"] == machine_id for used in row.used_by):
        raise NotAdmitted
    of_launch = (machines.c.group_name == row.group_name) & (machines.c.token == row.launch_token)
    query = sa.select(machines.c.machine_id).where(of_launch, machines.c.machine_id == machine_id)
    if conn.execute(query).first() is None:
        raise NotListed(machine_id)


def show_ticket(conn: sa.Connection, request: JoinRequest, *, now: datetime) -> Admission:
    """The return of a machine that has joined before. Raises NotAdmitted, also where the cloud of today's settings does not
    have it any more: what hears no other word ends itself."""
    row = _row(conn, request.token, now)
    if row is None or row.machine_id is None or row.machine_id != request.machine_id:
        raise NotAdmitted
    gone = sa.select(machines.c.gone_at).where(
        machines.c.group_name == row.group_name, machines.c.machine_id == row.machine_id
    )
    if conn.execute(gone).scalar() is not None:
        raise NotAdmitted
    mine = table.c.digest == row.digest
    conn.execute(table.update().where(mine).values(expires_at=now + TICKET_LIFE))
    return Admission(group=row.group_name, machine_id=row.machine_id)


def ticket_of(
    conn: sa.Connection, key: SecretKey, admission: Admission, public_key: str, *, now: datetime
) -> str:
    """The ticket that a joining gives. Older ones of the same machine go: it has begun anew, or is a copy."""
    purpose = f"ticket/{admission.group}/{admission.machine_id}/{public_key}"
    raw = base64.urlsafe_b64encode(key.derive(purpose))
    ticket = TICKET_PREFIX + raw.decode().rstrip("=")
    digest = digest_of(ticket)
    mine = (table.c.group_name == admission.group) & (table.c.machine_id == admission.machine_id)
    if conn.execute(table.delete().where(mine, table.c.digest != digest)).rowcount:
        log.warning(
            "machine %s joins group %s once more, and its ticket of before is void; if that is another machine (copies of a "
            "disk share /etc/machine-id), give one of them another name with `join --machine-id`",
            admission.machine_id,
            admission.group,
            extra={"action": "joined-again", "group": admission.group},
        )
    values: dict[str, Any] = {
        "group_name": admission.group,
        "machine_id": admission.machine_id,
        "uses_left": 0,
        "used_by": [],
        "expires_at": now + TICKET_LIFE,
    }
    insert_ignore(conn, table, digest=digest, **values)
    return ticket


def is_known(conn: sa.Connection, token: str, *, now: datetime) -> bool:
    """Whether it is a token or ticket of ours, used up or not; expired ones are not known."""
    return conn.execute(_select(token, now)).first() is not None


def _row(conn: sa.Connection, token: str, now: datetime) -> Any:
    """Ours alone until the end of the transaction: whoever wants it too sees what we have made of it."""
    return conn.execute(_select(token, now).with_for_update()).first()


def _select(token: str, now: datetime) -> sa.Select[Any]:
    return sa.select(table).where(table.c.digest == digest_of(token), table.c.expires_at > now)


# -- the group's user in Redis ---------------------------------------------------------------------------------------


def machines_user(deployment: str, group: str) -> str:
    """One of this deployment: others on the same Redis may have a group of this name. Not that of `agents acl`, whose
    password somebody keeps."""
    return f"{deployment}-{group}-machines"


@dataclass(frozen=True, kw_only=True)
class Passwords:
    """`current` is given to machines; `former` still opens for agents that have not started since it changed."""

    current: str = field(repr=False)
    former: tuple[str, ...] = field(repr=False, default=())


def agents_passwords(conn: sa.Connection, key: SecretKey, deployment: str, group: str) -> Passwords:
    """Derived, so that every conductor knows them and none stores them; a new generation is a new password."""
    generation, only = get_fact(conn, _fact(group)) or (0, True)

    def of(number: int) -> str:
        raw = key.derive(f"redis/{deployment}/{group}/{number}")
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    former = () if only else (of(generation - 1),)
    return Passwords(current=of(generation), former=former)


def change_password(conn: sa.Connection, group: str, *, at_once: bool) -> None:
    """From now on machines get another one. The one before opens until the next change, unless `at_once`."""
    generation, _ = get_fact(conn, _fact(group)) or (0, True)
    set_fact(conn, _fact(group), [generation + 1, at_once])


def _fact(group: str) -> str:
    return f"agents-password:{group}"


def groups_joined(conn: sa.Connection) -> set[str]:
    """Groups that machines have joined."""
    return set(
        conn.execute(sa.select(table.c.group_name).where(table.c.machine_id.is_not(None))).scalars()
    )


def makes_users(settings: Settings) -> bool:
    """Whether machines get a user of Redis from us: not where the address for agents names one of its own, nor where no
    machine can reach Redis."""
    return not own_user(settings) and _reachable(settings.redis_url)


def make_user(settings: Settings, keys: Keys, group: str, passwords: Passwords) -> None:
    """Creates or repairs the group's user; does nothing where the address for agents names a user of its own.

    Raises ConfigurationError, BrokerUnavailable.
    """
    if own_user(settings):
        return
    address = settings.redis_url
    if address is None or not _reachable(address):
        raise ConfigurationError(
            "machines cannot reach the embedded Redis, which listens on this host only; run a Redis and set redis_url, "
            "then join again"
        )
    client = make_client(address)
    user = machines_user(keys.deployment, group)
    try:
        set_agent_user(
            client,
            keys,
            group,
            username=user,
            password=passwords.current,
            former=passwords.former,
        )
    except NoPermissionError as error:
        raise ConfigurationError(
            f"the user of redis_url may not make the user {user!r} for the machines of {group!r} ({error}); "
            "give it `+acl|setuser`, or set agent_redis_url with a user made by `valohai-dagster agents acl`"
        ) from error
    except redis.RedisError as error:
        raise explain(error, address) from error
    finally:
        client.close()


def _reachable(address: str | None) -> bool:
    return address is not None and urlsplit(address).scheme != "unix"


def own_user(settings: Settings) -> bool:
    return bool(settings.agent_redis_url and urlsplit(settings.agent_redis_url).password)


def redis_address(settings: Settings, user: str, password: str) -> tuple[str, dict[str, str]]:
    """The Redis URL for agents, with `user` where the settings name none; and the files that it names, by the name under which a machine keeps them.

    Of the certificate authority the machine gets a copy; a client certificate of ours is not given away.
    """
    parts = urlsplit(settings.agent_redis_url or settings.redis_url or "")
    options, files = [], {}
    for name, value in parse_qsl(parts.query):
        if name == "ssl_ca_certs" and Path(value).is_file():
            files[CA_NAME] = Path(value).read_text()
            options.append((name, "{dir}/" + CA_NAME))
        elif name not in ("ssl_certfile", "ssl_keyfile") or settings.agent_redis_url:
            options.append((name, value))
    parts = parts._replace(query=urlencode(options, safe="/{}"))
    if not own_user(settings):
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{quote(user, safe='')}:{password}@{host}")
    return urlunsplit(parts), files


# -- the answer ------------------------------------------------------------------------------------------------------


def answer(
    settings: Settings,
    *,
    deployment: str,
    admission: Admission,
    ticket: str,
    password: str,
    release: AgentFile | None,
) -> JoinAnswer:
    """All that a machine of the group needs to run its agents."""
    group = settings.groups[admission.group]
    user = machines_user(deployment, admission.group)
    address, files = redis_address(settings, user, password)
    cloud = group if isinstance(group, CloudGroupSettings) else None
    return JoinAnswer(
        group=admission.group,
        deployment=deployment,
        ticket=ticket,
        environment={
            "VALOHAI_AGENT_REDIS": address,
            "VALOHAI_AGENT_QUEUE": admission.group,
            "VALOHAI_AGENT_DEPLOYMENT": deployment,
            "VALOHAI_AGENT_MACHINE_ID": admission.machine_id,
            "VALOHAI_AGENT_LOG_FORMAT": settings.log_format,
            **agent_options(group),
            **group.env,
        },
        files=files,
        agents=cloud.agents if cloud else 1,
        gpu_each=bool(cloud and cloud.agents_per_machine == "gpu"),
        dead_man_seconds=cloud.dead_man_seconds if cloud else None,
        release=release,
    )


def agent_options(group: AnyGroupSettings) -> Mapping[str, str]:
    """What the group's settings say to an agent, as its environment variables."""
    runtime = "process" if isinstance(group, DockerGroupSettings) else group.runtime
    options = {
        "VALOHAI_AGENT_SLOTS": str(group.slots),
        "VALOHAI_AGENT_RUNTIME": runtime,
        "VALOHAI_AGENT_CACHE_DISK_PERCENT": str(group.cache_disk_percent),
    }
    if isinstance(group, (AwsGroupSettings, GcpGroupSettings, AzureGroupSettings)):
        options["VALOHAI_AGENT_CLOUD"] = group.kind  # for its notices of a reclaim (L-30)
    if group.cache_max_gb is not None:
        options["VALOHAI_AGENT_CACHE_MAX_GB"] = str(group.cache_max_gb)
    if group.shared_cache is not None:
        options["VALOHAI_AGENT_SHARED_CACHE"] = str(group.shared_cache)
        options["VALOHAI_AGENT_SHARED_CACHE_COPY"] = "true" if group.shared_cache_copy else "false"
    return options
