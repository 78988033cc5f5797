"""Signs what leases are granted, away from the records and from the event loop.

Every store signs on threads of its own, so that one that is slow or away delays only those who need it. What a store
cannot do now is tried again for a while; then it is refused with the store's name and the reason. If this process dies
meanwhile, agents ask again, and what was begun for them is swept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypeVar

from valohai_agent.protocol import Grants, RegistryLogin
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions import uploads
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.grants import seal
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.parted import Begun, seal_parts
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.signing import Signed, sign
from valohai_dagster.executions.wishes import Wish
from valohai_dagster.executions.writing import ShardLost, Writing
from valohai_dagster.records import tables as t

log = logging.getLogger(__name__)
T = TypeVar("T")

MINT_SECONDS = 60.0  # longest wait for a store before it is refused
PAUSE_SECONDS = 1.0  # before a store that cannot do it now is asked again; doubled each time
THREADS = 4  # per store
MANY = 100  # files in one answer; more of them are sealed on a thread
REGISTRY = "registry"  # under this name a login that cannot be had is refused

LoginFor = Callable[[str], RegistryLogin | None]


@dataclass(kw_only=True)
class _Answer:
    """What has been signed of one wish so far."""

    signed: Signed = field(default_factory=Signed)
    registry: RegistryLogin | None = None


class Minting:
    """`begin` for every wish, once the records are committed."""

    def __init__(
        self, core: ServiceCore, shards: Shards, secret_key: SecretKey, login_for: LoginFor
    ) -> None:
        self._core = core
        self._shards = shards
        self._secret_key = secret_key
        self._login_for = login_for
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._busy: set[tuple[str, str]] = set()
        self._tasks: dict[int, set[asyncio.Future[None]]] = defaultdict(set)
        shards.on_lost(self._finish)

    def close(self) -> None:
        """Waits for nothing: a store may hang."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    def is_busy(self, token: str, name: str) -> bool:
        """Whether that is being minted already; safe from any thread."""
        return (token, name) in self._busy

    def begin(self, wish: Wish) -> None:
        asked = wish.asked
        self._busy |= asked
        task = asyncio.ensure_future(self._grant(wish))
        self._keep(wish.shard, task)
        task.add_done_callback(lambda _: self._busy.difference_update(asked))

    def _keep(self, shard: int, task: asyncio.Future[None]) -> None:
        self._tasks[shard].add(task)
        task.add_done_callback(self._tasks[shard].discard)
        task.add_done_callback(_tell_failure)

    def _finish(self, shard: int) -> Awaitable[None] | None:
        """An orderly hand-over waits for what is being minted."""
        tasks = set(self._tasks[shard])
        return _all_done(tasks) if tasks else None

    # -- one wish ----------------------------------------------------------------------------------------------
    async def _grant(self, wish: Wish) -> None:
        answer = _Answer()
        parts = [
            self._sign(half, store, answer.signed)
            for store in wish.stores
            for half in wish.of_store(store).halves()
        ]
        if wish.image is not None:
            parts.append(self._log_in(wish.image, answer))
        await asyncio.gather(*parts)
        if await self._note_begun(wish, answer.signed):
            await self._push(wish, answer)

    async def _push(self, wish: Wish, answer: _Answer) -> None:
        signed = answer.signed
        transfers = {**wish.urls, **signed.transfers}
        grants = Grants(
            initial=wish.initial,
            archive=transfers.pop("archive", None) if wish.initial else None,
            inputs=transfers,
            secrets=dict(wish.secrets),
            registry=answer.registry,
            uploads=signed.uploads,
            refused={**wish.refused, **signed.refused},
        )
        many = len(transfers) + len(signed.uploads) > MANY
        sealed = (
            await asyncio.to_thread(seal, grants, wish.public_key)
            if many
            else seal(grants, wish.public_key)
        )
        await self._core.deliver(Outbox(grants=[(wish.group, wish.execution_id, sealed)]))

    # -- stores ------------------------------------------------------------------------------------------------
    async def _sign(self, wish: Wish, store: str, result: Signed) -> None:
        """All of the wish is of that store; what it cannot do now is tried again until the time is up."""
        deadline, pause = time.monotonic() + MINT_SECONDS, PAUSE_SECONDS
        while True:
            work = self._on_thread(store, self._signing(wish, store, result))
            why = f"the store {store!r} did not answer within {MINT_SECONDS:.0f} s"
            try:
                signed = await self._in_time(work, wish, deadline - time.monotonic())
            except Exception as error:  # agents would ask again for ever
                log.exception("cannot sign", extra={"action": "fail", "store": store})
                signed, why = (
                    None,
                    f"the store {store!r}: a defect, see the conductor's log: {error!r}",
                )
            if signed is None:
                result.refused.update(dict.fromkeys(wish.names(), why))
                return
            result.add(signed)
            if not signed.unavailable:
                return
            if time.monotonic() + pause >= deadline:
                result.refused.update(signed.unavailable)
                return
            wish = wish.of_names(signed.unavailable)
            extra = {"action": "mint-again", "execution": wish.execution_id, "store": store}
            log.warning("cannot sign now: %s", next(iter(signed.unavailable.values())), extra=extra)
            await asyncio.sleep(pause)
            pause *= 2

    def _signing(self, wish: Wish, store: str, known: Signed) -> Callable[[], Signed]:
        begun = {
            p.upload_id: known.begun[p.upload_id] for p in wish.puts if p.upload_id in known.begun
        }
        life = timedelta(seconds=self._core.settings.grant_seconds)
        stores, clock = self._core.stores, self._core.clock
        return lambda: sign(wish, lambda: stores[store], life=life, now=clock(), begun=begun)

    async def _in_time(
        self, work: asyncio.Future[Signed], wish: Wish, seconds: float
    ) -> Signed | None:
        """None when the store takes longer; what it begins in the end is noted for the sweep."""
        await asyncio.wait({work}, timeout=seconds)
        if work.done():
            return work.result()
        if not work.cancel():
            self._keep(wish.shard, asyncio.ensure_future(self._note_late(work, wish)))
        return None

    async def _note_late(self, work: asyncio.Future[Signed], wish: Wish) -> None:
        await self._note_begun(wish, await work)

    async def _note_begun(self, wish: Wish, signed: Signed) -> bool:
        """Uploads in parts are in the records before an agent knows of them. False when the shard is lost."""
        if not signed.begun:
            return True
        sizes = {put.upload_id: put.size or 0 for put in wish.puts}
        sealed = {
            upload_id: seal_parts(self._secret_key, Begun(upload=upload, size=sizes[upload_id]))
            for upload_id, upload in signed.begun.items()
        }
        try:
            await self._core.patiently(lambda: self._note(wish, sealed), "grants")
        except ShardLost:
            log.warning(
                "lost the shard before the grants were noted",
                extra={"action": "mint-lost", "execution": wish.execution_id},
            )
            await self._abort(wish, signed)
            return False
        return True

    async def _note(self, wish: Wish, sealed: dict[str, bytes]) -> None:
        def change(writing: Writing) -> None:
            active = writing.find(wish.execution_id)
            if active is not None:
                uploads.keep_parts(writing.touch(active, t.grants), sealed)

        await self._core.transact(change)

    async def _abort(self, wish: Wish, signed: Signed) -> None:
        """Whoever has the shard now does not know of these."""
        for put in wish.puts:
            upload = signed.begun.get(put.upload_id)
            if upload is not None:
                abort = partial(self._core.stores[put.store].abort_parts, put.key, upload)
                await asyncio.wait({self._on_thread(put.store, abort)}, timeout=MINT_SECONDS)

    # -- registries --------------------------------------------------------------------------------------------
    async def _log_in(self, image: str, answer: _Answer) -> None:
        work = self._on_thread(REGISTRY, lambda: self._login_for(image))
        done, _ = await asyncio.wait({work}, timeout=MINT_SECONDS)
        try:
            if not done:
                raise ValohaiError(f"no token came within {MINT_SECONDS:.0f} s")
            answer.registry = work.result()
        except ValohaiError as error:
            answer.signed.refused[REGISTRY] = str(error)

    def _on_thread(self, name: str, call: Callable[[], T]) -> asyncio.Future[T]:
        threads = self._threads.get(name)
        if threads is None:
            threads = ThreadPoolExecutor(THREADS, thread_name_prefix=f"sign-{name}")
            self._threads[name] = threads
        return asyncio.get_running_loop().run_in_executor(threads, call)


async def _all_done(tasks: Iterable[asyncio.Future[None]]) -> None:
    await asyncio.wait(set(tasks))


def _tell_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("cannot grant: %r", error, exc_info=error, extra={"action": "fail"})
