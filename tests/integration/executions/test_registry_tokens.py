"""Registry tokens by the clouds' own libraries (A-30): ECR against moto; Google's and Microsoft's token servers, and
the token exchange of Azure's registries, are stand-ins of this file, since neither can be run here. What is real there
is that google-auth and azure-identity ask as they do, and that their answers and refusals are handled.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from pydantic import SecretStr

from tests.support.ports import free_port
from tests.support.servers.google_key import write_key
from tests.support.servers.token_endpoint import TokenEndpoint
from tests.support.tls import Authority
from valohai_dagster.errors import RegistryError
from valohai_dagster.executions.registries import microsoft
from valohai_dagster.executions.registries.logins import RegistryLogins
from valohai_dagster.settings_registries import (
    AnyRegistrySettings,
    AzureRegistrySettings,
    EcrRegistrySettings,
    EcrRoleRegistrySettings,
    GoogleRegistrySettings,
)

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/train:1"
GAR = "europe-docker.pkg.dev/proj/images/train"


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def login(entry: AnyRegistrySettings, image: str):
    return RegistryLogins({"images": entry}).login_for(image)


def refusal(entry: AnyRegistrySettings, image: str) -> str:
    with pytest.raises(RegistryError) as raised:
        login(entry, image)
    assert "[registries.images]" in str(raised.value)
    return str(raised.value)


# -- Amazon --------------------------------------------------------------------------------------------------------


def ecr(endpoint: str) -> EcrRegistrySettings:
    return EcrRegistrySettings(
        kind="aws-ecr",
        match="*.dkr.ecr.*.amazonaws.com/*",
        access_key_id="testing",
        secret_access_key=SecretStr("testing"),
        endpoint_url=endpoint,
    )


def test_an_ecr_token_is_got_with_access_keys_for_the_images_account_and_region(moto_server: str):
    found = login(ecr(moto_server), ECR)
    assert found is not None
    assert (found.registry, found.username) == (ECR.partition("/")[0], "AWS")
    assert found.password


def test_an_ecr_token_is_got_by_an_assumed_role(moto_server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    entry = EcrRoleRegistrySettings(
        kind="aws-ecr-role",
        match="*",
        role_arn="arn:aws:iam::123456789012:role/puller",
        role_external_id="valohai",
        endpoint_url=moto_server,
        sts_endpoint_url=moto_server,
    )
    found = login(entry, ECR)
    assert found is not None
    assert found.username == "AWS"


def test_an_ecr_token_is_got_with_the_control_planes_own_credentials(
    moto_server: str, monkeypatch: pytest.MonkeyPatch
):
    entry = EcrRoleRegistrySettings(kind="aws-ecr-role", match="*", endpoint_url=moto_server)
    text = refusal(entry, ECR)
    assert "Unable to locate credentials" in text
    assert "the control plane's own AWS credentials" in text
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    assert login(entry, ECR) is not None


def test_a_refusal_of_aws_is_told_with_its_words(moto_server: str, monkeypatch: pytest.MonkeyPatch):
    """moto refuses nothing of ECR, but an account that is none."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # whatever ran before
    entry = EcrRoleRegistrySettings(
        kind="aws-ecr-role", match="*", profile="no-such-profile", endpoint_url=moto_server
    )
    assert "no-such-profile" in refusal(entry, ECR)
    gone = ecr(f"http://127.0.0.1:{free_port()}")
    assert "AWS cannot be asked" in refusal(gone, ECR)
    assert boto3.DEFAULT_SESSION is None  # nothing is left behind that others would use


# -- Google --------------------------------------------------------------------------------------------------------


def key_file(path: Path, token_uri: str) -> Path:
    """Of the usual universe, in which accounts get their tokens from the server."""
    content = json.loads(write_key(path, token_uri=token_uri).read_text())
    path.write_text(json.dumps({**content, "universe_domain": "googleapis.com"}))
    return path


def google(key: Path | None) -> GoogleRegistrySettings:
    return GoogleRegistrySettings(kind="gcp-ar", match="*-docker.pkg.dev/*", credentials_file=key)


def test_an_artifact_registry_token_is_the_service_accounts_access_token(tmp_path: Path):
    with TokenEndpoint() as tokens:
        found = login(google(key_file(tmp_path / "key.json", tokens.url)), GAR)
    assert found is not None
    assert (found.registry, found.username) == ("europe-docker.pkg.dev", "oauth2accesstoken")
    assert found.password == "of-the-tests"


def test_application_default_credentials_are_used_without_a_key_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with TokenEndpoint() as tokens:
        key = key_file(tmp_path / "key.json", tokens.url)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
        found = login(google(None), GAR)
    assert found is not None
    assert found.password == "of-the-tests"


def test_a_key_file_that_is_missing_or_whose_server_is_away_is_told(tmp_path: Path):
    missing = tmp_path / "missing.json"
    assert str(missing) in refusal(google(missing), GAR)
    gone = key_file(tmp_path / "key.json", f"http://127.0.0.1:{free_port()}/token")
    text = refusal(google(gone), GAR)
    assert "Google gives no token" in text
    assert "Artifact Registry Reader" in text


# -- Microsoft -----------------------------------------------------------------------------------------------------

Answer = Callable[[str, dict[str, list[str]]], "tuple[int, dict[str, object]]"]


class Server:
    """Answers JSON as a function says; with a context it speaks TLS."""

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                form = parse_qs(body or urlsplit(self.path).query)
                outer.asked.append((urlsplit(self.path).path, form))
                status, content = answer(urlsplit(self.path).path, form)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


TOKEN_URL = {"now": ""}  # where Entra sends those who ask for tokens


def entra(path: str, form: dict[str, list[str]]) -> tuple[int, dict[str, object]]:
    """A managed identity's endpoint, and Entra's for service principals."""
    if path.endswith("openid-configuration"):
        base = f"https://127.0.0.1/{path.split('/')[1]}"
        return 200, {
            "issuer": base,
            "authorization_endpoint": base,
            "token_endpoint": TOKEN_URL["now"],
        }
    if form.get("client_secret") == ["wrong"]:
        words = "AADSTS7000215: Invalid client secret provided."
        return 401, {"error": "invalid_client", "error_description": words}
    life = {"expires_in": 3600, "expires_on": "4102444800", "token_type": "Bearer"}
    return 200, {"access_token": "entra-token", "resource": "x", **life}


END = datetime(2030, 1, 1, tzinfo=timezone.utc)


def exchange(path: str, form: dict[str, list[str]]) -> tuple[int, dict[str, object]]:
    """Azure Container Registry's."""
    if (path, form["access_token"]) != ("/oauth2/exchange", ["entra-token"]):
        return 401, {"errors": [{"code": "UNAUTHORIZED"}]}
    if form.get("tenant") == ["no-pull"]:
        return 403, {}
    return 200, {"refresh_token": "head.eyJleHAiOjE4OTM0NTYwMDB9.tail"}  # {"exp": 1893456000}


@pytest.fixture
def acr() -> Iterator[Server]:
    server = Server(exchange)
    yield server
    server.close()


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Microsoft Entra for service principals; its library insists on TLS."""
    certificate = Authority(tmp_path / "ca").issue("login")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.authority))
    server = Server(entra, context)
    monkeypatch.setitem(TOKEN_URL, "now", f"https://127.0.0.1:{server.port}/token")
    yield server
    server.close()


def principal(authority: Server, acr: Server, *, tenant: str = "t1", secret: str = "right"):
    return AzureRegistrySettings(
        kind="azure-acr",
        match=f"127.0.0.1:{acr.port}/*",
        tenant_id=tenant,
        client_id="c1",
        client_secret=SecretStr(secret),
        authority_url=f"https://127.0.0.1:{authority.port}",
    )


def test_an_azure_token_is_exchanged_for_a_service_principal(acr: Server, authority: Server):
    image = f"127.0.0.1:{acr.port}/team/train"
    found = login(principal(authority, acr), image)
    assert found is not None
    assert (found.registry, found.username) == (f"127.0.0.1:{acr.port}", microsoft.USERNAME)
    assert found.password.startswith("head.")
    asked = acr.asked[0][1]
    assert asked["service"] == [f"127.0.0.1:{acr.port}"]
    assert asked["tenant"] == ["t1"]


def test_an_azure_token_is_exchanged_for_the_control_planes_own_identity(
    acr: Server, monkeypatch: pytest.MonkeyPatch
):
    identity = Server(entra)
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{identity.port}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "secret-header")
    entry = AzureRegistrySettings(kind="azure-acr", match=f"127.0.0.1:{acr.port}/*")
    try:
        found = login(entry, f"127.0.0.1:{acr.port}/team/train")
    finally:
        identity.close()
    assert found is not None
    assert "containerregistry" in str(identity.asked)


def test_what_azure_refuses_is_told_without_the_secret(acr: Server, authority: Server):
    image = f"127.0.0.1:{acr.port}/team/train"
    text = refusal(principal(authority, acr, secret="wrong"), image)
    assert "AADSTS7000215" in text
    assert "client_secret" in text
    assert "wrong" not in text
    text = refusal(principal(authority, acr, tenant="no-pull"), image)
    assert "403" in text
    assert "AcrPull" in text


def test_an_azure_token_ends_when_it_says_so(acr: Server, authority: Server):
    now = END - timedelta(hours=3)
    token = microsoft.mint(principal(authority, acr), f"127.0.0.1:{acr.port}", now)
    assert token.expires_at == END
