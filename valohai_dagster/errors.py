"""Every error that this package raises on purpose.

    ValohaiError
    +-- ConfigurationError          settings, environment, missing extra: the operator can fix it
    +-- ProjectError(problems)      a project or its valohai.yaml cannot be read
    +-- SpecError(problems)         what was asked for cannot become an execution
    +-- ResolutionError(problems)   inputs that cannot be resolved (I-38)
    +-- RefusedError                the request is understood and declined; repeating it changes nothing
    |   +-- NotFoundError           no such execution, datum, alias, secret, file
    +-- ServiceUnavailable          a part is not reachable now; repeating later may work
    |   +-- BrokerUnavailable       Redis
    |   +-- RecordsUnavailable      the database
    +-- SourceUnreadable            something outside cannot be looked at: gone, denied, or its store is down
    +-- RegistryError               an image registry gives no credentials
    +-- StoreError                  a file store (`.store` names it)
        +-- StoreConflict           the key exists and stores never overwrite (O-02)
        +-- StoreMissing            no such object
        +-- StoreNotWritable        permission, read-only, not a directory
        +-- StoreFull               no space left
        +-- StoreBadKey             the key is not a safe relative path
        +-- StoreUnavailable        cannot reach or cannot tell
        +-- StoreUnknown            no store of that name is configured

A message names the thing, what was tried and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BrokerUnavailable",
    "ConfigurationError",
    "NotFoundError",
    "ProblemsError",
    "ProjectError",
    "RecordsUnavailable",
    "RefusedError",
    "RegistryError",
    "ResolutionError",
    "ServiceUnavailable",
    "SourceUnreadable",
    "SpecError",
    "StoreBadKey",
    "StoreConflict",
    "StoreError",
    "StoreFull",
    "StoreMissing",
    "StoreNotWritable",
    "StoreUnavailable",
    "StoreUnknown",
    "ValohaiError",
]


class ValohaiError(Exception):
    """Base of all; its text is written for people and shows no secrets."""


class ConfigurationError(ValohaiError):
    """The deployment is set up wrongly; the text names the setting, its source and the next step."""


class ProblemsError(ValohaiError):
    """Several problems found in one pass, so that a user fixes them all at once."""

    def __init__(self, headline: str, problems: Sequence[str] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__("\n".join([headline, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.headline, self.problems)


class ProjectError(ProblemsError):
    """A project's source or valohai.yaml cannot be used."""


class SpecError(ProblemsError):
    """A step with this configuration is not a valid execution."""


class ResolutionError(ProblemsError):
    """Inputs of one execution that cannot be resolved, all of them (I-38)."""


class RefusedError(ValohaiError):
    """Declined for a reason that does not go away by repeating."""


class NotFoundError(RefusedError):
    """What was named does not exist."""


class ServiceUnavailable(ValohaiError):
    """A needed part cannot be reached; nothing was lost and the call may be repeated."""


class BrokerUnavailable(ServiceUnavailable):
    """Redis cannot be reached or refuses us."""


class RecordsUnavailable(ServiceUnavailable):
    """The records database cannot be reached."""


class SourceUnreadable(ValohaiError):
    """What steps read from outside cannot be looked at; the text names it without credentials."""


class RegistryError(ValohaiError):
    """No credentials for an image registry can be had; the text names the entry and what to check."""


class StoreError(ValohaiError):
    """Something about one store; `store` is its configured name."""

    def __init__(self, message: str, *, store: str = "") -> None:
        self.store = store
        super().__init__(message)


class StoreConflict(StoreError):
    """An object with that key exists already."""


class StoreMissing(StoreError):
    """There is no object with that key."""


class StoreNotWritable(StoreError):
    """The store refuses writes from us."""


class StoreFull(StoreError):
    """No space, inodes or quota left."""


class StoreBadKey(StoreError):
    """A key that is no safe relative path."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, so existence is unknown."""


class StoreUnknown(StoreError):
    """No store of that name is configured."""
