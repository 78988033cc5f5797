"""What is shown of a Redis URL, and what certificates may have to do with an error."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from valohai_agent.redis_link import RedisLink
from valohai_agent.redis_url import redact, scheme_hint, tls_trouble

URL = "rediss://agent:hunter2@redis.example:6380/1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "rediss://agent:***@redis.example:6380/1"),
        ("unix://agent:hunter2@/run/r.sock", "unix://agent:***@/run/r.sock"),
        ("redis://localhost:6379", "redis://localhost:6379"),
        (
            "rediss://h/0?ssl_ca_certs=/etc/ca.crt&ssl_password=hunter2&password=hunter2",
            "rediss://h/0?ssl_ca_certs=/etc/ca.crt&ssl_password=***&password=***",
        ),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def wrapped(cause: BaseException) -> ConnectionError:
    error = ConnectionError("as the client library words it")
    error.__cause__ = cause
    return error


def test_an_untrusted_certificate_is_told_with_the_authorities_that_were_tried() -> None:
    cause = ssl.SSLCertVerificationError(1, "no")
    cause.verify_message = "self-signed certificate"
    text = str(tls_trouble(wrapped(cause), URL))
    assert "does not trust the certificate of the server: self-signed certificate" in text
    assert "the authorities of the system" in text


@pytest.mark.parametrize(
    ("query", "expected"), [("", "wants a client certificate"), ("?ssl_certfile={}", "refuses")]
)
def test_a_client_certificate_that_is_missing_or_refused_is_told(
    tmp_path: Path, query: str, expected: str
) -> None:
    (tmp_path / "c.crt").touch()
    cause = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED]")
    assert expected in str(tls_trouble(wrapped(cause), URL + query.format(tmp_path / "c.crt")))


def test_other_troubles_are_not_blamed_on_certificates() -> None:
    assert tls_trouble(wrapped(ConnectionResetError()), URL) is None
    assert tls_trouble(wrapped(ssl.SSLEOFError(8, "EOF")), URL) is None
    assert tls_trouble(wrapped(ssl.SSLError(1, "x")), "redis://h") is None


def test_one_side_without_tls_gets_a_hint() -> None:
    assert "rediss://" in scheme_hint(wrapped(ConnectionResetError()), "redis://h")
    late = wrapped(TimeoutError("_ssl.c:989: The handshake operation timed out"))
    assert "redis://" in scheme_hint(late, URL)
    assert scheme_hint(wrapped(ConnectionRefusedError()), "redis://h") == ""


@pytest.mark.parametrize("url", [URL + "?ssl_ca=x", "redis://h?ssl_ca_certs=x", "http://h"])
def test_an_option_that_does_not_exist_is_refused_with_the_variable(url: str) -> None:
    with pytest.raises(ValueError, match="VALOHAI_AGENT_REDIS") as caught:
        RedisLink(url)
    assert "hunter2" not in str(caught.value)
