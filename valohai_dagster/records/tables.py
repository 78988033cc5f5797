"""Tables of the records: what ran, on what, and what came of it.

They live in the same database as Dagster's storage (or in `records.db` of the state directory) under the prefix
`vh_`. Times are aware UTC. JSON columns hold what is only ever read whole.
"""

from __future__ import annotations

from datetime import datetime, timezone

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every backend (SQLite drops the offset)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r} would be stored in an unknown zone")
        return value.astimezone(timezone.utc) if value else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return (
            value.replace(tzinfo=timezone.utc)
            if value.tzinfo is None
            else value.astimezone(timezone.utc)
        )


def _id() -> sa.Column[str]:
    return sa.Column("id", sa.String(36), primary_key=True)


projects = sa.Table(
    "vh_projects",
    metadata,
    _id(),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("counter", sa.Integer, nullable=False, default=0),  # of its executions (T-05)
    sa.Column("ctime", UtcDateTime, nullable=False),
)

commits = sa.Table(
    "vh_commits",
    metadata,
    _id(),
    sa.Column("project_id", sa.String(36), sa.ForeignKey("vh_projects.id"), nullable=False),
    sa.Column("identifier", sa.String(80), nullable=False),  # git SHA, or ~ + sha256 (T-02, T-03)
    sa.Column("ref", sa.String(255)),
    sa.Column("adhoc", sa.Boolean, nullable=False),
    sa.Column("archive_store", sa.String(64), nullable=False),
    sa.Column("archive_key", sa.String(1024), nullable=False),
    sa.Column("archive_sha256", sa.String(64), nullable=False),
    sa.Column("archive_size", sa.BigInteger),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.Column("used_at", UtcDateTime),  # when a launch chose it last, before its first execution
    sa.UniqueConstraint("project_id", "identifier"),
)

executions = sa.Table(
    "vh_executions",
    metadata,
    _id(),
    sa.Column("project_id", sa.String(36), sa.ForeignKey("vh_projects.id"), nullable=False),
    sa.Column("counter", sa.Integer, nullable=False),
    sa.Column("step", sa.String(255), nullable=False),
    sa.Column("commit", sa.String(80), nullable=False),
    sa.Column("instance_id", sa.String(64)),  # Dagster instance that launched it
    sa.Column("run_id", sa.String(64), index=True),
    sa.Column("step_key", sa.String(512)),
    sa.Column("retry_number", sa.Integer, nullable=False, default=0),  # the user's own retries
    sa.Column("log_key", sa.String(512), index=True),  # Dagster compute-log key, joined with /
    sa.Column("asset_key", sa.String(512), index=True),
    sa.Column("shard", sa.Integer, nullable=False, default=0, server_default="0"),
    sa.Column("group_name", sa.String(255), nullable=False),
    sa.Column("environment", sa.String(255)),
    sa.Column("image", sa.String(512), nullable=False),
    sa.Column("title", sa.String(512)),
    sa.Column("tags", sa.JSON, nullable=False, default=list),
    sa.Column("spec", sa.JSON, nullable=False),  # ExecutionSpec as submitted
    sa.Column("job", sa.JSON),  # Job as queued; null while refused or not resolved
    sa.Column(
        "sources", sa.LargeBinary
    ),  # how to reach each input file, encrypted (may hold credentials)
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("status_detail", sa.Text),
    sa.Column("reason", sa.Text),  # why it ended the way it did, for people
    sa.Column("exit_code", sa.Integer),
    sa.Column("attempt", sa.Integer, nullable=False, default=1),  # infrastructure attempts
    sa.Column("cumulative_metadata", sa.JSON, nullable=False, default=dict),  # M-14
    sa.Column("interpolated_command", sa.Text),
    sa.Column("stop_requested", sa.Integer, nullable=False, default=0),  # 0 no, 1 soft, 2 hard
    sa.Column("priority", sa.Integer, nullable=False, default=0),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.Column("qtime", UtcDateTime),
    sa.Column("started_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    sa.Column(
        "phases", sa.JSON, nullable=False, default=list
    ),  # [{phase, started_at, ended_at}] of the last attempt
    sa.Column("usage", sa.JSON),
    sa.Column(
        "warnings", sa.JSON, nullable=False, default=list, server_default="[]"
    ),  # what came up while it ran; those from before are the job's notices
    sa.Column("restart_of", sa.String(36), index=True),  # the execution that was interrupted (L-32)
    sa.Column("restarts", sa.Integer, nullable=False, default=0, server_default="0"),
    sa.Column("price", sa.Numeric(12, 6)),  # L-40
    sa.Column("user_name", sa.String(255), index=True),  # who launched it, as its run's tags say
    sa.Column("team_name", sa.String(255)),
    sa.UniqueConstraint("project_id", "counter"),
    sa.Index(None, "shard", "status"),
)

runs = sa.Table(
    "vh_runs",  # runs that a conductor drives instead of a process of their own
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("instance_id", sa.String(64), nullable=False),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("handover", sa.JSON, nullable=False),  # what the launcher knew
    sa.Column("state", sa.String(16), nullable=False),  # driving, ended
    sa.Column("reason", sa.Text),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
    sa.Index(None, "shard", "state"),
)

shards = sa.Table(
    "vh_shards",  # who may write for a shard; a conductor that lost it finds another fence here
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("fence", sa.Integer, nullable=False, default=0),  # counts the conductors that had it
    sa.Column("holder", sa.String(255)),
    sa.Column("epoch", sa.String(64)),  # of the Redis that it was last served from
)

attempts = sa.Table(
    "vh_attempts",
    metadata,
    sa.Column("execution_id", sa.String(36), sa.ForeignKey("vh_executions.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(64)),
    sa.Column("worker", sa.String(255)),
    sa.Column("host", sa.String(255)),
    sa.Column("runtime", sa.String(32)),
    sa.Column("machine_id", sa.String(255)),
    sa.Column("agent_version", sa.String(64)),
    sa.Column("last_seq", sa.Integer, nullable=False, default=0),  # reports up to here are applied
    sa.Column("leased_at", UtcDateTime),
    sa.Column("suspected_at", UtcDateTime),
    sa.Column("reclaimed_at", UtcDateTime),  # by when its cloud has announced to take the machine
    sa.Column("ended_at", UtcDateTime),
    sa.Column("end", sa.String(32)),  # finished, lost, preempted
    sa.Column("reason", sa.Text),
    sa.Column(
        "logs", sa.JSON, nullable=False, default=dict
    ),  # stream -> {store, key, size, lines, complete}
)

grants = sa.Table(
    "vh_grants",  # every PUT that was ever granted; unaccepted ones are swept
    metadata,
    sa.Column("upload_id", sa.String(36), primary_key=True),
    sa.Column(
        "execution_id", sa.String(36), sa.ForeignKey("vh_executions.id"), nullable=False, index=True
    ),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),  # output, log
    sa.Column("name", sa.String(4096), nullable=False),
    sa.Column("store", sa.String(64), nullable=False),
    sa.Column("key", sa.String(4096), nullable=False),
    sa.Column("granted_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),  # of the last URL that was signed for it
    sa.Column("accepted", sa.Boolean, nullable=False, default=False),
    sa.Column("parts", sa.LargeBinary),  # upload in parts as its store knows it, encrypted
    sa.Column("swept_at", UtcDateTime),  # nothing of it is left in the store
    sa.Index(
        "ix_vh_grants_open",
        "expires_at",
        sqlite_where=sa.text("accepted = 0 AND swept_at IS NULL"),
        postgresql_where=sa.text("NOT accepted AND swept_at IS NULL"),
    ),
)

uploads = sa.Table(
    "vh_uploads",  # objects that the control plane writes or removes itself, until that is done
    metadata,
    sa.Column("upload_id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),  # datum, log, code
    sa.Column("name", sa.String(4096), nullable=False),
    sa.Column("execution_id", sa.String(36)),  # whose log it is
    sa.Column("attempt", sa.Integer),
    sa.Column("store", sa.String(64), nullable=False),
    sa.Column("key", sa.String(4096), nullable=False),
    sa.Column("begun_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),  # put off while it goes on
    sa.Column("parts", sa.LargeBinary),  # upload in parts as its store knows it, encrypted
    sa.Column(  # it is being removed: nobody may record it any more
        "given_up", sa.Boolean, nullable=False, default=False, server_default=sa.false()
    ),
)

execution_inputs = sa.Table(
    "vh_execution_inputs",  # which file went into which execution (I-32, lineage)
    metadata,
    sa.Column("execution_id", sa.String(36), sa.ForeignKey("vh_executions.id"), primary_key=True),
    sa.Column("file_id", sa.String(255), primary_key=True),
    sa.Column("input", sa.String(255), nullable=False),
    sa.Column("name", sa.String(4096), nullable=False),
    sa.Column("uri", sa.String(4096), nullable=False),
    sa.Column("datum_id", sa.String(36), index=True),
    sa.Column("size", sa.BigInteger),
    sa.Column("md5", sa.String(32)),
    sa.Column("sha1", sa.String(40)),
    sa.Column("sha256", sa.String(64)),
    sa.Column("cached", sa.Boolean),
    sa.Column("version", sa.String(255)),  # what the source called this content: ETag, generation
    sa.Column("asked", sa.String(4096)),  # the URI that it was found by: an alias, a wildcard
)

outside_files = sa.Table(
    "vh_outside_files",  # what the URIs of files that are no datums held at their last use (I-32)
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),  # sha256 of the URI, which may be long
    sa.Column("uri", sa.String(4096), nullable=False),
    sa.Column("version", sa.String(255)),
    sa.Column("sha256", sa.String(64)),
    sa.Column("size", sa.BigInteger),
    sa.Column("execution_id", sa.String(36), nullable=False),  # that found this content
    sa.Column("mtime", UtcDateTime, nullable=False),
)

metadata_events = sa.Table(
    "vh_metadata",  # metadata lines (metrics) in order
    metadata,
    sa.Column("execution_id", sa.String(36), sa.ForeignKey("vh_executions.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("values", sa.JSON, nullable=False),
)

datums = sa.Table(
    "vh_datums",
    metadata,
    _id(),
    sa.Column("name", sa.String(4096), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("md5", sa.String(32)),
    sa.Column("sha1", sa.String(40)),
    sa.Column("sha256", sa.String(64), index=True),
    sa.Column("store", sa.String(64), nullable=False),
    sa.Column("key", sa.String(4096), nullable=False),
    sa.Column("project_id", sa.String(36), index=True),
    sa.Column("execution_id", sa.String(36), index=True),  # that made it; null for uploads
    sa.Column(  # made by a lost attempt: its execution's file, but none of its outputs
        "withdrawn", sa.Boolean, nullable=False, default=False, server_default=sa.false()
    ),
    sa.Column("tags", sa.JSON, nullable=False, default=list),
    sa.Column("metadata", sa.JSON, nullable=False, default=dict),
    sa.Column("properties", sa.JSON, nullable=False, default=dict, server_default="{}"),  # O-24
    sa.Column("adopted", sa.Boolean, nullable=False, default=False, server_default=sa.false()),
    sa.Column(
        "version", sa.String(255)
    ),  # what the store called an adopted content: ETag, generation
    sa.Column("live", sa.Boolean, nullable=False, default=False),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.Column("file_ctime", UtcDateTime),
    sa.Column("file_mtime", UtcDateTime),
    sa.Column("purged", sa.Boolean, nullable=False, default=False),
    sa.Column("purged_at", UtcDateTime),
    sa.Index(
        "ix_vh_datums_key", "key", postgresql_using="hash"
    ),  # keys may be too long for a btree
)

datum_aliases = sa.Table(
    "vh_datum_aliases",
    metadata,
    sa.Column("project_id", sa.String(36), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("datum_id", sa.String(36), sa.ForeignKey("vh_datums.id"), nullable=False),
    sa.Column("history", sa.JSON, nullable=False, default=list),  # [{datum_id, time}] oldest first
    sa.Column("mtime", UtcDateTime, nullable=False),
)

datasets = sa.Table(
    "vh_datasets",  # named containers of files within a project (T-16)
    metadata,
    _id(),
    sa.Column("project_id", sa.String(36), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("properties", sa.JSON, nullable=False, default=dict),
    sa.Column(  # new versions are packed (O-23)
        "packaging", sa.Boolean, nullable=False, default=False, server_default=sa.false()
    ),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.UniqueConstraint("project_id", "name"),
)

dataset_versions = sa.Table(
    "vh_dataset_versions",
    metadata,
    _id(),
    sa.Column("dataset_id", sa.String(36), sa.ForeignKey("vh_datasets.id"), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # open while its execution runs, then closed
    sa.Column("execution_id", sa.String(36), index=True),  # that made it; null for people's own
    sa.Column("base_id", sa.String(36)),  # the version whose files it carries over (`from`)
    sa.Column(
        "wish", sa.JSON, nullable=False, default=dict
    ),  # exclude, aliases: applied at the end
    sa.Column("tags", sa.JSON, nullable=False, default=list),
    sa.Column("properties", sa.JSON, nullable=False, default=dict),
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.Column("closed_at", UtcDateTime),
    sa.UniqueConstraint("dataset_id", "name"),
)

dataset_files = sa.Table(
    "vh_dataset_files",
    metadata,
    sa.Column(
        "version_id", sa.String(36), sa.ForeignKey("vh_dataset_versions.id"), primary_key=True
    ),
    sa.Column("datum_id", sa.String(36), sa.ForeignKey("vh_datums.id"), primary_key=True),
    sa.Column("package_id", sa.String(36)),  # of this version, which has it too
    sa.Index(None, "datum_id"),
)

packagings = sa.Table(
    "vh_packagings",  # versions of datasets that are, or are to be, in packages (O-23)
    metadata,
    sa.Column(
        "version_id", sa.String(36), sa.ForeignKey("vh_dataset_versions.id"), primary_key=True
    ),
    sa.Column("state", sa.String(16), nullable=False, index=True),  # wanted, made, failed, dropped
    sa.Column("problem", sa.Text),  # why it is not made, for people
    sa.Column("holder", sa.String(36)),  # who is at it, until `due`
    sa.Column("due", UtcDateTime, nullable=False),  # not to be taken before
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("ctime", UtcDateTime, nullable=False),
)

packages = sa.Table(
    "vh_packages",  # stored ones; those that are being written or removed are in `uploads`
    metadata,
    _id(),
    sa.Column(
        "version_id",
        sa.String(36),
        sa.ForeignKey("vh_dataset_versions.id"),
        nullable=False,
        index=True,
    ),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("store", sa.String(64), nullable=False),
    sa.Column("key", sa.String(1024), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("files", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("ctime", UtcDateTime, nullable=False),
)

dataset_aliases = sa.Table(
    "vh_dataset_aliases",
    metadata,
    sa.Column("dataset_id", sa.String(36), sa.ForeignKey("vh_datasets.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("version_id", sa.String(36), sa.ForeignKey("vh_dataset_versions.id"), nullable=False),
    sa.Column(
        "history", sa.JSON, nullable=False, default=list
    ),  # [{version_id, time}] oldest first
    sa.Column("mtime", UtcDateTime, nullable=False),
)

models = sa.Table(
    "vh_models",  # registry of models within a project (T-17)
    metadata,
    _id(),
    sa.Column("project_id", sa.String(36), nullable=False),
    sa.Column("slug", sa.String(255), nullable=False),
    sa.Column("counter", sa.Integer, nullable=False, default=0),  # of its versions
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.UniqueConstraint("project_id", "slug"),
)

model_versions = sa.Table(
    "vh_model_versions",
    metadata,
    _id(),
    sa.Column("model_id", sa.String(36), sa.ForeignKey("vh_models.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # creating, pending, approved, rejected
    sa.Column("execution_id", sa.String(36), index=True),
    sa.Column("tags", sa.JSON, nullable=False, default=list),
    sa.Column("release_note", sa.Text),
    sa.Column("history", sa.JSON, nullable=False, default=list),  # [{status, time}] oldest first
    sa.Column("ctime", UtcDateTime, nullable=False),
    sa.UniqueConstraint("model_id", "number"),
)

model_files = sa.Table(
    "vh_model_files",
    metadata,
    sa.Column("version_id", sa.String(36), sa.ForeignKey("vh_model_versions.id"), primary_key=True),
    sa.Column("datum_id", sa.String(36), sa.ForeignKey("vh_datums.id"), primary_key=True),
    sa.Index(None, "datum_id"),
)

secrets = sa.Table(
    "vh_secrets",
    metadata,
    sa.Column("group_name", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),  # encrypted with the deployment's key
    sa.Column("secret", sa.Boolean, nullable=False, default=True),
    sa.Column("mtime", UtcDateTime, nullable=False),
)

facts = sa.Table(
    "vh_facts",  # single values of the deployment, such as its id
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
)
