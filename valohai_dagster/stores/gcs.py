"""Google Cloud Storage: V4 signed URLs, uploads that fail when the object exists, resumable sessions for large files.

Signing takes a service account: its key file, or, where there is no private key (a machine's own account, workload
identity), the IAM API, which that account must be allowed to call (role Service Account Token Creator on itself).
A session's address is a credential of its own that ends with the upload, or after a week.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

import google.auth
import google.auth.exceptions
import requests
from google.api_core import exceptions as api_errors
from google.auth import credentials as google_credentials
from google.auth import iam
from google.auth.transport.requests import Request
from google.oauth2 import service_account

from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import StoreMissing, StoreUnavailable
from valohai_dagster.settings_stores import GcsStoreSettings
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.remote import RemoteStore, as_stream, expiry, known_size

MAX_EXPIRY = timedelta(days=7)  # of a V4 signature
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
PAGE = 1000
RETRY_SECONDS = 15.0
FIELDS = "items(name,size,generation,updated),nextPageToken"


class GcsStore(RemoteStore):
    """One bucket. Versions are object generations."""

    kind = "gcs"
    scheme = "gs"
    failures = (
        api_errors.GoogleAPIError,
        google.auth.exceptions.GoogleAuthError,
        requests.RequestException,
    )

    def __init__(self, name: str, section: GcsStoreSettings) -> None:
        super().__init__(name, section, place=section.bucket)
        self._section = section
        self._waits = (section.connect_timeout_seconds, section.read_timeout_seconds)
        self._lock = threading.Lock()

    # -- signed requests ----------------------------------------------------------------------------------------

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        return self._signed(key, "GET", expires, {})

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        """Fails when the object exists (O-02), and for more than `size` bytes."""
        self.refuse_readonly()
        headers = {"x-goog-if-generation-match": "0"}
        if size is not None:
            headers["x-goog-content-length-range"] = f"0,{size}"
        return self._signed(key, "PUT", expires, headers)

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        self.check(key)
        if size <= self._section.part_bytes:
            return None
        with self.explained(f"begin an upload of {key!r}", writing=True):
            url = self._blob(key).create_resumable_upload_session(
                size=size, timeout=self._waits, retry=self._retry, if_generation_match=0
            )
        assert url is not None
        return PartedUpload(style="session", part_bytes=self._section.part_bytes, token=url)

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        """The session's address, whatever the numbers: chunks are sent there in order."""
        session = Transfer(url=upload.token, method="PUT")
        return Parts(style="session", part_bytes=upload.part_bytes, parts={1: session})

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        what = f"give up the upload of {key!r}"
        with self.explained(what, writing=True), self.client() as client:
            status = client.delete(upload.token, headers={"Content-Length": "0"}).status_code
        if (
            status >= 500 and status != 501
        ):  # which an emulator answers; sessions end by themselves in time
            raise self.failure(what, status, writing=True)

    # -- the control plane itself -------------------------------------------------------------------------------

    def stat(self, key: str) -> ObjectStat | None:
        self.check(key)
        with self.explained(f"look at {key!r}"):
            blob = self._bucket.get_blob(key, timeout=self._waits, retry=self._retry)
        if blob is None:
            self.require_place()
        return None if blob is None else _describe(blob)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        with self.explained(f"list {prefix!r}"):
            found = self.library.list_blobs(
                self._bucket,
                prefix=prefix,
                page_size=PAGE,
                fields=FIELDS,
                timeout=self._waits,
                retry=self._retry,
            )
            for blob in found:
                if self.listed(blob.name):
                    yield _describe(blob)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.check(key)
        return self.read(key, lambda: self.sign_get(key, expires=timedelta(hours=1)), offset=offset)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        self.check(key)
        with self.explained(f"write {key!r}", writing=True):
            blob = self._blob(key)
            blob.chunk_size = self._section.part_bytes
            stream, size = _FromHere(as_stream(content)), known_size(content)
            blob.upload_from_file(
                stream,
                size=size,
                timeout=self._waits,
                retry=self._retry,
                if_generation_match=0,
                checksum="md5",
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
                self._blob(key).delete(timeout=self._waits, retry=self._retry)
            except api_errors.NotFound:
                return

    # -- the library --------------------------------------------------------------------------------------------

    def status_of(self, error: Exception) -> int | None:
        code = getattr(error, "code", None)
        return int(code) if isinstance(error, api_errors.GoogleAPICallError) and code else None

    @cached_property
    def library(self) -> Any:
        """Google's own client, for what a store does not do."""
        from google.cloud import storage

        options = {"universe_domain": self._credentials.universe_domain}
        if self._section.endpoint_url:
            options["api_endpoint"] = self._section.endpoint_url
        return storage.Client(
            project=self._section.project or "none",  # needed for making buckets only
            credentials=self._credentials,
            client_options=options,
        )

    @cached_property
    def _retry(self) -> Any:
        """As the library repeats, but not for two minutes while somebody waits."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_timeout(RETRY_SECONDS)

    @property
    def _endpoint(self) -> str:
        own = self._section.endpoint_url
        return own or f"https://storage.{self._credentials.universe_domain}"

    @property
    def _bucket(self) -> Any:
        with self._lock:  # the client is made once
            return self.library.bucket(self._section.bucket, user_project=self._section.project)

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(key)

    @cached_property
    def _credentials(self) -> Any:
        section = self._section
        if section.anonymous:
            return google_credentials.AnonymousCredentials()
        try:
            if section.credentials_file is not None:
                return service_account.Credentials.from_service_account_file(
                    str(section.credentials_file), scopes=[SCOPE]
                )
            return google.auth.default(scopes=[SCOPE])[0]
        except (google.auth.exceptions.GoogleAuthError, ValueError, OSError) as error:
            where = section.credentials_file or "Application Default Credentials"
            raise StoreUnavailable(
                f"the store {self.name!r} finds no usable credentials in {where} ({type(error).__name__}); set "
                f"credentials_file in [stores.{self.name}] to the key file of a service account",
                store=self.name,
            ) from error

    # -- signing ------------------------------------------------------------------------------------------------

    def _signed(
        self, key: str, method: Any, expires: timedelta, headers: dict[str, str]
    ) -> Transfer:
        self.check(key)
        lasting = min(expires, MAX_EXPIRY)
        billed = {"userProject": self._section.project} if self._section.project else {}
        if self._section.anonymous:
            url = f"{self._endpoint}/{self.place}/{quote(key, safe='/~')}"
            return Transfer(
                url=f"{url}?{urlencode(billed)}" if billed else url, method=method, headers=headers
            )
        until = expiry(lasting)
        with self.explained(f"sign a request for {key!r}"):
            url = self._blob(key).generate_signed_url(
                version="v4",
                expiration=lasting,
                method=method,
                headers=dict(headers),
                query_parameters=billed,
                credentials=self._signer,
                api_access_endpoint=self._endpoint,
            )
        return Transfer(url=url, method=method, headers=headers, expires_at=until)

    @cached_property
    def _signer(self) -> Any:
        """Credentials that can sign: those of the client when they hold a key, else IAM in their name."""
        credentials = self._credentials
        if isinstance(credentials, google_credentials.Signing):
            return credentials
        request = Request()
        email = getattr(credentials, "service_account_email", None)
        if email in (
            None,
            "default",
        ):  # a machine learns the name of its account with its first token
            credentials.refresh(request)
            email = getattr(credentials, "service_account_email", None)
        if email in (None, "default"):
            raise StoreUnavailable(
                f"the store {self.name!r} cannot sign URLs: its credentials are no service account's; set "
                f"credentials_file in [stores.{self.name}], or run as a service account with the role "
                "Service Account Token Creator on itself",
                store=self.name,
            )
        return _IamSigning(iam.Signer(request, credentials, email), str(email))


class _IamSigning(google_credentials.Signing):
    """Signs by the IAM API: one request per signature."""

    def __init__(self, signer: iam.Signer, email: str) -> None:
        self._signer, self._email = signer, email

    @property
    def signer(self) -> iam.Signer:
        return self._signer

    @property
    def signer_email(self) -> str:
        return self._email

    def sign_bytes(self, message: bytes) -> bytes:
        return self._signer.sign(message)


class _FromHere:
    """A stream, wherever it stands and whether or not it knows that: the library insists on a beginning."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._taken = stream, 0

    def read(self, count: int = -1, /) -> bytes:
        piece = self._stream.read(count)
        self._taken += len(piece)
        return piece

    def tell(self) -> int:
        return self._taken


def _describe(blob: Any) -> ObjectStat:
    return ObjectStat(
        key=blob.name, size=int(blob.size), version=str(blob.generation), mtime=blob.updated
    )
