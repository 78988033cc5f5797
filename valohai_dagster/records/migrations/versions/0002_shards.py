"""Shards: which conductor looks after which executions and runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "vh_executions", sa.Column("shard", sa.Integer(), nullable=False, server_default="0")
    )
    op.create_index(op.f("ix_vh_executions_shard_status"), "vh_executions", ["shard", "status"])
    _runs()
    op.create_table(
        "vh_shards",
        sa.Column("shard", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(length=255), nullable=True),
        sa.Column("epoch", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("shard", name=op.f("pk_vh_shards")),
    )


def _runs() -> None:
    op.create_table(
        "vh_runs",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("handover", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_vh_runs")),
    )
    op.create_index(op.f("ix_vh_runs_shard_state"), "vh_runs", ["shard", "state"])
