"""Tables of machines: what was asked of clouds, what came of it, and why. See `capacity/book.py` for who writes them."""

from __future__ import annotations

import sqlalchemy as sa

from valohai_dagster.records.tables import UtcDateTime, metadata

machines = sa.Table(
    "vh_machines",  # every machine that a cloud ever listed for a group; kept after its end, for costs
    metadata,
    sa.Column("group_name", sa.String(64), primary_key=True),
    sa.Column("machine_id", sa.String(255), primary_key=True),  # as its cloud calls it
    sa.Column("kind", sa.String(16), nullable=False),  # aws, gcp, ...
    sa.Column("token", sa.String(64), index=True),  # of the launch that made it
    sa.Column("zone", sa.String(64), nullable=False, default=""),
    sa.Column("purchase", sa.String(16), nullable=False),  # spot, on-demand
    sa.Column("state", sa.String(16), nullable=False, index=True),  # MachineState
    sa.Column("bootstrap", sa.String(64)),  # version of what it was started with
    sa.Column("adopted", sa.Boolean, nullable=False, default=False),  # found, not launched by us
    sa.Column("orphan_since", UtcDateTime),  # first phase of being removed as nobody's
    sa.Column("reclaimed_at", UtcDateTime),  # the cloud takes it back then (spot)
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("listed_at", UtcDateTime, nullable=False),  # when a list last had it
    sa.Column("registered_at", UtcDateTime),  # when a worker of it first checked in
    sa.Column("worker_seen_at", UtcDateTime),  # when one last did
    sa.Column("draining_since", UtcDateTime),
    sa.Column("stopped_since", UtcDateTime),
    sa.Column("started_at", UtcDateTime),  # again after a stop
    sa.Column("missing_since", UtcDateTime),  # first list that did not have it any more
    sa.Column("gone_at", UtcDateTime),  # confirmed
    sa.Column("reason", sa.Text),  # why it is as it is, or why it went, for people
    sa.Column("price_per_hour", sa.Numeric(12, 6)),
    sa.Column("slots", sa.Integer),  # of all its agents: each has an equal share of the price
    sa.Column(
        "stopped_seconds", sa.Float, nullable=False, default=0.0
    ),  # of all its stops that are over
    sa.Index(None, "group_name", "gone_at"),
)

intents = sa.Table(
    "vh_capacity_intents",  # calls to clouds, written before they are made
    metadata,
    sa.Column("token", sa.String(64), primary_key=True),
    sa.Column("group_name", sa.String(64), nullable=False),
    sa.Column("action", sa.String(16), nullable=False),  # ActionKind
    sa.Column("zone", sa.String(64), nullable=False, default=""),
    sa.Column("purchase", sa.String(16), nullable=False),
    sa.Column("count", sa.Integer, nullable=False, default=1),
    sa.Column("machine_id", sa.String(255)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("settled_at", UtcDateTime),
    sa.Column("outcome", sa.Text),
    sa.Index(None, "group_name", "settled_at"),
)

holds = sa.Table(
    "vh_capacity_holds",  # where launches were refused, and until when they are not tried again
    metadata,
    sa.Column("group_name", sa.String(64), primary_key=True),
    sa.Column("zone", sa.String(64), primary_key=True),  # empty: all
    sa.Column("purchase", sa.String(16), primary_key=True),  # empty: both
    sa.Column("until", UtcDateTime, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),  # in a row
)

capacity_events = sa.Table(
    "vh_capacity_events",  # what was decided and what happened, line by line, for people; trimmed
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("group_name", sa.String(64), nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column(
        "kind", sa.String(16), nullable=False
    ),  # decision, trouble, cleared, adopted, orphan, lost
    sa.Column("machine_id", sa.String(255)),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index(None, "group_name", "id"),
)

turns = sa.Table(
    "vh_capacity_turns",  # how often the machines of a group were written to: who has read an older number is late
    metadata,
    sa.Column("group_name", sa.String(64), primary_key=True),
    sa.Column("turn", sa.BigInteger, nullable=False),
)

group_overrides = sa.Table(
    "vh_groups",  # settings of groups that were changed at run time, over those of the file
    metadata,
    sa.Column("group_name", sa.String(64), primary_key=True),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("mtime", UtcDateTime, nullable=False),
)

join_tokens = sa.Table(
    "vh_join_tokens",  # tickets by which new machines get their group's credentials; only digests are kept
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),  # sha256 of the token
    sa.Column("group_name", sa.String(64), nullable=False),
    sa.Column("launch_token", sa.String(64), index=True),  # of the launch that it was made for
    sa.Column("uses_left", sa.Integer, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
    sa.Column("machine_id", sa.String(255), index=True),  # the one that alone may use it: a ticket
    sa.Column("used_by", sa.JSON, nullable=False, default=list),  # machine ids and their keys
)

agent_releases = sa.Table(
    "vh_agent_releases",  # published agent files
    metadata,
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("store", sa.String(64), nullable=False),
    sa.Column("key", sa.String(1024), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("protocol", sa.Integer, nullable=False),
    sa.Column("protocol_min", sa.Integer, nullable=False),
    sa.Column("current", sa.Boolean, nullable=False, default=False),
    sa.Column("ctime", UtcDateTime, nullable=False),
)
