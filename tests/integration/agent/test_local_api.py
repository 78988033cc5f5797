"""The HTTP endpoints of api.json (K-38, K-39)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import requests

from tests.support import web as answers
from tests.support.ports import free_port
from tests.support.web import serve
from valohai_agent.local_api import LocalApi
from valohai_agent.protocol import Grants, JobFile, JobInput, Transfer


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.details: list[str] = []
        self.grants = Grants()
        (tmp_path / "a ü").write_bytes(b"content")
        self.local = Transfer(url=(tmp_path / "a ü").as_uri())
        files = [JobFile(id="1", name="d/a ü", uri="datum://1")]
        self.api = LocalApi(
            bind_host="127.0.0.1",
            public_host="127.0.0.1",
            inputs=[JobInput(name="d", input_id="i1", files=files, download="on-demand")],
            on_status_detail=self.details.append,
            input_grants=lambda ids: self.grants,
        )

    def call(self, endpoint: str, **options) -> requests.Response:
        return requests.request(**self.api.endpoints()[endpoint], timeout=5, **options)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    with rig.api:
        yield rig


def test_k38_the_newest_status_detail_arrives(rig: Rig) -> None:
    assert rig.call("set_status_detail", json={"status_detail": "epoch 1"}).ok
    assert rig.call("set_status_detail", json={"status_detail": "x" * 5000}).ok
    assert rig.details == ["epoch 1", "x" * 1000]


@pytest.mark.parametrize("body", [{}, {"status_detail": 1}, [1], None])
def test_a_wrong_status_detail_is_refused_in_words(rig: Rig, body: object) -> None:
    answer = rig.call("set_status_detail", json=body)
    assert answer.status_code == 400
    assert "status_detail" in answer.json()["detail"]


def test_nothing_works_without_the_token(rig: Rig) -> None:
    for entry in rig.api.endpoints().values():
        for headers in ({}, {"Authorization": "Bearer guess"}):
            answer = requests.request(
                entry["method"],
                entry["url"],
                headers=headers,
                json={"status_detail": "x"},
                timeout=5,
            )
            assert answer.status_code == 401
    assert rig.details == []


def test_i36_input_request_gives_urls_the_command_can_open(rig: Rig) -> None:
    rig.grants = Grants(inputs={"1": rig.local})
    [item] = rig.call("input_request", params={"inputs": ["i1"]}).json()
    [file] = item["files"]
    assert (file["filename"], file["input_id"]) == ("d/a ü", "i1")
    assert requests.get(file["url"], timeout=5).content == b"content"


def test_i36_a_signed_http_url_is_passed_on(rig: Rig) -> None:
    rig.grants = Grants(inputs={"1": Transfer(url="https://store/x?sig=1")})
    [item] = rig.call("input_request", params={"inputs": "i1"}).json()
    assert item["files"][0]["url"] == "https://store/x?sig=1"


def test_i36_headers_that_a_store_needs_are_sent_for_the_command_and_never_shown(rig: Rig) -> None:
    with serve() as web:
        web.answers["/x"] = [answers.content(b"content", ETag='"1"')]
        rig.grants = Grants(inputs={"1": Transfer(url=web.url("/x"), headers={"X-Key": "hidden"})})
        reply = rig.call("input_request", params={"inputs": "i1"})
        [item] = reply.json()
        got = requests.get(item["files"][0]["url"], timeout=5)
        assert (got.content, got.headers["Content-Length"]) == (b"content", "7")
        assert "hidden" not in reply.text
        assert web.requests[0][2]["X-Key"] == "hidden"


def test_headers_that_a_store_needs_are_sent_to_no_other_server(rig: Rig) -> None:
    with serve() as web, serve() as other:
        web.answers["/x"] = [answers.status(302, Location=other.url("/y"))]
        other.answers["/y"] = [answers.content(b"content")]
        rig.grants = Grants(inputs={"1": Transfer(url=web.url("/x"), headers={"X-Key": "hidden"})})
        [item] = rig.call("input_request", params={"inputs": "i1"}).json()
        assert requests.get(item["files"][0]["url"], timeout=5).content == b"content"
        assert web.requests[0][2]["X-Key"] == "hidden"
        assert "X-Key" not in other.requests[0][2]


def test_a_file_that_breaks_off_is_not_taken_for_whole(rig: Rig) -> None:
    with serve() as web:
        web.answers["/x"] = [answers.broken(b"content", 3)]
        rig.grants = Grants(inputs={"1": Transfer(url=web.url("/x"), headers={"X-Key": "1"})})
        [item] = rig.call("input_request", params={"inputs": "i1"}).json()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(item["files"][0]["url"], timeout=5)


def test_i36_a_permission_that_has_run_out_is_renewed_when_the_file_is_opened(rig: Rig) -> None:
    past = datetime.now(timezone.utc) - timedelta(minutes=1)
    old = Transfer(url="http://127.0.0.1:1/gone", headers={"X-Key": "1"}, expires_at=past)
    rig.grants = Grants(inputs={"1": old})
    [item] = rig.call("input_request", params={"inputs": "i1"}).json()
    rig.grants = Grants(inputs={"1": rig.local})
    assert requests.get(item["files"][0]["url"], timeout=5).content == b"content"


def test_a_file_that_cannot_be_reached_is_said_in_words_without_its_url(rig: Rig) -> None:
    url = f"http://127.0.0.1:{free_port()}/x?sig=secret"
    rig.grants = Grants(inputs={"1": Transfer(url=url, headers={"X-Key": "1"})})
    [item] = rig.call("input_request", params={"inputs": "i1"}).json()
    answer = requests.get(item["files"][0]["url"], timeout=5)
    assert answer.status_code == 502
    assert "127.0.0.1 cannot be reached from the worker" in answer.json()["detail"]
    assert "secret" not in answer.text


def test_refused_and_unknown_inputs_are_said_in_words(rig: Rig) -> None:
    rig.grants = Grants(refused={"1": "the datum was purged"})
    answer = rig.call("input_request", params={"inputs": "i1"})
    assert answer.status_code == 403
    assert "the datum was purged" in answer.json()["detail"]
    assert rig.call("input_request", params={"inputs": "other"}).status_code == 404
    assert rig.call("input_request").status_code == 404


def test_the_trigger_catalogue_is_missing_in_words(rig: Rig) -> None:
    answer = rig.call("trigger_catalog", params={"q": "x"})
    assert answer.status_code == 404
    assert "trigger" in answer.json()["detail"]
