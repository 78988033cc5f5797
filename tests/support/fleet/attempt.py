"""One attempt of one execution, played from its lease to its end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.fleet.calls import Calls
from tests.support.fleet.profile import Profile
from valohai_agent import protocol as p
from valohai_agent.sealing import CannotOpen, PrivateKey, open_grants

LEASE_MS = int(p.LEASE_SECONDS * 1000)
FIRST_LOOK_SECONDS = 0.03
LONGEST_LOOK_SECONDS = 0.5  # between two looks for grants
ASK_AGAIN_SECONDS = 15.0  # as agents do; doubled each time


class Fenced(Exception):
    """Another attempt holds the lease: nothing of this one counts any more."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the attempts of one fleet share."""

    calls: Calls
    keys: p.Keys
    group: str
    key: PrivateKey
    public_key: str
    counts: Counter[str]
    let_end: asyncio.Event  # held commands may end
    trace: Callable[[str, str | None, str, float], None]  # execution, run, kind of report, time


class Attempt:
    """Reports one by one; after a loss of Redis tells everything again, in order, as `Reporter` does."""

    def __init__(
        self,
        around: Surroundings,
        profile: Profile,
        *,
        worker: str,
        incarnation: str,
        token: str,
        execution_id: str,
        number: int,
        job: dict[str, Any],
    ) -> None:
        self.execution_id, self.number, self.token, self.worker = (
            execution_id,
            number,
            token,
            worker,
        )
        self.shard, self.run_id = int(job.get("shard", 0)), job.get("run_id")
        self.stopped = asyncio.Event()
        self.renewed_at = time.monotonic()
        self.phase = "leased"
        self.told_the_end = False
        self._around, self._profile, self._incarnation = around, profile, incarnation
        self._sending = asyncio.Lock()
        self._history: list[str] = []
        self._seq = 0
        self._generation = 0
        keys, group = around.keys, around.group
        self._lease_key = keys.lease(group, execution_id)
        self._job_key = keys.job(group, execution_id)
        self._grant_key = keys.grant(group, execution_id)
        self._reports_key = keys.reports(group, self.shard)

    # -- the play ---------------------------------------------------------------------------------------------------
    async def play(self) -> None:
        """Raises Fenced."""
        profile = self._profile
        leased = p.Leased(runtime="simulated", host="fleet", agent_version="0")
        await self.report(leased)
        await self._grants(leased, "initial", decrypt=False)
        for phase in profile.phases:
            if not self.stopped.is_set() or phase == "uploading":
                await self._enter(phase)
        logs = [await self._store_log()] if profile.logs else []
        await self.report(self._finished(logs))

    async def _enter(self, phase: str) -> None:
        self.phase = phase
        await self.report(p.PhaseChanged(phase=p.Phase(phase)))
        if phase == "running":
            await self._run_command()
        elif phase == "uploading":
            for number in range(self._profile.outputs):
                await self._store_output(f"part-{number}.bin")

    async def _run_command(self) -> None:
        profile, seconds = self._profile, self._profile.seconds(self.execution_id)
        steps = max(1, profile.metadata)
        for step in range(steps):
            await self._wait(seconds / steps)
            if step < profile.metadata and not self.stopped.is_set():
                event = {"step": step, "loss": 1 / (step + 1), "_time": _now().isoformat()}
                await self.report(p.MetadataEvents(events=[event]))
        if profile.hold and not self.stopped.is_set():
            await _first_of(self._around.let_end.wait(), self.stopped.wait())
        if self.stopped.is_set():
            await self.report(p.StopAcknowledged(signal="SIGINT", message="sent SIGINT"))

    async def _wait(self, seconds: float) -> None:
        if seconds > 0 and not self.stopped.is_set():
            await _first_of(asyncio.sleep(seconds), self.stopped.wait())

    def _finished(self, logs: list[p.LogStored]) -> p.Finished:
        if self.stopped.is_set():
            return p.Finished(outcome=p.Outcome.stopped, exit_code=130, reason="stopped", logs=logs)
        if self._profile.fails(self.execution_id):
            reason = "the command failed with exit code 1"
            return p.Finished(outcome=p.Outcome.error, exit_code=1, reason=reason, logs=logs)
        return p.Finished(outcome=p.Outcome.complete, exit_code=0, logs=logs)

    # -- outputs ----------------------------------------------------------------------------------------------------
    async def _store_output(self, name: str) -> None:
        content = hashlib.sha256(f"{self.execution_id}/{name}".encode()).digest()
        content = (content * (self._profile.output_bytes // 32 + 1))[: self._profile.output_bytes]
        upload_id = await self._upload("output", name, content)
        checksums = p.Checksums(
            md5=hashlib.md5(content).hexdigest(),
            sha1=hashlib.sha1(content).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        stored = p.OutputStored(
            upload_id=upload_id, name=name, size=len(content), checksums=checksums
        )
        await self.report(stored)

    async def _store_log(self) -> p.LogStored:
        content = b"simulated\n"
        upload_id = await self._upload("log", "stdout", content)
        return p.LogStored(stream="stdout", upload_id=upload_id, size=len(content), lines=1)

    async def _upload(self, kind: str, name: str, content: bytes) -> str:
        """Writes through a real grant; the grant's upload id."""
        request_id = f"{kind}-{name}-{secrets.token_hex(4)}"
        request = p.GrantRequest.model_validate(
            {"id": request_id, "kind": kind, "name": name, "size": len(content)}
        )
        grants = await self._grants(p.GrantsWanted(requests=[request]), request_id)
        grant = grants.uploads[request_id]
        target = Path(unquote(urlsplit(grant.transfer.url).path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return grant.upload_id

    async def _grants(self, ask: Any, wanted: str, *, decrypt: bool = True) -> p.Grants:
        """Waits for the answer, asking again after a long silence. `Leased` asks for the first grants by itself."""
        if not isinstance(ask, p.Leased):
            await self.report(ask)
        pause, patience = FIRST_LOOK_SECONDS, ASK_AGAIN_SECONDS
        asked, generation = time.monotonic(), self._generation
        while True:
            for sealed in await self._collect():
                grants = self._open(sealed) if decrypt else p.Grants(initial=True)
                if grants is not None and wanted in grants.refused:
                    raise RuntimeError(f"{wanted} was refused: {grants.refused[wanted]}")
                if grants is not None and (not decrypt or wanted in grants.uploads):
                    return grants
            if generation != self._generation or time.monotonic() - asked > patience:
                self._around.counts["asked_again"] += 1
                asked, patience, generation = time.monotonic(), patience * 2, self._generation
                await self.report(ask)
            await asyncio.sleep(pause)
            pause = min(LONGEST_LOOK_SECONDS, pause * 2)

    async def _collect(self) -> list[bytes]:
        keys = (self._grant_key, self._lease_key)
        return await self._around.calls.persist("vh1_collect_grants", keys, self.token)

    def _open(self, sealed: bytes) -> p.Grants | None:
        try:
            return open_grants(sealed, self._around.key)
        except CannotOpen:
            return None

    # -- reports and the lease --------------------------------------------------------------------------------------
    async def report(self, body: Any) -> None:
        """Delivered when it returns. Raises Fenced."""
        self._seq += 1
        report = p.Report(
            execution_id=self.execution_id,
            attempt=self.number,
            token=self.token,
            seq=self._seq,
            worker=self.worker,
            time=_now(),
            clock_offset_seconds=0.0,
            body=body,
        )
        async with self._sending:
            await self._deliver(report.model_dump_json(exclude_none=True), body.kind)
            if isinstance(body, p.Finished):
                self.told_the_end = True

    async def _deliver(self, text: str, kind: str) -> None:
        while True:
            sent_at = time.time()
            if await self._send(text):
                self._history.append(text)
                self._around.trace(self.execution_id, self.run_id, kind, sent_at)
                return
            await self._renew()

    async def _send(self, text: str) -> bool:
        keys = (self._reports_key, self._lease_key)
        accepted = bool(await self._around.calls.persist("vh1_report", keys, self.token, text))
        self._around.counts["reports" if accepted else "reports_refused"] += 1
        return accepted

    async def renew(self) -> None:
        """One renewal and what follows from it, before any other report. Raises Fenced."""
        async with self._sending:
            if not self.told_the_end:
                await self._renew()

    async def _renew(self) -> None:
        keys = (self._lease_key, self._job_key)
        mine = (self.worker, self._incarnation, self.token, str(self.number))
        arguments = (*mine, self._around.public_key, str(LEASE_MS), self.phase)
        answer = await self._around.calls.persist("vh1_renew", keys, *arguments)
        self.renewed_at = time.monotonic()
        if answer == b"lost":
            raise Fenced
        if answer == b"restored":
            self._around.counts["restored"] += 1
            self._generation += 1
            await self._tell_again()

    async def _tell_again(self) -> None:
        """A refusal half way means that the lease is gone again; the next renewal starts over."""
        for text in list(self._history):
            if not await self._send(text):
                return


async def _first_of(*waits: Any) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _now() -> datetime:
    return datetime.now(timezone.utc)


def job_of(text: bytes) -> dict[str, Any]:
    """Plain JSON: the fleet needs two fields, and validation would be most of its work."""
    return json.loads(text)
