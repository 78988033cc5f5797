"""Datasets and models, uploads in parts, what is known of adopted and purged files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    _datasets()
    _dataset_contents()
    _models()
    _outside_files()
    _columns()


def _datasets() -> None:
    op.create_table(
        "vh_datasets",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("properties", sa.JSON(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_datasets")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_vh_datasets_project_id_name")),
    )
    op.create_table(
        "vh_dataset_versions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("dataset_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("execution_id", sa.String(length=36), nullable=True),
        sa.Column("base_id", sa.String(length=36), nullable=True),
        sa.Column("wish", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("properties", sa.JSON(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["vh_datasets.id"],
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_dataset_versions")),
        sa.UniqueConstraint(
            "dataset_id", "name", name=op.f("uq_vh_dataset_versions_dataset_id_name")
        ),
    )
    op.create_index(
        op.f("ix_vh_dataset_versions_execution_id"),
        "vh_dataset_versions",
        ["execution_id"],
        unique=False,
    )


def _dataset_contents() -> None:
    op.create_table(
        "vh_dataset_aliases",
        sa.Column("dataset_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("version_id", sa.String(length=36), nullable=False),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.Column("mtime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["vh_datasets.id"],
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["vh_dataset_versions.id"],
        ),
        sa.PrimaryKeyConstraint("dataset_id", "name", name=op.f("pk_vh_dataset_aliases")),
    )
    op.create_table(
        "vh_dataset_files",
        sa.Column("version_id", sa.String(length=36), nullable=False),
        sa.Column("datum_id", sa.String(length=36), nullable=False),
        sa.ForeignKeyConstraint(
            ["datum_id"],
            ["vh_datums.id"],
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["vh_dataset_versions.id"],
        ),
        sa.PrimaryKeyConstraint("version_id", "datum_id", name=op.f("pk_vh_dataset_files")),
    )
    op.create_index(
        op.f("ix_vh_dataset_files_datum_id"), "vh_dataset_files", ["datum_id"], unique=False
    )


def _models() -> None:
    op.create_table(
        "vh_models",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("slug", sa.String(length=255), nullable=False),
        sa.Column("counter", sa.Integer(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_models")),
        sa.UniqueConstraint("project_id", "slug", name=op.f("uq_vh_models_project_id_slug")),
    )
    op.create_table(
        "vh_model_versions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("model_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("execution_id", sa.String(length=36), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("release_note", sa.Text(), nullable=True),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"],
            ["vh_models.id"],
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_model_versions")),
        sa.UniqueConstraint(
            "model_id", "number", name=op.f("uq_vh_model_versions_model_id_number")
        ),
    )
    op.create_index(
        op.f("ix_vh_model_versions_execution_id"),
        "vh_model_versions",
        ["execution_id"],
        unique=False,
    )
    op.create_table(
        "vh_model_files",
        sa.Column("version_id", sa.String(length=36), nullable=False),
        sa.Column("datum_id", sa.String(length=36), nullable=False),
        sa.ForeignKeyConstraint(
            ["datum_id"],
            ["vh_datums.id"],
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["vh_model_versions.id"],
        ),
        sa.PrimaryKeyConstraint("version_id", "datum_id", name=op.f("pk_vh_model_files")),
    )
    op.create_index(
        op.f("ix_vh_model_files_datum_id"), "vh_model_files", ["datum_id"], unique=False
    )


def _outside_files() -> None:
    op.create_table(
        "vh_outside_files",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("uri", sa.String(length=4096), nullable=False),
        sa.Column("version", sa.String(length=255), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("execution_id", sa.String(length=36), nullable=False),
        sa.Column("mtime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_vh_outside_files")),
    )


def _columns() -> None:
    op.add_column(
        "vh_executions", sa.Column("warnings", sa.JSON(), server_default="[]", nullable=False)
    )
    op.add_column(
        "vh_datums", sa.Column("properties", sa.JSON(), server_default="{}", nullable=False)
    )
    op.add_column(
        "vh_datums", sa.Column("adopted", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.add_column("vh_datums", sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True))
    _withdrawn()
    op.create_index("ix_vh_datums_key", "vh_datums", ["key"], unique=False, postgresql_using="hash")
    op.add_column("vh_execution_inputs", sa.Column("version", sa.String(length=255), nullable=True))
    op.add_column("vh_execution_inputs", sa.Column("asked", sa.String(length=4096), nullable=True))
    op.add_column("vh_grants", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("vh_grants", sa.Column("parts", sa.LargeBinary(), nullable=True))
    op.add_column("vh_grants", sa.Column("swept_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "ix_vh_grants_open",
        "vh_grants",
        ["expires_at"],
        unique=False,
        sqlite_where=sa.text("accepted = 0 AND swept_at IS NULL"),
        postgresql_where=sa.text("NOT accepted AND swept_at IS NULL"),
    )
    op.execute("UPDATE vh_grants SET expires_at = granted_at")  # so that these are swept too


def _withdrawn() -> None:
    """Files of lost attempts get the execution back that made them; their grants have it."""
    op.add_column(
        "vh_datums", sa.Column("withdrawn", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    datums = sa.table("vh_datums", *map(sa.column, ("id", "execution_id", "withdrawn")))
    grants = sa.table("vh_grants", *map(sa.column, ("upload_id", "execution_id", "kind")))
    mine = sa.and_(grants.c.upload_id == datums.c.id, grants.c.kind == "output")
    maker = sa.select(grants.c.execution_id).where(mine).scalar_subquery()
    lost = sa.and_(datums.c.execution_id.is_(None), sa.exists().where(mine))
    op.execute(datums.update().where(lost).values(withdrawn=sa.true(), execution_id=maker))
