"""The control plane's side of the wire, just enough to exercise an agent: enqueue, grant, apply, fence."""

from __future__ import annotations

import io
import tarfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import redis

from tests.support.ports import wait_for
from valohai_agent import sealing
from valohai_agent.protocol import (
    PROTOCOL_VERSION,
    Command,
    Finished,
    GrantRequest,
    Grants,
    GrantsWanted,
    Job,
    Keys,
    Leased,
    Report,
    Transfer,
    UploadGrant,
    ready_score,
)

FUNCTIONS = Path(__file__).parents[2] / "valohai_dagster" / "broker" / "functions.lua"
GROUP = "g1"
DEPLOYMENT = "d1"
T = TypeVar("T")


@dataclass
class Applied:
    """What one attempt has reported, each sequence number once and in order."""

    token: str
    reports: list[Report] = field(default_factory=list)
    repeats: int = 0

    def bodies(self, kind: type[T]) -> list[T]:
        return [report.body for report in self.reports if isinstance(report.body, kind)]

    @property
    def finished(self) -> Finished | None:
        found = self.bodies(Finished)
        return found[0] if found else None


class Conductor:
    """Answers agents from a thread of its own; `paused` makes it deaf, as when it is restarted."""

    def __init__(self, url: str, directory: Path) -> None:
        self.redis: Any = redis.Redis.from_url(url)
        self.keys = Keys(DEPLOYMENT)
        self.store = directory / "store"
        self.store.mkdir(parents=True)
        self.attempts: dict[tuple[str, int], Applied] = {}
        self.secrets: dict[str, str] = {}
        self.input_urls: dict[str, str] = {}
        self.mute = False  # applies reports, grants nothing
        self.refuse: Callable[[GrantRequest], str | None] = lambda request: None
        self.paused = threading.Event()
        self._reading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._archive = self.put("code.tar.gz", code_archive({"hello.txt": "hello\n"}))
        self.load_functions()

    # -- set-up -----------------------------------------------------------------------------------------------------
    def load_functions(self) -> None:
        self.redis.function_load(FUNCTIONS.read_text(), replace=True)

    def __enter__(self) -> Conductor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.redis.close()

    def put(self, name: str, content: bytes) -> Path:
        path = self.store / name
        path.write_bytes(content)
        return path

    def job(self, *commands: str, **changes: Any) -> Job:
        values: dict[str, Any] = {
            "execution_id": str(uuid.uuid4()),
            "group": GROUP,
            "project_id": str(uuid.uuid4()),
            "project_name": "local/test",
            "step": "step",
            "commit": "abc",
            "archive_sha256": sha256(self._archive.read_bytes()).hexdigest(),
            "image": "python:3.11",
            "commands": list(commands),
        }
        return Job(**{**values, **changes})

    def enqueue(
        self, job: Job, *, version: int = PROTOCOL_VERSION, front: bool = False, force: bool = False
    ) -> str:
        keys = [
            self.keys.ready(GROUP),
            self.keys.job(GROUP, job.execution_id),
            self.keys.lease(GROUP, job.execution_id),
            self.keys.sequence(GROUP),
            self.keys.bell(GROUP),
        ]
        score = ready_score(0, front=front)
        arguments = [
            job.execution_id,
            job.model_dump_json(),
            job.attempt,
            version,
            score,
            int(force),
        ]
        self.redis.fcall("vh1_enqueue", len(keys), *keys, *arguments)
        return job.execution_id

    def requeue(self, job: Job, attempt: int) -> str:
        return self.enqueue(job.model_copy(update={"attempt": attempt}), front=True, force=True)

    def submit(self, *commands: str, **changes: Any) -> str:
        return self.enqueue(self.job(*commands, **changes))

    def command(self, worker: str, **fields: Any) -> None:
        command = Command.model_validate(fields)
        self.redis.xadd(self.keys.command(GROUP, worker), {"c": command.model_dump_json()})

    def pause(self) -> None:
        """Returns when nothing is read any more."""
        self.paused.set()
        with self._reading:
            return

    # -- what is seen -------------------------------------------------------------------------------------------------
    def applied(self, execution_id: str, attempt: int = 1) -> Applied:
        found = wait_for(
            lambda: self.attempts.get((execution_id, attempt)),
            seconds=20,
            what=f"a report of {execution_id} attempt {attempt}",
        )
        assert found is not None
        return found

    def finished(self, execution_id: str, attempt: int = 1, *, seconds: float = 30.0) -> Finished:
        found = wait_for(
            lambda: self.applied(execution_id, attempt).finished,
            seconds=seconds,
            what=f"the end of {execution_id} attempt {attempt}",
        )
        assert found is not None
        return found

    def lease(self, execution_id: str) -> dict[str, str]:
        fields = self.redis.hgetall(self.keys.lease(GROUP, execution_id))
        return {name.decode(): value.decode(errors="replace") for name, value in fields.items()}

    def worker(self, name: str) -> dict[str, str]:
        fields = self.redis.hgetall(self.keys.worker(GROUP, name))
        return {key.decode(): value.decode() for key, value in fields.items()}

    def live_lines(self, execution_id: str, attempt: int = 1) -> list[tuple[str, str]]:
        entries = self.redis.xrange(self.keys.log(GROUP, execution_id, attempt))
        return [(fields[b"s"].decode(), fields[b"m"].decode()) for _, fields in entries]

    def stored_log(self, execution_id: str, stream: str, attempt: int = 1) -> bytes:
        finished = self.finished(execution_id, attempt)
        upload_id = next(log.upload_id for log in finished.logs if log.stream == stream)
        return (self.store / upload_id).read_bytes()

    # -- the loop -----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._reading:
                    if not self.paused.is_set():
                        self._read_once()
                if self.paused.is_set():
                    self._stop.wait(0.02)
            except (redis.RedisError, OSError):
                self._stop.wait(0.05)

    def _read_once(self) -> None:
        stream = self.keys.reports(GROUP)
        for _, entries in self.redis.xread({stream: "0"}, count=50, block=100) or []:
            for entry_id, fields in entries:
                self._apply(Report.model_validate_json(fields[b"r"]))
                self.redis.xdel(stream, entry_id)

    def _apply(self, report: Report) -> None:
        key = (report.execution_id, report.attempt)
        newest = max((n for e, n in self.attempts if e == report.execution_id), default=0)
        applied = self.attempts.setdefault(key, Applied(report.token))
        if report.attempt < newest or report.token != applied.token:
            self.command(
                report.worker, kind="fence", execution_id=report.execution_id, token=report.token
            )
            return
        repeated = bool(applied.reports) and report.seq <= applied.reports[-1].seq
        if repeated:
            applied.repeats += 1
        else:
            applied.reports.append(report)
        self._answer(report)

    def _answer(self, report: Report) -> None:
        lease = self.lease(report.execution_id)
        if isinstance(report.body, Finished):
            keys = (
                self.keys.lease(GROUP, report.execution_id),
                self.keys.job(GROUP, report.execution_id),
            )
            self.redis.delete(*keys)
        if self.mute or lease.get("token") != report.token:
            return
        if isinstance(report.body, Leased):
            self._grant(report.execution_id, lease, self._initial())
        elif isinstance(report.body, GrantsWanted):
            self._grant(report.execution_id, lease, self._wanted(report.body.requests))

    def _initial(self) -> Grants:
        inputs = {file_id: Transfer(url=url) for file_id, url in self.input_urls.items()}
        archive = Transfer(url=self._archive.as_uri())
        return Grants(archive=archive, inputs=inputs, secrets=self.secrets, initial=True)

    def _wanted(self, requests: list[GrantRequest]) -> Grants:
        uploads, refused = {}, {}
        for request in requests:
            reason = self.refuse(request)
            if reason:
                refused[request.id] = reason
                continue
            upload_id = str(uuid.uuid4())
            url = (self.store / upload_id).as_uri()
            uploads[request.id] = UploadGrant(
                upload_id=upload_id, transfer=Transfer(url=url, method="PUT")
            )
        return Grants(uploads=uploads, refused=refused)

    def _grant(self, execution_id: str, lease: dict[str, str], grants: Grants) -> None:
        sealed = sealing.seal_grants(grants, lease["public_key"])
        key = self.keys.grant(GROUP, execution_id)
        self.redis.xadd(key, {"g": sealed})
        self.redis.expire(key, 300)


def code_archive(files: dict[str, str]) -> bytes:
    """A gzip tarball, as the control plane publishes commits."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()
