"""Files below one HTTP(S) address, for reading: what an existing file server or artifact repository holds."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import BinaryIO, NoReturn
from urllib.parse import quote, unquote, urlsplit

import httpx

from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import StoreError, StoreNotWritable, StoreUnavailable
from valohai_dagster.settings_stores import HttpStoreSettings
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.remote import RemoteStore, certificates

_NO_HEAD = (400, 403, 405, 501)  # what servers say that answer GET only
_WHOLE = {"Accept-Encoding": "identity"}


class HttpStore(RemoteStore):
    """Versions are strong ETags, else time and size. Its URIs are the plain addresses."""

    kind = "http"

    def __init__(self, name: str, section: HttpStoreSettings) -> None:
        parts = urlsplit(section.base_url)
        self.scheme = parts.scheme
        super().__init__(name, section, place=f"{parts.netloc}{parts.path}".rstrip("/"))
        self.readonly = True
        self._headers = {key: value.get_secret_value() for key, value in section.headers.items()}
        if section.username is not None:
            password = section.password.get_secret_value() if section.password else ""
            login = base64.b64encode(f"{section.username}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {login}"

    # -- names --------------------------------------------------------------------------------------------------

    def uri(self, key: str) -> str:
        return f"{self.scheme}://{self.place}/{quote(key, safe='/~*')}"

    def key_of(self, uri: str) -> str | None:
        """Addresses with a query are not served: what they name is no path."""
        if uri.startswith(f"store://{self.name}/"):
            return uri[len(f"store://{self.name}/") :]
        base = self.uri("")
        if not uri.startswith(base) or "?" in uri or "#" in uri:
            return None
        return unquote(uri[len(base) :])

    # -- reading ------------------------------------------------------------------------------------------------

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        """The plain request with the headers of the settings; `expires` does not apply."""
        return Transfer(url=self.uri(self.check(key)), headers=dict(self._headers))

    def stat(self, key: str) -> ObjectStat | None:
        """By HEAD; by the first byte where the server refuses that or does not tell the size."""
        url, what = self.uri(self.check(key)), f"look at {key!r}"
        headers = {**self._headers, **_WHOLE}
        with self.explained(what), self.client() as client:
            answer = client.head(url, headers=headers)
            size = _size(answer)
            if answer.status_code in _NO_HEAD or (answer.is_success and size is None):
                first = {**headers, "Range": "bytes=0-0"}
                with client.stream("GET", url, headers=first) as answer:
                    size = 0 if answer.status_code == 416 else _size(answer)
        status = answer.status_code
        if status in (404, 410):
            return None
        if not answer.is_success and status != 416:
            raise self.failure(what, status)
        if size is None:
            raise StoreUnavailable(
                f"the store {self.name!r} cannot {what}: the server does not say how large it is",
                store=self.name,
            )
        return _describe(key, size, answer)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.check(key)
        return self.read(key, lambda: self.sign_get(key, expires=timedelta()), offset=offset)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        raise StoreError(
            f"the store {self.name!r} ({self.uri('')}) cannot list {prefix!r}: HTTP has no listings; name the files "
            "one by one, without wildcards",
            store=self.name,
        )

    def require_place(self) -> None:
        """A server has no place that could be missing, other than the file itself."""

    def client(self) -> httpx.Client:
        """Follows redirects, and takes the headers of the settings to no other server."""
        own = httpx.URL(self.uri(""))

        def keep_secrets(request: httpx.Request) -> None:
            if (request.url.scheme, request.url.netloc) != (own.scheme, own.netloc):
                for name in self._headers:
                    request.headers.pop(name, None)

        return httpx.Client(
            timeout=self._timeout,
            verify=certificates(),
            follow_redirects=True,
            event_hooks={"request": [keep_secrets]},
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        self._refuse(key)

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        self._refuse(key)

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        self._refuse(key)

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        self._refuse(key)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        self._refuse(key)

    def delete(self, key: str) -> None:
        self._refuse(key)

    def wipe(self, key: str) -> None:
        self._refuse(key)

    def _refuse(self, key: str) -> NoReturn:
        self.check(key)
        raise StoreNotWritable(
            f'the store {self.name!r} is of kind = "http", which is for reading only; choose another store',
            store=self.name,
        )


def _size(answer: httpx.Response) -> int | None:
    """Of the whole file, whichever part of it was answered."""
    if answer.status_code == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _describe(key: str, size: int, answer: httpx.Response) -> ObjectStat:
    tag, modified = answer.headers.get("ETag", ""), _time(answer.headers.get("Last-Modified"))
    if tag and not tag.startswith("W/"):
        version = tag.strip('"')
    elif modified is not None:
        version = f"{size}-{int(modified.timestamp())}"
    else:
        version = tag or str(size)
    when = modified or _time(answer.headers.get("Date")) or datetime.now(timezone.utc)
    return ObjectStat(key=key, size=size, version=version, mtime=when)


def _time(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text).astimezone(timezone.utc) if text else None
    except ValueError:
        return None
