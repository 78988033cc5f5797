"""Our presigned URLs are those of botocore, character for character."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any
from unittest import mock

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.stores.sigv4 import Signer

NOW = datetime(2026, 11, 22, 13, 30, 59, tzinfo=timezone.utc)
KEYS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
).map(lambda text: text.strip("/") or "key")
ACCESS, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def by_botocore(
    method: str, url: str, headers: dict[str, str], token: str | None, seconds: int, region: str
) -> str:
    request = AWSRequest(method, url, headers=headers)
    credentials = Credentials(ACCESS, SECRET, token)
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        S3SigV4QueryAuth(credentials, "s3", region, expires=seconds).add_auth(request)
    return str(request.url)


def signature(url: str) -> str:
    return url.rpartition("X-Amz-Signature=")[2]


@given(
    key=KEYS,
    base=st.sampled_from(
        [
            "https://bucket.s3.eu-west-1.amazonaws.com",
            "http://127.0.0.1:9000/bucket",
            "https://minio.example.com:443/bucket",
        ]
    ),
    token=st.none() | st.just("a+b/c=="),
    headers=st.sampled_from(
        [{}, {"If-None-Match": "*"}, {"x-amz-server-side-encryption": "  aws:kms   x "}]
    ),
    part=st.none() | st.integers(1, 10_000),
)
def test_it_signs_what_botocore_signs(
    key: str, base: str, token: str | None, headers: dict[str, str], part: int | None
) -> None:
    signer = Signer(
        base=base, region="eu-west-1", access_key=ACCESS, secret_key=SECRET, token=token
    )
    query = {} if part is None else {"partNumber": str(part), "uploadId": "a.b~c-d_e/f=="}
    ours = signer.url("PUT", key, now=NOW, seconds=600, query=query, headers=headers)
    unsigned = ours.partition("?")[0]
    asked = "&".join(
        pair for pair in ours.partition("?")[2].split("&") if not pair.startswith("X-Amz-")
    )
    theirs = by_botocore(
        "PUT", f"{unsigned}?{asked}" if asked else unsigned, headers, token, 600, "eu-west-1"
    )
    assert signature(ours) == signature(theirs)


def test_secrets_are_not_in_its_repr() -> None:
    values: Any = {"access_key": "id-1", "secret_key": "secret-1", "token": "token-1"}
    shown = repr(Signer(base="http://x/b", region="us-east-1", **values))
    assert not any(value in shown for value in values.values())
