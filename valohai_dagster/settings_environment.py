"""Settings from VALOHAI_* variables: reading them, and noticing names that nothing reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource

from valohai_dagster.errors import ConfigurationError

log = logging.getLogger(__name__)

PREFIX = "VALOHAI_"
BESIDE = ("config", "state")  # VALOHAI_CONFIG and VALOHAI_STATE, which are no keys of the file
NO_KEYS = frozenset({"config_file"})  # fields that nobody sets
OURS = ("agent_", "git_", "test_")  # how the names of variables begin that other parts read
FOREIGN = frozenset(
    {"attempt", "port", "stage", "stats"}  # of executions and of deployments
    | {"config_dir", "debug", "host", "password", "project_dir", "table_format", "token"}
    | {"username"}  # these and the line above: the command-line client of Valohai
)
SLIPS = {"config_file": "config"}  # that no likeness finds
SHORT = 8  # letters; of shorter names one letter may be wrong, of others two
# Set in each pod for each Service of its namespace, such as one of the name valohai-redis.
KUBERNETES = re.compile(
    r"(.+_)?(service_host|service_port(_\w+)?|port(_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)?)"
)


def read_environment(model: type[BaseSettings], names: Iterable[str]) -> dict[str, Any]:
    """What the environment sets. Raises ConfigurationError; `names` are those of its variables with our prefix."""
    check_names(model, names)
    try:
        return EnvSettingsSource(model)()
    except Exception as error:  # pydantic-settings raises its own kinds for undecodable JSON
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ConfigurationError(
            f"an environment variable VALOHAI_* cannot be read: {error}{cause}"
        ) from error


def check_names(model: type[BaseSettings], names: Iterable[str]) -> None:
    """Refuses names that look like a slip, as the file's unknown keys are; of others a warning says that nothing reads
    them: they may be another program's."""
    known = [*(name for name in model.model_fields if name not in NO_KEYS), *BESIDE]
    problems = []
    for variable in names:
        first, *rest = variable[len(PREFIX) :].split("__")
        name = first.lower()
        if name in known or name in FOREIGN or name.startswith(OURS):
            continue
        if close := _meant(name, known, inside=bool(rest)):
            meant = "__".join([PREFIX + close.upper(), *rest])
            problems.append(f"  - {variable}: there is no such setting; did you mean {meant}?")
        elif not KUBERNETES.fullmatch(name):
            log.warning(
                "the environment variable %s is no setting; nothing reads it",
                variable,
                extra={"action": "settings"},
            )
    if problems:
        lines = ["environment variables are not valid:", *problems]
        raise ConfigurationError("\n".join([*lines, "docs/settings.md describes every setting."]))


def _meant(name: str, known: Iterable[str], *, inside: bool) -> str | None:
    """The setting of which the name is a slip of the pen. `inside`: the variable goes on below it, as those of tables do.

    Only a letter or two may differ, since a whole word that differs is as likely another program's: refusing that
    would stop a deployment that is right. So is a table's name in the singular when nothing goes on below it.
    """
    if name in SLIPS:
        return SLIPS[name]
    most = 1 if len(name) < SHORT else 2
    letters, close = min((distance(name, one), one) for one in known)
    return close if letters <= most and (inside or f"{name}s" != close) else None


def distance(one: str, other: str) -> int:
    """Letters to insert, remove or change in one to get the other."""
    row = list(range(len(other) + 1))
    for above, letter in enumerate(one, 1):
        before, row = row, [above]
        for column, wanted in enumerate(other, 1):
            changed = before[column - 1] + (letter != wanted)
            row.append(min(changed, before[column] + 1, row[-1] + 1))
    return row[-1]
