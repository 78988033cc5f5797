"""ACL rules: for the agents of one worker group, and for the control plane.

An agent's user reaches the keys of its own group only, and of those only what its part of the protocol needs.
Functions run with the caller's rights, so the commands inside `functions.lua` are listed too. Each selector (in
parentheses) is a pair of commands and keys; a command passes when one selector allows all of it. Jobs can thus be
read but not forged, and reports added but not read. Within a group agents trust each other for availability, never
for secrets: those are sealed to the one agent that holds the lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from valohai_agent.protocol import Keys

_ANYWHERE = (
    "+ping",
    "+time",
    "+hello",
    "+auth",
    "+select",
    "+client|setname",
    "+client|id",
)
_SINCE_7_2 = ("+client|setinfo",)


def agent_rules(keys: Keys, group: str, *, version: tuple[int, ...] = (7, 2)) -> list[str]:
    """Arguments of ACL SETUSER that describe one group's agents, without the password.

    An older server (`version`) refuses rules about commands that it does not know.
    """
    every = keys.group_prefix(group) + "*"
    job, lease, worker = keys.job(group, "*"), keys.lease(group, "*"), keys.worker(group, "*")
    ready, bell, reports = (
        keys.ready(group),
        keys.bell(group),
        keys.group_prefix(group) + "reports:*",
    )
    grant, command = keys.grant(group, "*"), keys.command(group, "*")
    log = keys.group_prefix(group) + "log:*"
    return [
        *("reset", "on", "-@all", "resetchannels"),
        *_ANYWHERE,
        *(_SINCE_7_2 if version >= (7, 2) else ()),
        f"(+fcall ~{every})",
        f"(+hget +hmget %R~{job})",
        f"(+hget +hmget +hset +pexpire +exists ~{lease} ~{worker})",
        f"(+exists %R~{keys.sealed(group, '*')})",
        f"(+sadd ~{keys.roster(group)})",
        f"(+zrange +zrem ~{ready})",
        f"(+hmget +hincrby +hdel ~{keys.passed(group)})",
        f"(+blpop ~{bell})",
        f"(+xread +xrange %R~{command} %R~{grant})",
        f"(+del %W~{grant})",
        f"(+xadd +expire %W~{log})",
        f"(+xadd %W~{reports})",
    ]


def control_plane_rules() -> list[str]:
    """Arguments of ACL SETUSER that describe the control plane's user, without the password.

    It owns every deployment on the server (keys `vh:*`) and nothing else of it: no channels, no administration.
    """
    return ["reset", "on", "resetchannels", "~vh:*", "+@all", "-@admin", "-@dangerous", "+info"]


def set_agent_user(
    client: redis.Redis,
    keys: Keys,
    group: str,
    *,
    username: str,
    password: str,
    former: Sequence[str] = (),
) -> None:
    """Creates or replaces the user; the password replaces every older one but those in `former`.

    It lives until the server restarts, unless somebody saves the server's ACL file.
    """
    rules = agent_rules(keys, group, version=server_version(client))
    passwords = [f">{one}" for one in (password, *former)]
    client.execute_command("ACL", "SETUSER", username, *rules, *passwords)


def server_version(client: redis.Redis) -> tuple[int, ...]:
    """The Redis version that the server is, or (Valkey) claims to be."""
    info: Any = client.info("server")
    return tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
