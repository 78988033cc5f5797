"""On-demand inputs of every kind of store, by the very URLs that a command gets (I-36)."""

from __future__ import annotations

from datetime import timedelta

import httpx

from tests.contract.stores.conftest import Put
from valohai_agent.local_api import LocalApi
from valohai_agent.protocol import Grants, JobFile, JobInput
from valohai_dagster.stores.base import Store

HOUR = timedelta(hours=1)


def test_i36_a_command_gets_urls_that_it_can_open_without_knowing_the_store(
    source: tuple[Store, Put],
) -> None:
    store, put = source
    keys = ["plain.csv", "deep/er/with space+ü.bin"]
    for key in keys:
        put(key, f"content of {key}".encode())
    files = [JobFile(id=key, name=key, uri=store.uri(key)) for key in keys]
    asked: list[list[str]] = []

    def grants(file_ids: list[str]) -> Grants:
        asked.append(file_ids)
        return Grants(inputs={key: store.sign_get(key, expires=HOUR) for key in file_ids})

    with LocalApi(
        bind_host="127.0.0.1",
        public_host="127.0.0.1",
        inputs=[JobInput(name="d", input_id="i", files=files, download="on-demand")],
        on_status_detail=lambda text: None,
        input_grants=grants,
    ) as api:
        request = api.endpoints()["input_request"]
        (item,) = httpx.request(**request, params={"inputs": "i"}).json()
        assert [file["filename"] for file in item["files"]] == keys
        assert {file["input_id"] for file in item["files"]} == {"i"}
        for file in item["files"]:
            answer = httpx.get(file["url"], follow_redirects=True)
            assert answer.is_success, answer.text
            assert answer.content == f"content of {file['filename']}".encode()
    assert asked == [keys]
