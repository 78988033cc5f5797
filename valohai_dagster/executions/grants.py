"""Mints grants: signed URLs and secrets for the one agent that holds a lease.

Nothing here is stored or queued in the clear. Every PUT names a fresh key (O-02) that is recorded first, so that
an object nobody reported can be swept; grants are sealed to the lease's ephemeral public key.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from nacl.public import PublicKey, SealedBox

from valohai_agent.protocol import GrantRequest, Grants, Job, Transfer, UploadGrant
from valohai_dagster.data.resolve import Source
from valohai_dagster.data.secrets import SecretKey, variable_groups, variables_of_groups
from valohai_dagster.errors import StoreError
from valohai_dagster.executions.memory import Active, Details
from valohai_dagster.executions.registries import login_for
from valohai_dagster.executions.writing import Writing
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores


class GrantMinter:
    def __init__(self, settings: Settings, stores: Stores, secret_key: SecretKey) -> None:
        self._settings = settings
        self._stores = stores
        self._secret_key = secret_key

    @property
    def _life(self) -> timedelta:
        return timedelta(seconds=self._settings.grant_seconds)

    def initial(self, writing: Writing, details: Details) -> Grants:
        """What every execution needs at its start; pushed unasked once it is leased."""
        commit, inputs = details.spec["commit"], details.job["inputs"]
        grants = self._inputs(
            details, [f["id"] for i in inputs if i["download"] == "always" for f in i["files"]]
        )
        refused = dict(grants.refused)
        archive = self._get(commit["archive_store"], commit["archive_key"], "archive", refused)
        return grants.model_copy(
            update={
                "initial": True,
                "archive": archive,
                "secrets": self._secrets(writing, details),
                "registry": login_for(details.image, self._settings.registries),
                "refused": refused,
            }
        )

    def requested(
        self,
        writing: Writing,
        active: Active,
        requests: Sequence[GrantRequest],
    ) -> Grants:
        """Answers one `grants-wanted`; what cannot be granted is refused with the reason."""
        details = writing.details(active.id)
        uploads: dict[str, UploadGrant] = {}
        refused: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        for request in requests:
            if request.kind == "input":
                continue
            try:
                row, transfer = self._upload(writing, active, details, request)
                rows.append(row)
                uploads[request.id] = UploadGrant(upload_id=row["upload_id"], transfer=transfer)
            except StoreError as error:
                refused[request.id] = str(error)
        if rows:
            writing.add_grants(active, rows)
        inputs = self._inputs(details, [r.name for r in requests if r.kind == "input"])
        return Grants(inputs=inputs.inputs, uploads=uploads, refused={**refused, **inputs.refused})

    def _upload(
        self, writing: Writing, active: Active, details: Details, request: GrantRequest
    ) -> tuple[dict[str, Any], Transfer]:
        upload_id = str(uuid.uuid4())
        store_name = self._store_for(details, request.kind)
        key = _fresh_key(details, active.attempt, request, upload_id)
        transfer = self._stores[store_name].sign_put(key, expires=self._life, size=request.size)
        row = {
            "upload_id": upload_id,
            "execution_id": active.id,
            "attempt": active.attempt,
            "kind": request.kind,
            "name": request.name,
            "store": store_name,
            "key": key,
            "granted_at": writing.now,
            "accepted": False,
        }
        return row, transfer

    def _store_for(self, details: Details, kind: str) -> str:
        """O-15: launch choice, then the step's `upload-store`, then the default store."""
        if kind == "log":
            return self._settings.log_store_name
        return details.spec.get("upload_store") or self._settings.default_store

    def _inputs(self, details: Details, file_ids: Sequence[str]) -> Grants:
        transfers: dict[str, Transfer] = {}
        refused: dict[str, str] = {}
        sources = self.open_sources(details) if file_ids else {}
        for file_id in file_ids:
            source = sources.get(file_id)
            if source is None:
                refused[file_id] = f"the execution has no input file {file_id!r}"
            elif source.url is not None:
                transfers[file_id] = Transfer(url=source.url)
            else:
                transfer = self._get(source.store or "", source.key or "", file_id, refused)
                if transfer is not None:
                    transfers[file_id] = transfer
        return Grants(inputs=transfers, refused=refused)

    def _get(self, store: str, key: str, name: str, refused: dict[str, str]) -> Transfer | None:
        try:
            return self._stores[store].sign_get(key, expires=self._life)
        except StoreError as error:
            refused[name] = str(error)
            return None

    def _secrets(self, writing: Writing, details: Details) -> dict[str, str]:
        wanted = set(details.job["secret_names"])
        if not wanted:
            return {}
        spec = details.spec
        groups = variable_groups(spec["environment_variable_groups"], spec["project"]["name"])
        variables = variables_of_groups(writing.conn, groups, self._secret_key)
        return {v.name: v.value for v in variables if v.name in wanted}

    def seal_sources(self, sources: dict[str, Source]) -> bytes:
        """How to reach the inputs, encrypted for the records: URLs may hold credentials."""
        return self._secret_key.encrypt_json(
            {k: v.model_dump(mode="json") for k, v in sources.items()}
        )

    def open_sources(self, details: Details) -> dict[str, Source]:
        if not details.sources:
            return {}
        content = self._secret_key.decrypt_json(details.sources)
        return {k: Source.model_validate(v) for k, v in content.items()}


def seal(grants: Grants, public_key: str) -> bytes:
    """Readable only by the holder of the lease's private key; `public_key` is hex."""
    return SealedBox(PublicKey(bytes.fromhex(public_key))).encrypt(
        grants.model_dump_json().encode()
    )


def _fresh_key(details: Details, attempt: int, request: GrantRequest, upload_id: str) -> str:
    """A key that no other upload can have (O-02). The name is kept only as far as it is harmless in a key."""
    if request.kind == "log":
        return f"logs/{details.project_id}/{details.id}/{attempt}/{upload_id}/{request.name}"
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in request.name.rsplit("/", 1)[-1])
    return f"data/{details.project_id}/{details.id}/{upload_id}/{name.strip('.')[-100:] or 'file'}"


def job_of(details: Details, active: Active) -> Job:
    """The job as the execution's present attempt has it."""
    now = {"attempt": active.attempt, "shard": active.shard}
    return Job.model_validate({**details.job, **now})
