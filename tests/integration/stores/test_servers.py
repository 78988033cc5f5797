"""The servers of the other tests: each starts, answers, and is the one that its name says."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import demand
from tests.support.ports import free_port, wait_for
from tests.support.servers import kinds, process
from tests.support.servers.kinds import AzureServer, GcsServer, SwiftServer
from tests.support.servers.process import ServerProcess


def test_moto(moto_server: str) -> None:
    assert "ListAllMyBucketsResult" in httpx.get(moto_server).text


def test_both_emulators_of_google(gcs_server: GcsServer, gcs_session_server: GcsServer) -> None:
    for server in (gcs_server, gcs_session_server):
        url = f"{server.endpoint}/storage/v1/b"
        assert httpx.post(url, json={"name": "a-bucket"}).status_code == 200
        assert "a-bucket" in httpx.get(f"{url}/a-bucket").text
        assert "PRIVATE KEY" in server.credentials_file.read_text()


def test_azurite(azure_server: AzureServer) -> None:
    answer = httpx.get(f"{azure_server.endpoint}?comp=list")
    assert (answer.status_code, "Azurite" in answer.headers["Server"]) == (403, True)


def test_swift_and_its_s3(swift_server: SwiftServer) -> None:
    assert httpx.get(swift_server.storage_url).status_code == 401
    login = {"X-Auth-User": swift_server.user, "X-Auth-Key": swift_server.key}
    token = httpx.get(swift_server.auth_url, headers=login).headers["X-Auth-Token"]
    answer = httpx.head(swift_server.storage_url, headers={"X-Auth-Token": token})
    assert answer.headers["X-Account-Meta-Temp-Url-Key"] == swift_server.temp_url_key
    forged = {"AWSAccessKeyId": swift_server.access_key, "Signature": "no", "Expires": "2147483647"}
    answer = httpx.get(f"{swift_server.s3_endpoint}/a-bucket", params=forged)
    assert "SignatureDoesNotMatch" in answer.text


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = ServerProcess("broken", directory=tmp_path / "broken")
    server.directory.mkdir()
    server.run(["sh", "-c", "echo cannot open the port >&2; exit 3"])
    with pytest.raises(
        AssertionError, match=r"ended with 3\n-- broken.log --\ncannot open the port"
    ):
        server.wait(f"http://127.0.0.1:{free_port()}/")
    assert not server.directory.exists()


def test_a_server_ends_with_the_pytest_that_started_it(tmp_path: Path) -> None:
    """However that ended: killed here, as by a time-out of the machine."""
    script = f"""
import os, pathlib, signal
from tests.support.servers.process import ServerProcess
server = ServerProcess("lasting", directory=pathlib.Path({str(tmp_path)!r}))
server.run(["sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec sleep 600"])
while not pathlib.Path({str(tmp_path / "pid")!r}).exists():
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=process.ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_alive(pid), what=f"process {pid} to end")


def is_alive(pid: int) -> bool:
    """Nobody may be there to bury it: a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_the_servers_the_tests_that_need_them_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SERVERS", tmp_path)
    monkeypatch.delenv(demand.VARIABLE, raising=False)
    for start in (kinds.moto, kinds.fake_gcs, kinds.gcp_emulator, kinds.azurite, kinds.swift):
        with pytest.raises(pytest.skip.Exception, match="run `make setup-servers`"):
            start().__enter__()
