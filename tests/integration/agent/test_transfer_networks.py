"""The transfer engine on networks as companies have them: TLS with an authority of their own, proxies, redirects, logins.

From outside, by its public methods. What the environment says is tested in processes of their own, where it is read.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.file_server import FileServer, serving
from tests.support.http_proxy import HttpProxy
from tests.support.tls import Authority
from tests.support.transfer_process import transfer
from valohai_agent.errors import Denied, Refused
from valohai_agent.protocol import Transfer
from valohai_agent.transfer import Transferer

SMALL = os.urandom(300_000)
LARGE = os.urandom(40 * 1024 * 1024)  # comes by several connections


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def http(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "http") as server:
        server.put("small", SMALL)
        server.put("large", LARGE)
        yield server


@pytest.fixture
def https(tmp_path: Path, authority: Authority) -> Iterator[FileServer]:
    with serving(tmp_path / "https", certificate=authority.issue("files")) as server:
        server.put("small", SMALL)
        server.put("large", LARGE)
        yield server


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    with HttpProxy() as proxy:
        yield proxy


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transferer]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    engine = Transferer(attempts=2, timeout=(5.0, 5.0), sleep=lambda seconds: None)
    yield engine
    engine.close()


# -- TLS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("small", SMALL), ("large", LARGE)])
@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_server_of_ones_own_authority_is_read(
    https: FileServer,
    authority: Authority,
    tmp_path: Path,
    variable: str,
    name: str,
    content: bytes,
) -> None:
    target = tmp_path / "got"
    known = {variable: str(authority.certificate)}
    moved = transfer("get", f"{https.url}/{name}", target, known)
    assert moved == {"size": len(content), "sha256": sha256(content)}
    assert target.read_bytes() == content


@pytest.mark.parametrize("content", [SMALL, LARGE, b""])
def test_a_server_of_ones_own_authority_is_written(
    https: FileServer, authority: Authority, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    known = {"REQUESTS_CA_BUNDLE": str(authority.certificate)}
    moved = transfer("put", f"{https.url}/new", tmp_path / "file", known)
    assert moved == {"size": len(content), "sha256": sha256(content)}
    assert (https.directory / "new").read_bytes() == content


def test_an_unknown_authority_is_refused_and_told(https: FileServer, tmp_path: Path) -> None:
    told = transfer("get", f"{https.url}/small", tmp_path / "got", {})
    assert told["error"] == "Unreachable"
    assert "the TLS certificate was not accepted" in told["text"]
    assert not (tmp_path / "got").exists()
    assert https.seen == []


def test_a_certificate_of_another_host_is_refused(
    https: FileServer, authority: Authority, tmp_path: Path
) -> None:
    """The certificate is for 127.0.0.1 and localhost."""
    known = {"REQUESTS_CA_BUNDLE": str(authority.certificate)}
    url = https.url.replace("127.0.0.1", "127.0.0.2")
    assert transfer("get", f"{url}/small", tmp_path / "got", known)["error"] == "Unreachable"
    assert https.seen == []


# -- proxies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_http_goes_through_the_proxy_with_its_whole_url(
    http: FileServer, proxy: HttpProxy, tmp_path: Path, variable: str
) -> None:
    environment = {variable: f"http://{proxy.address}"}
    url = f"{http.url}/small?signature=a%2Fb"
    moved = transfer("get", url, tmp_path / "got", environment)
    assert moved["sha256"] == sha256(SMALL)
    assert proxy.asked == [("GET", url)]


def test_uploads_go_through_the_proxy(http: FileServer, proxy: HttpProxy, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SMALL)
    url = f"{http.url}/new"
    transfer("put", url, tmp_path / "file", {"http_proxy": f"http://{proxy.address}"})
    assert (http.directory / "new").read_bytes() == SMALL
    assert proxy.asked == [("PUT", url)]


@pytest.mark.parametrize(("name", "content"), [("small", SMALL), ("large", LARGE)])
def test_https_goes_through_a_tunnel(
    https: FileServer,
    proxy: HttpProxy,
    authority: Authority,
    tmp_path: Path,
    name: str,
    content: bytes,
) -> None:
    """The proxy sees the server's name and nothing of the request."""
    environment = {
        "https_proxy": f"http://{proxy.address}",
        "REQUESTS_CA_BUNDLE": str(authority.certificate),
    }
    moved = transfer("get", f"{https.url}/{name}?signature=secret", tmp_path / "got", environment)
    assert moved["sha256"] == sha256(content)
    assert set(proxy.asked) == {("CONNECT", https.url.split("/")[2])}


def test_the_certificate_is_looked_at_through_a_tunnel_too(
    https: FileServer, proxy: HttpProxy, tmp_path: Path
) -> None:
    environment = {"https_proxy": f"http://{proxy.address}"}
    assert transfer("get", f"{https.url}/small", tmp_path / "got", environment)["error"] == (
        "Unreachable"
    )
    assert https.seen == []


@pytest.mark.parametrize("kind", ["http", "https"])
def test_a_proxy_may_want_a_login(
    request: pytest.FixtureRequest, kind: str, authority: Authority, tmp_path: Path
) -> None:
    server: FileServer = request.getfixturevalue(kind)
    login = base64.b64encode(b"me:p@ss word").decode()
    with HttpProxy(login=f"Basic {login}") as proxy:
        known = {"REQUESTS_CA_BUNDLE": str(authority.certificate)}
        good = {f"{kind}_proxy": f"http://me:p%40ss%20word@{proxy.address}", **known}
        assert transfer("get", f"{server.url}/small", tmp_path / "a", good)["size"] == len(SMALL)
        seen = len(server.seen)
        bad = {f"{kind}_proxy": f"http://me:hunter2@{proxy.address}", **known}
        told = transfer("get", f"{server.url}/small", tmp_path / "b", bad)
    assert "error" in told
    assert "hunter2" not in told["text"]
    assert len(server.seen) == seen
    assert "Proxy-Authorization" not in server.seen[0]


def test_no_proxy_names_those_that_are_asked_directly(
    http: FileServer, proxy: HttpProxy, tmp_path: Path
) -> None:
    environment = {"http_proxy": f"http://{proxy.address}", "no_proxy": "example.com,127.0.0.1"}
    assert transfer("get", f"{http.url}/small", tmp_path / "got", environment)["size"]
    assert proxy.asked == []


# -- redirects and logins ----------------------------------------------------------------------------------------


def test_a_login_in_the_url_is_sent_and_never_shown(engine: Transferer, tmp_path: Path) -> None:
    with serving(tmp_path / "files", login=("me", "p@ss:word")) as server:
        server.put("a", SMALL)
        host = server.url.removeprefix("http://")
        good = Transfer(url=f"http://me:p%40ss%3Aword@{host}/a")
        engine.download(good, tmp_path / "got", name="the file")
        assert (tmp_path / "got").read_bytes() == SMALL
        assert engine.etag(good, name="the file") is not None
        bad = Transfer(url=f"http://me:hunter2@{host}/a")
        with pytest.raises(Denied) as caught:
            engine.download(bad, tmp_path / "other", name="the file")
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_neither_a_login_nor_headers_follow_a_redirect_to_another_server(
    http: FileServer, engine: Transferer, tmp_path: Path
) -> None:
    with serving(tmp_path / "files", login=("me", "secret")) as first:
        first.redirects |= {"near": f"{first.url}/far", "far": f"{http.url}/large"}
        host = first.url.removeprefix("http://")
        wanted = Transfer(url=f"http://me:secret@{host}/far", headers={"PRIVATE-TOKEN": "t"})
        engine.download(wanted, tmp_path / "got", name="the file")
        assert all(headers["PRIVATE-TOKEN"] == "t" for headers in first.seen)
        engine.etag(wanted, name="the file")
    assert (tmp_path / "got").read_bytes() == LARGE
    assert http.seen
    assert not [h for h in http.seen if {"PRIVATE-TOKEN", "Authorization"} & h.keys()]


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "file://localhost/etc/passwd", "ftp://h/x"]
)
def test_a_redirect_to_anything_but_a_web_server_is_refused(
    http: FileServer, engine: Transferer, tmp_path: Path, target: str
) -> None:
    http.redirects["away"] = target
    with pytest.raises(Refused, match="is not http or https"):
        engine.download(Transfer(url=f"{http.url}/away"), tmp_path / "got", name="the file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["http"]


def test_redirects_in_a_circle_come_to_an_end(
    http: FileServer, engine: Transferer, tmp_path: Path
) -> None:
    http.redirects |= {"a": f"{http.url}/b", "b": f"{http.url}/a"}
    with pytest.raises(Refused, match="redirects"):
        engine.download(Transfer(url=f"{http.url}/a"), tmp_path / "got", name="the file")
