"""What stores call the content of datums that were adopted without being read (I-40)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("vh_datums", sa.Column("version", sa.String(length=255), nullable=True))
