"""Whether the process runtime can bind a job's mounts on this machine, asked before anything is downloaded (K-58)."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence

from valohai_agent.protocol import JobMount

OWN = ("/valohai", *(f"/valohai/{name}" for name in ("repository", "inputs", "outputs", "config")))


def first_problem(mounts: Sequence[JobMount]) -> str | None:
    """The first mount that cannot be bound, with the reason and the next step; None if all can."""
    for mount in mounts:
        reason = _source_problem(mount) or _destination_problem(mount)
        if reason is not None:
            return (
                f"The mount of {mount.source} at {mount.destination} cannot be made on this worker: "
                f"{reason}, or run the step on a worker with Docker."
            )
    return None


def _source_problem(mount: JobMount) -> str | None:
    if mount.type not in (None, "", "bind"):
        return (
            f"plain processes can only bind directories of this machine, and its type is "
            f"{mount.type!r}. Mount it on the machine and name that directory as the source"
        )
    if not os.path.isabs(mount.source):
        return "the source is no absolute path. Write the whole path in the step's mounts"
    if not os.path.exists(mount.source):
        return (
            "the source does not exist on this machine. Create it, correct the step's mounts, "
            "or choose an environment whose workers have it"
        )
    return None


def _destination_problem(mount: JobMount) -> str | None:
    """A mount point in a directory of the host would have to be made there, which the agent never does."""
    place = posixpath.normpath(mount.destination)
    if not place.startswith("/") or place == "/" or ".." in mount.destination.split("/"):
        return "the destination is no absolute path below /. Correct it in the step's mounts"
    if place in OWN:
        return "the destination would hide a directory of the job. Choose another one"
    if place.startswith("/valohai/") or not os.path.lexists("/" + place.split("/")[1]):
        return None
    if not os.path.isdir(place):
        return (
            f"{place} is no directory on this machine and the agent creates none outside of the job. "
            f"Create it there, choose a destination below /valohai or below a directory that this "
            f"machine does not have"
        )
    if not os.path.isdir(mount.source):
        return "the source is a file and the destination a directory. Correct the step's mounts"
    return None
