"""Settings from VALOHAI_* variables: reading them, and noticing names that nothing reads."""

from __future__ import annotations

import difflib
import logging
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
    {"attempt", "port"}  # of executions and of deployments
    | {"config_dir", "debug", "host", "password", "project_dir", "table_format", "token"}
    | {"username"}  # these and the line above: the command-line client of Valohai
)
LIKE = 0.7  # how alike two names are when one is taken for a slip of the other


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
        close = difflib.get_close_matches(name, known, n=1, cutoff=LIKE)
        if close:
            meant = "__".join([PREFIX + close[0].upper(), *rest])
            problems.append(f"  - {variable}: there is no such setting; did you mean {meant}?")
        else:
            log.warning(
                "the environment variable %s is no setting; nothing reads it",
                variable,
                extra={"action": "settings"},
            )
    if problems:
        lines = ["environment variables are not valid:", *problems]
        raise ConfigurationError("\n".join([*lines, "docs/settings.md describes every setting."]))
