"""Brings every input file of a job to `/valohai/inputs` before the first command (CONTRACT 5.2, 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from valohai_agent.cache import InputCache
from valohai_agent.protocol import InputReady, JobInput, Transfer
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


class InputFetcher:
    """Fetches inputs through the cache and says what it does on the status stream (I-31).

    `renew(file_ids)` asks the control plane for fresh grants (kind `input`) when one is missing or has expired.
    `progress(done, total)` counts bytes of the whole job and may be called from several threads.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        valohai_dir: str,
        transferer: Transferer,
        cache: InputCache | None,
        status: Callable[[str], None],
        on_ready: Callable[[InputReady], None],
        renew: Callable[[list[str]], Mapping[str, Transfer]] | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        no_cache: bool = False,
        parallel: int = 4,
    ) -> None:
        raise NotImplementedError

    def fetch(
        self,
        inputs: Sequence[JobInput],
        grants: Mapping[str, Transfer],
        refused: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Downloads everything that is not on-demand; gives the content of inputs.json (K-33, K-35).

        Raises InputError or TransferError, naming the input and the file, after trying all other files.
        """
        raise NotImplementedError
