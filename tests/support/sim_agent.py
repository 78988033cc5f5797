"""A worker agent without containers: speaks the real protocol over a real Redis, one step at a time.

Tests decide when it takes, reports, renews or dies, so every interleaving can be played.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import redis
from nacl.public import PrivateKey, SealedBox

from valohai_agent import protocol as p


@dataclass
class SimLease:
    """A job that the simulated agent holds."""

    agent: SimAgent
    job: p.Job
    attempt: int
    token: str
    key: PrivateKey
    seq: int = 0
    grants: list[p.Grants] = field(default_factory=list)

    def report(self, body: Any, *, seq: int | None = None, token: str | None = None) -> p.Report:
        if seq is None:
            self.seq += 1
            seq = self.seq
        report = p.Report(
            execution_id=self.job.execution_id,
            attempt=self.attempt,
            token=token or self.token,
            seq=seq,
            worker=self.agent.name,
            time=datetime.now(timezone.utc),
            clock_offset_seconds=0.0,
            body=body,
        )
        self.agent.send(report, self.job.shard)
        return report

    def leased(self) -> p.Report:
        return self.report(p.Leased(runtime="simulated", host="sim"))

    def wait_grants(self, timeout: float = 5.0) -> p.Grants:
        """The next grants, opened; fails the test when none come."""
        agent = self.agent
        stream = agent.keys.grant(agent.group, self.job.execution_id)
        lease = agent.keys.lease(agent.group, self.job.execution_id)
        while not self.grants:
            assert agent.redis.xread({stream: "0-0"}, block=int(timeout * 1000)), "no grants came"
            for sealed in agent.redis.fcall("vh1_collect_grants", 2, stream, lease, self.token):
                content = SealedBox(self.key).decrypt(sealed)
                self.grants.append(p.Grants.model_validate_json(content))
        return self.grants.pop(0)

    def want(self, *requests: p.GrantRequest) -> p.Grants:
        self.report(p.GrantsWanted(requests=list(requests)))
        answer = self.wait_grants()
        while answer.initial:  # a conductor that took over gives the first ones again
            answer = self.wait_grants()
        return answer

    def store(self, name: str, content: bytes, **metadata: Any) -> str:
        """Uploads one output through a `file://` grant and reports it; returns the datum's id."""
        request = p.GrantRequest(id=name, kind="output", name=name, size=len(content))
        grant = self.want(request).uploads[name]
        target = Path(unquote(urlsplit(grant.transfer.url).path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        checksums = p.Checksums(
            md5=hashlib.md5(content).hexdigest(),
            sha1=hashlib.sha1(content).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        self.report(
            p.OutputStored(
                upload_id=grant.upload_id,
                name=name,
                size=len(content),
                checksums=checksums,
                metadata=metadata,
            )
        )
        return grant.upload_id

    def store_log(self, stream: Literal["stdout", "stderr"], content: bytes) -> p.LogStored:
        """Uploads the complete log of one stream; `finish(logs=[...])` reports it."""
        request = p.GrantRequest(id=f"log-{stream}", kind="log", name=stream, size=len(content))
        grant = self.want(request).uploads[request.id]
        target = Path(unquote(urlsplit(grant.transfer.url).path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        lines = content.count(b"\n")
        return p.LogStored(stream=stream, upload_id=grant.upload_id, size=len(content), lines=lines)

    def finish(self, outcome: p.Outcome = p.Outcome.complete, **values: Any) -> p.Report:
        return self.report(p.Finished(outcome=outcome, **values))

    def renew(self) -> str:
        agent = self.agent
        keys = agent.keys
        reply = agent.redis.fcall(
            "vh1_renew",
            2,
            keys.lease(agent.group, self.job.execution_id),
            keys.job(agent.group, self.job.execution_id),
            *(agent.name, agent.incarnation, self.token, str(self.attempt)),
            *(bytes(self.key.public_key).hex(), "30000", "running"),
        )
        return reply.decode()


class SimAgent:
    """Checks in on construction; `client` must not decode responses."""

    def __init__(
        self, client: redis.Redis, keys: p.Keys, *, group: str = "local", name: str = "sim-1"
    ) -> None:
        self.redis = client
        self.keys = keys
        self.group = group
        self.name = name
        self.incarnation = secrets.token_hex(8)
        self.heartbeat()

    def heartbeat(self, **fields: str) -> bool:
        values = {
            "name": self.name,
            "group": self.group,
            "state": "idle",
            "slots": "1",
            "busy": "0",
            **fields,
        }
        flat = [item for pair in values.items() for item in pair]
        key = self.keys.worker(self.group, self.name)
        return bool(self.redis.fcall("vh1_heartbeat", 1, key, self.incarnation, "30000", *flat))

    def take(self, timeout: float = 5.0) -> SimLease:
        """Waits on the bell and takes; fails the test when nothing is to be had."""
        lease = self.try_take()
        while lease is None:
            assert self.redis.blpop([self.keys.bell(self.group)], timeout=timeout), (
                "the bell did not ring"
            )
            lease = self.try_take()
        return lease

    def try_take(
        self, *, protocol: tuple[int, int] = (p.MIN_PROTOCOL_VERSION, p.PROTOCOL_VERSION)
    ) -> SimLease | None:
        key, token = PrivateKey.generate(), secrets.token_hex(16)
        reply = self.redis.fcall(
            "vh1_take",
            2,
            self.keys.ready(self.group),
            self.keys.worker(self.group, self.name),
            *(self.keys.group_prefix(self.group), self.name, self.incarnation, token),
            *(bytes(key.public_key).hex(), "30000", str(protocol[0]), str(protocol[1])),
        )
        if not reply:
            return None
        job = p.Job.model_validate_json(reply[1])
        return SimLease(agent=self, job=job, attempt=int(reply[2]), token=token, key=key)

    def commands(self) -> list[p.Command]:
        entries: Any = self.redis.xrange(self.keys.command(self.group, self.name))
        return [p.Command.model_validate_json(fields[b"c"]) for _, fields in entries]

    def send(self, report: p.Report, shard: int) -> None:
        entry = {"r": report.model_dump_json()}
        self.redis.xadd(self.keys.reports(self.group, shard), entry)  # type: ignore[arg-type]
