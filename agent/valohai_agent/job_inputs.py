"""The inputs of one job, through the caches of its worker; undone when the job is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from valohai_agent.cache.local import InputCache
from valohai_agent.cache.shared import Share, ShareTree
from valohai_agent.config_files import switch
from valohai_agent.inputs import InputFetcher, InputOptions
from valohai_agent.lease import Lease
from valohai_agent.protocol import Grants, Phase, PhaseChanged
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


class JobInputs:
    """`fetch` before the command, `close` once nothing reads them any more."""

    def __init__(self, lease: Lease, cache: InputCache | None, share: Share | None) -> None:
        self._lease, self._cache, self._share = lease, cache, share
        self._tree: ShareTree | None = None

    def fetch(
        self,
        workspace: Workspace,
        grants: Grants,
        *,
        transferer: Transferer,
        environment: Mapping[str, str],
        valohai_dir: str,
        status: Callable[[str], None],
        warn: Callable[[str], None],
        progress: Callable[[int, int | None], None],
        cancelled: threading.Event,
    ) -> dict[str, Any]:
        """Gives the content of inputs.json. Only where the command sees its inputs read-only it gets links to what
        others use too, in the cache or on the share."""
        lease, share, readonly = self._lease, self._share, valohai_dir == "/valohai"
        options = InputOptions(
            cache=self._cache,
            share=share,
            tree=self._tree_on if readonly and share is not None and not share.copy else None,
            link=readonly,
            no_cache=switch(environment, "VH_NO_DATA_CACHE"),
            batches=lease.job.batches,
            cancelled=cancelled,
        )
        fetcher = InputFetcher(
            workspace,
            valohai_dir=valohai_dir,
            transferer=transferer,
            options=options,
            status=status,
            warn=warn,
            on_ready=lease.report,
            renew=lambda file_ids: lease.input_grants(file_ids).inputs,
            progress=progress,
        )
        job = lease.job
        described = fetcher.fetch(job.inputs, grants.inputs, grants.refused, job.packages)
        if fetcher.words is not None:  # one line in the run's events
            lease.report(PhaseChanged(phase=Phase.downloading, message=fetcher.words))
        return described

    def clear(self) -> int:
        """VH_CLEAN: everything that nobody uses goes; gives the bytes (K-22)."""
        return self._cache.clear() if self._cache else 0

    def close(self) -> None:
        if self._tree is not None:
            self._tree.close()

    def _tree_on(self, share: Share) -> ShareTree:
        self._tree = share.tree()
        return self._tree
