"""`valohai-dagster data put`, `get` and `adopt`: files into stores, out of them, and those that are there already."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from valohai_agent.protocol import Checksums
from valohai_dagster.cli import dataset_packages
from valohai_dagster.cli.data_place import (
    AsJson,
    Deployment,
    OfProject,
    Project,
    References,
    datum_dict,
    deployment,
    now,
    pairs,
    print_json,
)
from valohai_dagster.cli.download import download_all
from valohai_dagster.cli.render import counted
from valohai_dagster.cli.transfer_batch import run_batch
from valohai_dagster.data import adoption, aliases, datasets, datums, own_uploads, transfers
from valohai_dagster.data.references import find_datums, names_one
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.data.version_wishes import check_version_name, split_dataset_uri
from valohai_dagster.errors import RefusedError
from valohai_dagster.executions.parted import Begun, seal_parts
from valohai_dagster.stores.base import Store


def put(
    paths: Annotated[
        list[Path], typer.Argument(help="Files, or directories with all that lies below.")
    ],
    project: OfProject = None,
    name: Annotated[str | None, typer.Option(help="Name of the datum; for a single file.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag; may be given several times.")] = None,
    alias: Annotated[
        str | None, typer.Option(help="Datum alias that then points to the file; needs --project.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="NAME/VERSION or dataset://NAME/VERSION: all the files become this new version."
        ),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="JSON object that executions get with the files, or @FILE with one."),
    ] = None,
    property_: Annotated[
        list[str] | None,
        typer.Option("--property", help="NAME=VALUE kept with the datums; several times."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Store; default: default_store of the settings.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Uploads files; each becomes a new datum, also when the name exists already. Prints their datum:// URIs.

    Several at once. Interrupted, it leaves whole datums only, and no dataset version.
    """
    found = list(_files(paths, name))
    if alias is not None:
        aliases.check_alias(alias)
        if project is None or len(found) != 1:
            raise RefusedError("--alias needs --project and exactly one file")
    values = {"metadata": _metadata(metadata), "properties": pairs(property_ or [], "--property")}
    with deployment() as here:
        target = here.stores.get(store) if store else here.stores.default
        version = _new_version(here, dataset, project)
        create = project is not None
        project_id = here.project_id(project, create=create)
        if version is not None:
            project_id = here.need_project(project, create=create)
        with _interruptible("put") as made:
            _upload(here, found, made, target, project_id, tags=tag or (), **values)
        order = {path: number for number, (path, _) in enumerate(found)}
        stored = [made[path] for path in sorted(made, key=order.__getitem__)]
        versions = _name_them(here, stored, project_id, alias, version)
        dataset_packages.start_packing(here, versions)
    if as_json:
        print_json([datum_dict(datum, [alias] if alias else []) for datum in stored])
        return
    for datum in stored:
        typer.echo(f"{datum.uri}  {datum.name}")
    if version is not None:
        typer.echo(version)


def get(
    references: References,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory; for a single datum, by id or alias, also a file name.",
        ),
    ] = Path(),
    project: Project = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist and differ.")] = False,
    as_json: AsJson = False,
) -> None:
    """Downloads files under their names, several at once, and checks their sha256.

    A file appears whole or not at all; one that is there with the same content is left alone, so that an interrupted
    download goes on with the files that are missing.
    """
    with deployment() as here:
        project_id = here.only_project(project)
        with here.records.read() as connection:
            named = [find_datums(connection, r, project_id=project_id) for r in references]
        found = list({datum.id: datum for some in named for datum in some}.values())
        for datum in found:
            datums.require_content(datum)
        targets = _targets(found, output, single=all(map(names_one, references)))

        items = list(zip(found, targets, strict=True))
        download_all(items, here.stores, overwrite=overwrite)
    if as_json:
        print_json([{"path": str(t), **datum_dict(d)} for d, t in zip(found, targets, strict=True)])
        return
    for target in targets:
        typer.echo(str(target))


def adopt(
    urls: Annotated[
        list[str],
        typer.Argument(help="Objects of a configured store: s3://bucket/key, with * and ** too."),
    ],
    project: OfProject = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the datum; for a single object.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag; may be given several times.")] = None,
    alias: Annotated[
        str | None, typer.Option(help="Datum alias for a single object; needs --project.")
    ] = None,
    checksum: Annotated[
        bool,
        typer.Option(
            help="Read every object once to know its checksums. Else the first execution that uses it tells them."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Makes datums of objects that are in a store already, without copying them.

    They stay where they are and belong to whoever put them there: `data rm` does not delete them unless asked to.
    Exit code 1 when one of the URLs cannot be adopted; the others are.
    """
    if alias is not None:
        aliases.check_alias(alias)
    with deployment() as here:
        candidates, missing = adoption.find_candidates(urls, here.stores)
        if (name is not None or alias is not None) and len(candidates) != 1:
            raise RefusedError(
                f"--name and --alias need exactly one object, found {len(candidates)}"
            )
        if alias is not None and project is None:
            raise RefusedError("--alias needs --project")
        if name is not None:
            candidates = [_renamed(candidates[0], name)]
        project_id = here.project_id(project, create=project is not None)
        sums = _checksums(candidates) if checksum else {}
        adopted = adoption.adopt(
            here.records,
            candidates,
            project_id=project_id,
            tags=tag or (),
            checksums_of=(lambda candidate: sums[candidate.uri]) if checksum else None,
            now=now(),
        )
        missing += adopted.refused
        named = [*adopted.created.values(), *adopted.existing.values()]
        _name_them(here, named, project_id, alias, None)
        projects = {ident: known for known, ident in here.projects().items()}
    _tell_adopted(adopted, missing, projects, as_json=as_json)
    if missing:
        raise typer.Exit(1)


# -- put ---------------------------------------------------------------------------------------------------------


def _upload(
    here: Deployment,
    files: Sequence[tuple[Path, str]],
    made: dict[Path, datums.Datum],
    store: Store,
    project_id: str | None,
    **values: Any,
) -> None:
    """Fills `made`; a file that was stored but could not be recorded is swept later."""
    stop = threading.Event()
    secret_key = load_secret_key(here.settings)

    def note(name: str, upload_id: str, key: str) -> own_uploads.Noted:
        return own_uploads.Noted(
            here.records,
            upload_id=upload_id,
            name=name,
            store=store.name,
            key=key,
            clock=now,
            seal=lambda parts, size: seal_parts(secret_key, Begun(upload=parts, size=size)),
        )

    def upload(item: tuple[Path, str], progress: transfers.Progress) -> tuple[Path, datums.Datum]:
        path, datum_name = item
        datum = transfers.store_file(
            path,
            name=datum_name,
            store=store,
            project_id=project_id,
            now=now(),
            mover=mover,
            progress=progress,
            note=partial(note, datum_name),
            **values,
        )
        # Where that fails, the sweep decides by what the records say: they may have it although no answer came.
        with here.records.write() as connection:
            own_uploads.settle_datum(connection, datum)
            datums.create_datum(connection, datum)
        made[path] = datum
        return path, datum

    total = sum(path.stat().st_size for path, _ in files)
    with transfers.Mover(stop) as mover:
        for _ in run_batch(files, upload, total_bytes=total, label="uploading", stop=stop):
            pass


@contextmanager
def _interruptible(what: str) -> Iterator[dict[Path, datums.Datum]]:
    """Says what is there when a batch ends early."""
    made: dict[Path, datums.Datum] = {}
    try:
        yield made
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not made:
            typer.echo(f"{what} was interrupted; nothing was stored", err=True)
        if made:
            typer.echo(
                f"{what} ended early; stored as datums: {counted(len(made), 'file')}", err=True
            )
            for path, datum in made.items():
                typer.echo(f"{datum.uri}  {path}", err=True)
        raise


def _new_version(here: Deployment, dataset: str | None, project: str | None) -> str | None:
    """The URI, checked before anything is uploaded."""
    if dataset is None:
        return None
    uri = dataset if dataset.startswith("dataset://") else f"dataset://{dataset}"
    name, version = split_dataset_uri(uri)
    if not version:
        raise RefusedError(
            f"--dataset {dataset}: name the new version too, such as --dataset {name}/first; versions never change"
        )
    check_version_name(version)
    project_id = here.only_project(project) if project in {None, *here.projects()} else None
    if project_id is not None:
        with here.records.read() as connection:
            known = datasets.find_dataset(connection, project_id, name)
            if known and datasets.find_version(connection, known, version):
                raise RefusedError(
                    f"{uri} exists already, and versions never change; choose another name"
                )
    return uri


def _name_them(
    here: Deployment,
    made: Sequence[datums.Datum],
    project_id: str | None,
    alias: str | None,
    version: str | None,
) -> list[str]:
    """Ids of the versions that were made."""
    if project_id is None or not made or (alias is None and version is None):
        return []
    with here.records.write() as connection:
        if alias is not None:
            aliases.set_alias(
                connection, project_id=project_id, name=alias, datum_id=made[0].id, now=now()
            )
        if version is not None:
            ids = [datum.id for datum in made]
            new = datasets.create_version(
                connection, project_id=project_id, uri=version, datum_ids=ids, now=now()
            )
            return [new.id]
    return []


def _metadata(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(Path(text[1:]).read_text("utf-8") if text.startswith("@") else text)
    except OSError as error:
        raise RefusedError(f"--metadata: cannot read {text[1:]}: {error.strerror}") from error
    except ValueError as error:
        raise RefusedError(f"--metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError("--metadata must be a JSON object")
    return value


def _files(paths: list[Path], name: str | None) -> Iterator[tuple[Path, str]]:
    if name is not None and (len(paths) != 1 or paths[0].is_dir()):
        raise RefusedError("--name needs exactly one file")
    for path in paths:
        if path.is_dir():
            below = sorted(item for item in path.rglob("*") if item.is_file())
            if not below:
                raise RefusedError(f"the directory {path} holds no files")
            yield from ((item, item.relative_to(path).as_posix()) for item in below)
        elif path.is_file():
            yield path, name or path.name
        else:
            raise RefusedError(f"{path} is not a file or directory")


# -- get and adopt -----------------------------------------------------------------------------------------------


def _targets(found: list[datums.Datum], output: Path, *, single: bool) -> list[Path]:
    """`single`: what was asked for can only be one file, so `output` may be its name."""
    if single and len(found) == 1 and str(output) != "." and not output.is_dir():
        return [output]
    targets = [transfers.local_path(output, datum) for datum in found]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise RefusedError(
            f"two of the datums have the name {twice.name!r}; get them one by one with --output"
        )
    return targets


def _renamed(candidate: adoption.Candidate, name: str) -> adoption.Candidate:
    return adoption.Candidate(
        url=candidate.url, store=candidate.store, stat=candidate.stat, name=name
    )


def _checksums(candidates: Sequence[adoption.Candidate]) -> dict[str, Checksums]:
    def read(candidate: adoption.Candidate, progress: transfers.Progress) -> tuple[str, Checksums]:
        return candidate.uri, adoption.read_checksums(candidate, progress)

    total = sum(candidate.stat.size for candidate in candidates)
    stop = threading.Event()
    return dict(run_batch(candidates, read, total_bytes=total, label="reading", stop=stop))


def _tell_adopted(
    adopted: adoption.Adoption,
    missing: Sequence[adoption.Missing],
    projects: dict[str, str],
    *,
    as_json: bool,
) -> None:
    if as_json:
        problems = [{"url": m.url, "message": m.message, "code": m.code} for m in missing]
        known = {
            uri: {"id": datum.id, "project": projects.get(datum.project_id or "")}
            for uri, datum in adopted.existing.items()
        }
        created = {uri: datum.id for uri, datum in adopted.created.items()}
        print_json({"ok": not missing, "created": created, "existing": known, "problems": problems})
        return
    for uri, datum in adopted.created.items():
        typer.echo(f"{datum.uri}  {uri}")
    for uri, datum in adopted.existing.items():
        project = projects.get(datum.project_id or "")
        inside = f" in project {project}" if project else ""
        typer.echo(f"{datum.uri}  {uri} exists already{inside}, under the name {datum.name}")
    for one in missing:
        typer.echo(f"{one.message}{f' ({one.code})' if one.code else ''}", err=True)
