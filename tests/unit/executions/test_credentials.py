"""Credentials in URLs of inputs are sealed before a client hands an execution over."""

from __future__ import annotations

import pytest

from tests.support.service import make_spec
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.executions.credentials import open_credentials, seal_credentials

KEY = SecretKey(b"k" * 32)
URLS = [
    "https://h/a?temp_url_sig=hide-me&temp_url_expires=1",
    "https://h/a?anything=hide-me",
    "https://h/a?hide-me",
    "https://me:hide-me@h/a",
    "https://h/a#hide-me",
    "https://h/plain.csv",
    "s3://bucket/key",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_sealed_whole_and_opened_as_it_was(url: str) -> None:
    spec = make_spec(inputs=[InputSpec(name="data", uris=["https://h/first", url])])
    sealed = seal_credentials(spec, lambda: KEY)
    assert "hide-me" not in sealed.model_dump_json()
    assert bool(sealed.sealed_uris) == ("hide-me" in url)
    assert open_credentials(sealed, KEY) == spec.inputs


@pytest.mark.parametrize("url", URLS)
def test_what_is_sealed_may_be_handed_over_again(url: str) -> None:
    """As a client does that has heard nothing for a while."""
    spec = make_spec(inputs=[InputSpec(name="data", uris=[url])])
    sealed = seal_credentials(spec, lambda: KEY)
    assert seal_credentials(sealed, lambda: KEY) == sealed
