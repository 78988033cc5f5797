"""Removes packages that nobody gets any more, at once where their store lets us; else the sweep does it later."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import sqlalchemy as sa

from valohai_dagster.data import own_uploads
from valohai_dagster.errors import StoreError
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)


def remove_packages(records: Records, stores: Stores, removals: Sequence[str]) -> None:
    """`removals` as `packages.drop` gives them, once that is committed. Blocks; no store's failure is the caller's."""
    u = t.uploads.c
    for removal in removals:
        with records.read() as connection:
            query = sa.select(u.store, u.key).where(u.upload_id == removal)
            found = connection.execute(query).one_or_none()
        if found is None:  # the sweep was quicker
            continue
        try:
            stores.get(found.store).wipe(found.key)
        except StoreError as error:
            text, extra = "the package %r is left to the sweep: %s", {"action": "remove-package"}
            log.warning(text, found.key, error, extra=extra)
            continue
        with records.write() as connection:
            own_uploads.forget(connection, [removal])
