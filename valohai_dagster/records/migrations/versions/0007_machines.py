"""Machines of clouds, what was asked of them and why, join tokens, published agents, restarts and prices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    _agent_releases()
    _capacity_events()
    _capacity_holds()
    _capacity_intents()
    _capacity_turns()
    _groups()
    _join_tokens()
    _machines()
    _executions()


def _agent_releases() -> None:
    op.create_table(
        "vh_agent_releases",
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("store", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=1024), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("protocol_min", sa.Integer(), nullable=False),
        sa.Column("current", sa.Boolean(), nullable=False),
        sa.Column("ctime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("version", "sha256", name=op.f("pk_vh_agent_releases")),
    )


def _capacity_events() -> None:
    op.create_table(
        "vh_capacity_events",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("machine_id", sa.String(length=255), nullable=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vh_capacity_events")),
    )
    op.create_index(
        op.f("ix_vh_capacity_events_group_name_id"),
        "vh_capacity_events",
        ["group_name", "id"],
        unique=False,
    )


def _capacity_holds() -> None:
    op.create_table(
        "vh_capacity_holds",
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("zone", sa.String(length=64), nullable=False),
        sa.Column("purchase", sa.String(length=16), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint(
            "group_name", "zone", "purchase", name=op.f("pk_vh_capacity_holds")
        ),
    )


def _capacity_intents() -> None:
    op.create_table(
        "vh_capacity_intents",
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("zone", sa.String(length=64), nullable=False),
        sa.Column("purchase", sa.String(length=16), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("machine_id", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("token", name=op.f("pk_vh_capacity_intents")),
    )
    op.create_index(
        op.f("ix_vh_capacity_intents_group_name_settled_at"),
        "vh_capacity_intents",
        ["group_name", "settled_at"],
        unique=False,
    )


def _capacity_turns() -> None:
    op.create_table(
        "vh_capacity_turns",
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("group_name", name=op.f("pk_vh_capacity_turns")),
    )


def _groups() -> None:
    op.create_table(
        "vh_groups",
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("mtime", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("group_name", name=op.f("pk_vh_groups")),
    )


def _join_tokens() -> None:
    op.create_table(
        "vh_join_tokens",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("launch_token", sa.String(length=64), nullable=True),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("machine_id", sa.String(length=255), nullable=True),
        sa.Column("used_by", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_vh_join_tokens")),
    )
    op.create_index(
        op.f("ix_vh_join_tokens_expires_at"), "vh_join_tokens", ["expires_at"], unique=False
    )
    op.create_index(
        op.f("ix_vh_join_tokens_launch_token"), "vh_join_tokens", ["launch_token"], unique=False
    )
    op.create_index(
        op.f("ix_vh_join_tokens_machine_id"), "vh_join_tokens", ["machine_id"], unique=False
    )


def _machines() -> None:
    op.create_table(
        "vh_machines",
        sa.Column("group_name", sa.String(length=64), nullable=False),
        sa.Column("machine_id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=True),
        sa.Column("zone", sa.String(length=64), nullable=False),
        sa.Column("purchase", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("bootstrap", sa.String(length=64), nullable=True),
        sa.Column("adopted", sa.Boolean(), nullable=False),
        sa.Column("orphan_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reclaimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("listed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("worker_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("draining_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stopped_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("missing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("gone_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("price_per_hour", sa.Numeric(precision=12, scale=6), nullable=True),
        sa.Column("stopped_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("group_name", "machine_id", name=op.f("pk_vh_machines")),
    )
    op.create_index(
        op.f("ix_vh_machines_group_name_gone_at"),
        "vh_machines",
        ["group_name", "gone_at"],
        unique=False,
    )
    op.create_index(op.f("ix_vh_machines_state"), "vh_machines", ["state"], unique=False)
    op.create_index(op.f("ix_vh_machines_token"), "vh_machines", ["token"], unique=False)


def _executions() -> None:
    op.add_column(
        "vh_attempts", sa.Column("reclaimed_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column("vh_executions", sa.Column("restart_of", sa.String(length=36), nullable=True))
    op.add_column(
        "vh_executions", sa.Column("restarts", sa.Integer(), server_default="0", nullable=False)
    )
    op.add_column(
        "vh_executions", sa.Column("price", sa.Numeric(precision=12, scale=6), nullable=True)
    )
    op.add_column("vh_executions", sa.Column("user_name", sa.String(length=255), nullable=True))
    op.add_column("vh_executions", sa.Column("team_name", sa.String(length=255), nullable=True))
    op.create_index(
        op.f("ix_vh_executions_restart_of"), "vh_executions", ["restart_of"], unique=False
    )
    op.create_index(
        op.f("ix_vh_executions_user_name"), "vh_executions", ["user_name"], unique=False
    )
