"""What `groups check` and `doctor` look at beside the cloud: whether machines of a group could work at all."""

from __future__ import annotations

from valohai_dagster.capacity.bootstrap.needs import lacks
from valohai_dagster.capacity.bootstrap.releases import current_release
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.executions.reach import unreachable
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import open_stores


def obstacles(records: Records, settings: Settings, name: str) -> list[str]:
    """What keeps a group's machines from joining, and executions from being accepted; empty when nothing is known to."""
    with records.read() as conn:
        published = current_release(conn) is not None
    group = settings.groups[name]
    found = lacks(group, settings, published=published)
    uses = [
        (settings.default_store, "outputs"),
        (settings.log_store_name, "logs"),
        (settings.code_store_name, "code archives"),
    ]
    try:
        return [*found, *unreachable(uses, open_stores(settings), name, group)]
    except ConfigurationError as error:
        return [*found, str(error)]
