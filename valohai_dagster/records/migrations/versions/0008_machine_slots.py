"""Among how many slots the price of a machine is shared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("vh_machines", sa.Column("slots", sa.Integer(), nullable=True))
