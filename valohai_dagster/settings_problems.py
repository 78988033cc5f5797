"""What is wrong with the settings, in words: where, what, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError

from valohai_dagster.settings_groups import GROUP_KINDS
from valohai_dagster.settings_registries import REGISTRY_KINDS
from valohai_dagster.settings_stores import STORE_KINDS

_KEYS_OF_STORES = ("access_key_id", "secret_access_key", "session_token")  # groups have none
Location = tuple["int | str", ...]
KINDS: Mapping[str, Mapping[str, type[BaseModel]]] = {
    "stores": STORE_KINDS,
    "registries": REGISTRY_KINDS,
    "groups": GROUP_KINDS,
}


def explain(error: ValidationError, source: object, model: type[BaseModel]) -> str:
    """All problems of settings that `model` refused; shows no values, they may be secret."""
    problems = error.errors(include_input=False, include_url=False)
    assumed = {
        problem["loc"][1]
        for problem in problems
        if problem["type"] == "missing" and problem["loc"][-2:] == ("local", "path")
    }
    lines = [f"the settings are not valid ({source}, then VALOHAI_* variables):"]
    for problem in problems:
        location, kind = _without_kind(problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = "there is no such setting" + _suggestion(location, kind, model)
            if location[0] == "groups" and location[-1] in _KEYS_OF_STORES:
                text += "; docs/clouds.md says where a group's credentials come from"
            if kind == "local" and location[1] in assumed:
                text += _other_kinds(str(location[-1]))
        where = ".".join(str(part) for part in location)
        lines.append(f"  - {where}: {text}" if where else f"  - {text}")
    lines.append("docs/settings.md describes every setting.")
    return "\n".join(lines)


def _without_kind(location: Location) -> tuple[Location, str]:
    """The location as the file has it: pydantic puts the kind of store, registry or group after its name."""
    if len(location) > 2 and location[2] in KINDS.get(str(location[0]), ()):
        return (*location[:2], *location[3:]), str(location[2])
    return location, ""


def _suggestion(location: Location, kind: str, model: type[BaseModel]) -> str:
    section = KINDS[str(location[0])][kind] if kind else _section(location, model)
    fields = section.model_fields
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _section(location: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    """The model of a table of tables, such as [groups.NAME]; the settings themselves otherwise."""
    field = model.model_fields.get(str(location[0])) if len(location) > 1 else None
    for part in get_args(field.annotation) if field else ():
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return model


def _other_kinds(key: str) -> str:
    kinds = [f'kind = "{kind}"' for kind, model in STORE_KINDS.items() if key in model.model_fields]
    if not kinds:
        return ""
    return f" of a local directory, which is what a store without `kind` is; state {' or '.join(kinds)}"
