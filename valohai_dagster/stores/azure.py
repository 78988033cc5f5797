"""Azure Blob Storage: shared access signatures of one blob each, block blobs, uploads that fail when the blob exists.

A signature is made with the account's key or, with Entra credentials, with a user delegation key that is fetched once
and lives for days. One for a whole file may only create; blocks cannot be written with that permission, so the
signature for parts may write its one blob, and the list of blocks is refused when the blob exists. The service forgets
blocks that no list named after a week; `abort_parts` makes it forget them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any, BinaryIO
from urllib.parse import quote

from azure.core import MatchConditions  # noqa: TID253 - this module is imported for stores of its kind only
from azure.core import exceptions as azure_errors  # noqa: TID253

from valohai_agent.protocol import Parts, Transfer, block_id
from valohai_dagster.errors import ConfigurationError, StoreBadKey, StoreMissing
from valohai_dagster.settings_stores import AzureStoreSettings
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.remote import RemoteStore, expiry, known_size, part_size

MAX_BLOCKS = 50_000
MIB = 1024 * 1024
PAGE = 1000
DELEGATION = timedelta(days=6)  # life of a user delegation key; the service allows seven days
CLOCK_SKEW = timedelta(minutes=5)
FRESH = {"If-None-Match": "*"}  # refused when the blob exists (O-02)


class AzureStore(RemoteStore):
    """One container. Versions are ETags."""

    kind = "azure"
    scheme = "azure"
    failures = (azure_errors.AzureError,)

    def __init__(self, name: str, section: AzureStoreSettings) -> None:
        self._section = section
        self._account = section.account or _account_of(section, name)
        super().__init__(name, section, place=f"{self._account}/{section.container}")
        self._lock = threading.Lock()
        self._delegation: tuple[datetime, Any] | None = None

    def check(self, key: str) -> str:
        """Refuses backslashes too: the service takes them for slashes, so that two keys would be one blob."""
        if "\\" in key:
            raise StoreBadKey(
                f"the key {key[:200]!r} in the store {self.name!r} is refused: Azure takes a backslash for a slash",
                store=self.name,
            )
        return super().check(key)

    # -- signed requests ----------------------------------------------------------------------------------------

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        return self._signed(key, "r", expires)

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        self.refuse_readonly()
        headers = {"x-ms-blob-type": "BlockBlob", **FRESH}
        return self._signed(key, "c", expires, method="PUT", headers=headers)

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        """Asks nothing of the service: blocks need no beginning."""
        self.check(key)
        self.refuse_readonly()
        wanted = self._section.part_bytes
        if size <= wanted:
            return None
        part_bytes = part_size(size, wanted=wanted, most_parts=MAX_BLOCKS)
        return PartedUpload(style="azure", part_bytes=part_bytes, token="")

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        blob = self._signed(key, "cw", expires, method="PUT")
        parts = {
            number: _with_query(blob, f"comp=block&blockid={quote(block_id(number), safe='')}")
            for number in numbers
        }
        finish = _with_query(blob, "comp=blocklist", headers=FRESH)
        return Parts(style="azure", part_bytes=upload.part_bytes, parts=parts, finish=finish)

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        """An empty list of blocks makes the service forget those that came; the empty blob is removed at once."""
        self.check(key)
        with self.explained(f"give up the upload of {key!r}", writing=True):
            blob = self._blob(key)
            with suppress(azure_errors.ResourceExistsError, azure_errors.ResourceModifiedError):
                made = blob.commit_block_list([], match_condition=MatchConditions.IfMissing)
                blob.delete_blob(etag=made["etag"], match_condition=MatchConditions.IfNotModified)

    # -- the control plane itself -------------------------------------------------------------------------------

    def stat(self, key: str) -> ObjectStat | None:
        self.check(key)
        with self.explained(f"look at {key!r}"):
            try:
                found = self._blob(key).get_blob_properties()
            except azure_errors.ResourceNotFoundError as error:
                if self.code_of(error) == "ContainerNotFound":
                    raise
                return None
        return None if _is_directory(found) else _describe(found, key)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        with self.explained(f"list {prefix!r}"):
            found = self._container.list_blobs(
                name_starts_with=prefix or None, include=["metadata"], results_per_page=PAGE
            )
            for blob in found:
                if self.listed(blob.name) and not _is_directory(blob):
                    yield _describe(blob, blob.name)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.check(key)
        return self.read(key, lambda: self.sign_get(key, expires=timedelta(hours=1)), offset=offset)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        self.check(key)
        with self.explained(f"write {key!r}", writing=True):
            self._blob(key).upload_blob(
                content, length=known_size(content), overwrite=False, max_concurrency=1
            )
        found = self.stat(key)
        if found is None:
            raise StoreMissing(
                f"the object {key!r} was deleted from the store {self.name!r} right after it was written",
                store=self.name,
            )
        return found

    def delete(self, key: str) -> None:
        self.check(key)
        with self.explained(f"delete {key!r}", writing=True):
            try:
                self._blob(key).delete_blob(delete_snapshots="include")
            except azure_errors.ResourceNotFoundError as error:
                if self.code_of(error) == "ContainerNotFound":
                    raise

    # -- the library --------------------------------------------------------------------------------------------

    def status_of(self, error: Exception) -> int | None:
        return getattr(error, "status_code", None)

    def code_of(self, error: Exception) -> str:
        code = getattr(error, "error_code", None)
        return str(getattr(code, "value", code) or type(error).__name__)

    @cached_property
    def library(self) -> Any:
        """Azure's own client, for what a store does not do."""
        from azure.storage.blob import BlobServiceClient, ExponentialRetry

        section = self._section
        options: dict[str, Any] = {
            "connection_timeout": section.connect_timeout_seconds,
            "read_timeout": section.read_timeout_seconds,
            "retry_policy": ExponentialRetry(
                initial_backoff=0, increment_base=2, retry_total=3, random_jitter_range=1
            ),
            "max_single_put_size": 4 * MIB,
            "max_block_size": 4 * MIB,
        }
        if section.connection_string is not None:
            text = section.connection_string.get_secret_value()
            return BlobServiceClient.from_connection_string(text, **options)
        return BlobServiceClient(self._address, credential=self._credential, **options)

    @property
    def _address(self) -> str:
        return self._section.endpoint_url or f"https://{self._account}.blob.core.windows.net"

    @cached_property
    def _credential(self) -> Any:
        section = self._section
        secret = section.account_key or section.sas_token
        if secret is not None:
            return secret.get_secret_value().lstrip("?")
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()

    @property
    def _container(self) -> Any:
        with self._lock:  # the client is made once
            return self.library.get_container_client(self._section.container)

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(key)

    # -- signing ------------------------------------------------------------------------------------------------

    def _signed(
        self,
        key: str,
        permission: str,
        expires: timedelta,
        *,
        method: Any = "GET",
        headers: Mapping[str, str] | None = None,
    ) -> Transfer:
        self.check(key)
        until = expiry(expires)
        with self.explained(f"sign a request for {key!r}"):
            address = self._blob(key).url
            if "?" in address:  # the configured signature of the container is on it already
                return Transfer(url=address, method=method, headers=dict(headers or {}))
            signature = self._signature(key, permission, until)
        url = f"{address}?{signature}"
        return Transfer(url=url, method=method, headers=dict(headers or {}), expires_at=until)

    def _signature(self, key: str, permission: str, until: datetime) -> str:
        from azure.storage.blob import generate_blob_sas

        account_key = getattr(self.library.credential, "account_key", None)
        if account_key is not None:
            how: dict[str, Any] = {"account_key": account_key}
        else:
            how = {"user_delegation_key": self._delegation_key(until)}
        return generate_blob_sas(
            account_name=self._account,
            container_name=self._section.container,
            blob_name=key,
            permission=permission,
            expiry=until,
            protocol="https" if self.library.url.startswith("https:") else None,
            **how,
        )

    def _delegation_key(self, until: datetime) -> Any:
        """One that lives until then; kept for all signatures that it covers."""
        service = self.library
        with self._lock:
            if self._delegation is None or self._delegation[0] < until:
                now = datetime.now(timezone.utc)
                ends = max(now + DELEGATION, until)
                self._delegation = (ends, service.get_user_delegation_key(now - CLOCK_SKEW, ends))
            return self._delegation[1]


def _account_of(section: AzureStoreSettings, name: str) -> str:
    """The account that a connection string names."""
    text = section.connection_string.get_secret_value() if section.connection_string else ""
    pairs = (item.partition("=") for item in text.split(";"))
    for field, _, value in pairs:
        if field.strip().lower() == "accountname":
            return value.strip()
    raise ConfigurationError(
        f"the connection_string in [stores.{name}] names no AccountName; state the account there as well"
    )


def _with_query(
    transfer: Transfer, query: str, *, headers: Mapping[str, str] | None = None
) -> Transfer:
    changed = {"url": f"{transfer.url}&{query}", "headers": dict(headers or {})}
    return transfer.model_copy(update=changed)


def _is_directory(found: Any) -> bool:
    """Accounts with a hierarchical namespace list directories as empty blobs with this mark."""
    return (found.metadata or {}).get("hdi_isfolder") == "true"


def _describe(found: Any, key: str) -> ObjectStat:
    return ObjectStat(
        key=key, size=found.size, version=found.etag.strip('"'), mtime=found.last_modified
    )
