"""Packs dataset versions in the background (O-23): one at a time in each conductor, whoever claims it first.

What is stored counts: whoever takes over a version goes on with the files that are in no package yet. A package is
noted as an upload of the control plane before its first byte, so whatever a cut leaves in a store is swept. Every
failure ends in the records, where executions that read the version find it; they get the files one by one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import sqlalchemy as sa

from valohai_dagster.data import own_uploads, packages
from valohai_dagster.data.datums import Datum, learn_checksums, require_content
from valohai_dagster.data.package_writing import (
    Stopped,
    Written,
    plan_packages,
    store_for,
    write_package,
)
from valohai_dagster.data.packages import Package, Packaging
from valohai_dagster.errors import (
    RefusedError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    ValohaiError,
)
from valohai_dagster.executions.core import ServiceCore

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_SECONDS = 5.0  # between two looks for work
RENEW_SECONDS = 15.0  # between two words of who is at it
FIRST_PAUSE = timedelta(seconds=30)  # of a version whose store is away; doubled each time
LONGEST_PAUSE = timedelta(hours=1)


class _NotOurs(Exception):
    """Somebody else packs the version by now, or nobody wants that any more."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a package is written, known to the sweep."""

    upload_id: str
    store: str
    key: str


class Packager:
    """`step` in an endless loop."""

    def __init__(self, core: ServiceCore) -> None:
        self._core = core
        self._stop = threading.Event()
        self._writing = False
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="packages")

    def close(self) -> None:
        """Waits for nothing: a store may hang, and what it has by then is swept.

        Only the end of the process waits for the thread, as that of the interpreter does for every pool.
        """
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a package is being written, which would have to begin anew elsewhere."""
        return self._writing

    async def step(self) -> None:
        if not await self.look():
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> bool:
        """Packs the version that waits longest; False when none does."""
        core, holder = self._core, str(uuid.uuid4())
        version_id = await core.read(lambda conn: packages.next_wanted(conn, core.clock()))
        if version_id is None:
            return False
        if await core.write(lambda conn: packages.claim(conn, version_id, holder, core.clock())):
            core.last_work = core.clock()
            await self._pack(version_id, holder)
        return True

    async def _pack(self, version_id: str, holder: str) -> None:
        core = self._core
        extra = {"action": "package", "version": version_id}
        try:
            files = await core.read(lambda conn: packages.left_to_pack(conn, version_id))
            for datum in files:
                require_content(datum)
            for group in plan_packages(files, core.settings.package_bytes):
                await self._store(version_id, holder, group)
            await core.write(lambda conn: packages.end(conn, version_id, holder))
            log.info("packed the version %s", version_id, extra=extra)
        except _NotOurs:
            log.info("the version %s is not ours to pack any more", version_id, extra=extra)
        except (StoreUnavailable, StoreFull) as error:
            log.warning("cannot pack %s now: %s", version_id, error, extra=extra)
            await self._put_off(version_id, holder, str(error))
        except ValohaiError as error:
            problem = str(error)
            log.warning("cannot pack %s: %s", version_id, problem, extra=extra)
            await core.write(lambda conn: packages.end(conn, version_id, holder, problem))

    async def _put_off(self, version_id: str, holder: str, problem: str) -> None:
        core = self._core
        known = await core.read(lambda conn: packages.packaging_of(conn, version_id))
        due = core.clock() + pause(known)
        await core.write(
            lambda conn: packages.put_off(conn, version_id, holder, problem=problem, due=due)
        )

    # -- one package -------------------------------------------------------------------------------------------
    async def _store(self, version_id: str, holder: str, files: Sequence[Datum]) -> None:
        core = self._core
        place = _place(version_id, store_for(files, core.stores))
        await core.write(lambda conn: own_uploads.note(conn, self._upload(place)))
        try:
            written = await self._written(version_id, holder, files, place)
        except (_NotOurs, ValohaiError):
            await self._remove(place)
            raise
        if not await self._record(version_id, holder, files, place, written):
            await self._remove(place)
            raise _NotOurs

    def _upload(self, place: _Place) -> own_uploads.OwnUpload:
        now = self._core.clock()
        return own_uploads.OwnUpload(
            upload_id=place.upload_id,
            kind=packages.KIND,
            name=place.upload_id,
            store=place.store,
            key=place.key,
            begun_at=now,
            expires_at=now + own_uploads.LIFE,
        )

    async def _written(
        self, version_id: str, holder: str, files: Sequence[Datum], place: _Place
    ) -> Written:
        """On a thread, while the claim and the upload are renewed. Who leaves early does not wait for the store: the
        thread ends by itself, and what comes after it on the same thread finds it ended."""
        stores, stop = self._core.stores, threading.Event()
        self._stop, self._writing = stop, True
        target = stores.get(place.store)
        work = self._on_thread(
            lambda: _write(lambda: write_package(files, stores, target, place.key, stop=stop))
        )
        work.add_done_callback(_look_at)  # when we are cancelled, nobody else does
        try:
            while True:
                done, _ = await asyncio.wait({work}, timeout=RENEW_SECONDS)
                if done:
                    return work.result()
                if not await self._renewed(version_id, holder, place):
                    raise _NotOurs
        except Stopped:
            raise _NotOurs from None
        finally:
            stop.set()
            work.cancel()  # its answer has nowhere to go once the loop is closed
            self._writing = False

    async def _renewed(self, version_id: str, holder: str, place: _Place) -> bool:
        core, now = self._core, self._core.clock()
        core.last_work = now
        end = now + own_uploads.LIFE
        return await core.write(
            lambda conn: (
                packages.keep(conn, version_id, holder, now)
                and own_uploads.prolong(conn, place.upload_id, end)
            )
        )

    async def _record(
        self,
        version_id: str,
        holder: str,
        files: Sequence[Datum],
        place: _Place,
        written: Written,
    ) -> bool:
        core, now = self._core, self._core.clock()
        learnt = {d.id: written.checksums[d.id] for d in files if d.sha256 is None}
        number = await core.read(lambda conn: packages.next_number(conn, version_id))
        package = Package(
            id=place.upload_id,
            version_id=version_id,
            number=number,
            store=place.store,
            key=place.key,
            size=written.size,
            files=len(files),
            sha256=written.sha256,
            ctime=now,
        )
        ids = [datum.id for datum in files]

        def change(conn: sa.Connection) -> bool:
            if not packages.record(conn, package, ids, holder=holder, now=now):
                return False
            for datum_id, checksums in learnt.items():
                learn_checksums(conn, datum_id, checksums)
            return True

        return await core.write(change)

    async def _remove(self, place: _Place) -> None:
        """At once if the store lets us, else by the sweep."""
        store = self._core.stores[place.store]
        try:
            await self._on_thread(lambda: store.wipe(place.key))
        except StoreError as error:
            text, extra = "%r is left to the sweep: %s", {"action": "undo-package"}
            log.warning(text, place.key, error, extra=extra)
        else:
            await self._core.write(lambda conn: own_uploads.forget(conn, [place.upload_id]))

    def _on_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, call)


def _look_at(work: asyncio.Future[Written]) -> None:
    if not work.cancelled():
        work.exception()


def _write(call: Callable[[], Written]) -> Written:
    """What nobody expects is told as such, and does not end the conductor."""
    try:
        return call()
    except (ValohaiError, Stopped):
        raise
    except Exception as error:
        log.exception("cannot write a package", extra={"action": "fail"})
        raise RefusedError(
            f"a defect while writing a package ({type(error).__name__}), see the conductor's log"
        ) from error


def pause(known: Packaging | None) -> timedelta:
    """Before the next try, longer each time."""
    tries = min(known.tries if known is not None else 0, 10)
    return min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE)


def _place(version_id: str, store: str) -> _Place:
    package_id = str(uuid.uuid4())
    key = f"packages/{version_id}/{package_id}/package.tar"
    return _Place(upload_id=package_id, store=store, key=key)
