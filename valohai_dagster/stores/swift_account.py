"""An account of OpenStack Swift: tokens of Keystone or TempAuth, renewed when they run out, and temporary URLs."""

from __future__ import annotations

import base64
import hmac
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit

from keystoneauth1 import adapter, session

from valohai_dagster.errors import StoreUnavailable
from valohai_dagster.settings_stores import SwiftStoreSettings

KEY_SECONDS = 300.0  # how long a key and its digest are believed before they are looked up again
DIGESTS = (
    "sha256",
    "sha512",
    "sha1",
)  # the first that the server takes; old servers take only the last
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class TempUrlKey:
    """What signs temporary URLs; `whole_account` is False for the key of one container, which opens no other."""

    secret: str = field(repr=False)
    digest: str
    whole_account: bool


class SwiftAccount:
    """Talks to one account; may be used by several threads."""

    def __init__(self, name: str, section: SwiftStoreSettings) -> None:
        self._name, self._section = name, section
        self._lock = threading.Lock()
        self._keys: dict[str, tuple[float, TempUrlKey]] = {}

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The answer to an authenticated request for `path` below the account, whatever its status."""
        return self._adapter.request(path, method, raise_exc=False, **options)

    @property
    def address(self) -> str:
        """The account's own URL."""
        return (self._section.storage_url or self._adapter.get_endpoint() or "").rstrip("/")

    def temp_url(self, method: str, container: str, key: str, *, until: int, key_of: str) -> str:
        """Signed with the key that the container `key_of` is served with; `until` in seconds since 1970."""
        signing = self.key(key_of)
        address = urlsplit(self.address)
        path = f"{address.path}/{container}/{key}"
        # Servers that prefix their Swift interface, such as RADOS Gateway, sign from the version on.
        signed = path[max(0, path.find("/v1")) :]
        words = f"{method}\n{until}\n{signed}".encode()
        signature = _signature(signing, words)
        query = f"temp_url_sig={signature}&temp_url_expires={until}"
        return f"{address.scheme}://{address.netloc}{quote(path)}?{query}"

    def key(self, container: str) -> TempUrlKey:
        """The key of temporary URLs for a container: the configured one, else that of the account or container."""
        with self._lock:
            known = self._keys.get(container)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        found = self._look_up(container)
        with self._lock:
            self._keys[container] = (time.monotonic() + KEY_SECONDS, found)
        return found

    def _look_up(self, container: str) -> TempUrlKey:
        own = self._section.temp_url_key
        chosen = own.get_secret_value() if own is not None else None
        account = _keys_in(self.call("HEAD", ""), "X-Account-Meta-Temp-Url-Key")
        local = _keys_in(
            self.call("HEAD", f"/{quote(container, safe='')}"), "X-Container-Meta-Temp-Url-Key"
        )
        secret = chosen or next(iter([*account, *local]), None)
        if secret is None:
            raise StoreUnavailable(
                f"the store {self._name!r} can sign nothing: no key for temporary URLs can be seen on its Swift "
                f"account or the container {container!r}; set one there (`swift post -m 'Temp-URL-Key: <random "
                f"text>'`), or tell it as temp_url_key in [stores.{self._name}]",
                store=self._name,
            )
        return TempUrlKey(
            secret=secret, digest=self._digest(), whole_account=secret in account or not local
        )

    def _digest(self) -> str:
        """The best digest that the server says it takes; one that says nothing is old, or not Swift itself."""
        address = urlsplit(self.address)
        root = address.path.partition("/v1")[0]
        url = f"{address.scheme}://{address.netloc}{root}/info"
        answer = self._adapter.request(url, "GET", raise_exc=False, authenticated=False)
        try:
            offered = answer.json()["tempurl"].get("allowed_digests", ["sha1"])
        except (ValueError, KeyError, AttributeError):
            offered = ["sha1"]
        return next((digest for digest in DIGESTS if digest in offered), "sha1")

    @cached_property
    def _adapter(self) -> Any:
        section = self._section
        return adapter.Adapter(
            session.Session(
                auth=self._login(),
                timeout=section.read_timeout_seconds,
                user_agent="valohai-dagster",
            ),
            service_type="object-store",
            interface="public",
            region_name=section.region,
            endpoint_override=section.storage_url,
            connect_retries=2,
            status_code_retries=2,
            retriable_status_codes=list(BUSY),
        )

    def _login(self) -> Any:
        section = self._section
        if section.auth_version == "1":
            from swiftclient.authv1 import PasswordPlugin

            assert section.key is not None
            return PasswordPlugin(
                auth_url=section.auth_url,
                username=section.user,
                password=section.key.get_secret_value(),
            )
        from keystoneauth1.identity import v3

        if section.application_credential_secret is not None:
            return v3.ApplicationCredential(
                section.auth_url,
                application_credential_id=section.application_credential_id,
                application_credential_secret=section.application_credential_secret.get_secret_value(),
            )
        assert section.key is not None
        return v3.Password(
            section.auth_url,
            username=section.user,
            password=section.key.get_secret_value(),
            user_domain_name=section.user_domain,
            project_id=section.project_id,
            project_name=None if section.project_id else section.project,
            project_domain_name=None if section.project_id else section.project_domain,
        )


def _signature(key: TempUrlKey, words: bytes) -> str:
    """In hexadecimal, but for the longest digest, which Swift takes with its name and in base 64 only."""
    mac = hmac.new(key.secret.encode(), words, key.digest)
    if key.digest != "sha512":
        return mac.hexdigest()
    return quote(f"sha512:{base64.urlsafe_b64encode(mac.digest()).decode()}")


def _keys_in(answer: Any, header: str) -> list[str]:
    return [answer.headers[name] for name in (header, f"{header}-2") if answer.headers.get(name)]
