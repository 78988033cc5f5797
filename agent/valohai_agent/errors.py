"""Everything that can go wrong on the agent's side, as one tree.

    AgentError
    |-- WorkspaceError        the private directory of an attempt cannot be made, locked or removed
    |-- ArchiveError          the commit's archive is damaged or would write outside the repository directory
    |-- TransferError         one download or upload failed for good (retries are over)
    |   |-- NotFound          404, 410, missing file
    |   |-- Denied            401, 403, no permission
    |   |-- Conflict          the target of an upload exists already (nothing is ever overwritten, O-02)
    |   |-- ChecksumMismatch  the content is not what the control plane expects
    |   |-- DiskFull          ENOSPC or EDQUOT on either side
    |   |-- Unreachable       no connection, time-out, 5xx, 429 after all retries
    |   `-- Refused           any other answer that retrying cannot change
    |-- InputError            an input cannot be placed
    |-- OutputError           an output cannot be stored
    `-- RuntimeFailure
        |-- RuntimeUnavailable  no Docker daemon, no rights, unknown name
        |-- ImageError          the image cannot be pulled or does not exist
        |-- StartError          the command cannot be started
        `-- DebugUnavailable    the SSH server that was asked for cannot be offered

`str(error)` is fit for `Finished.reason`: it names the thing, what was tried and the next step, and no secret.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of all expected failures of the agent."""


class WorkspaceError(AgentError):
    """The private directory of an attempt cannot be made, locked or removed."""


class ArchiveError(AgentError):
    """The commit's archive is damaged, or one of its members would leave the repository directory."""


class TransferError(AgentError):
    """A download or upload failed after its retries."""


class NotFound(TransferError):
    """The source does not exist."""


class Denied(TransferError):
    """The other side refuses these credentials."""


class Conflict(TransferError):
    """The target exists already; it is never overwritten."""


class ChecksumMismatch(TransferError):
    """The bytes that arrived are not the expected ones."""


class DiskFull(TransferError):
    """No space is left where the bytes should go."""


class Unreachable(TransferError):
    """The other side did not answer, or asked to come back later, until the retries were over."""


class Refused(TransferError):
    """An answer that retrying cannot change."""


class InputError(AgentError):
    """An input file cannot be fetched or placed; the execution ends before user code starts (I-30)."""


class OutputError(AgentError):
    """At least one output could not be stored; turns `complete` into `error` (O-18)."""


class RuntimeFailure(AgentError):
    """A container or process cannot be run."""


class RuntimeUnavailable(RuntimeFailure):
    """This machine cannot offer the runtime that was asked for."""


class ImageError(RuntimeFailure):
    """The image cannot be pulled or does not exist."""


class StartError(RuntimeFailure):
    """The command cannot be started in this image or on this machine."""


class DebugUnavailable(RuntimeFailure):
    """The SSH server that was asked for cannot be offered; the execution goes on without it."""
