"""Steps whose inputs lie in a store behind a network, which is asked before they are queued."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import status
from tests.support.dagster_side import Ask, Side
from tests.support.servers.s3_stores import s3_client
from tests.support.servers.stores import fresh_name

YAML = """
- step:
    name: prep
    image: python:3.11
    command: python prep.py
    inputs:
      - {name: table, default: "s3://BUCKET/raw/*.csv"}
- step:
    name: none
    image: python:3.11
    command: python prep.py
    inputs:
      - {name: table, default: "s3://BUCKET/nothing/*.csv"}
"""


@pytest.fixture
def bucket(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    name = fresh_name()
    with closing(s3_client(moto_server)) as client:
        client.create_bucket(Bucket=name)
        client.put_object(Bucket=name, Key="raw/a.csv", Body=b"a")
    store = {
        "kind": "s3",
        "bucket": name,
        "endpoint_url": moto_server,
        "region": "us-east-1",
        "access_key_id": "testing",
        "secret_access_key": "testing",
        "readonly": True,
    }
    monkeypatch.setenv("VALOHAI_STORES", json.dumps({"data": store}))
    return name


def test_inputs_of_a_bucket(same: Comparison, bucket: str) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))
        side.run(Ask(assets=["none"]))

    seen = same(Case(yaml=YAML.replace("BUCKET", bucket), scenario=scenario))
    assert [status(seen, run) for run in range(2)] == ["SUCCESS", "FAILURE"]
