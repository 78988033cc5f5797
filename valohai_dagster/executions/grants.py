"""Plans grants: what the one agent that holds a lease may read and write, and the secrets that it gets.

Runs inside the transaction that applies the agent's report and touches no network. Every upload gets a fresh key
(O-02) that is recorded first, so that an object nobody reported can be swept. What is signed, and when, is in
`minting`; grants are sealed to the lease's ephemeral public key, so nothing of them is stored in the clear.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from nacl.public import PublicKey, SealedBox

from valohai_agent.protocol import (
    GRANTED_PARTS,
    GrantRequest,
    Grants,
    Job,
    Transfer,
)
from valohai_dagster.data.packages import usable as usable_packages
from valohai_dagster.data.resolve import Source
from valohai_dagster.data.secrets import SecretKey, variable_groups, variables_of_groups
from valohai_dagster.errors import RefusedError
from valohai_dagster.executions import uploads
from valohai_dagster.executions.memory import Active, Details
from valohai_dagster.executions.parted import open_parts
from valohai_dagster.executions.reach import out_of_reach
from valohai_dagster.executions.wishes import Get, MoreParts, Put, Wish
from valohai_dagster.executions.writing import Writing
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

INITIAL_FILES = 2_000  # input files that are granted unasked; agents ask for what is missing
MAX_NAME_CHARACTERS = 4096  # what the records hold
LOG_NAMES = ("stdout", "stderr", "events")


@dataclass(frozen=True, kw_only=True)
class Lessee:
    """Who gets the grants: the lease as Redis has it."""

    token: str = field(repr=False)
    public_key: str
    uses_images: bool = True


class GrantPlanner:
    """On the records' thread. `busy` tells what of a lease's requests is being minted already, by token and id."""

    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        secret_key: SecretKey,
        busy: Callable[[str, str], bool] = lambda token, name: False,
    ) -> None:
        self._settings = settings
        self._stores = stores
        self._secret_key = secret_key
        self._busy = busy

    @property
    def _life(self) -> timedelta:
        return timedelta(seconds=self._settings.grant_seconds)

    def initial(self, writing: Writing, active: Active, to: Lessee) -> Wish | None:
        """What every execution needs at its start; pushed unasked once it is leased."""
        if self._busy(to.token, "*"):
            return None
        details = writing.details(active.id)
        commit, inputs = details.spec["commit"], details.job["inputs"]
        packages = details.job.get("packages", [])
        packed = {file_id for package in packages for file_id in package["files"]}
        wanted = [package["id"] for package in packages]  # whose files are asked for if need be
        always = (f["id"] for i in inputs if i["download"] == "always" for f in i["files"])
        wanted += [file_id for file_id in always if file_id not in packed]
        gets, urls, refused = self._inputs(writing, active, details, wanted[:INITIAL_FILES])
        archive = Get(name="archive", store=commit["archive_store"], key=commit["archive_key"])
        self._sort_out(active, archive, gets, refused)
        return Wish(
            **_addressed(active, to),
            initial=True,
            image=details.image if to.uses_images else None,
            secrets=self._secrets(writing, details),
            gets=tuple(gets),
            urls=urls,
            refused=refused,
        )

    def requested(
        self, writing: Writing, active: Active, requests: Sequence[GrantRequest], to: Lessee
    ) -> Wish | None:
        """Answers one `grants-wanted`; what cannot be granted is refused with the reason."""
        details = writing.details(active.id)
        puts: list[Put] = []
        rows: list[dict[str, Any]] = []
        more: list[MoreParts] = []
        refused: dict[str, str] = {}
        files: list[str] = []
        for request in requests:
            place = request.name if request.kind == "input" else request.id
            if self._busy(to.token, place):
                continue
            try:
                if request.kind == "input":
                    files.append(request.name)
                elif request.kind == "parts":
                    more.append(self._more_parts(writing, active, request))
                else:
                    puts.append(put := self._put(active, details, request))
                    rows.append(self._row(writing, active, request, put))
            except RefusedError as error:
                refused[place] = str(error)
        if rows:
            writing.add_grants(active, rows)
        gets, urls, refused_files = self._inputs(writing, active, details, files)
        answers = {**refused, **refused_files}
        if not (puts or more or gets or urls or answers):
            return None
        return Wish(
            **_addressed(active, to),
            puts=tuple(puts),
            more=tuple(more),
            gets=tuple(gets),
            urls=urls,
            refused=answers,
        )

    # -- uploads -----------------------------------------------------------------------------------------------
    def _put(self, active: Active, details: Details, request: GrantRequest) -> Put:
        if request.size is not None and request.size < 0:
            raise RefusedError(f"{request.name[:200]!r} cannot have {request.size} bytes")
        if not request.name or len(request.name) > MAX_NAME_CHARACTERS:
            raise RefusedError(
                f"a file name has 1 to {MAX_NAME_CHARACTERS} characters, this has {len(request.name)}"
            )
        if request.kind == "log" and request.name not in LOG_NAMES:
            raise RefusedError(f"a log is one of {', '.join(LOG_NAMES)}")
        store = self._store_for(details, request.kind)
        self._require_reach(active, store)
        upload_id = str(uuid.uuid4())
        return Put(
            request_id=request.id,
            upload_id=upload_id,
            store=store,
            key=_fresh_key(details, active.attempt, request, upload_id),
            size=request.size,
        )

    def _row(
        self, writing: Writing, active: Active, request: GrantRequest, put: Put
    ) -> dict[str, Any]:
        return {
            "upload_id": put.upload_id,
            "execution_id": active.id,
            "attempt": active.attempt,
            "kind": request.kind,
            "name": request.name,
            "store": put.store,
            "key": put.key,
            "granted_at": writing.now,
            "expires_at": writing.now + self._life,
            "accepted": False,
        }

    def _more_parts(self, writing: Writing, active: Active, request: GrantRequest) -> MoreParts:
        """Only for what this very attempt began and nobody has accepted or swept."""
        writing.flush()  # an acceptance may be in the same batch
        conn = writing.touch(active)
        found = uploads.unfinished(conn, active, request.name)
        if found is None or found.parts is None:
            raise RefusedError(
                f"there is no unfinished upload in parts {request.name[:40]!r} of this attempt"
            )
        known = open_parts(self._secret_key, found.parts)
        last = request.first + min(request.count, GRANTED_PARTS) - 1
        if request.first < 1 or request.count < 0 or last > known.number:
            raise RefusedError(
                f"the upload has the parts 1 to {known.number}, not {request.first} to {last}"
            )
        uploads.prolong(conn, request.name, writing.now + self._life)
        return MoreParts(
            request_id=request.id,
            upload_id=request.name,
            store=found.store,
            key=found.key,
            upload=known.upload,
            size=known.size,
            numbers=range(request.first, last + 1),
        )

    def _store_for(self, details: Details, kind: str) -> str:
        """O-15: what the spec names (by launch, step or project, see `build_spec`), then the default store."""
        if kind == "log":
            return self._settings.log_store_name
        return details.spec.get("upload_store") or self._settings.default_store

    # -- inputs ------------------------------------------------------------------------------------------------
    def _inputs(
        self, writing: Writing, active: Active, details: Details, file_ids: Sequence[str]
    ) -> tuple[list[Get], dict[str, Transfer], dict[str, str]]:
        gets: list[Get] = []
        urls: dict[str, Transfer] = {}
        refused: dict[str, str] = {}
        sources = self.open_sources(details) if file_ids else {}
        asked = [s.package for i in file_ids if (s := sources.get(i)) is not None and s.package]
        usable = usable_packages(writing.conn, asked) if asked else ()
        for file_id in file_ids:
            source = sources.get(file_id)
            if source is None:
                refused[file_id] = f"the execution has no input file {file_id!r}"
            elif source.package is not None and source.package not in usable:
                refused[file_id] = "the package was given up since the execution was created"
            elif source.url is not None:
                urls[file_id] = Transfer(url=source.url)
            else:
                get = Get(name=file_id, store=source.store or "", key=source.key or "")
                self._sort_out(active, get, gets, refused)
        return gets, urls, refused

    def _sort_out(self, active: Active, get: Get, gets: list[Get], refused: dict[str, str]) -> None:
        try:
            self._require_reach(active, get.store)
        except RefusedError as error:
            refused[get.name] = str(error)
        else:
            gets.append(get)

    def _require_reach(self, active: Active, store: str) -> None:
        """Settings may have changed since the execution was submitted."""
        group = self._settings.groups.get(active.group)
        if store in self._stores and group is not None:
            why = out_of_reach(store, self._stores, active.group, group)
            if why is not None:
                raise RefusedError(why)

    # -- secrets -----------------------------------------------------------------------------------------------
    def _secrets(self, writing: Writing, details: Details) -> dict[str, str]:
        wanted = set(details.job["secret_names"])
        if not wanted:
            return {}
        spec = details.spec
        groups = variable_groups(spec["environment_variable_groups"], spec["project"]["name"])
        variables = variables_of_groups(writing.conn, groups, self._secret_key)
        return {v.name: v.value for v in variables if v.name in wanted}

    def seal_sources(self, sources: Mapping[str, Source]) -> bytes:
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


def _addressed(active: Active, to: Lessee) -> dict[str, Any]:
    return {
        "execution_id": active.id,
        "group": active.group,
        "shard": active.shard,
        "token": to.token,
        "public_key": to.public_key,
    }


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
