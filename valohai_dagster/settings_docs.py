"""The settings reference page, generated from the models so that it cannot fall behind."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import GROUP_KINDS
from valohai_dagster.settings_registries import REGISTRY_KINDS
from valohai_dagster.settings_retention import ProjectRetention, RetentionSettings
from valohai_dagster.settings_stores import STORE_KINDS

_INTRODUCTION = """# Settings

This page is generated from the models in `valohai_dagster/settings.py`, `settings_stores.py` and `settings_registries.py`
(`python -m valohai_dagster.settings_docs`).

Every setting has a default. Settings come from, later ones winning:

1. `valohai.toml`: the file named by `VALOHAI_CONFIG`, else the first one found from the current directory upwards.
2. Environment variables: `VALOHAI_` and the name in capitals. Values inside a table are reached with `__` between
   the names (names of stores, groups and registries in small letters then), and lists and tables may be given as JSON.

Keys that do not exist are refused, so that a slip cannot pass unnoticed; so are variables whose names differ from a
setting's by a letter or two. Of other unknown `VALOHAI_` variables a warning says that nothing reads them; those that
Kubernetes sets for Services, such as `VALOHAI_REDIS_PORT` for one named `valohai-redis`, are passed over.

Relative paths count from the directory of `valohai.toml`, without one from the current directory.

```toml
redis_url = "rediss://control:password@queue.example.com:6380/0"
database_url = "postgresql://dagster:password@db.example.com/dagster"
default_store = "shared"

[stores.shared]
path = "/mnt/shared/valohai"

[groups.local]
slots = 4
runtime = "docker"

[environments]
aws-eu-west-1-p3-2xlarge = "local"
```
"""


def render() -> str:
    """The whole page as Markdown."""
    sections = [
        ("Top level", "", Settings),
        *(
            (f'`[stores.NAME]`, `kind = "{kind}"`', "STORES__NAME__", model)
            for kind, model in STORE_KINDS.items()
        ),
        *(
            (f'`[groups.NAME]`, `kind = "{kind}"`', "GROUPS__NAME__", model)
            for kind, model in GROUP_KINDS.items()
        ),
        *(
            (f'`[registries.NAME]`, `kind = "{kind}"`', "REGISTRIES__NAME__", model)
            for kind, model in REGISTRY_KINDS.items()
        ),
        ("`[retention]`", "RETENTION__", RetentionSettings),
        ("`[retention.projects.NAME]`", "RETENTION__PROJECTS__NAME__", ProjectRetention),
    ]
    return "\n".join([_INTRODUCTION, *(_section(*section) for section in sections)])


def _section(title: str, prefix: str, model: type[BaseModel]) -> str:
    lines = [f"## {title}", "", (model.__doc__ or "").strip(), ""]
    lines += ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, info in model.model_fields.items():
        if not info.exclude:
            lines.append(_row(name, prefix, info))
    return "\n".join(lines) + "\n"


def _row(name: str, prefix: str, info: FieldInfo) -> str:
    cells = [
        f"`{name}`<br>`VALOHAI_{prefix}{name.upper()}`",
        f"`{_type(info.annotation)}`",
        _default(info),
        info.description or "",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
    text = text if text and "[" not in str(annotation) else str(annotation)
    for long, short in (
        ("pathlib.Path", "path"),
        ("Path", "path"),
        ("typing.", ""),
        ("NoneType", "None"),
    ):
        text = text.replace(long, short)
    # names say more than the unions
    text = re.sub(r"Annotated\[Union\[.*(Store|Registry|Group)Settings.*\]\]", r"\1Settings]", text)
    text = re.sub(r"valohai_dagster\.settings\w*\.|pydantic\.types\.", "", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1", text)
    return text.replace(" | None", "").replace("SecretStr", "str")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if info.default_factory is not None or value is None or isinstance(value, SecretStr):
        return "see text" if "Default:" in (info.description or "") else "empty"
    value = value.value if isinstance(value, Enum) else value
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Writes docs/settings.md of the checkout that the command runs in."""
    path = Path("docs/settings.md")
    path.write_text(render(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
