"""Variables that go into a named section, such as VALOHAI_STORES__models__SECRET_ACCESS_KEY, where there is no such one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings_environment import PREFIX, distance

log = logging.getLogger(__name__)

# Of each table: what a section is called, which names are always there, and the keys of which one makes a whole section.
NAMED = {
    "stores": ("store", ("local",), ("kind", "path")),
    "registries": ("registry", (), ("kind", "match")),
}
SHORT = 4  # letters; of shorter names none is taken for a slip of another


def placed(
    environment: Mapping[str, Any], file: Mapping[str, Any], names: Collection[str], source: object
) -> dict[str, Any]:
    """What the environment sets, without what only completes a section that is not there; `names`: its variables.

    The same secret is set for every directory that a person or a machine works in, so one too many is left out with a
    warning. Raises ConfigurationError for a name that looks like a slip of one that is there.
    """
    found = dict(environment)
    problems: list[str] = []
    for table, (what, always, whole) in NAMED.items():
        sections = found.get(table)
        written = file.get(table, {})
        if not isinstance(sections, dict) or not isinstance(written, dict):
            continue
        kept: dict[str, Any] = {}
        for name, section in sections.items():
            variables = _variables(names, table, name)
            own = _as_written(name, written)
            if own in written or own in always or not variables or {*section} & {*whole}:
                kept[own] = section
                continue
            known = sorted({*written, *always})
            close = next((one for one in known if _is_slip(name, one)), None)
            listed = f"known are {', '.join(known) or 'none'}"
            if close is None:
                log.warning(
                    "%s is for a %s %r, which the settings (%s) do not have; it is left out; %s",
                    *(", ".join(variables), what, name, source, listed),
                    extra={"action": "settings"},
                )
            for variable in variables if close else ():
                problems.append(
                    f"  - {variable}: there is no {what} {name!r}; did you mean {close!r}? ({listed})"
                )
        found[table] = kept
    if problems:
        raise ConfigurationError(
            "\n".join(
                [
                    f"environment variables do not fit the settings ({source}):",
                    *problems,
                    "Correct the name, or unset the variable. docs/settings.md describes every setting.",
                ]
            )
        )
    return found


def _variables(names: Collection[str], table: str, section: str) -> list[str]:
    beginning = f"{PREFIX}{table}__{section}__".upper()
    return sorted(name for name in names if name.upper().startswith(beginning))


def _as_written(name: str, written: Mapping[str, Any]) -> str:
    """Names from the environment come in small letters; the file's may have others."""
    if name in written:
        return name
    alike = [one for one in written if one.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else name


def _is_slip(name: str, other: str) -> bool:
    """A letter that differs, digits aside: `data1` and `data2` are as likely two things."""
    letters = ["".join(c for c in one.lower() if not c.isdigit()) for one in (name, other)]
    return (
        min(len(name), len(other)) >= SHORT
        and letters[0] != letters[1]
        and distance(name.lower(), other.lower()) == 1
    )
