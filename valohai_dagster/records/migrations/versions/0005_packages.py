"""Packages of dataset versions (O-23)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column(
        "vh_datasets",
        sa.Column("packaging", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column("vh_dataset_files", sa.Column("package_id", sa.String(length=36), nullable=True))
    _packagings()
    _packages()


def _packagings() -> None:
    op.create_table(
        "vh_packagings",
        sa.Column("version_id", sa.String(length=36), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("holder", sa.String(length=36), nullable=True),
        sa.Column("due", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["vh_dataset_versions.id"]),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_vh_packagings")),
    )
    op.create_index(op.f("ix_vh_packagings_state"), "vh_packagings", ["state"], unique=False)


def _packages() -> None:
    op.create_table(
        "vh_packages",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("version_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("store", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=1024), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["vh_dataset_versions.id"]),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_packages")),
    )
    op.create_index(op.f("ix_vh_packages_version_id"), "vh_packages", ["version_id"], unique=False)
