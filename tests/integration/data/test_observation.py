"""What an observation and an execution call the same content of a web server."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.support.file_server import serving
from valohai_agent.protocol import Transfer
from valohai_agent.transfer import Transferer
from valohai_dagster.data.observation import ask_server, plain_version, version_used
from valohai_dagster.executions.stream import InputView


def test_a_server_without_etags_is_seen_and_used_under_one_version(tmp_path: Path) -> None:
    with serving(tmp_path / "served") as server:
        server.says_etag = False
        server.put("a.txt", b"content")
        url = f"{server.url}/a.txt"
        seen = ask_server(url, url)
        moved = Transferer().download(Transfer(url=url), tmp_path / "got", name="a")
    assert moved.version is not None
    used = InputView(
        input="i",
        name="a.txt",
        uri=url,
        version=moved.version.like(None),
        sha256=moved.checksums.sha256,
    )
    assert used.version is not None  # by the time of the last change
    assert used.version != moved.checksums.sha256
    assert version_used([used], is_pattern=False) == plain_version(seen.version)
    assert seen.version == hashlib.sha256(b"content").hexdigest()
