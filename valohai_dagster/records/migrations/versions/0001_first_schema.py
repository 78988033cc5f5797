"""The first schema: projects, commits, executions with attempts, files, secrets, facts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _datums()
    _facts()
    _projects()
    _secrets()
    _commits()
    _datum_aliases()
    _executions()
    _attempts()
    _execution_inputs()
    _grants()
    _metadata()


def _datums() -> None:
    op.create_table(
        "vh_datums",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=4096), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("md5", sa.String(length=32), nullable=True),
        sa.Column("sha1", sa.String(length=40), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("store", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=4096), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=True),
        sa.Column("execution_id", sa.String(length=36), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.Column("file_ctime", sa.DateTime(timezone=True), nullable=True),
        sa.Column("file_mtime", sa.DateTime(timezone=True), nullable=True),
        sa.Column("purged", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_datums")),
    )
    op.create_index(op.f("ix_vh_datums_execution_id"), "vh_datums", ["execution_id"], unique=False)
    op.create_index(op.f("ix_vh_datums_project_id"), "vh_datums", ["project_id"], unique=False)
    op.create_index(op.f("ix_vh_datums_sha256"), "vh_datums", ["sha256"], unique=False)


def _facts() -> None:
    op.create_table(
        "vh_facts",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_vh_facts")),
    )


def _projects() -> None:
    op.create_table(
        "vh_projects",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("counter", sa.Integer(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_vh_projects_name")),
    )


def _secrets() -> None:
    op.create_table(
        "vh_secrets",
        sa.Column("group_name", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("secret", sa.Boolean(), nullable=False),
        sa.Column("mtime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("group_name", "name", name=op.f("pk_vh_secrets")),
    )


def _commits() -> None:
    op.create_table(
        "vh_commits",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("identifier", sa.String(length=80), nullable=False),
        sa.Column("ref", sa.String(length=255), nullable=True),
        sa.Column("adhoc", sa.Boolean(), nullable=False),
        sa.Column("archive_store", sa.String(length=64), nullable=False),
        sa.Column("archive_key", sa.String(length=1024), nullable=False),
        sa.Column("archive_sha256", sa.String(length=64), nullable=False),
        sa.Column("archive_size", sa.BigInteger(), nullable=True),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["vh_projects.id"],
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_commits")),
        sa.UniqueConstraint(
            "project_id", "identifier", name=op.f("uq_vh_commits_project_id_identifier")
        ),
    )


def _datum_aliases() -> None:
    op.create_table(
        "vh_datum_aliases",
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("datum_id", sa.String(length=36), nullable=False),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.Column("mtime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["datum_id"],
            ["vh_datums.id"],
        ),
        sa.PrimaryKeyConstraint("project_id", "name", name=op.f("pk_vh_datum_aliases")),
    )


def _executions() -> None:
    op.create_table(
        "vh_executions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("counter", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(length=255), nullable=False),
        sa.Column("commit", sa.String(length=80), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=True),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("step_key", sa.String(length=512), nullable=True),
        sa.Column("retry_number", sa.Integer(), nullable=False),
        sa.Column("log_key", sa.String(length=512), nullable=True),
        sa.Column("asset_key", sa.String(length=512), nullable=True),
        sa.Column("group_name", sa.String(length=255), nullable=False),
        sa.Column("environment", sa.String(length=255), nullable=True),
        sa.Column("image", sa.String(length=512), nullable=False),
        sa.Column("title", sa.String(length=512), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("job", sa.JSON(), nullable=True),
        sa.Column("sources", sa.LargeBinary(), nullable=True),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("status_detail", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("cumulative_metadata", sa.JSON(), nullable=False),
        sa.Column("interpolated_command", sa.Text(), nullable=True),
        sa.Column("stop_requested", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.Column("qtime", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("phases", sa.JSON(), nullable=False),
        sa.Column("usage", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["vh_projects.id"],
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_executions")),
        sa.UniqueConstraint(
            "project_id", "counter", name=op.f("uq_vh_executions_project_id_counter")
        ),
    )
    op.create_index(
        op.f("ix_vh_executions_asset_key"), "vh_executions", ["asset_key"], unique=False
    )
    op.create_index(op.f("ix_vh_executions_log_key"), "vh_executions", ["log_key"], unique=False)
    op.create_index(op.f("ix_vh_executions_run_id"), "vh_executions", ["run_id"], unique=False)
    op.create_index(op.f("ix_vh_executions_status"), "vh_executions", ["status"], unique=False)


def _attempts() -> None:
    op.create_table(
        "vh_attempts",
        sa.Column("execution_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=True),
        sa.Column("worker", sa.String(length=255), nullable=True),
        sa.Column("host", sa.String(length=255), nullable=True),
        sa.Column("runtime", sa.String(length=32), nullable=True),
        sa.Column("machine_id", sa.String(length=255), nullable=True),
        sa.Column("agent_version", sa.String(length=64), nullable=True),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("leased_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("suspected_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end", sa.String(length=32), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("logs", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["execution_id"],
            ["vh_executions.id"],
        ),
        sa.PrimaryKeyConstraint("execution_id", "number", name=op.f("pk_vh_attempts")),
    )


def _execution_inputs() -> None:
    op.create_table(
        "vh_execution_inputs",
        sa.Column("execution_id", sa.String(length=36), nullable=False),
        sa.Column("file_id", sa.String(length=255), nullable=False),
        sa.Column("input", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=4096), nullable=False),
        sa.Column("uri", sa.String(length=4096), nullable=False),
        sa.Column("datum_id", sa.String(length=36), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("md5", sa.String(length=32), nullable=True),
        sa.Column("sha1", sa.String(length=40), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("cached", sa.Boolean(), nullable=True),
        sa.ForeignKeyConstraint(
            ["execution_id"],
            ["vh_executions.id"],
        ),
        sa.PrimaryKeyConstraint("execution_id", "file_id", name=op.f("pk_vh_execution_inputs")),
    )
    op.create_index(
        op.f("ix_vh_execution_inputs_datum_id"), "vh_execution_inputs", ["datum_id"], unique=False
    )


def _grants() -> None:
    op.create_table(
        "vh_grants",
        sa.Column("upload_id", sa.String(length=36), nullable=False),
        sa.Column("execution_id", sa.String(length=36), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=4096), nullable=False),
        sa.Column("store", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=4096), nullable=False),
        sa.Column("granted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["execution_id"],
            ["vh_executions.id"],
        ),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_vh_grants")),
    )
    op.create_index(op.f("ix_vh_grants_execution_id"), "vh_grants", ["execution_id"], unique=False)


def _metadata() -> None:
    op.create_table(
        "vh_metadata",
        sa.Column("execution_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["execution_id"],
            ["vh_executions.id"],
        ),
        sa.PrimaryKeyConstraint("execution_id", "number", name=op.f("pk_vh_metadata")),
    )
