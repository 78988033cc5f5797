"""Redis URLs: what may be shown of them, and what is wrong with their TLS part. Shared with the control plane.

    rediss://user:password@host:6379/0?ssl_ca_certs=/etc/ca.crt&ssl_certfile=/etc/me.crt&ssl_keyfile=/etc/me.key

`ssl_ca_certs` is the authority that has signed the server's certificate (without it: those of the system),
`ssl_certfile` and `ssl_keyfile` are our own certificate for servers that ask for one.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

_SECRET_OPTIONS = ("password", "ssl_password", "sslpassword")
_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CLIENT_CERTIFICATE_WORDS = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA")


def redact(url: str) -> str:
    """The URL without its passwords, wherever they stand, for messages and logs."""
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    secret = any(name in _SECRET_OPTIONS for name, _ in options)
    if parts.password is None and not secret:
        return url
    if secret:
        shown = [(n, "***" if n in _SECRET_OPTIONS else quote(v, safe="/:@")) for n, v in options]
        parts = parts._replace(query="&".join(f"{name}={value}" for name, value in shown))
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username or ''}:***@{host}")
    return urlunsplit(parts)


def tls_trouble(error: BaseException, url: str) -> str | None:
    """What is wrong with certificates, in words; None when the error is of another kind.

    Waiting cures none of it. A server that restarts never causes it, since it ends connections without TLS alerts.
    """
    if urlsplit(url).scheme != "rediss":
        return None
    files = dict(parse_qsl(urlsplit(url).query))
    for name in _FILE_OPTIONS:
        path = files.get(name)
        if path is not None and not os.access(path, os.R_OK):
            return f"the file {name}={path} cannot be read"
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause, files.get("ssl_ca_certs"))
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return _handshake(cause, "ssl_certfile" in files)
    return None


def scheme_hint(error: BaseException, url: str) -> str:
    """The likely cause when the two sides do not agree on TLS; empty when nothing points to that."""
    causes = list(_chain(error))
    if urlsplit(url).scheme == "redis" and any(isinstance(c, ConnectionResetError) for c in causes):
        return " (if the server speaks TLS, the URL begins with rediss://)"
    if "ssl_certfile" not in url and any(isinstance(c, ssl.SSLEOFError) for c in causes):
        return " (the server may want a client certificate: ssl_certfile=... and ssl_keyfile=...)"
    if urlsplit(url).scheme == "rediss" and any("handshake" in str(c) for c in causes):
        return " (if the server does not speak TLS, the URL begins with redis://)"
    return ""


def _untrusted(error: ssl.SSLCertVerificationError, authority: str | None) -> str:
    tried = f"ssl_ca_certs={authority}" if authority else "the authorities of the system"
    return (
        f"this machine does not trust the certificate of the server: {error.verify_message} (tried {tried}); "
        "name the authority that signed it with ?ssl_ca_certs=/path/to/ca.crt"
    )


def _handshake(error: ssl.SSLError, has_certificate: bool) -> str:
    reason = getattr(error, "reason", None) or str(error)
    if any(word in reason for word in _CLIENT_CERTIFICATE_WORDS):
        given = "refuses the one of" if has_certificate else "wants a client certificate:"
        return f"the server {given} ssl_certfile=... and ssl_keyfile=... ({reason})"
    return f"TLS does not work: {reason}; check ssl_certfile, ssl_keyfile and ssl_ca_certs"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
