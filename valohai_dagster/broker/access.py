"""ACL rules for the agents of one worker group.

An agent's user reaches the keys of its own group only, and of those only what its part of the protocol needs.
Functions run with the caller's rights, so the commands inside `functions.lua` are listed too. Each selector (in
parentheses) is a pair of commands and keys; a command passes when one selector allows all of it. Jobs can thus be
read but not forged, and reports added but not read. Within a group agents trust each other for availability, never
for secrets: those are sealed to the one agent that holds the lease.
"""

from __future__ import annotations

import redis

from valohai_agent.protocol import Keys

_ANYWHERE = (
    "+ping",
    "+time",
    "+hello",
    "+auth",
    "+select",
    "+client|setinfo",
    "+client|setname",
    "+client|id",
)


def agent_rules(keys: Keys, group: str) -> list[str]:
    """Arguments of ACL SETUSER that describe one group's agents, without the password."""
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
        f"(+fcall ~{every})",
        f"(+hget +hmget %R~{job})",
        f"(+hget +hmget +hset +pexpire +exists ~{lease} ~{worker})",
        f"(+zrange +zrem ~{ready})",
        f"(+blpop ~{bell})",
        f"(+xread +xrange %R~{command} %R~{grant})",
        f"(+del %W~{grant})",
        f"(+xadd +expire %W~{log})",
        f"(+xadd %W~{reports})",
    ]


def set_agent_user(
    client: redis.Redis, keys: Keys, group: str, *, username: str, password: str
) -> None:
    """Creates or replaces the user; the password replaces every older one."""
    client.execute_command("ACL", "SETUSER", username, *agent_rules(keys, group), f">{password}")
