"""What steps read from outside as observable assets: their data version changes when the content does.

Observing happens in the process of an observing run or of a sensor's tick, with the stores of the settings; what it
needs is imported then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import AssetExecutionContext, AssetKey, MetadataValue

from valohai_dagster.errors import SourceUnreadable, ValohaiError
from valohai_dagster.plugin.step_tag import TaggedSource

if TYPE_CHECKING:
    from valohai_dagster.data.external import ExternalSource
    from valohai_dagster.data.observation import Seen
    from valohai_dagster.projects.project import Project

SOURCE_KIND = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "azure": "azure"}
NAMED_FILES = 20  # of a listing, in metadata
_known: dict[str, dict[AssetKey, ExternalSource]] = {}  # by project, of this process


def sources_of(step: str, sources: Sequence[ExternalSource]) -> list[TaggedSource]:
    """Those that feed a step, as its tag carries them."""
    return [
        TaggedSource(
            key=source.path, input=use.input, asked=use.asked, is_pattern=source.is_pattern
        )
        for source in sources
        for use in source.uses
        if use.step == step
    ]


def observable(
    project: Project,
    sources: Sequence[ExternalSource],
    *,
    group_name: str,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> dg.AssetsDefinition:
    """All sources of a project: one op observes those that are selected, one after the other."""
    by_key = {AssetKey(source.path): source for source in sources}
    _known[project.name] = by_key
    specs = [
        dg.AssetSpec(
            key,
            description=_description(source),
            metadata={"uri": source.uri, "project": project.name},
            group_name=group_name,
            kinds={SOURCE_KIND.get(source.uri.partition("://")[0].lower(), "file")},
            owners=list(owners) if owners else None,
            tags=dict(tags) if tags else None,
        )
        for key, source in by_key.items()
    ]

    def _observe(context: AssetExecutionContext) -> Iterator[Any]:
        selected = [source for key, source in by_key.items() if key in context.selected_asset_keys]
        yield from observe_all(project.name, selected)

    _observe.__annotations__["context"] = AssetExecutionContext  # Dagster does not resolve texts
    name = f"{project.asset_name}__observe_external"
    with warnings.catch_warnings():  # ours to decide, and nothing that a user could do about it
        of_this = r".*\bmulti_observable_source_asset\b"
        warnings.filterwarnings("ignore", message=of_this, category=dg.BetaWarning)
        return dg.multi_observable_source_asset(specs=specs, name=name, can_subset=True)(_observe)


def known_sources() -> Mapping[str, Mapping[AssetKey, ExternalSource]]:
    """Those of every project that this process has loaded, by the project's name."""
    return dict(_known)


def _description(source: ExternalSource) -> str:
    used = ", ".join(dict.fromkeys(f"`{use.step}.{use.input}`" for use in source.uses))
    what = "All files of" if source.is_pattern else "The file"
    return f"{what} `{source.uri}`, which feeds {used}."


def observe_all(project_name: str, sources: Sequence[ExternalSource]) -> Iterator[dg.ObserveResult]:
    """What is seen of each source; fails at the end, naming all that could not be looked at."""
    problems: list[str] = []
    for source, seen in look(project_name, sources):
        if isinstance(seen, SourceUnreadable):
            problems.append(str(seen))
            continue
        yield dg.ObserveResult(
            asset_key=AssetKey(source.path),
            metadata=metadata_of(source, seen),
            data_version=dg.DataVersion(seen.version),
        )
    if problems:
        raise dg.Failure(description="\n".join(problems))


def look(
    project_name: str, sources: Sequence[ExternalSource]
) -> Iterator[tuple[ExternalSource, Seen | SourceUnreadable]]:
    """Each source with what is there now, through the stores and records of the settings."""
    import sqlalchemy as sa

    from valohai_dagster.data.observation import observe
    from valohai_dagster.records.engine import open_records
    from valohai_dagster.records.tables import projects
    from valohai_dagster.settings import load_settings
    from valohai_dagster.stores.registry import open_stores

    settings = load_settings()
    stores, records = open_stores(settings), open_records(settings)
    mine = sa.select(projects.c.id).where(projects.c.name == project_name)
    try:
        for source in sources:
            try:
                with records.read() as connection:
                    seen = observe(
                        source,
                        connection=connection,
                        stores=stores,
                        group=settings.groups[_group(settings, source)],
                        project_id=connection.execute(mine).scalar_one_or_none(),
                    )
            except SourceUnreadable as error:
                yield source, error
            except ValohaiError as error:
                yield source, SourceUnreadable(f"{source.uri} cannot be observed: {error}")
            else:
                yield source, seen
    finally:
        records.close()


def _group(settings: Any, source: ExternalSource) -> str:
    """Whose machines read it; an unknown environment is the default one's, as for executions."""
    environment = source.environment
    known = environment in settings.environments or environment in settings.groups
    return settings.group_of(environment if known else None)


def metadata_of(source: ExternalSource, seen: Seen) -> dict[str, MetadataValue[Any]]:
    """What the UI shows of an observation; never an address with credentials."""
    out: dict[str, MetadataValue[Any]] = {
        "uri": MetadataValue.text(source.uri),
        "version": MetadataValue.text(seen.version),
        "count": MetadataValue.int(len(seen.files)),
    }
    if seen.size is not None:
        out["size"] = MetadataValue.int(seen.size)
    if seen.mtime is not None:
        out["mtime"] = MetadataValue.timestamp(seen.mtime)
    if source.is_pattern:
        names = [file.uri for file in seen.files]
        more = len(names) - NAMED_FILES
        lines = names[:NAMED_FILES] + ([f"... and {more} more"] if more > 0 else [])
        out["files"] = MetadataValue.md("\n".join(f"- `{line}`" for line in lines) or "none")
    return out
