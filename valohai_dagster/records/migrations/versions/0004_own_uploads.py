"""What the control plane uploads itself, and when a commit was last chosen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "vh_uploads",
        sa.Column("upload_id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=4096), nullable=False),
        sa.Column("execution_id", sa.String(length=36), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("store", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=4096), nullable=False),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("parts", sa.LargeBinary(), nullable=True),
        sa.Column("given_up", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_vh_uploads")),
    )
    op.create_index(op.f("ix_vh_uploads_expires_at"), "vh_uploads", ["expires_at"], unique=False)
    op.add_column("vh_commits", sa.Column("used_at", sa.DateTime(timezone=True), nullable=True))
