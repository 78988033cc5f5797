"""An output collector with a store of files and a control plane that grants or refuses."""

from __future__ import annotations

import threading
from pathlib import Path

from valohai_agent.outputs import OutputCollector, OutputSummary
from valohai_agent.protocol import GrantRequest, Grants, OutputStored, Transfer, UploadGrant
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.store = tmp_path / "store"
        self.workspace = Workspace.create(tmp_path / "work", "e", 1, "w")
        self.outputs = self.workspace.outputs
        self.reports: list[OutputStored] = []
        self.status: list[str] = []
        self.warnings: list[str] = []
        self.requests: list[GrantRequest] = []
        self.refuse: dict[str, str] = {}
        self.grants = 0
        self.seconds = 1e10  # later than any file's time
        self.lock = threading.Lock()
        self.collector = self.new_collector()

    def new_collector(self) -> OutputCollector:
        return OutputCollector(
            self.workspace,
            transferer=Transferer(attempts=2, sleep=lambda seconds: None),
            request_grants=self.grant,
            report=self.reports.append,
            status=self.status.append,
            warn=self.warnings.append,
            now=lambda: self.seconds,
        )

    def grant(self, requests: list[GrantRequest]) -> Grants:
        with self.lock:
            self.requests += requests
            uploads, refused = {}, {}
            for request in requests:
                if request.name in self.refuse:
                    refused[request.id] = self.refuse[request.name]
                    continue
                self.grants += 1
                transfer = Transfer(url=(self.store / str(self.grants)).as_uri(), method="PUT")
                uploads[request.id] = UploadGrant(upload_id=str(self.grants), transfer=transfer)
            return Grants(uploads=uploads, refused=refused)

    def write(self, name: str, data: bytes | str = b"x", mode: int = 0o644) -> Path:
        path = self.outputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        path.chmod(mode)
        return path

    def finish(self) -> OutputSummary:
        return self.collector.finish()

    def names(self) -> list[str]:
        return sorted(report.name for report in self.reports)

    def metadata(self, name: str) -> dict:
        return next(r.metadata for r in reversed(self.reports) if r.name == name)

    def stored(self, report: OutputStored) -> bytes:
        return (self.store / report.upload_id).read_bytes()
