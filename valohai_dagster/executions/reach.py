"""Which stores an execution can use: those that take its outputs, and those that the workers of its group can reach.

Stores behind a network are reached by their signed URLs. A local store is a directory: its grants are of use only
where the same directory is mounted.
"""

from __future__ import annotations

from collections.abc import Iterable

from valohai_dagster.errors import StoreUnknown
from valohai_dagster.settings_groups import GroupSettings
from valohai_dagster.stores.registry import Stores


def out_of_reach(store: str, stores: Stores, group_name: str, group: GroupSettings) -> str | None:
    """Why workers of the group cannot use the store, and what to do; None when they can."""
    if stores[store].kind != "local" or group.kind == "local" or group.local_stores:
        return None
    text = (
        f"workers of the group {group_name!r} do not see the directory of the local store {store!r}: choose a store "
        "that is reached by network"
    )
    if group.kind == "docker":  # its containers have no mounts
        return text
    return (
        f"{text}, or mount the directory there at the same path and set local_stores = true in "
        f"[groups.{group_name}]"
    )


def unreachable(
    uses: Iterable[tuple[str, str]], stores: Stores, group_name: str, group: GroupSettings
) -> list[str]:
    """One problem per store, with the first thing (store, what for) that an execution would need it for."""
    first: dict[str, str] = {}
    for store, what in uses:
        first.setdefault(store, what)
    found = ((what, out_of_reach(s, stores, group_name, group)) for s, what in first.items())
    return [f"{what}: {why}" for what, why in found if why is not None]


def unwritable(store: str, stores: Stores) -> str | None:
    """Why the store of that name takes no outputs, and which ones do; None when it takes them."""
    try:
        if not stores[store].readonly:
            return None
    except StoreUnknown as error:
        return str(error)
    others = sorted(name for name in stores if not stores[name].readonly)
    return (
        f"the store {store!r} can only be read (its kind, or readonly = true in [stores.{store}]); "
        f"stores that take outputs are {', '.join(others) or 'none'}"
    )
